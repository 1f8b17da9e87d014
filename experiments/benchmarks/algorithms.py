"""The algorithm library beside its peers: the same instances, the same seeds, one run.

    python -m searchlab.experiments.benchmarks.algorithms [--quick] [--check] [--out FILE]
        [--part NAME]...

Figures are evaluations, front volumes and gaps, which are equal on every machine, and costs of a
proposal, which are not. Published tables are read below $SEARCHLAB_DATA; cases without their data
or their peer say so and are skipped. With `--part` and `--out` the lines of the other parts stay in
the file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchlab.errors import ConfigError
from searchlab.experiments.benchmarks._common import Journal, flags

__all__ = ["PARTS", "main"]

PARTS: dict[str, str] = {
    path.stem.removeprefix("_algorithms_"): f"{__package__}.{path.stem}"
    for path in sorted(Path(__file__).parent.glob("_algorithms_*.py"))
}


def _parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", action="append", choices=sorted(PARTS), help="only this part; may be repeated"
    )


def _others(options: argparse.Namespace) -> list[str]:
    """The lines that other parts left in the file."""
    if options.part is None or options.out is None or not options.out.exists():
        return []
    lines: list[dict[str, Any]] = json.loads(options.out.read_text("utf-8"))
    kept = [line for line in lines if line["part"] not in options.part]
    if any(line["quick"] is not options.quick for line in kept):
        raise ConfigError(f"{options.out} mixes short and full forms; allowed: one of them")
    return [json.dumps(line) for line in kept]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_parts)
    journal = Journal("algorithms", options, lines=_others(options))
    for name, module in PARTS.items():
        if options.part is None or name in options.part:
            journal.part = name
            importlib.import_module(module).run(journal, options.quick)
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
