"""The recipe `flasheval`: which text-to-image setting is best, from tables of scored images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from searchlab.errors import ConfigError
from searchlab.experiments.table import check_algorithm, check_budget, place_among
from searchlab.recipes import Recipe

if TYPE_CHECKING:
    from searchlab.config import SearchConfig
    from searchlab.evaluators.flasheval import FlashEval
    from searchlab.report import Section
    from searchlab.result import Result

__all__ = ["RECIPE", "FlashEvalOptions"]

LISTED = ("listed", "paired_race")  # they are given all settings
BLOCK = "100"  # prompts of a race's blocks
FEWEST_BLOCKS = 3
EVALUATIONS = 40


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FlashEvalOptions:
    """Options of the recipe `flasheval`, all JSON values."""

    data: str | None = _option(None, "folder with configs.csv and scores; else in $SEARCHLAB_DATA")
    dataset: Literal["diffusiondb", "coco"] = _option("diffusiondb", "whose prompts")
    metric: Literal["ImageReward", "HPS", "Aesthetic", "CLIP"] = _option(
        "ImageReward", "ImageReward, HPS, Aesthetic or CLIP"
    )
    prompts: tuple[str, ...] = _option(
        (), "of one fidelity, or all; ascending, repeatable (10 30 100 300 1000 all; races: 100)"
    )
    trade: bool = _option(False, "trade quality off against model calls")
    pilot: int = _option(0, "prompts on which other metrics give signals")
    elsewhere: bool = _option(False, "the metric's mean on the other dataset is a signal")
    budget: int | None = _option(None, "evaluations to pay for")
    algorithm: str = _option("auto", "a registered name, or auto: by space, budget and objectives")
    seed: int = _option(0, "the one seed of the search, and of the order of prompts")
    lag: int | None = _option(None, "jobs open at once; fixed when the run is opened")

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.algorithm == "race":
            raise ConfigError("algorithm 'race'; allowed: one whose bounds are not needed")
        check_algorithm(self.algorithm, lists=True)
        self.counts()

    def counts(self) -> tuple[int, ...]:
        """Prompts of each fidelity, 0 = all; empty = the evaluator's own."""
        texts = self.prompts or ((BLOCK,) if self.algorithm == "paired_race" else ())
        for text in texts:
            if text != "all" and not (text.isdecimal() and int(text)):
                raise ConfigError(f"prompts {text!r}; allowed: 1 or more, or all")
        return tuple(0 if text == "all" else int(text) for text in texts)


def build(options: FlashEvalOptions) -> SearchConfig:
    """A search over the settings of a dataset."""
    from searchlab.algorithms.base import Seeds
    from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
    from searchlab.evaluators.flasheval import PROMPTS, FlashEval

    evaluator = FlashEval(
        options.data,
        dataset=options.dataset,
        metric=options.metric,
        prompts=options.counts() or PROMPTS,
        trade=options.trade,
        pilot=options.pilot,
        elsewhere=options.elsewhere,
        seed=options.seed,
    )
    seeds, limit = None, options.budget
    if options.algorithm in LISTED:
        every = evaluator.space.enumerate()
        seeds = Seeds(every, tuple(f"seed:{number}" for number in range(len(every))))
    elif limit is None:  # a list ends by itself
        limit = EVALUATIONS
    algorithm_options = {}
    if options.algorithm == "paired_race":  # no prompt twice, as blocks are to be independent
        blocks = len(evaluator.prompt_ids) // evaluator.prompts[-1]
        if blocks < FEWEST_BLOCKS:
            raise ConfigError(
                f"a race on blocks of {evaluator.prompts[-1]} prompts; allowed: at most "
                f"{len(evaluator.prompt_ids) // FEWEST_BLOCKS}"
            )
        algorithm_options = {"blocks": blocks}
    stage = Stage(
        "search",
        evaluator.space,
        evaluator,
        AlgorithmSpec(options.algorithm, algorithm_options),
        Budget(limit),
        seeds=seeds,
    )
    return SearchConfig(
        (stage,),
        name=RECIPE.name,
        seed=options.seed,
        lag=options.lag,
        recipe=RECIPE.name,
        options=asdict(options),
    )


def sections(config: SearchConfig, result: Result) -> Sequence[Section]:
    """Where the best that was found stands by its mean over all prompts."""
    from searchlab.errors import StudyError

    stage = config.stages[-1]
    if stage.trades:  # several objectives have no rank
        return ()
    evaluator = cast("FlashEval", stage.evaluator)
    try:
        best = result.best.contender
    except StudyError:  # nothing succeeded
        return ()
    truth = evaluator.truth()
    row = int(evaluator.rows_of(best.among.take([best.row]))[0])
    return place_among(truth, float(truth[row]), evaluator.metric, stage.sign)


RECIPE = Recipe(
    "flasheval",
    "text-to-image settings by scores of their images, from a folder with FlashEval's tables",
    FlashEvalOptions,
    build,
    sections=sections,
)
