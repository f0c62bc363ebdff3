"""Linear layers by oneDNN compute what PyTorch's do."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from ibke import linear
from ibke.linear import OneDNNLinear, speed_up


@pytest.fixture
def layers() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    fast = copy.deepcopy(plain)
    fast.__class__ = OneDNNLinear
    return plain, fast


@pytest.mark.parametrize("shape", [(24,), (3, 24), (50, 24), (2, 9, 24)])
def test_the_same_product_with_and_without_gradients(layers, shape):
    plain, fast = layers
    x = torch.randn(shape)
    for context in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
        with context:
            assert torch.allclose(fast(x), plain(x), atol=1e-5)


@pytest.mark.parametrize(("of_x", "of_weight"), [p for p in product((True, False), repeat=2) if any(p)])
def test_the_same_gradients_and_their_gradients(layers, of_x, of_weight):
    found = []
    for layer in layers:
        torch.manual_seed(1)
        x = torch.randn(30, 24, requires_grad=of_x)
        layer.weight.requires_grad_(of_weight)
        wanted = [t for t, on in ((x, of_x), (layer.weight, of_weight)) if on]
        first = torch.autograd.grad(layer(x).tanh().pow(2).sum(), wanted, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)])
    for plain, fast in zip(*found, strict=True):
        assert torch.allclose(plain, fast, rtol=1e-4, atol=1e-4)


def test_other_types_go_the_usual_way(layers):
    plain, fast = (layer.to(torch.bfloat16) for layer in layers)
    x = torch.randn(50, 24, dtype=torch.bfloat16)
    assert torch.equal(plain(x), fast(x))


def test_layers_change_where_it_is_quicker_and_nowhere_else(monkeypatch):
    for quicker in (False, True):
        monkeypatch.setattr(linear, "onednn_is_quicker", lambda quicker=quicker: quicker)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Bilinear(2, 2, 2))
        speed_up(model)
        assert [type(module) is OneDNNLinear for module in model] == [quicker, False, False]
