"""``python -m ibke`` is the ``ibke`` command."""

from ibke.cli.main import app

app(prog_name="ibke")
