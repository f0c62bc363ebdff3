"""The value looked for at a subject's last token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import make_tiny
from tests.locating import EDITORS, FAST, REQUESTS, close, key_at_subject, make_editor, noted_values

from ibke.editors import locate, value_optimisation
from ibke.editors.value_optimisation import adding_at_first
from ibke.errors import CaptureError
from ibke.modules import resolve, target_modules, weight_OI
from ibke.request import EditRequest

pytestmark = pytest.mark.usefixtures("statistics_folder")


def test_a_value_is_looked_for_by_the_published_loss(monkeypatch):
    editor = make_editor("rome", weight_decay=0.3, kl_weight=0.2, steps=12, clamp=50.0)
    (module,), request = editor.modules.values(), REQUESTS[0]
    seen = []
    objective = value_optimisation._objective

    def note(*given):
        # By position: δ is the fourth.
        loss_B, base_BV = objective(*given)
        seen.append((given[3].detach().clone()[0], float(loss_B.detach())))
        return loss_B, base_BV

    monkeypatch.setattr(value_optimisation, "_objective", note)
    editor.edit([request])
    start = weight_OI(module).double() @ key_at_subject(editor, module, request)

    def logits(pair, ids, delta_O):
        def add(_, __, out):
            return out.index_add(1, torch.tensor([pair.place]), delta_O[None, None])

        handle = module.register_forward_hook(add)
        with torch.no_grad():
            found = editor.lm.model(torch.tensor([ids])).logits[0]
        handle.remove()
        return found

    def loss(delta_O):
        total = 0.0
        for context in ("", *FAST["contexts"]):
            pair = editor.pair(request.prompt, request.target_new, subject=request.subject, context=context)
            said = logits(pair, pair.fed, delta_O)[len(pair.prompt) - 1 :]
            total += float(F.cross_entropy(said, torch.tensor(pair.answer))) / 3
        about = editor.pair(f"{request.subject} is a", "-", subject=request.subject)
        edited, base = (logits(about, about.prompt, delta)[-1].log_softmax(-1) for delta in (delta_O, 0 * delta_O))
        return total + 0.2 * float((edited.exp() * (edited - base)).sum())

    # Computed on tails of the rows, with what comes before them kept; here in whole passes.
    for delta_O, computed in (seen[0], seen[1], seen[-1]):
        assert computed == pytest.approx(loss(delta_O), rel=1e-4)
    decay = 0.3 * float(seen[-1][0].norm() / start.norm().square())
    assert seen[-1][1] + decay < seen[0][1] - 0.05


@pytest.mark.parametrize("method", EDITORS)
def test_a_loss_that_is_no_number_is_no_value_found(method, monkeypatch):
    objective = value_optimisation._objective
    monkeypatch.setattr(value_optimisation, "_objective", lambda *given: (objective(*given)[0] * torch.nan, None))
    with pytest.raises(CaptureError, match="not finite.*float32"):
        make_editor(method).edit(REQUESTS[:1])


@pytest.mark.parametrize("method", EDITORS)
def test_values_are_clamped(method, monkeypatch):
    found = []
    optimise = locate.optimise_values

    def note(*given):
        found.append((given[3], optimise(*given).delta_BO))
        return optimise(*given)

    monkeypatch.setattr(locate, "optimise_values", note)
    make_editor(method, clamp=0.01, stop_below=0.0).edit(REQUESTS[:2])
    assert found
    for start_BO, delta_BO in found:
        torch.testing.assert_close(delta_BO.norm(dim=-1), 0.01 * start_BO.norm(dim=-1))


def test_values_of_requests_together_are_those_of_each_alone(monkeypatch):
    editor = make_editor("memit", stop_below=6.05, steps=8)
    found, passes = noted_values(monkeypatch), []
    optimise = locate.optimise_values
    monkeypatch.setattr(locate, "optimise_values", lambda *given: passes.append(given) or optimise(*given))
    # Of much the same length, so that they are looked for in one pass.
    requests = [EditRequest("The capital of Borduria is", target, "Borduria") for target in ("Rom", "Ann", "Xyz")]
    editor.edit(requests)
    assert len(passes) == 1
    steps = [editor.edit([request]).info.refine_steps for request in requests]
    close(found[0], torch.cat(found[1:]), 1e-3)
    assert min(steps) < max(steps) == editor.settings.steps - 1


def test_a_request_that_is_done_takes_no_further_step(monkeypatch):
    found = []
    optimise = locate.optimise_values
    monkeypatch.setattr(locate, "optimise_values", lambda *given: found.append(optimise(*given)) or found[-1])
    assert make_editor("rome", stop_below=1e9).edit(REQUESTS[:1]).info.refine_steps == 0
    assert make_editor("rome", stop_below=0.0).edit(REQUESTS[:1]).info.refine_steps == FAST["steps"] - 1
    assert found[0].delta_BO.norm() == 0 < found[1].delta_BO.norm()


@pytest.mark.parametrize("model", ["llama", "opt", "falcon"])
def test_a_vector_is_added_at_the_first_token_of_each_row(model):
    lm = make_tiny(model)
    (module,) = resolve(lm.model, target_modules(lm, lm.architecture, (1,))).values()
    ids, delta = torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.randn(2, 32)
    plain, moved = [], []
    for taken, shift in ((plain, 0 * delta), (moved, delta)):
        with adding_at_first(module, shift), torch.no_grad():
            handle = module.register_forward_hook(lambda _, __, out, taken=taken: taken.append(out.view(2, 3, -1)))
            lm.model(ids)
            handle.remove()
    torch.testing.assert_close(moved[0][:, 0] - plain[0][:, 0], delta)
    assert torch.equal(moved[0][:, 1:], plain[0][:, 1:])
