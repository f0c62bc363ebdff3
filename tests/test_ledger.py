"""The ledger: what is in force is a function of what was written down, and nothing committed is ever lost."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from random_editor import random_edit

from ibke.edit import Edit
from ibke.errors import FingerprintMismatchError, FormatError, LedgerError
from ibke.evaluation.metrics import signed
from ibke.ledger import Ledger
from ibke.ledger.care import gc, verify
from ibke.ledger.exchange import export_lines, import_lines
from ibke.ledger.schema import MIGRATIONS
from ibke.models import LanguageModel
from ibke.request import EditRequest
from ibke.session import EditSession

KILLS = 200


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_tiny("llama")


@pytest.fixture(scope="module")
def edits(lm: LanguageModel) -> list[Edit]:
    return [random_edit(lm, 1, seed=seed, scale=0.5, layers=[1]) for seed in range(6)]


@pytest.fixture
def ledger(lm: LanguageModel, tmp_path: Path):
    with Ledger(tmp_path / "ledger", lm) as opened:
        yield opened


def deltas(edit: Edit | None) -> dict[str, torch.Tensor]:
    return {name: edit.delta(name) for name in edit.factors} if edit else {}


def same(one: Edit | None, other: Edit | None) -> bool:
    left, right = deltas(one), deltas(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_in_force_is_what_was_committed_and_not_taken_back(ledger: Ledger, edits: list[Edit]) -> None:
    assert (ledger.head(), ledger.active(), ledger.state()) == (0, [], None)
    numbers = [ledger.commit(edit, scores={"nll": 0.5}, who="me", note="why") for edit in edits[:4]]
    assert numbers == ledger.active() == [1, 2, 3, 4]
    assert same(ledger.state(), Edit.join(edits[:4]))
    ledger.revert([2, 4])
    assert ledger.active() == [1, 3] and not ledger.standing(2) and ledger.standing(3)
    assert same(ledger.state(), Edit.join([edits[0], edits[2]]))
    ledger.restore([4])
    assert ledger.active() == [1, 3, 4] and ledger.active(at=4) == [1, 2, 3, 4] and ledger.active(at=0) == []
    assert ledger.diff(4, ledger.head()) == ([2], []) and ledger.diff(1, 3) == ([], [2, 3])
    for event in (-1, ledger.head() + 1):
        with pytest.raises(LedgerError, match=f"no event {event}.*The last is {ledger.head()}"):
            ledger.diff(0, event)
    assert [(event.action, event.edit) for event in ledger.events()][3:] == [
        ("commit", 4),
        ("revert", 2),
        ("revert", 4),
        ("restore", 4),
    ]
    entry = ledger.entry(1)
    assert (entry.who, entry.parent, entry.scores) == ("me", 0, {"nll": 0.5})
    assert entry.requests == edits[0].requests and entry.factors_bytes > entry.latent_bytes > 0
    assert [one.id for one in ledger.entries()] == numbers


def test_an_edit_taken_back_leaves_no_trace(ledger: Ledger, lm: LanguageModel, edits: list[Edit]) -> None:
    prompt = torch.tensor([lm.tokenizer("The harbour lies").input_ids])
    with torch.no_grad():
        before = lm.model(prompt).logits
    for edit in edits:
        ledger.commit(edit)
    ledger.revert([3])
    never = Edit.join([edit for number, edit in enumerate(edits, start=1) if number != 3])
    assert same(ledger.state(), never)
    ledger.revert([1, 2, 4, 5, 6])
    assert ledger.state() is None
    with EditSession(lm) as session, torch.no_grad():
        if state := ledger.state():
            session.attach(state)
        assert torch.equal(lm.model(prompt).logits, before)


def test_one_among_a_thousand_is_taken_back(ledger: Ledger, lm: LanguageModel, tmp_path: Path) -> None:
    def made(number: int) -> Edit:
        return random_edit(lm, 1, seed=number, scale=0.01, layers=[1])

    numbers = [ledger.commit(made(number)) for number in range(1000)]
    ledger.revert([numbers[499]])
    with Ledger(tmp_path / "never", lm) as never:
        for number in range(1000):
            if number != 499:
                never.commit(made(number))
        assert len(ledger.active()) == 999 and same(ledger.state(), never.state())
    ledger.revert(ledger.active(), note="all")
    assert ledger.state() is None and verify(ledger) == []


def test_what_supersedes_is_taken_back_and_the_old_is_in_force_again(ledger: Ledger, edits: list[Edit]) -> None:
    first = ledger.commit(edits[0])
    second = ledger.commit(edits[1], supersedes=[first])
    third = ledger.commit(edits[2], supersedes=[second])
    assert ledger.active() == [third] and ledger.entry(third).supersedes == (first, second)
    ledger.revert([second])  # of no effect: the third stands for both
    assert ledger.active() == [third]
    ledger.revert([third])
    assert ledger.active() == [first]
    ledger.restore([second])
    assert ledger.active() == [second]
    ledger.revert_all(note="all")  # the superseded first one too, or it would be in force again
    assert ledger.active() == []
    head = ledger.head()
    ledger.revert_all()
    assert ledger.head() == head  # nothing was left to take back


def test_nothing_is_done_by_halves(ledger: Ledger, edits: list[Edit], lm: LanguageModel) -> None:
    ledger.commit(edits[0])
    for wrong in (lambda: ledger.revert([1, 9]), lambda: ledger.restore([1]), lambda: ledger.entry(9)):
        with pytest.raises(LedgerError):
            wrong()
    with pytest.raises(LedgerError, match="no edit 7"):
        ledger.commit(edits[1], supersedes=[7])
    with pytest.raises(LedgerError, match="meanwhile"):
        ledger.commit(edits[1], parent=0)
    foreign = replace(edits[1], info=replace(edits[1].info, fingerprint="another"))
    with pytest.raises(FingerprintMismatchError):
        ledger.commit(foreign)
    assert (ledger.head(), ledger.active()) == (1, [1])
    ledger.revert([1])
    with pytest.raises(LedgerError, match="already"):
        ledger.revert([1])


def test_rows_can_only_be_added(ledger: Ledger, edits: list[Edit]) -> None:
    ledger.commit(edits[0])
    for change in ("UPDATE edits SET who = 'x'", "DELETE FROM events", "UPDATE about SET value = 'x'"):
        with pytest.raises(sqlite3.IntegrityError, match="only ever added to"):
            ledger.base.execute(change)


def test_an_edit_comes_back_bit_for_bit(ledger: Ledger, edits: list[Edit], lm: LanguageModel) -> None:
    ledger.commit(edits[0])
    with Ledger(ledger.folder, lm) as again:
        loaded = again.load(1)
    tensors = edits[0].pack()[1]
    assert loaded.pack()[1].keys() == tensors.keys()
    assert all(torch.equal(loaded.pack()[1][name], tensor) for name, tensor in tensors.items())


def test_a_change_of_what_was_written_down_is_found(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits[:3]:
        ledger.commit(edit, note="a note")
    ledger.revert([1])
    assert verify(ledger) == []
    with sqlite3.connect(ledger.folder / "ledger.sqlite") as base:
        for table in ("edits", "events"):
            base.execute(f"DROP TRIGGER {table}_no_update")
        base.execute("UPDATE edits SET record = replace(record, 'random', 'rondom') WHERE id = 2")
    assert verify(ledger) == ["event 2 is not what it was when it was written down; see `ibke log`."]
    with sqlite3.connect(ledger.folder / "ledger.sqlite") as base:
        base.execute("UPDATE events SET action = 'restore' WHERE id = 4")
    assert [problem.split(" is ")[0] for problem in verify(ledger)] == ["event 2", "event 4"]


def test_a_record_that_is_cut_off_is_found_and_named(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits[:2]:
        ledger.commit(edit)
    with sqlite3.connect(ledger.folder / "ledger.sqlite") as base:
        base.execute("DROP TRIGGER edits_no_update")
        base.execute("UPDATE edits SET record = substr(record, 1, 20) WHERE id = 1")
    sealed, damaged = verify(ledger)
    assert sealed.startswith("event 1 is not what it was") and "edit 1" in damaged and "record" in damaged
    for read in (ledger.entries, ledger.made):
        with pytest.raises(LedgerError, match="what is written down is damaged: record"):
            list(read())


def test_a_ledger_of_the_first_version_is_brought_up_to_date(ledger: Ledger, edits: list[Edit]) -> None:
    ledger.commit(replace(edits[0], requests=(EditRequest("The  harbour is", "x"),)))
    ledger.commit(edits[1])
    ledger.revert([2])
    ledger.close()
    with sqlite3.connect(ledger.folder / "ledger.sqlite") as base:
        for table in ("asks", "seals", "shared"):
            base.execute(f"DROP TABLE {table}")
        base.execute("PRAGMA user_version = 1")
    with Ledger(ledger.folder) as again:
        assert verify(again) == [] and again.asking(signed("The harbour is")) == [1] and again.active() == [1]
        assert len(again.rows("SELECT * FROM seals")) == 3
        with pytest.raises(sqlite3.IntegrityError, match="only ever added to"):
            again.base.execute("DELETE FROM seals")


def test_damage_is_found_and_named(ledger: Ledger, edits: list[Edit], lm: LanguageModel, tmp_path: Path) -> None:
    for edit in edits[:3]:
        ledger.commit(edit)
    assert verify(ledger) == []
    flipped, gone = (ledger.blobs.path(ledger.rows("SELECT factors FROM edits WHERE id = ?", n)[0][0]) for n in (1, 2))
    raw = bytearray(flipped.read_bytes())
    raw[len(raw) // 2] ^= 1
    flipped.write_bytes(raw)
    gone.unlink()
    problems = verify(ledger)
    assert len(problems) == 2
    assert "edit 1" in problems[0] and "changed" in problems[0] and str(flipped) in problems[0]
    assert "edit 2" in problems[1] and "missing" in problems[1] and str(gone) in problems[1]
    with pytest.raises(LedgerError, match="changed since"):
        ledger.state()
    with pytest.raises(FingerprintMismatchError, match="it is of"):
        Ledger(ledger.folder, replace(lm, fingerprint="another"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "ledger.sqlite").write_text("this is no database, though it is long enough to be one" * 50)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path / "text", lm)
    ledger.base.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(LedgerError, match="Use the version of ibke that wrote it"):
        Ledger(ledger.folder, lm)


def test_a_full_disk_loses_nothing(ledger: Ledger, edits: list[Edit]) -> None:
    ledger.commit(edits[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(LedgerError, match="Make room"):
            ledger.commit(edits[1])
        with pytest.raises(LedgerError, match="Look at the disk"):  # its files are there, the database cannot grow
            for _ in range(100):
                ledger.commit(edits[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert verify(ledger) == [] and ledger.active() == [1]
    assert ledger.commit(edits[1]) == 2


def test_what_nothing_names_is_cleared_away(ledger: Ledger, edits: list[Edit]) -> None:
    ledger.commit(edits[0])
    kept = set(ledger.blobs)
    orphan = ledger.blobs.path(ledger.blobs.write(b"left by somebody"))
    assert gc(ledger) == (0, 0) and orphan.exists()  # somebody may be about to name it
    assert gc(ledger, grace=0.0) == (1, 16)
    assert set(ledger.blobs) == kept and verify(ledger) == []


def test_a_ledger_goes_out_and_comes_in_again(
    ledger: Ledger, edits: list[Edit], lm: LanguageModel, tmp_path: Path
) -> None:
    for edit in edits[:3]:
        ledger.commit(edit, note="é")
    ledger.commit(edits[3], supersedes=[1])
    ledger.revert([2])
    lines = list(export_lines(ledger))
    assert all(json.loads(line) for line in lines)
    with Ledger(tmp_path / "copy", lm) as copy:
        assert import_lines(copy, lines, "lines") == 4
        assert copy.active() == ledger.active() and same(copy.state(), ledger.state())
        assert list(export_lines(copy)) == lines
        assert import_lines(copy, lines, "lines") == 4 and copy.active() == [3, 4, 7, 8]
        state = list(copy.events())
        bad = [*lines[:3], lines[3].replace('"factors": "', '"factors": "AAAA')]
        cut = lines[:5], lines[:-1]
        missing = [*lines[:5], *lines[6:]]
        wrongs = ((bad, "line 4"), (missing, "line 6"), ([*lines[:2], "{"], "line 3"), (["{}"], "line 1"))
        for wrong, message in (*wrongs, ([], "nothing in it"), *((some, "not whole") for some in cut)):
            with pytest.raises((FormatError, LedgerError), match=message):
                import_lines(copy, wrong, "lines")
        assert list(copy.events()) == state and verify(copy) == []
        foreign = replace(lm, fingerprint="another")
        with Ledger(tmp_path / "other", foreign) as other, pytest.raises(FingerprintMismatchError):
            import_lines(copy, export_lines(other), "lines")


def about(edit: Edit, prompt: str, target: str = "x") -> Edit:
    """An edit that says what it is for."""
    return replace(edit, requests=(EditRequest(prompt, target),))


def test_edits_that_do_not_go_together_are_found(
    ledger: Ledger, edits: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> Edit:
        raise FormatError("their gates open at different thresholds.", "edits to compose", "Make them by one editor.")

    ledger.commit(edits[0])
    assert verify(ledger) == []
    monkeypatch.setattr(Edit, "join", refuse)
    assert ["different thresholds" in problem for problem in verify(ledger)] == [True]


def test_who_reads_waits_for_no_writer(ledger: Ledger, edits: list[Edit], lm: LanguageModel) -> None:
    ledger.commit(edits[0])
    began = time.monotonic()
    with ledger.writing(), Ledger(ledger.folder, lm) as reader:
        assert reader.active() == [1] and same(reader.state(), edits[0])
    assert time.monotonic() - began < 30  # a writer would be waited for a minute


def test_a_file_that_is_there_is_checked_before_it_is_named_again(ledger: Ledger, edits: list[Edit]) -> None:
    ledger.commit(edits[0])
    ledger.commit(edits[1])
    places = [
        ledger.blobs.path(ledger.rows("SELECT factors FROM edits WHERE id = ?", number)[0][0]) for number in (1, 2)
    ]
    places[0].write_bytes(b"x" * places[0].stat().st_size)
    os.utime(places[1], (0, 0))
    assert len(verify(ledger)) == 1
    ledger.commit(edits[0])
    ledger.commit(edits[1])
    assert verify(ledger) == []
    assert time.time() - places[1].stat().st_mtime < 3600  # too young to be cleared away


def write_until_killed(folder: Path, lm: LanguageModel, edits: list[Edit], tell: int) -> None:
    """Commit and take back, telling each number that was promised to be on the disk."""
    with Ledger(folder, lm) as ledger:
        os.write(tell, b"0\n")
        for edit in edits * 1000:
            number = ledger.commit(edit)
            os.write(tell, f"{number}\n".encode())
            if number % 3 == 0:
                ledger.revert([number])


def test_killed_at_any_moment_nothing_committed_is_lost(lm: LanguageModel, tmp_path: Path) -> None:
    draw = random.Random(0)
    Ledger(tmp_path, lm).close()
    many = [random_edit(lm, 1, seed=seed, layers=[1]) for seed in range(1000)]
    promised = 0
    for kill in range(KILLS):
        hear, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                # Others than before, so that their files are written too.
                write_until_killed(tmp_path, lm, many[promised:] + many, tell)
            finally:
                os._exit(1)
        os.close(tell)
        if kill % 4:  # else it may be killed before it has begun
            os.read(hear, 1)
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(hear) as heard:
            promised = max([promised, *(int(line) for line in heard if line.strip() and line.endswith("\n"))])
    with Ledger(tmp_path, lm) as ledger:
        assert verify(ledger) == []
        made = [entry.id for entry in ledger.entries()]
        assert made == list(range(1, len(made) + 1)) and promised <= len(made) <= promised + KILLS
        assert promised > KILLS // 4
        events = list(ledger.events())
        assert {event.edit for event in events if event.action == "commit"} == set(made)
        taken = {event.edit for event in events if event.action == "revert"}
        assert all(number % 3 == 0 for number in taken) and set(ledger.active()) == set(made) - taken
        gc(ledger, grace=0.0)
        assert verify(ledger) == []


def test_two_writers_both_succeed(lm: LanguageModel, edits: list[Edit], tmp_path: Path) -> None:
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            done = 1
            try:
                with Ledger(tmp_path, lm) as ledger:
                    for edit in edits * 5:
                        ledger.commit(edit)
                done = 0
            finally:
                os._exit(done)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    with Ledger(tmp_path, lm) as ledger:
        assert len(ledger.active()) == 2 * 5 * len(edits) and verify(ledger) == []
