"""Recipe: search how to mix the checkpoints of a training run (LCSC, arXiv 2404.02241).

Algorithm 1 of the paper, preset `paper`:

1. The population begins with the coefficients of moving averages of several rates.
2. Two parents are drawn among the best ten; a child is their crossover, mutated, and its sum is
   repaired to one. It is scored on few samples with noise that all candidates share.
3. The answer is the best of all.

The default does step 2 by CMA-ES from the best average, which needs fewer evaluations. Both score
their five best, and the best of all known averages, again on other noise; the winner and the best
average are reported on noise that nothing was chosen by.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchlab.errors import ConfigError
from searchlab.recipes import Recipe

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
    from searchlab.evaluator import Objective
    from searchlab.report import Section
    from searchlab.result import Result
    from searchlab.spaces.checkpoint_mix.bank import CheckpointBank
    from searchlab.spaces.checkpoint_mix.sources import CheckpointSource
    from searchlab.spaces.checkpoint_mix.space import CheckpointMixSpace

__all__ = ["RECIPE", "CheckpointMixOptions", "build"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class CheckpointMixOptions:
    """Options of the recipe, all JSON values."""

    preset: Literal["default", "paper"] = _option(
        "default", "default: CMA-ES from the best average; paper: the evolution of algorithm 1"
    )
    checkpoints: tuple[str, ...] = _option(
        (), "folder, file or pattern, repeatable; without it the bundled digits checkpoints"
    )
    part: str | None = _option(None, "subfolder of every checkpoint with the weights, e.g. unet")
    evaluator: str = _option(
        "samples", "module:function, command, or for the bundled checkpoints: samples, loss"
    )
    model: str | None = _option(
        None, "module:function that makes the model; the evaluator then gets it, not a state dict"
    )
    command: str | None = _option(
        None, "for --evaluator command: with {model} (a folder of merged weights) and {out}"
    )
    objective: tuple[str, ...] = _option((), "NAME:min or NAME:max of the evaluator; repeatable")
    steer: str | None = _option(None, "which of several objectives is optimised")
    timeout: float = _option(3600.0, "seconds that one command may take")
    distance: Literal["fd", "kid"] = _option("fd", "for samples: Fréchet or kernel distance")
    calls: int = _option(5, "model calls per sample of the bundled checkpoints")
    samples: int | None = _option(None, "samples, or rows, per evaluation of the search")
    held_out: int | None = _option(None, "the same on the selection and report splits")
    constraint: Literal["affine", "simplex"] = _option(
        "affine", "affine: negative coefficients too; simplex: none below zero, to compare"
    )
    group_depth: int = _option(
        0, "mix layers apart, by so many first parts of their names; 0 = all alike"
    )
    subspace: int = _option(
        0, "search along so many main directions first, for a third of the evaluations"
    )
    algorithm: str | None = _option(None, "a registered name, instead of the preset's")
    guided: bool = _option(
        False,
        "a predictor of the losses proposes (kriging, with 160 evaluations); with an algorithm or "
        "the preset paper it chooses among that one's proposals",
    )
    budget: int | str | None = _option(
        None,
        "evaluations beyond the averages (400, guided 160), or a limit: 90min, 6gpuh, 50usd",
    )
    gpu_price: float | None = _option(None, "US dollars per device hour, for a budget in dollars")
    target: float | None = _option(None, "a value that is good enough to stop")
    memory: str | None = _option(None, "for bank and mixes, e.g. 16GiB; half of what is free")
    bank: str | None = _option(None, "folder for a bank that is mapped, or larger than memory")
    delta: Literal["float16", "bfloat16"] | None = _option(
        None, "keep the newest in float32 and the others as differences in this dtype"
    )
    device: str | None = _option(None, "cuda: keep and mix the bank there, by the fused kernel")
    report_banks: int = _option(4, "replicates of the report split; 2 or more give intervals")
    seed: int = _option(0, "the one seed of the search")
    data_seed: int = _option(0, "seed of the noise, the same for searches to be compared")
    threads: int | None = _option(None, "torch threads; 1 for the bundled checkpoints")
    lag: int | Literal["free"] | None = _option(
        None, "jobs open at once, or free; fixed when the run is opened"
    )

    def __post_init__(self) -> None:
        self.limits()
        parse_bytes(self.memory)
        for name, least, most in (
            ("group_depth", 0, 8),
            ("subspace", 0, 64),
            ("report_banks", 2, 64),
            ("calls", 3, 100),
            ("data_seed", 0, 2**40 - 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"{name} {value}; allowed: {least} to {most}")
        for name in ("samples", "held_out"):
            value = getattr(self, name)
            if value is not None and value < 16:
                raise ConfigError(f"{name} {value}; allowed: 16 or more")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError(f"threads {self.threads}; allowed: 1 to 1024")
        if not self.timeout > 0:
            raise ConfigError(f"timeout {self.timeout}; allowed: more than 0 seconds")
        if self.subspace and self.group_depth:
            raise ConfigError("subspace with group_depth; allowed: one of them")
        self._check_evaluator()

    def _check_evaluator(self) -> None:
        bundled = self.evaluator in ("samples", "loss")
        if not bundled and self.evaluator != "command" and ":" not in self.evaluator:
            raise ConfigError(
                f"evaluator {self.evaluator!r}; allowed: module:function, command, samples, loss"
            )
        if bundled and self.checkpoints:
            _sources(self)  # a path that leads nowhere is named first
            raise ConfigError(
                f"evaluator {self.evaluator!r} knows the bundled checkpoints only; allowed for "
                "yours: module:function or command"
            )
        if (self.evaluator == "command") != (self.command is not None):
            raise ConfigError("--evaluator command and --command go together")
        if self.model is not None and ":" not in self.evaluator:
            raise ConfigError("model is for an evaluator that is a module:function")
        if self.objective and bundled:
            raise ConfigError(f"objective is not for evaluator {self.evaluator!r}")
        known = [objective.name for objective in self.objectives()]
        if self.steer is not None and not bundled and self.steer not in known:
            raise ConfigError(f"steer {self.steer!r}; allowed: {', '.join(known)}")
        if self.evaluator == "command" and not self.objective:
            raise ConfigError("no objective; allowed: --objective NAME:min or NAME:max")
        self.objectives()

    def objectives(self) -> tuple[Objective, ...]:
        """What the user's evaluator returns."""
        from searchlab.evaluator import Objective
        from searchlab.external import parse_objective

        return tuple(map(parse_objective, self.objective)) or (Objective("value", "min"),)

    @property
    def predicts(self) -> bool:
        """Whether a predictor proposes by itself, not among another algorithm's proposals."""
        return self.guided and self.algorithm is None and self.preset == "default"

    def limits(self) -> Budget:
        """What ends the search; 400 evaluations where nothing is said, by a predictor 160."""
        from searchlab.budget_text import parse_budget

        budget = (160 if self.predicts else 400) if self.budget is None else self.budget
        return parse_budget(budget, gpu_price=self.gpu_price, target=self.target)


