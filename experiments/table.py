"""Recipes for tables of measured candidates: `table` reads any, `nasbench201` a known one.

They are what searches are tried on: a value costs nothing, and the report says how far from the
table's best the search came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from searchlab.errors import ConfigError, unknown_name
from searchlab.external import parse_objective
from searchlab.recipes import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from searchlab.config import SearchConfig
    from searchlab.evaluators.table import TableEvaluator
    from searchlab.report import Section
    from searchlab.result import Result

__all__ = [
    "NASBENCH201",
    "RECIPE",
    "NASBench201Options",
    "TableOptions",
    "check_algorithm",
    "check_budget",
    "place_among",
]

NEED_A_LIST = ("listed", "paired_race", "race")  # they propose nothing of their own


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def check_algorithm(name: str, *, lists: bool = False) -> None:
    """Raises ConfigError for an unknown algorithm, or without `lists` one that needs a list."""
    from searchlab.auto import AUTO
    from searchlab.config import ALGORITHMS, known_names

    known = [AUTO, *known_names(ALGORITHMS, "algorithm")]
    allowed = [each for each in known if lists or each not in NEED_A_LIST]
    if name not in allowed:
        raise unknown_name("algorithm of a table", name, allowed)


@dataclass(frozen=True)
class TableOptions:
    """Options of the recipe `table`, all JSON values."""

    file: str = _option("", "table of candidates: .csv, .csv.gz or .parquet")
    variables: tuple[str, ...] = _option((), "COLUMN or COLUMN:choice|integer|digits; repeatable")
    objective: tuple[str, ...] = _option((), "NAME:min or NAME:max; repeatable")
    steer: str | None = _option(None, "name of the one objective to optimise; others are recorded")
    fidelity: tuple[str, ...] = _option((), "NAME:COLUMN[,COLUMN]:COST, cheapest first; repeatable")
    signal: tuple[str, ...] = _option((), "COLUMN:min or COLUMN:max; repeatable")
    missing: Literal["restrict", "fail"] = _option("restrict", "candidates without a row")
    duplicates: Literal["refuse", "mean"] = _option("refuse", "rows of one candidate")
    classes: str | None = _option(None, "column whose equal values are one candidate")
    budget: int | None = _option(None, "evaluations to pay for")
    algorithm: str = _option("auto", "a registered name, or auto: by space, budget and objectives")
    seed: int = _option(0, "the one seed of the search")
    lag: int | None = _option(None, "jobs open at once; fixed when the run is opened")

    def __post_init__(self) -> None:
        if not self.file:
            raise ConfigError("no table; allowed: --file FILE")
        if not self.variables:
            raise ConfigError("no variables; allowed: --variables COLUMN or COLUMN:KIND")
        for text in self.variables:
            if "," in text or "=" in text:
                raise ConfigError(
                    f"variable {text!r}; allowed: COLUMN or COLUMN:KIND, --variables once for each"
                )
        if not self.objective:
            raise ConfigError("no objective; allowed: --objective NAME:min or NAME:max")
        check_budget(self.budget)
        check_algorithm(self.algorithm)
        names = [parse_objective(text).name for text in self.objective]
        if self.steer is not None and self.steer not in names:
            raise unknown_name("objective", self.steer, names)
        for text in self.fidelity:
            _parse_fidelity(text)


@dataclass(frozen=True)
class NASBench201Options:
    """Options of the recipe `nasbench201`, all JSON values."""

    data: str | None = _option(None, "folder with nasbench201.csv.gz; else in $SEARCHLAB_DATA")
    dataset: Literal["cifar10", "cifar100"] = _option("cifar10", "cifar10 or cifar100")
    canonical: bool = _option(False, "cells that compute the same are one candidate")
    budget: int | None = _option(None, "evaluations to pay for")
    algorithm: str = _option("auto", "a registered name, or auto: by space, budget and objectives")
    seed: int = _option(0, "the one seed of the search")
    lag: int | None = _option(None, "jobs open at once; fixed when the run is opened")

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_algorithm(self.algorithm)


def check_budget(budget: int | None) -> None:
    """Raises ConfigError for a negative number of evaluations."""
    if budget is not None and budget < 0:
        raise ConfigError(f"budget {budget}; allowed: 0 or more")


def _parse_fidelity(text: str) -> tuple[str, tuple[tuple[str, ...], float]]:
    name, _, rest = text.partition(":")
    columns, _, cost = rest.rpartition(":")
    try:
        price = float(cost)
    except ValueError:
        price = math.nan
    if not (name and columns and price > 0):
        raise ConfigError(f"fidelity {text!r}; allowed: NAME:COLUMN[,COLUMN]:COST, cost above 0")
    return name, (tuple(columns.split(",")), price)


def _config(
    evaluator: TableEvaluator, recipe: Recipe, options: TableOptions | NASBench201Options
) -> SearchConfig:
    from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage

    budget = Budget(100 if options.budget is None else options.budget)
    stage = Stage(
        "search",
        evaluator.space,
        evaluator,
        AlgorithmSpec(options.algorithm),
        budget,
        steer=getattr(options, "steer", None),
    )
    return SearchConfig(
        (stage,),
        name=recipe.name,
        seed=options.seed,
        lag=options.lag,
        recipe=recipe.name,
        options=asdict(options),
    )


def build(options: TableOptions) -> SearchConfig:
    """A search over the rows of a table."""
    from searchlab.evaluators.table import TableEvaluator

    pairs = [
        text.rpartition(":") if ":" in text else (text, "", "auto") for text in options.variables
    ]
    objectives = [parse_objective(text) for text in options.objective]
    signals = [parse_objective(text) for text in options.signal]
    evaluator = TableEvaluator(
        options.file,
        {name: cast(Any, kind) for name, _, kind in pairs},
        objectives={o.name: o.direction for o in objectives},
        fidelities=dict(map(_parse_fidelity, options.fidelity)) or None,
        signals={o.name: o.direction for o in signals},
        missing=options.missing,
        duplicates=options.duplicates,
        classes=options.classes,
    )
    return _config(evaluator, RECIPE, options)


def build_nasbench201(options: NASBench201Options) -> SearchConfig:
    """A search over the cells of NAS-Bench-201."""
    from searchlab.evaluators.nasbench201 import nasbench201

    evaluator = nasbench201(options.data, dataset=options.dataset, canonical=options.canonical)
    return _config(evaluator, NASBENCH201, options)


def sections(config: SearchConfig, result: Result) -> Sequence[Section]:
    """Where the best that was found stands among all rows of the table."""
    from searchlab.errors import StudyError

    stage = config.stages[-1]
    evaluator = cast("TableEvaluator", stage.evaluator)
    if stage.trades:  # several objectives have no rank
        return ()
    try:
        found = result.best.contender.search
    except StudyError:  # nothing succeeded
        return ()
    values = evaluator.values()[:, stage.main]
    return place_among(values, found, evaluator.objectives[stage.main].name, stage.sign)


def place_among(values: NDArray[Any], found: float, name: str, sign: float) -> Sequence[Section]:
    """Where a value stands among those of all rows; `sign` is -1 where more is better."""
    import numpy as np

    from searchlab.report import Section

    losses = sign * values[np.isfinite(values)]
    rank = 1 + int((losses < sign * found).sum())
    row = {
        "objective": name,
        "found": found,
        "best of the table": float(sign * losses.min()),
        "rank": f"{rank} of {len(losses)}",
    }
    return (
        Section(
            "Against the table",
            "The best candidate that the search found, among all rows that have a value.",
            table=[row],
        ),
    )


RECIPE = Recipe(
    "table",
    "a CSV or Parquet table of measured candidates",
    TableOptions,
    build,
    sections=sections,
)
NASBENCH201 = Recipe(
    "nasbench201",
    "the cells of NAS-Bench-201, from a folder with its table",
    NASBench201Options,
    build_nasbench201,
    sections=sections,
)
