"""NAS-Bench-201 as a table: 15,625 cells, their accuracies, costs and cheap signals."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from searchlab.errors import ConfigError
from searchlab.evaluator import Signal
from searchlab.evaluators._table_file import published_folder
from searchlab.evaluators.table import TableEvaluator

__all__ = ["DATASETS", "nasbench201", "nasbench201_folder"]

Dataset = Literal["cifar10", "cifar100"]
DATASETS = ("cifar10", "cifar100")
FILE = "nasbench201.csv.gz"
# Share of a full training that 12 epochs take; on CIFAR-10 they see half of the training set.
COST = {"cifar10": 12 / 200 / 2, "cifar100": 12 / 200}
SIGNALS = (
    Signal("flops_m", "min", "MFLOPs", when="static"),
    Signal("params_m", "min", "M", when="static"),
    *(
        Signal(f"zc_{name}", "max", when="static")
        for name in ("naswot", "jacob_cov", "grad_norm", "snip", "plain", "log10_synflow")
    ),
)


def nasbench201_folder(folder: str | Path | None = None) -> Path:
    """The folder with the table: the given one, or nasbench201 in $SEARCHLAB_DATA.

    Raises:
        ConfigError: neither is set, or the file is not there.
    """
    return published_folder(folder, "nasbench201", "NAS-Bench-201", [FILE])


def nasbench201(
    folder: str | Path | None = None,
    *,
    dataset: Dataset = "cifar10",
    canonical: bool = False,
) -> TableEvaluator:
    """The benchmark's cells, six edges with one of five operations each.

    The objective `accuracy` is the mean test accuracy (%) after 200 epochs at the fidelity
    "200 epochs", and the validation accuracy (%) after 12 at "12 epochs". Signals are FLOPs,
    parameters and six zero-shot scores, NaN where a cell has none.

    Args:
        folder: holds nasbench201.csv.gz; None = see `nasbench201_folder`.
        dataset: "cifar10" or "cifar100".
        canonical: cells that compute the same function are one candidate (6,466 of them), with the
            values of the first of each class.

    Source: arXiv 2001.00326.

    Raises:
        ConfigError: an unknown dataset or no such folder.
        DataError: a file that is not the benchmark's.
    """
    if dataset not in DATASETS:
        raise ConfigError(f"dataset {dataset!r}; allowed: {', '.join(DATASETS)}")
    return TableEvaluator(
        nasbench201_folder(folder) / FILE,
        {"genotype": "digits"},
        objectives={"accuracy": "max"},
        fidelities={
            "12 epochs": (f"{dataset}_val12", COST[dataset]),
            "200 epochs": (f"{dataset}_acc200", 1.0),
        },
        signals=SIGNALS,
        classes="iso_class" if canonical else None,
    )