def parse_bytes(text: str | None) -> int | None:
    """A number of bytes such as 16GiB, 500MB or 4096; None stays None."""
    if text is None:
        return None
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
    number = text.strip().lower().rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text.strip().lower()[len(number) :]
    try:
        count = float(number) * units[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"memory {text!r}; allowed: a number such as 16GiB or 500MB") from None
    if not 1 <= count < 2**60:
        raise ConfigError(f"memory {text!r}; allowed: 1 byte or more")
    return int(count)


def build(options: CheckpointMixOptions) -> SearchConfig:
    """The configuration of a run; opens the bank."""
    import torch

    from searchlab.config import Final, SearchConfig
    from searchlab.spaces.checkpoint_mix.space import CheckpointMixSpace

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif not options.checkpoints:
        torch.set_num_threads(1)
    # What is cheap to find wrong comes before the bank, which reads every byte of the checkpoints.
    sources = _sources(options)
    if options.subspace >= len(sources):
        raise ConfigError(f"subspace {options.subspace}; allowed: 0 to {len(sources) - 1}")
    score = _score(options, sources)
    bank = _bank(options, sources)
    groups = _groups(options, bank)
    names = [] if groups is None else sorted(set(groups.values()))
    space = CheckpointMixSpace(bank.names, groups=names, constraint=options.constraint)
    numbers = None if groups is None else {t: names.index(g) for t, g in groups.items()}
    evaluator = _evaluator(options, score, space, bank, numbers)
    return SearchConfig(
        tuple(_stages(options, space, bank, evaluator)),
        name="checkpoint_mix",
        seed=options.seed,
        lag=options.lag,
        final=Final(k=5, report=options.report_banks, named=("last", "uniform")),
        recipe="checkpoint_mix",
        options=asdict(options),
    )


