"""`searchlab salvage`: what a damaged study file still holds, as a new study."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    text = "write the readable rows of a damaged study file into a new study"
    parser = commands.add_parser("salvage", help=text, description=text, allow_abbrev=False)
    parser.set_defaults(action=_salvage)
    parser.add_argument("database", metavar="DATABASE", help="the damaged SQLite file")
    parser.add_argument("directory", metavar="DIR", help="gets searchlab.db and RUN.csv files")


def _salvage(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab._study_rescue import NEW_NAME, rescue
    from searchlab.runs import check_folder

    directory = Path(options.directory)
    check_folder(directory)
    for run in rescue(Path(options.database), directory):
        of = "an unknown number" if run.expected is None else str(run.expected)
        form = "" if run.decoded else " (packed candidates: the variables were lost)"
        print(f"{run.name}: {run.records} of {of} records, {run.table}{form}")
    print(f"go on with: searchlab resume RUN --database {directory / NEW_NAME}")
    return 0
