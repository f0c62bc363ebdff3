"""Damage to a ledger, or to what is exported from it: found, named, and never taken for what was written down."""

from __future__ import annotations

import json
import random
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_tiny
from random_editor import random_edit
from tests.commands import Run

from ibke.edit import Edit
from ibke.errors import FormatError, LedgerError
from ibke.ledger import Ledger
from ibke.ledger.care import verify
from ibke.ledger.exchange import _digest, export_lines, import_lines
from ibke.ledger.shared import share
from ibke.models import LanguageModel
from ibke.request import EditRequest


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_tiny("llama")


@pytest.fixture(scope="module")
def edits(lm: LanguageModel) -> list[Edit]:
    requests = [EditRequest(f"The capital of Turkey, part {n}, is", "Ankara", "Turkey") for n in range(7)]
    return [
        replace(random_edit(lm, 1, seed=seed, scale=0.5, layers=[1]), requests=(request,))
        for seed, request in enumerate(requests)
    ]


@pytest.fixture
def ledger(lm: LanguageModel, tmp_path: Path):
    with Ledger(tmp_path / "ledger", lm) as opened:
        yield opened


def flip(ledger: Ledger, around: bytes, at: int) -> Ledger:
    """The ledger opened again, one bit changed in the only place of its database where some bytes stand."""
    ledger.close()
    file = ledger.folder / "ledger.sqlite"
    raw = bytearray(file.read_bytes())
    assert raw.count(around) == 1
    raw[raw.index(around) + at] ^= 1
    file.write_bytes(raw)
    return Ledger(ledger.folder)


def write_over(ledger: Ledger, table: str, change: str) -> None:
    ledger.base.execute(f"DROP TRIGGER {table}_no_update")
    ledger.base.execute(f"UPDATE {table} SET {change}")