def _sources(options: CheckpointMixOptions) -> tuple[CheckpointSource, ...]:
    from searchlab.experiments.checkpoint_mix_problems import DIGITS_CHECKPOINTS
    from searchlab.spaces.checkpoint_mix.sources import find_checkpoints

    return find_checkpoints(options.checkpoints or (DIGITS_CHECKPOINTS,), part=options.part)


def _bank(options: CheckpointMixOptions, sources: Sequence[CheckpointSource]) -> CheckpointBank:
    from searchlab.errors import DataError
    from searchlab.spaces.checkpoint_mix.bank import CheckpointBank

    def announce(text: str) -> None:
        if options.checkpoints:
            print(f"{len(sources)} checkpoints, oldest first; {text}", file=sys.stderr)

    bank = CheckpointBank(
        sources,
        memory=parse_bytes(options.memory),
        folder=options.bank,
        delta=options.delta,
        device=options.device,
        announce=announce,
    )
    if bank.broken:
        raise DataError(f"{next(iter(bank.broken.values()))}; leave this checkpoint out")
    return bank


def _groups(options: CheckpointMixOptions, bank: CheckpointBank) -> dict[str, str] | None:
    """Mixed tensor -> the first parts of its name."""
    if not options.group_depth:
        return None
    return {name: ".".join(name.split(".")[: options.group_depth]) for name in bank.layout.mixed}


def _score(options: CheckpointMixOptions, sources: Sequence[CheckpointSource]) -> Any:
    """What mixed weights are worth; None for a command, which is only checked here."""
    from searchlab._looking import only_looking
    from searchlab.evaluators.merged_model import FunctionScore

    if options.evaluator == "command":
        from searchlab.evaluators.merged_command import MergedCommandEvaluator

        assert options.command is not None
        if not only_looking():
            MergedCommandEvaluator.check(options.command)
        return None
    if options.evaluator == "samples":
        from searchlab.experiments.checkpoint_mix_problems import digits_score

        return digits_score(
            calls=options.calls,
            samples=(options.samples or 1000,),
            held_out=options.held_out or 4000,
            objective=options.distance,
            seed=options.data_seed,
        )
    if options.evaluator == "loss":
        from searchlab.experiments.checkpoint_mix_problems import digits_loss

        return digits_loss(
            samples=(options.samples or 256,),
            held_out=options.held_out or 512,
            seed=options.data_seed,
        )
    score = FunctionScore(
        _function("evaluator", options.evaluator),
        options.evaluator,
        model=None if options.model is None else _function("model", options.model),
        objectives=options.objectives(),
        seed=options.data_seed,
    )
    if options.model is not None and not only_looking():
        score.check({name: sources[-1].tensor(name) for name in sources[-1].entries})
    return score


def _function(option: str, name: str) -> Any:
    from searchlab.evaluators.pipeline_metric import load_metric

    try:
        return load_metric(name)
    except ConfigError as error:
        raise ConfigError(f"{option} {name!r}: {error}") from None


def _evaluator(
    options: CheckpointMixOptions,
    score: Any,
    space: CheckpointMixSpace,
    bank: CheckpointBank,
    groups: dict[str, int] | None,
) -> Any:
    if options.command is None:
        from searchlab.evaluators.merged_model import MergedModelEvaluator

        return MergedModelEvaluator(space, bank, score, groups)
    from searchlab.evaluators.merged_command import MergedCommandEvaluator

    return MergedCommandEvaluator(
        space,
        options.command,
        options.objectives(),
        timeout_s=options.timeout,
        seed=options.data_seed,
        bank=bank,
        groups=groups,
    )


