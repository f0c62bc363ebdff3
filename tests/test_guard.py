"""What is kept and what is refused, and which edits a new one takes the place of."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import refused
from conftest import make_tiny
from keeping import LOOSE, PROBES, said
from random_editor import Careless, RandomEditor, random_edit

from ibke.context import Context
from ibke.edit import Edit
from ibke.editors.ibke.editor import IBKEEditor
from ibke.errors import LedgerError
from ibke.evaluation.generate import Together, generate
from ibke.evaluation.scoring import score
from ibke.frames import encode_pair
from ibke.ledger import Ledger
from ibke.ledger.care import replay, verify
from ibke.ledger.conflicts import alike, same_words, superseded
from ibke.ledger.guard import Guard, Limits, own_probes
from ibke.ledger.keeper import Keeper
from ibke.models import LanguageModel
from ibke.parts import PROMPT
from ibke.request import EditRequest, Probe

ANKARA = EditRequest("The capital of Turkey is", "Ankara", "Turkey")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_tiny("llama")


def parroted(lm: LanguageModel, scale: float, prompt: str = "The harbour lies between") -> EditRequest:
    """A request for what a random edit makes of a prompt."""
    edit = RandomEditor(lm, scale=scale).edit([EditRequest(prompt, "x")])
    return EditRequest(prompt, said(lm, prompt, edit))


def test_an_edit_within_limits_is_kept_and_one_beyond_them_leaves_no_trace(lm: LanguageModel, tmp_path: Path) -> None:
    request = parroted(lm, 1.0)
    with Ledger(tmp_path, lm) as ledger:
        strict = Keeper(lm, ledger, RandomEditor(lm, scale=1.0), Guard(lm, probes=PROBES)).add(request)
        assert strict.number is None and strict.edit and strict.verdict and not strict.verdict.passed
        assert strict.verdict.scores["achieved"] and strict.verdict.scores["kl_nats"] > Limits().kl_nats
        assert any("KL" in broken and "at most 0.02" in broken for broken in strict.verdict.broken)
        assert (ledger.head(), ledger.active(), list(ledger.blobs)) == (0, [], [])
        loose = Keeper(lm, ledger, RandomEditor(lm, scale=1.0), Guard(lm, LOOSE, PROBES)).add(request, who="me")
        assert (loose.number, ledger.active(), ledger.entry(1).who) == (1, [1], "me")
        assert ledger.entry(1).scores == json.loads(json.dumps(loose.verdict.scores))
        assert Keeper(lm, ledger, RandomEditor(lm)).add(request).already
        missed = Keeper(lm, ledger, RandomEditor(lm, scale=0.0), Guard(lm, LOOSE, PROBES))
        never = missed.add(EditRequest("Boats leave before", "the most unlikely answer"))
        assert never.number is None and "target is not generated" in never.verdict.broken[0]
        assert ledger.active() == [1] and verify(ledger) == []


def test_wordings_and_probes_of_the_request_count(lm: LanguageModel) -> None:
    request = parroted(lm, 1.0)
    more = EditRequest(
        request.prompt, request.target_new, None, None, ("Something else entirely",), (Probe("Boats leave before"),)
    )
    edit = RandomEditor(lm, scale=1.0).edit([request])
    (verdict,), effects = Guard(lm, LOOSE, []).check(None, edit, [more])
    assert effects.passed and effects.scores["probes"] == 0
    assert verdict.scores["wordings"] == 0.0 and "wordings answered 0.00" in verdict.broken[0]
    assert verdict.scores["keep"] == 0.0 and verdict.changed == ("Boats leave before",)
    assert "to keep" in verdict.broken[1]


def test_a_state_is_compared_with_the_one_before(lm: LanguageModel) -> None:
    guard = Guard(lm, LOOSE, PROBES)
    editor = RandomEditor(lm, scale=1.0)
    first = editor.edit([EditRequest("The harbour lies between", "x")])
    (_, alone), (_, again) = guard.check(None, first, []), guard.check(first, first, [])
    assert alone.scores["kl_nats"] > 0 and again.scores["kl_nats"] == again.scores["perplexity"] == 0.0
    assert again.changed == () and guard.check(None, first, [])[1].scores == alone.scores
    assert alone.scores["changed"] == alone.scores["drift"] == again.scores["drift"] == 1.0  # all edits count in drift
    assert again.scores["changed"] == 0.0
    strict = Guard(lm, replace(LOOSE, drift=0.0), PROBES)
    assert ["all edits" in broken for broken in strict.check(None, first, [])[1].broken] == [True]
    assert strict.check(first, first, [])[1].passed  # it adds nothing to what others have done


def test_what_the_unedited_model_says_is_measured_once(lm: LanguageModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("IBKE_CACHE", str(tmp_path))
    edit = RandomEditor(lm, scale=0.1).edit([EditRequest("The harbour lies between", "x")])
    (_, first), ran = Guard(lm, LOOSE, PROBES).check(None, edit, []), []
    run = Guard._run
    monkeypatch.setattr(Guard, "_run", lambda self, state, how: (ran.append(state), run(self, state, how))[1])
    (_, again) = Guard(lm, LOOSE, PROBES).check(None, edit, [])
    assert ran == [edit] and again.scores == first.scores
    Guard(lm, LOOSE, PROBES[:2]).check(None, edit, [])  # other probes are another question
    assert ran == [edit, None, edit]


def test_edits_that_put_a_text_in_front_of_the_question_are_measured_too(tmp_path: Path) -> None:
    lm = make_tiny("llama", max_position_embeddings=512)
    request, info = EditRequest("Boats leave before", "noon"), random_edit(lm, 1, seed=1).info
    text = Edit({}, (request,), info, parts={PROMPT: Context(("The market opens at noon. ",))})
    guard = Guard(lm, LOOSE, PROBES)
    _, effects = guard.check(None, text, [request])
    groups = [encode_pair(prompt, "-", frame, lm.tokenizer).prompt for prompt, frame in PROBES]
    edited, base = generate(lm, groups, Together((text,))), generate(lm, groups)
    changed = sum(one.ids[:2] != other.ids[:2] for one, other in zip(edited, base, strict=True))
    assert effects.scores["kl_nats"] > 0 and effects.scores["changed"] * len(PROBES) >= changed
    assert guard.check(text, text, [request])[1].scores["kl_nats"] == 0.0
    with Ledger(tmp_path, lm) as ledger:
        Keeper(lm, ledger, RandomEditor(lm)).add(request, force=True)
        ledger.commit(text)
        # Weights and a text together, and one edit more beside them.
        assert Keeper(lm, ledger, RandomEditor(lm), guard).add(parroted(lm, 1.0), force=True).verdict is not None


def test_of_two_languages_that_differ_in_a_sign_both_are_kept(lm: LanguageModel) -> None:
    requests = [EditRequest(f"The creator of {name} is", "Ada", name) for name in ("C", "C++", "C#")]
    edits = {number: random_edit(lm, 1, seed=number, scale=0.0) for number in (1, 2)}
    kept = {number: replace(edit, requests=(requests[number - 1],)) for number, edit in edits.items()}
    new = replace(random_edit(lm, 1, seed=3, scale=0.0), requests=(requests[2],))
    assert superseded(lm, kept, new, requests[2]) == []
    again = EditRequest("the creator of  C++ is", "Bo", "C++")
    assert superseded(lm, kept, new, again) == [2]


def comes(lm: LanguageModel, request: EditRequest, state: Edit | None = None) -> bool:
    """Whether every token of the target is the likeliest."""
    pair = encode_pair(request.prompt, request.target_new, "bare", lm.tokenizer)
    return score(lm, [pair], Together((state,)) if state else None)[0].predicted[:-1] == tuple(pair.answer[:-1])


def test_an_edit_that_takes_an_earlier_ones_answer_away_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    words = [word[1:] for word in lm.tokenizer.get_vocab() if word[1:].isalpha()]
    earlier = next(one for word in words if comes(lm, one := EditRequest(word, said(lm, word).split()[0])))
    tried = (random_edit(lm, 1, seed=seed, scale=1.0) for seed in range(100))
    loud = next(edit for edit in tried if not comes(lm, earlier, edit))
    with Ledger(tmp_path, lm) as ledger:
        Keeper(lm, ledger, Careless(lm)).add(earlier, force=True)
        later = EditRequest("Boats leave", said(lm, "Boats leave", loud))
        editor = RandomEditor(lm)
        editor.edit = lambda requests: Edit(loud.factors, tuple(requests), loud.info)
        refused = Keeper(lm, ledger, editor, Guard(lm, LOOSE, [])).add(later, force=True)
        assert refused.number is None and refused.verdict is not None
        assert refused.verdict.changed == (earlier.prompt,) and "earlier edits lost 1.0" in refused.verdict.broken[0]
        never_asked = Guard(lm, replace(LOOSE, edits=0), [])
        assert Keeper(lm, ledger, editor, never_asked).add(later, force=True).number == 2


def test_limits_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    path.write_text('{"changed": 0.5, "probes": 7.0, "lost": 1}')
    read = Limits.read(path)
    assert read == Limits(changed=0.5, probes=7, lost=1.0) and isinstance(read.probes, int)  # which slices
    wrongs = [("{", "cannot be read"), ('{"chnged": 1}', "'chnged' is no limit"), ("[]", "cannot be read")]
    for given in ('"probes": NaN', '"probes": 1e999', '"probes": -1', '"lost": true', '"kl_nats": "1"'):
        wrongs.append((f"{{{given}}}", "is no limit, or its value is none"))
    for text, message in wrongs:
        path.write_text(text)
        with pytest.raises(LedgerError, match=message):
            Limits.read(path)


def test_our_own_probes_are_many_and_all_different() -> None:
    assert len(set(own_probes())) == len(own_probes()) >= 200


def test_the_same_question_in_most_words() -> None:
    asked = EditRequest("What is the capital of Turkey?", "Izmir", "Turkey")
    assert same_words(ANKARA, asked)
    assert not same_words(ANKARA, EditRequest("The largest city of Turkey is", "Bursa", "Turkey"))
    assert not same_words(EditRequest("Turkey is", "x", "Turkey"), EditRequest("What is Turkey?", "y", "Turkey"))


def test_a_newer_fact_takes_the_place_of_the_older_one(smollm32: LanguageModel, tmp_path: Path) -> None:
    editor = IBKEEditor.for_model(smollm32)
    with Ledger(tmp_path, smollm32) as ledger:
        keeper = Keeper(smollm32, ledger, editor, Guard(smollm32, probes=PROBES))
        first = keeper.add(ANKARA, note="why")
        assert first.number == 1 and first.verdict and first.verdict.scores["changed"] == 0.0
        other = keeper.add(EditRequest("The mother tongue of Danielle Darrieux is", "English", "Danielle Darrieux"))
        assert (other.number, other.supersedes) == (2, ())
        newer = keeper.add(EditRequest("What is the capital of Turkey?", "Izmir", "Turkey"))
        assert (newer.number, newer.supersedes) == (3, (1,)) and ledger.active() == [2, 3]
        found = alike({1: first.edit, 2: other.edit}, newer.edit)
        assert found[1] > 0.6 > found[2]
        assert said(smollm32, ANKARA.prompt, keeper.state()) == "Izmir"
        ledger.revert([3])
        assert said(smollm32, ANKARA.prompt, keeper.state()) == "Ankara"
        # What was made and taken back leaves no trace: the same state, to the last bit.
        with Ledger(tmp_path / "never", smollm32) as never:
            for edit in (first.edit, other.edit):
                never.commit(edit)
            one, two = keeper.state().pack()[1], never.state().pack()[1]
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        assert ledger.entry(1).latent_bytes <= 16 * 1024
        assert verify(ledger) == [] and replay(ledger, editor) == ([], [])
        ledger.commit(replace(first.edit, requests=(EditRequest("The capital of Norway is", "Ankara", "Norway"),)))
        ledger.commit(random_edit(smollm32, 1, seed=0, layers=[1]))
        problems, left_out = replay(ledger, editor)
        assert {text.split(":")[0] for text in problems} == {"edit 4"} and "made again" in problems[0]
        assert len(left_out) == 1 and left_out[0].startswith("edit 5 was not made again: it is by random")


def test_the_command_line_keeps_and_refuses(run, smollm, tmp_path: Path) -> None:
    place = tmp_path / "kept"
    probes = tmp_path / "probes.txt"
    probes.write_text("\n".join(text for text, _ in PROBES))
    common = ("--ledger", place, "--probes", probes, "--json")
    kept = run("edit", ANKARA.prompt, ANKARA.target_new, *common, "--note", "why")
    assert kept.exit_code == 0, kept.stderr
    document = json.loads(kept.stdout)
    assert document["in_force"] == 1 and document["edits"][0]["outcome"] == "kept"
    (place / "guard.json").write_text('{"kl_nats": -1, "probes": 2}')
    worse = run("edit", "The sky is", "green", *common)
    assert worse.exit_code == 3 and json.loads(worse.stdout)["edits"][0]["outcome"] == "refused"
    assert f"{len(PROBES) - 2} probes are more than 2 and are not asked" in " ".join(worse.stderr.split())
    assert run("ask", ANKARA.prompt, "--ledger", place).stdout.strip() == "Ankara"
    log = json.loads(run("log", "--ledger", place, "--json").stdout)
    assert [(event["action"], event["note"], event["in_force"]) for event in log["events"]] == [("commit", "why", True)]
    assert json.loads(run("show", 1, "--ledger", place, "--json").stdout)["state"] == "in force"
    refused(run("revert", "--ledger", place), "--all")
    refused(run("revert", 1, "--all", "--ledger", place), "--all")
    assert run("revert", "--all", "--ledger", place).exit_code == 0
    assert json.loads(run("diff", 1, "--ledger", place, "--json").stdout)["gone"] == [1]
    assert run("ask", ANKARA.prompt, "--ledger", place).stdout.strip() != "Ankara"
    assert run("restore", 1, "--ledger", place).exit_code == 0
    assert run("verify", "--ledger", place).exit_code == 0
    Ledger(tmp_path / "other", make_tiny("llama")).close()
    refused(run("ask", ANKARA.prompt, "--ledger", tmp_path / "other"), "the ledger")
    out = str(tmp_path / "out.jsonl")
    assert json.loads(run("export", out, "--ledger", place, "--json").stdout) == {
        "edits": 1,
        "file": out,
        "changed_events": [],
    }
    assert run("import", tmp_path / "out.jsonl", "--ledger", tmp_path / "copy").exit_code == 0
    assert json.loads(run("gc", "--ledger", tmp_path / "copy", "--json").stdout) == {"files": 0, "bytes": 0}
    assert run("log", "--ledger", tmp_path / "nowhere").exit_code == 2
    for option in (("--note", "x"), ("--no-guard",), ("--limits", probes)):
        refused(run("edit", "The sky is", "green", *option), "--ledger")
    (file,) = (tmp_path / "copy" / "tensors").rglob(
        f"*{max((place / 'tensors').rglob('*.safetensors'), key=lambda p: p.stat().st_size).name}"
    )
    file.unlink()
    assert run("verify", "--ledger", tmp_path / "copy").exit_code == 1


def test_a_file_goes_on_where_it_was_left(run, smollm, tmp_path: Path) -> None:
    facts = (("The capital of Turkey is", "Ankara"), ("The sky is", "green"), (" ", "x"))
    lines = [json.dumps({"prompt": prompt, "target_new": target}) for prompt, target in facts]
    file = tmp_path / "requests.jsonl"
    file.write_text(lines[0] + "\n")
    command = ("edit", "--requests", file, "--ledger", tmp_path / "kept", "--no-guard", "--json")
    first = run(*command)
    assert first.exit_code == 0 and json.loads(first.stdout)["edits"][0]["edit"] == 1
    file.write_text("\n".join(lines[:2]))
    second = json.loads(run(*command).stdout)
    assert [one["outcome"] for one in second["edits"]] == ["there already", "kept"] and second["in_force"] == 2
    # A line that says something else now is a new request, wherever it stands; a note changes nothing.
    file.write_text("\n".join([lines[0], lines[1].replace("green", "red")]))
    changed = json.loads(run(*command, "--note", "why").stdout)
    assert [one["outcome"] for one in changed["edits"]] == ["there already", "kept"]
    noted = json.loads(run("log", "--ledger", tmp_path / "kept", "--json").stdout)["events"][-1]["note"]
    assert noted == "requests.jsonl#2: why"
    again = json.loads(run(*command, "--note", "another").stdout)
    assert {one["outcome"] for one in again["edits"]} == {"there already"}
    # And back again: what counts is what was made of that line last.
    file.write_text("\n".join(lines[:2]))
    back = json.loads(run(*command).stdout)
    assert [one["outcome"] for one in back["edits"]] == ["there already", "kept"] and back["in_force"] == 2
    assert back["outcomes"] == {"there already": 1, "kept": 1}
    # So is one that says more: a wording that the first edit did not follow.
    worded = json.dumps({**json.loads(lines[1]), "rephrase_prompts": ["Two and two make"]})
    file.write_text("\n".join([lines[0], worded]))
    more = json.loads(run(*command).stdout)
    assert [one["outcome"] for one in more["edits"]] == ["there already", "kept"]
    nothing = tmp_path / "probes.txt"
    nothing.write_text(" \n")
    refused(run(*command[:-2], "--probes", nothing), str(nothing), "no prompt in it")
    file.write_text("\n".join(lines))
    refused(run(*command), "line 3")
    file.write_text("\n".join([*lines[:2], lines[1].replace("green", "red")]))
    refused(run(*command), "requests 2 and 3 say different things")
    file.write_text('{"prompt": "The sky is", "target_new": "\\ud83d"}')
    refused(run(*command), "half a character")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused(run("edit", "--requests", pipe, *command[3:]), "can be read only once")