def test_a_bit_of_an_index_is_found(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits:
        ledger.commit(edit)
    ledger.revert([3])
    assert verify(ledger) == [] and 3 not in ledger.active()
    entry = b"\x04\x01\x01\x01\x03\x08\x08"  # of event 8, of edit 3
    with flip(ledger, entry, 4) as damaged:
        assert 3 in damaged.active()  # no table says so
        assert any("events_of_edit" in problem for problem in verify(damaged))


def test_prompts_noted_for_another_edit_are_found(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits[:3]:
        ledger.commit(edit)
    write_over(ledger, "asks", "prompt = 'another' WHERE edit = 2")
    assert verify(ledger) == ["edit 2 is noted under other prompts than its own."]


def test_a_text_turned_into_bytes_breaks_its_seal(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits[:4]:
        ledger.commit(edit, who="somebody" if edit is edits[2] else "me", note="why")
    file = ledger.blobs.path(ledger.rows("SELECT factors FROM edits WHERE id = 4")[0][0])
    away = file.rename(file.with_suffix(".away"))
    header = b"\x07\x00\x47\x1d\x19\x01\x13"  # of event 3: number, at, who, action, edit, note
    with flip(ledger, header, 2) as damaged:
        problems = verify(damaged)
        assert "event 3 is not what it was when it was written down; see `ibke log`." in problems
        assert not any(problem.startswith(f"event {other} ") for problem in problems for other in (1, 2, 4))
        assert problems[-1].startswith("edit 4: ") and "missing" in problems[-1]  # and the rest is looked at
        away.rename(file)
        with pytest.raises(LedgerError, match="what is written down is damaged.*verify"):
            list(export_lines(damaged))


@pytest.mark.parametrize("out", ["-", "out.jsonl"])
def test_an_export_says_what_has_changed(ledger: Ledger, edits: list[Edit], run: Run, tmp_path: Path, out: str) -> None:
    for edit in edits[:2]:
        ledger.commit(edit)
    file = out if out == "-" else tmp_path / out
    assert run("export", file, "--ledger", ledger.folder).exit_code == 0
    write_over(ledger, "events", "who = 'another' WHERE id = 1")
    done = run("export", file, "--ledger", ledger.folder)
    assert done.exit_code == 1 and "events 1 are not what they were" in " ".join(done.stderr.split())
    lines = done.stdout.splitlines() if out == "-" else file.read_text().splitlines()
    assert len(lines) == 1 + 2 + 2 and json.loads(lines[-2])["who"] == "another"  # it may be all that can be saved


def test_a_text_that_is_none_breaks_its_seal(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits[:3]:
        ledger.commit(edit, note="é")
    write_over(ledger, "events", "note = CAST(x'e9' AS TEXT) WHERE id = 2")
    assert verify(ledger) == ["event 2 is not what it was when it was written down; see `ibke log`."]


def test_what_cannot_be_read_any_further_is_a_problem_among_others(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits[:2]:
        ledger.commit(edit)
    write_over(ledger, "events", "who = 'another' WHERE id = 1")
    write_over(ledger, "asks", "prompt = CAST(x'e9' AS TEXT) WHERE edit = 2")
    first, second = verify(ledger)
    assert first.startswith("event 1 is not") and "cannot be read any further" in second and "UTF-8" in second


def test_a_kept_file_whose_row_makes_no_sense_is_named(ledger: Ledger) -> None:
    with ledger.writing():
        share(ledger, "the maps", "codebook", b"maps")
    write_over(ledger, "shared", "kind = 'codebooj'")
    with pytest.raises(LedgerError, match=f"{ledger.folder}.*the maps.*codebooj.*restore"):
        Ledger(ledger.folder)


def test_what_is_written_meanwhile_is_no_damage(ledger: Ledger, edits: list[Edit], lm: LanguageModel) -> None:
    for edit in edits[:3]:
        ledger.commit(edit)
    with Ledger(ledger.folder, lm) as writer:

        def write(_: str) -> None:
            writer.revert([writer.commit(edits[3])])

        ledger.base.set_trace_callback(write)  # before each question
        problems = verify(ledger)
        ledger.base.set_trace_callback(None)
        assert problems == [] and writer.head() > 20 and verify(writer) == []
    assert not ledger.base.in_transaction


def test_a_request_that_is_none_any_more_is_named(ledger: Ledger, edits: list[Edit]) -> None:
    for edit in edits[:2]:
        ledger.commit(edit)
    write_over(
        ledger, "edits", """record = replace(record, '"subject": "Turkey"', '"subject": "Turkex"') WHERE id = 2"""
    )
    first, second = ledger.entries()
    assert first.requests == edits[0].requests
    with pytest.raises(LedgerError, match=r"edit 2: .*damaged.*'Turkex'.*Restore the ledger from a copy\.$"):
        _ = second.requests
    with pytest.raises(LedgerError, match=rf"edit 2 of {ledger.folder}: .*damaged.*'Turkex'"):
        list(ledger.made())


def test_a_full_disk_is_named_where_tables_are_made(lm: LanguageModel, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (10_000, 40_000, 60_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(LedgerError, match=r"disk.*make room on it; nothing was written\.$"):
                Ledger(tmp_path / "full", lm)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    with Ledger(tmp_path / "full", lm) as again:
        assert verify(again) == []


@pytest.fixture
def lines(ledger: Ledger, edits: list[Edit]) -> list[str]:
    with ledger.writing():
        share(ledger, "the maps", "codebook", bytes(range(256)))
    for edit in edits[:2]:
        ledger.commit(edit, note="why")
    ledger.revert([1])
    return list(export_lines(ledger))


def chained(values: list[dict]) -> list[str]:
    """Lines with digests of their own."""
    found, digest = [], ""
    for value in values:
        digest = _digest(digest, value)
        found.append(json.dumps(value | {"digest": digest}))
    return found


def without(lines: list[str], *names: str) -> list[dict]:
    return [{name: value for name, value in json.loads(line).items() if name not in names} for line in lines]


def test_a_letter_changed_on_the_way_is_refused(lines: list[str], lm: LanguageModel, tmp_path: Path) -> None:
    draw = random.Random(0)
    with Ledger(tmp_path / "copy", lm) as copy:
        for number, line in enumerate(lines, start=1):
            for place in [len(line) - 10, *draw.sample(range(len(line) - 2), 40)]:
                letter = chr(ord(line[place]) ^ 1)
                changed = [*lines[: number - 1], line[:place] + letter + line[place + 1 :], *lines[number:]]
                with pytest.raises(FormatError, match=rf"lines, line {number}: .*(Export it again|Its `format`)"):
                    import_lines(copy, changed, "lines")
        assert copy.head() == 0 and copy.rows("SELECT * FROM shared") == []
        assert import_lines(copy, lines, "lines") == 2 and verify(copy) == []


def test_lines_that_are_missing_or_moved_are_refused(lines: list[str], lm: LanguageModel, tmp_path: Path) -> None:
    with Ledger(tmp_path / "copy", lm) as copy:
        for wrong, message in (
            ([*lines[:2], *lines[3:]], "line 3.*not what was written here"),
            ([*lines[:-2], lines[-1], lines[-2]], f"line {len(lines) - 1}.*not what was written here"),
            (lines[:-1], "not whole"),
            ([json.dumps(one) for one in without(lines, "digest")], "line 1.*not what was written here"),
        ):
            with pytest.raises(FormatError, match=f"{message}.*Export it again"):
                import_lines(copy, wrong, "lines")
        assert copy.head() == 0


def test_a_file_that_is_not_the_one_named_is_refused(lines: list[str], lm: LanguageModel, tmp_path: Path) -> None:
    values = without(lines, "digest")
    (at,) = (number for number, value in enumerate(values) if value.get("edit") == 1)
    values[at]["factors"] = values[at + 1]["factors"]
    with Ledger(tmp_path / "copy", lm) as copy:
        with pytest.raises(FormatError, match=f"line {at + 1}: .*`factors` has changed.*Export it again"):
            import_lines(copy, chained(values), "lines")
        values[at] = {name: value for name, value in values[at].items() if name != "sha256"} | {"factors": "AAAA"}
        with pytest.raises(LedgerError, match="no tensors"):
            import_lines(copy, chained(values), "lines")
        assert copy.head() == 0


def test_exports_from_before_there_were_digests_come_in(lines: list[str], lm: LanguageModel, tmp_path: Path) -> None:
    values = without(lines, "digest", "sha256")
    values[0]["version"] = 2
    with Ledger(tmp_path / "copy", lm) as copy:
        assert import_lines(copy, map(json.dumps, values), "lines") == 2
        assert copy.active() == [2] and verify(copy) == [] and list(export_lines(copy)) == lines
        changed = [lines[0].replace('"version": 3', '"version": 2'), *lines[1:]]
        with pytest.raises(FormatError, match="line 1.*not what was written here"):  # a bit that says so is no excuse
            import_lines(copy, changed, "lines")
