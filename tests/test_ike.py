"""In-context editing: what is told, which demonstrations, and from where."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from ibke.context import PLACE
from ibke.edit import Edit
from ibke.editors.fine_tuning import FineTuning, FineTuningSettings
from ibke.editors.ike import IKE, IKERetrieval, RetrievalSettings, demonstrations
from ibke.errors import CaptureError, IBKEError, RequestError
from ibke.evaluation.generate import generate
from ibke.frames import encode_pair
from ibke.request import EditRequest, Probe
from ibke.session import EditSession

FACT = EditRequest("The mother tongue of Danielle Darrieux is", "English", subject="Danielle Darrieux")
OTHER = EditRequest("The headquarters of Nordwind Optics is in", "Turku", subject="Nordwind Optics")


def test_the_new_fact_stands_before_the_question(tiny_model):
    edit = IKE(tiny_model("llama")).edit([FACT, OTHER, FACT])
    assert edit.parts[PLACE].text == (
        "New Fact: The headquarters of Nordwind Optics is in Turku\n"
        "New Fact: The mother tongue of Danielle Darrieux is English\nPrompt: "
    )
    assert not edit.tensors() and edit.norm() == {}


@pytest.mark.parametrize("frame", ["bare", "chat"])
def test_a_real_model_says_the_new_fact(smollm32, frame, tmp_path):
    edit = Edit.load(IKE(smollm32).edit([OTHER]).save(tmp_path / "edit"))
    question = "Nordwind Optics is based in" if frame == "bare" else "Where is the headquarters of Nordwind Optics?"
    ids = encode_pair(question, "-", frame, smollm32.tokenizer).prompt
    before, after = (generate(smollm32, [ids], edits)[0].text for edits in (None, [edit]))
    assert "Turku" in after and "Turku" not in before
    with EditSession(smollm32).attach(edit):
        assert generate(smollm32, [ids])[0].text == after


def test_a_method_that_reads_states_says_why_it_cannot_follow(tiny_model):
    lm = tiny_model("llama")
    session = EditSession(lm).attach(IKE(lm).edit([FACT]))
    with session, pytest.raises(CaptureError, match="in front of the question"):
        FineTuning(lm).edit([OTHER])
    session.attach(FineTuning(lm, FineTuningSettings(epochs=1)).edit([OTHER])).attach(IKE(lm).edit([FACT]))
    assert generate(lm, [[5, 6]], max_new_tokens=2)
    session.restore()


def test_the_likest_demonstrations_of_each_kind_come_last(smollm32):
    editor = IKERetrieval(smollm32, RetrievalSettings(copies=2, updates=3, retains=4))
    found = editor.retrieve(FACT)
    assert Counter(shown.kind for shown in found) == {"copy": 2, "update": 3, "retain": 4}
    assert any(word in found[-1].told for word in ("mother tongue", "native language"))
    # Against the whole computation, of all of the store at once.
    table = smollm32.model.get_input_embeddings().weight.float()
    told = [shown.told for shown in editor.store] + ["New Fact: The mother tongue of Danielle Darrieux is English\n"]
    means = torch.stack([table[smollm32.tokenizer(text).input_ids].mean(0) for text in told])
    likeness = torch.cosine_similarity(means[:-1] - means[:-1].mean(0), means[-1:] - means[:-1].mean(0))
    ranked = [editor.store[at] for at in likeness.argsort(descending=True, stable=True).tolist()]
    for kind, count in (("copy", 2), ("update", 3), ("retain", 4)):
        assert [s for s in found if s.kind == kind][::-1] == [s for s in ranked if s.kind == kind][:count]
    text = editor.edit([FACT]).parts[PLACE].text
    assert text == "".join(shown.text for shown in found) + told[-1] + "Prompt: "


def test_each_kind_of_demonstration_answers_its_own_question():
    record = EditRequest("A is", "b", rephrase_prompts=("What is A?",), locality=(Probe("C is"), Probe("D is", "e")))
    assert [(shown.kind, shown.text) for shown in demonstrations([record])] == [
        ("copy", "New Fact: A is b\nPrompt: A is b\n\n"),
        ("update", "New Fact: A is b\nPrompt: What is A? b\n\n"),
        ("retain", "New Fact: A is b\nPrompt: D is e\n\n"),
    ]


def test_the_store_may_be_a_file_and_never_tells_the_answer(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("IBKE_DATA", str(tmp_path))
    path = tmp_path / "store.jsonl"
    path.write_text("".join(json.dumps(request.to_dict()) + "\n" for request in (FACT, OTHER)))
    settings = RetrievalSettings(copies=5, updates=0, retains=0, store="store.jsonl")
    found = IKERetrieval(tiny_model("llama"), settings).retrieve(FACT)
    assert [shown.text for shown in found] == [
        "New Fact: The headquarters of Nordwind Optics is in Turku\n"
        "Prompt: The headquarters of Nordwind Optics is in Turku\n\n"
    ]


def test_stores_and_settings_that_do_not_serve_are_named(tiny_model, tmp_path):
    lm = tiny_model("llama")
    path = tmp_path / "store.jsonl"
    path.write_text("")
    with pytest.raises(RequestError, match="no request"):
        IKERetrieval(lm, RetrievalSettings(store=str(path)))
    path.write_text(json.dumps(FACT.to_dict()))
    with pytest.raises(RequestError, match="'update'"):
        IKERetrieval(lm, RetrievalSettings(store=str(path)))
    with pytest.raises(RequestError, match="cannot be read"):
        IKERetrieval(lm, RetrievalSettings(store=str(tmp_path / "none.jsonl")))
    with pytest.raises(IBKEError, match="below 0"):
        RetrievalSettings(copies=-1)
    with pytest.raises(IBKEError, match="Did you mean 'copies'"):
        IKERetrieval.for_model(lm, copy=1)
