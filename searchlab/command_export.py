"""`searchlab export`: the winners in the form they are used in, or all records as a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.errors import ConfigError

if TYPE_CHECKING:
    from searchlab._run_layout import Layout
    from searchlab.runs import RunAddress
    from searchlab.study import Run

__all__ = ["add_parser", "layout_of_run"]


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    text = "write the winners, or all records"
    parser = commands.add_parser("export", help=text, description=text, allow_abbrev=False)
    parser.set_defaults(action=_export)
    parser.add_argument("run", metavar="RUN", help="a run's name or its folder")
    parser.add_argument("directory", nargs="?", metavar="DIR", help="folder for the winners")
    parser.add_argument("--to", default="", metavar="FORM", help="a form of the recipe")
    parser.add_argument("--csv", metavar="FILE", help="one row per record")
    parser.add_argument("--parquet", metavar="FILE", help="the same as Parquet (needs pyarrow)")
    parser.add_argument("--optuna", metavar="FILE", help="all records as an Optuna journal")
    parser.add_argument("--database", help="SQLite path or SQLAlchemy URL of the study")


def layout_of_run(address: RunAddress, store: Run) -> Layout:
    """What the columns of a run mean: what the run keeps of it, else what its recipe says.

    Raises:
        SearchlabError: the run keeps none and cannot be rebuilt.
    """
    from searchlab._run_layout import LAYOUT, layout_from, layout_of, read_layout
    from searchlab.runs import open_config

    found = read_layout(store.get_meta(LAYOUT), store.name)
    return found or layout_from(layout_of(open_config(address).config))


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.runs import export_result, find_run, open_config
    from searchlab.search import stored_result
    from searchlab.study import Database

    tables = (options.csv, options.parquet, options.optuna)
    if options.directory is None and not any(tables):
        raise ConfigError("export needs a folder, --csv FILE, --parquet FILE or --optuna FILE")
    address = find_run(options.run, options.database)
    with Database(address.database) as base:
        if any(tables):
            store = base.read(address.name)
            layout = layout_of_run(address, store)
            if options.csv:
                store.export_csv(Path(options.csv), layout.spaces, layout.objectives)
                print(options.csv)
            if options.parquet:
                store.export_parquet(Path(options.parquet), layout.spaces, layout.objectives)
                print(options.parquet)
            if options.optuna:
                from searchlab.optuna_export import write_optuna

                write_optuna(Path(options.optuna), address.name, store.records(), layout)
                print(options.optuna)
        if options.directory is not None:
            opened = open_config(address)
            result = stored_result(opened.config, base.read(address.name))
            result.out = address.out
            directory = Path(options.directory)
            for path in export_result(opened.recipe, opened.config, result, directory, options.to):
                print(path)
    return 0
