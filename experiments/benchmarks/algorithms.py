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
import sys
from collections.abc import Sequence
from pathlib import Path

from searchlab.experiments.benchmarks._common import Journal, flags, other_parts

__all__ = ["PARTS", "main"]

PARTS: dict[str, str] = {
    path.stem.removeprefix("_algorithms_"): f"{__package__}.{path.stem}"
    for path in sorted(Path(__file__).parent.glob("_algorithms_*.py"))
}


def _parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", action="append", choices=sorted(PARTS), help="only this part; may be repeated"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_parts)
    journal = Journal("algorithms", options, lines=other_parts(options))
    for name, module in PARTS.items():
        if options.part is None or name in options.part:
            journal.part = name
            importlib.import_module(module).run(journal, options.quick)
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
