"""``ibke data``: benchmarks and tables of facts from their public homes."""

from __future__ import annotations

from typing import Annotated

import typer

from ibke.cli.console import JSON, Bars
from ibke.cli.output import print_json, screen
from ibke.files import data_folder

app = typer.Typer(no_args_is_help=True, help="Fetch benchmarks and tables of facts.")


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As `ibke ls data` calls them.")],
    as_json: JSON = False,
) -> None:
    """Download data sets into IBKE_DATA, or else into the cache folder; files that are there stay.

    Where another file lies in the place of one, nothing is downloaded.
    """
    from ibke.data.fetch import fetch as fetch_source
    from ibke.data.fetch import find_source

    console, root = screen(as_json), data_folder()
    sources = [find_source(name) for name in dict.fromkeys(names)]
    for source in sources:
        source.to_fetch(root)  # what is in the way of the last is better known before the first is fetched
    documents = []
    with Bars() as tick:
        for source in sources:
            fetched = fetch_source(source, root, tick)
            folder = root / source.folder
            what = f"{len(fetched)} files fetched" if fetched else "all there already"
            console.print(f"{source.name}: {what}, in {folder} ({source.licence}, {source.home})", soft_wrap=True)
            documents.append({"name": source.name, "folder": str(folder), "fetched": [str(path) for path in fetched]})
    if as_json:
        print_json({"data_folder": str(root), "fetched": documents})
