"""A model of an architecture that is not in the table, edited by naming its modules."""

from tests.conftest import make_tiny

from ibke.modules import ARCHITECTURES, architecture_of
from ibke.partial import PartialModel


def test_the_list_of_layers_is_found_from_the_names(monkeypatch):
    lm = make_tiny("llama")
    monkeypatch.delitem(ARCHITECTURES, "llama")
    found = architecture_of(lm.model, ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"])
    assert found.layers == "model.layers"
    assert PartialModel(lm.model, found.layers, 1).layers is lm.model.model.layers
