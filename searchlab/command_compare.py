"""`searchlab compare`: two runs, paired on what they have in common."""

from __future__ import annotations

import argparse
import json
from typing import Any

from searchlab.errors import ConfigError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    text = "compare two runs on common report replicates and candidates"
    parser = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    parser.set_defaults(action=_compare)
    parser.add_argument("first", metavar="A", help="a run's name or its folder")
    parser.add_argument("second", metavar="B", help="another; gains are those of B over A")
    parser.add_argument("--alpha", type=float, default=0.05, help="intervals cover 1 - alpha")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("--database", help="SQLite path or SQLAlchemy URL of both")


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.compare import compare
    from searchlab.outcome import read_outcome
    from searchlab.runs import find_run

    if not 0 < options.alpha < 1:
        raise ConfigError(f"alpha {options.alpha}; allowed: between 0 and 1")
    first, second = (
        read_outcome(find_run(name, options.database, writes=False))
        for name in (options.first, options.second)
    )
    comparison = compare(first, second, alpha=options.alpha)
    if options.json:
        print(json.dumps(comparison.to_json(), indent=1))
        return 0
    print(comparison.table())
    for note in comparison.notes:
        print(f"left out: {note}")
    print(comparison.sentence())
    return 0