def _stages(
    options: CheckpointMixOptions, space: CheckpointMixSpace, bank: CheckpointBank, evaluator: Any
) -> list[Stage]:
    from dataclasses import replace

    from searchlab.config import AlgorithmSpec, Stage
    from searchlab.spaces.checkpoint_mix.space import AdoptMixes, MixSubspace
    from searchlab.spaces.checkpoint_mix.subspace import gram_matrix

    known = averages(space, bank)
    steer = options.steer
    budget = options.limits()
    stages = []
    if options.subspace:
        third = None if budget.evaluations is None else budget.evaluations // 3
        if third is None:
            raise ConfigError("subspace needs a budget in evaluations")
        inner = MixSubspace(bank.names, gram_matrix(bank), rank=options.subspace)
        along: Any = replace(evaluator, space=inner)
        cma = AlgorithmSpec("cma", {"sigma": 0.1})
        small = replace(budget, evaluations=third)
        stages.append(Stage("main directions", inner, along, cma, small, steer=steer))
        budget = replace(budget, evaluations=budget.evaluations - third)  # type: ignore[operator]
    stages.append(
        Stage(
            "search",
            space,
            evaluator,
            algorithm_of(options, space),
            budget,
            seeds=known,
            adopt=AdoptMixes(8) if options.subspace else None,
            chunk=8,
            steer=steer,
        )
    )
    return stages


def averages(space: CheckpointMixSpace, bank: CheckpointBank) -> Seeds:
    """The known ways to average these checkpoints, as baselines; of single ones at most 40."""
    import numpy as np

    from searchlab.algorithms.base import Seeds
    from searchlab.spaces.checkpoint_mix.baselines import named

    k = len(bank)
    every = -(-k // 40)
    rows = {
        name: row
        for name, row in named(k).items()
        if not name.startswith("single_") or (k - 1 - int(name[7:])) % every == 0
    }
    population = space.of_coefficients(np.stack(list(rows.values())))
    return Seeds(population, tuple(f"baseline:{name}" for name in rows))


def algorithm_of(options: CheckpointMixOptions, space: CheckpointMixSpace) -> AlgorithmSpec:
    """What proposes: CMA-ES with small steps from the best average, or what options say."""
    from searchlab.algorithms.evolution import ParentRule
    from searchlab.config import AlgorithmSpec
    from searchlab.spaces.checkpoint_mix.variation import CoefficientVariation

    name = options.algorithm or ("evolution" if options.preset == "paper" else "cma")
    if options.predicts:
        name = "kriging"
    if options.algorithm is None and space.group_count * (len(space.checkpoints) - 1) == 1:
        return AlgorithmSpec("es11")  # two checkpoints: a single number
    settings: dict[str, Any] = {}
    if name in ("cma", "kriging"):
        settings = {"sigma": 0.05 / space.unit}
    elif name == "evolution":
        settings = {
            "n_random": 0,
            "parents": ParentRule("rank", mu=10),
            "variation": CoefficientVariation(),
        }
    if options.guided and not options.predicts:
        return AlgorithmSpec("guided", {"wraps": name, "options": settings})
    return AlgorithmSpec(name, settings)


def export(config: SearchConfig, result: Result, directory: Path, form: str) -> list[Path]:
    """Writes the winner, see `checkpoint_mix_export`."""
    from searchlab.experiments.checkpoint_mix_export import export as write

    return write(config, result, directory, form)


def sections(config: SearchConfig, result: Result) -> Sequence[Section]:
    """Report sections of this room."""
    from searchlab.experiments.checkpoint_mix_report import sections as make

    return make(config, result)


RECIPE = Recipe(
    "checkpoint_mix",
    "how to mix the checkpoints that a training run leaves behind (LCSC)",
    CheckpointMixOptions,
    build,
    sections=sections,
    export=export,
)
