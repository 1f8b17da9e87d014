"""`searchlab check`: whether a run keeps what is expected of it, for continuous integration."""

from __future__ import annotations

import argparse
import sys
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    text = "check expectations of a run; exit code 1 names what falls short"
    parser = commands.add_parser("check", help=text, description=text, allow_abbrev=False)
    parser.set_defaults(action=_check)
    parser.add_argument("run", metavar="RUN", help="a run's name or its folder")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="EXPECTATION",
        help="such as 'best<0.05' or 'failed==0'; repeatable; without any, all figures are shown",
    )
    parser.add_argument("--database", help="SQLite path or SQLAlchemy URL of the study")


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.expectations import expect
    from searchlab.outcome import figures, read_outcome
    from searchlab.runs import find_run

    known = figures(read_outcome(find_run(options.run, options.database, writes=False)))
    if not options.expect:
        for name in sorted(known):
            print(f"{name:24} {known[name]:.6g}")
        return 0
    verdicts = [expect(text, known) for text in options.expect]
    for verdict in verdicts:
        print(f"{'ok         ' if verdict.holds else 'falls short'}  {verdict}")
    short = [verdict for verdict in verdicts if not verdict.holds]
    if short:
        listed = "; ".join(str(verdict) for verdict in short)
        print(f"searchlab: {len(short)} of {len(verdicts)} fall short: {listed}", file=sys.stderr)
    return 1 if short else 0
