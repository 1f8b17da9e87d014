"""Pruning and merging experts: exactness, planted answers, searches on a trained model.

    python -m searchlab.experiments.benchmarks.eep [--quick] [--check] [--out F] [--only PART]
        [--task NAME]

Parts: `exact` (seven families: masks, cut models and files loaded again, all to the bit),
`operators` (the released rates; merges are linear), `counting` (402 evaluations as released),
`published` (the 22 coefficient files), `merging` (a planted merge: what is left of the
divergence), `racing` (stopping early changes no winner), `planted` (one of 400 subsets is the only
best one: how often is it found, how soon), `speed` (against rebuilding, generating and scoring, on
two models), `half`, `quarter` (the bundled character model, four tasks: found subsets beside the
full model, random ones and known rankings, on items that nothing was chosen by), `few` (40
evaluations in all, against REAP), `predictor` (half of the evaluations with a predictor), `gpu` (a
random Mixtral of 60 GB: candidates, merges, sizes; needs a device).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging

from searchlab.experiments.benchmarks import _eep_card as card
from searchlab.experiments.benchmarks import _eep_items as items
from searchlab.experiments.benchmarks import _eep_zoo as zoo
from searchlab.experiments.benchmarks._common import Journal, flags, run_parts
from searchlab.experiments.benchmarks._eep_gpu import gpu
from searchlab.experiments.benchmarks._eep_planted import planted
from searchlab.experiments.benchmarks._eep_speed_cases import speed

_RUNS: dict[str, Callable[[Journal, bool, Path], None]] = {
    "exact": items.exact,
    "operators": items.operators,
    "counting": card.counting,
    "published": card.published,
    "merging": items.merging,
    "racing": items.racing,
    "planted": planted,
    "speed": speed,
    "half": zoo.half,
    "quarter": zoo.quarter,
    "few": zoo.few,
    "predictor": zoo.predictor,
    "gpu": gpu,
}
PARTS = tuple(_RUNS)


def _parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; repeatable")
    parser.add_argument("--task", choices=zoo.TASKS, action="append", help="only this task of zoo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments, add=_parts)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    journal = Journal("eep", options)
    return run_parts(journal, _RUNS, options.only)


if __name__ == "__main__":
    sys.exit(main())
