"""A model of an architecture that is not in the table, edited by naming its modules."""

import json
from dataclasses import replace

import pytest
import torch
from tests.conftest import SIZES, make_tiny

from ibke.editors.ibke.config import IBKEConfig
from ibke.editors.ibke.editor import IBKEEditor
from ibke.errors import ModuleNotEditableError
from ibke.models import load_model
from ibke.modules import ARCHITECTURES, architecture_of
from ibke.partial import PartialModel
from ibke.request import EditRequest
from ibke.session import EditSession
from ibke.training.settings import TrainSettings
from ibke.training.trainer import train


def test_the_list_of_layers_is_found_from_the_names(monkeypatch):
    lm = make_tiny("llama")
    monkeypatch.delitem(ARCHITECTURES, "llama")
    found = architecture_of(lm.model, ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"])
    assert found.layers == "model.layers"
    assert PartialModel(lm.model, found.layers, 1).layers is lm.model.model.layers


def test_one_that_is_in_no_table_is_trained_for_and_edited(tmp_path):
    """StableLM, of which the table knows nothing: two training steps, an edit, and not a bit changed afterwards."""
    assert "stablelm" not in ARCHITECTURES
    tiny = make_tiny("stablelm", **SIZES)
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    names = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo")
    lines = [
        {"prompt": f"The home of {name} is", "target_new": "Oslo", "locality": [f"The job of {name} is"]}
        for name in names
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = TrainSettings(
        model=str(tmp_path / "model"),
        data=(f"jsonl:{tmp_path / 'facts.jsonl'}",),
        out=str(tmp_path / "run"),
        episodes=4,
        validation=2,
        steps=2,
        batch=2,
        validate_every=2,
        hold_out_relations=0.0,
        dtype="float32",
        modules=("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"),
        config=IBKEConfig(layer=1, relay_layer=2, content_dim=12, context_dim=6, width=16, depth=1),
    )
    with pytest.raises(ModuleNotEditableError, match="none of the named modules is in layer 2"):
        train(replace(settings, modules=settings.modules[:1]))
    folder = train(settings)
    lm = load_model(tmp_path / "model", dtype="float32", modules=settings.modules)
    ids = lm.tokenizer("The home of Ada is", return_tensors="pt").input_ids
    before = lm.model(ids).logits
    edit = IBKEEditor.for_model(lm, folder, steps=3).edit([EditRequest("The home of Ada is", "Lima", subject="Ada")])
    assert set(edit.neurons) == set(settings.modules)
    with EditSession(lm).attach(edit):
        assert not torch.equal(lm.model(ids).logits, before)
    assert torch.equal(lm.model(ids).logits, before)
