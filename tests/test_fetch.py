"""Fetching data sets from a server on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ibke.cli.main import app
from ibke.data import fetch as fetching
from ibke.data.fetch import Source, SourceFile, fetch, find_source, load_sources
from ibke.data.readers import READERS
from ibke.errors import IBKEError

BODY = json.dumps([{"src": "Who?"}]).encode() * 40_000
SHA = hashlib.sha256(BODY).hexdigest()


class _Home(BaseHTTPRequestHandler):
    """Serves BODY under any name; breaks off under ``short``, and does not know ``gone``."""

    def do_GET(self) -> None:  # noqa: N802
        if "gone" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[: len(BODY) // 2] if "short" in self.path else BODY)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server on the loopback interface."""
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Home)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def source(base: str, *names: str, sha256: str | None = SHA) -> Source:
    files = tuple(SourceFile(name, len(BODY), sha256) for name in names)
    return Source("small", "A small set", "MIT", "http://example.org", base, "small", files)


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_fetches_what_is_missing_and_tells_of_it(home: str, tmp_path: Path):
    wanted, told = source(home, "a.json", "deep/b b.json"), []
    fetched = fetch(wanted, tmp_path, lambda *state: told.append(state))
    assert fetched == [tmp_path / "small" / "a.json", tmp_path / "small" / "deep" / "b b.json"]
    assert everything_in(tmp_path) == {"small/a.json", "small/deep/b b.json"}
    assert fetched[1].read_bytes() == BODY
    done = [state[1] for state in told]
    assert done == sorted(done) and done[-1] == wanted.bytes
    assert len(told) > 10 and {state[2] for state in told} == {wanted.bytes}
    assert fetch(wanted, tmp_path) == []
    fetched[0].unlink()
    assert fetch(wanted, tmp_path) == [fetched[0]]


@pytest.mark.parametrize("own", [b"mine", bytes(len(BODY)), b""], ids=["another size", "another content", "empty"])
def test_what_lies_in_the_place_of_a_file_is_named_and_stays(home: str, tmp_path: Path, own: bytes):
    wanted, place = source(home, "a.json", "b.json"), tmp_path / "small" / "b.json"
    place.parent.mkdir()
    place.write_bytes(own)
    with pytest.raises(IBKEError, match=r"not the file that small has.*Move it away, or set IBKE_DATA") as caught:
        fetch(wanted, tmp_path)
    assert caught.value.where == str(place) and place.read_bytes() == own
    assert everything_in(tmp_path) == {"small/b.json"}  # nothing was fetched
    assert wanted.missing(tmp_path) == list(wanted.files)


def test_any_edition_of_a_file_without_a_checksum_is_there(home: str, tmp_path: Path):
    wanted, place = source(home, "a.json", sha256=None), tmp_path / "small" / "a.json"
    place.parent.mkdir()
    place.write_bytes(b"a newer edition")
    assert fetch(wanted, tmp_path) == [] and place.read_bytes() == b"a newer edition"
    place.write_bytes(b"")
    with pytest.raises(IBKEError, match="not the file that small has"):
        fetch(wanted, tmp_path)


@pytest.mark.parametrize(
    ("name", "sha256", "message"),
    [
        ("gone.json", SHA, "404"),
        ("short.json", SHA, "connection broke"),
        ("a.json", "0" * 64, "not the file expected"),
    ],
    ids=["not there", "broken off", "other content"],
)
def test_nothing_is_kept_of_what_is_not_the_file(home: str, tmp_path: Path, name: str, sha256: str, message: str):
    with pytest.raises(IBKEError, match=message) as caught:
        fetch(source(home, name, sha256=sha256), tmp_path)
    assert caught.value.where == home + name
    assert everything_in(tmp_path) == set()


def test_no_network_and_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(IBKEError, match="cannot be reached") as caught:
        fetch(source("http://127.0.0.1:9/", "a.json"), tmp_path)
    assert str(tmp_path / "small" / "a.json") in caught.value.todo  # where to put it by hand
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(IBKEError, match="MB are needed"):
        fetch(source("http://127.0.0.1:9/", "a.json"), tmp_path)


def test_folder_that_cannot_be_written(home: str, tmp_path: Path):
    (tmp_path / "small").write_text("a file where the folder should be")
    with pytest.raises(IBKEError, match="cannot be written"):
        fetch(source(home, "a.json"), tmp_path)


def test_list_of_sources_is_sound():
    for name, entry in load_sources().items():
        assert entry.files and entry.bytes > 0
        assert entry.base.startswith("https://") and entry.base.endswith("/")
        assert entry.format is None or entry.format in READERS, name
        assert all(file.sha256 is None or len(file.sha256) == 64 for file in entry.files)
    with pytest.raises(IBKEError, match="Did you mean 'pararel'"):
        find_source("pararell")


def test_recorded_checksums_are_those_of_the_data_at_hand(data_folder: Path):
    for entry in load_sources().values():
        for file in entry.files:
            path = data_folder / entry.folder / file.path
            if file.sha256 and path.exists():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_command(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IBKE_DATA", str(tmp_path))
    monkeypatch.setattr(fetching, "load_sources", lambda: {"small": source(home, "a.json")})
    run = CliRunner()
    listed = json.loads(run.invoke(app, ["ls", "data", "--json"]).stdout)
    assert [(row["name"], row["here"]) for row in listed] == [("small", False)]
    result = run.invoke(app, ["data", "fetch", "small", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["fetched"][0]["fetched"] == [str(tmp_path / "small" / "a.json")]
    assert json.loads(run.invoke(app, ["ls", "data", "--json"]).stdout)[0]["here"] is True
    again = run.invoke(app, ["data", "fetch", "small"])
    assert "all there already" in again.stdout
    (tmp_path / "small" / "a.json").rename(tmp_path / "small" / "b.json")
    (tmp_path / "small" / "a.json").write_text("mine")
    others = {"more": replace(source(home, "c.json"), name="more"), "small": source(home, "a.json")}
    monkeypatch.setattr(fetching, "load_sources", lambda: others)
    refused = run.invoke(app, ["data", "fetch", "more", "small"])
    assert (refused.exit_code, refused.stdout) == (2, "") and "Move it away" in refused.stderr
    assert everything_in(tmp_path) == {"small/a.json", "small/b.json"}  # nor of the first
    unknown = run.invoke(app, ["data", "fetch", "smal"])
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "Did you mean 'small'?" in unknown.stderr


def test_formats_are_listed_alone_and_below_the_data_sets():
    run = CliRunner()
    rows = json.loads(run.invoke(app, ["ls", "formats", "--json"]).stdout)
    assert [row["format"] for row in rows] == list(READERS)
    listed = run.invoke(app, ["ls", "data"]).stdout
    for row in rows:
        assert row["format"] in listed and row["what"].split(":")[0] in listed
    help_text = run.invoke(app, ["eval", "--help"], terminal_width=200).stdout
    assert all(name in help_text for name in READERS)


def test_command_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IBKE_DATA", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "load_sources", lambda: {"small": source("http://127.0.0.1:9/", "a.json")})
    result = CliRunner().invoke(app, ["data", "fetch", "small"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("Error: ") == 1 and "cannot be reached" in result.stderr
    assert everything_in(tmp_path) == set()
