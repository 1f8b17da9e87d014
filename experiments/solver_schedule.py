"""Recipe: search the solver schedule of a diffusion model (USF / S3, arXiv 2312.07243).

1. Every known solver on every usual grid is a named point; all of them are scored on few samples,
   the best of each number of model calls on many.
2. Evolution goes on from those: one pool per number of model calls, children from the pool they
   are meant for or from a neighbouring one with a step inserted or deleted.
3. The five best and the best known points are scored on other noise; the winner and the best known
   point of each number of calls once more on noise that nothing was chosen by.

Models and evaluators are imported where they are needed, so that listing options stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchlab.errors import ConfigError
from searchlab.recipes import Recipe

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.config import AlgorithmSpec, Budget, SearchConfig
    from searchlab.evaluators.schedule_signals import CheapSignals
    from searchlab.report import Section
    from searchlab.result import Result
    from searchlab.spaces.solver_schedule.space import SolverScheduleSpace

__all__ = ["RECIPE", "SolverScheduleOptions", "build"]


KEPT = 24  # best known points per number of calls that go on to the search
_KNOWN: dict[tuple[str, str], Seeds] = {}
_MOST_KNOWN = 8
POOL = 8  # candidates whose signals are looked at for an evaluation


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SolverScheduleOptions:
    """Options of the recipe, all JSON values."""

    preset: Literal["default", "guided", "released", "paper"] = _option(
        "default",
        "default: our evolution; guided: the same, led by a predictor; released: the search of the "
        "released code; paper: stages of predictor search and true evaluation",
    )
    problem: Literal["digits", "mixture"] = _option(
        "digits", "bundled problem: digits (a trained model) or mixture (closed form)"
    )
    label: int | None = _option(None, "digits: class to sample, 0 to 9; all without it")
    pipeline: str | None = _option(None, "a diffusers pipeline: folder or hub id")
    prompts: str | None = _option(None, "text file with one prompt per line, for --pipeline")
    size: str | None = _option(None, "WIDTHxHEIGHT of the pipeline's images")
    dtype: str | None = _option(None, "fp32, fp16 or bf16, for --pipeline")
    reference_steps: int | None = _option(None, "model calls of the reference solution")
    guidance: float | None = _option(None, "guidance scale of the pipeline; its own without it")
    metric: str | None = _option(None, "module:function on images, for the pipeline's shortlist")
    metric_direction: Literal["min", "max"] = _option("max", "which direction of it is better")
    n_noise: int | None = _option(None, "start noises per prompt of the pipeline")
    num_frames: int | None = _option(None, "frames, for video pipelines")
    device: str | None = _option(None, "torch device of the pipeline; cuda where there is one")
    path: Literal["auto", "pipeline", "rows"] = _option(
        "auto", "rows: schedules share calls of the network; auto: where a probe finds that equal"
    )
    objective: Literal["rmse", "fd", "kid"] = _option(
        "rmse", "rmse: error against the reference; fd, kid: distance of samples to data (digits)"
    )
    nfe: str = _option("5..10", "numbers of model calls, LOW..HIGH or one number")
    budget: int | str | None = _option(
        None,
        "evaluations beyond the known points (300 per number of calls), or a limit such as 90min, "
        "6gpuh or 50usd",
    )
    gpu_price: float | None = _option(None, "US dollars per device hour, for a budget in dollars")
    target: float | None = _option(None, "a value that is good enough to stop")
    warm_start: str | None = _option(
        None,
        "name or folder of another run, whose best are proposed first; where its numbers of calls "
        "are others, steps are put in or taken out",
    )
    samples: int | None = _option(None, "samples per evaluation")
    held_out: int | None = _option(None, "samples per bank of the selection and report splits")
    report_banks: int = _option(4, "noise banks of the report split; 2 or more give intervals")
    seed: int = _option(0, "the one seed of the search")
    data_seed: int = _option(0, "seed of the noise banks, the same for searches to be compared")
    threads: int | None = _option(
        None, "torch threads; 1 for the bundled problems, torch's own choice for a pipeline"
    )
    quantum: int = _option(8, "children proposed and evaluated together")
    lag: int | Literal["free"] | None = _option(
        None, "jobs open at once, or free: as many as there is room; fixed when the run is opened"
    )

    def __post_init__(self) -> None:
        low, high = self.calls
        if not 1 <= low <= high <= 100:
            raise ConfigError(f"nfe {self.nfe!r}; allowed: 1 <= LOW <= HIGH <= 100")
        self.limits(0)
        if self.quantum < 1:
            raise ConfigError(f"quantum {self.quantum}; allowed: 1 or more")
        if not 2 <= self.report_banks <= 64:
            raise ConfigError(f"report_banks {self.report_banks}; allowed: 2 to 64")
        for name in ("samples", "held_out"):
            value = getattr(self, name)
            if value is not None and value < 16:
                raise ConfigError(f"{name} {value}; allowed: 16 or more")
        if not 0 <= self.data_seed < 2**40:
            raise ConfigError(f"data_seed {self.data_seed}; allowed: 0 to 2**40 - 1")
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError(f"threads {self.threads}; allowed: 1 to 1024")
        self._check_problem()

    def _check_problem(self) -> None:
        if self.pipeline is None:
            only = ("prompts", "size", "dtype", "guidance", "metric", "n_noise", "num_frames")
            for name in only:
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is for --pipeline; the problem is {self.problem!r}")
        elif self.objective != "rmse":
            raise ConfigError(
                f"objective {self.objective!r} needs reference features; a pipeline has 'rmse'"
            )
        if self.problem == "mixture" and (self.objective != "rmse" or self.label is not None):
            raise ConfigError("problem 'mixture' has objective 'rmse' and no labels")
        if self.label is not None and not 0 <= self.label <= 9:
            raise ConfigError(f"label {self.label}; allowed: 0 to 9")

    def limits(self, default: int) -> Budget:
        """What ends the search; so many evaluations where nothing is said."""
        from searchlab.budget_text import parse_budget

        budget = default if self.budget is None else self.budget
        return parse_budget(budget, gpu_price=self.gpu_price, target=self.target)

    @property
    def calls(self) -> tuple[int, int]:
        """(lowest, highest) number of model calls."""
        parts = self.nfe.split("..")
        try:
            numbers = [int(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 2):
            raise ConfigError(f"nfe {self.nfe!r}; allowed: LOW..HIGH or one number")
        return numbers[0], numbers[-1]


@dataclass(frozen=True)
class _Room:
    """A problem made ready to be searched."""

    space: SolverScheduleSpace
    evaluator: Any
    known: Seeds
    screened: bool
    kept: int = KEPT


def build(options: SolverScheduleOptions) -> SearchConfig:
    """The configuration of a run; loads the model."""
    from searchlab.config import AdoptBest, AlgorithmSpec, Final, SearchConfig, Stage

    _set_threads(options)
    low, high = options.calls
    groups = tuple(range(low, high + 1))
    room = _pipeline_room(options) if options.pipeline else _bundled_room(options)
    known = None if room.screened else room.known
    if options.warm_start is not None:
        from searchlab.warm_start import best_of_run

        warm = best_of_run(
            options.warm_start,
            room.space,
            room.evaluator.objectives[0],
            per="nfe",
            evaluator=room.evaluator,
        )
        known = warm if known is None else known.joined(warm)
    stages = []
    if room.screened:
        stages.append(
            Stage(
                "known points",
                room.space,
                room.evaluator,
                AlgorithmSpec("listed", {"quantum": 64}),
                fidelity=0,
                seeds=room.known,
                chunk=64,
            )
        )
    kinds = ("baseline:", "baseline-analytic:")
    stages.append(
        Stage(
            "search",
            room.space,
            room.evaluator,
            _algorithm(options, groups),
            options.limits(300 * len(groups)),
            seeds=known,
            adopt=AdoptBest(room.kept, per="nfe", kinds=kinds) if room.screened else None,
        )
    )
    return SearchConfig(
        tuple(stages),
        name="solver_schedule",
        seed=options.seed,
        lag=options.lag,
        chunk=options.quantum,
        group_by="nfe",
        groups=groups,
        upto=True,
        final=Final(k=5, report=options.report_banks),
        recipe="solver_schedule",
        options=asdict(options),
    )


def _set_threads(options: SolverScheduleOptions) -> None:
    """A fixed number of threads: sums are split by it, and small models gain nothing from more."""
    import torch

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif options.pipeline is None:
        torch.set_num_threads(1)


def _algorithm(options: SolverScheduleOptions, groups: tuple[int, ...]) -> AlgorithmSpec:
    from searchlab.algorithms.evolution import ParentRule
    from searchlab.config import AlgorithmSpec
    from searchlab.spaces.solver_schedule.variation import ReleasedVariation, ScheduleVariation

    common: dict[str, Any] = {
        "n_random": 0,
        "niche": "nfe",
        "niches": groups,
        "quantum": options.quantum,
    }
    if options.preset == "released":
        return AlgorithmSpec(
            "evolution",
            {
                **common,
                "parents": ParentRule("rank", mu=15),
                "variation": ReleasedVariation(),
                "repeats": "allow",
            },
        )
    ours = {
        **common,
        "parents": ParentRule(start=8),
        "variation": ScheduleVariation(),
        "neighbour": 0.15,
    }
    if options.preset == "paper":
        # A fifth of the recipe's own budget is the first sample, four stages share the rest.
        first, batch = KEPT * len(groups) + 60 * len(groups), 60 * len(groups)
        return AlgorithmSpec("staged", {"options": ours, "first": first, "batch": batch})
    if options.preset == "default":
        return AlgorithmSpec("evolution", ours)
    return AlgorithmSpec(
        "guided",
        {
            "wraps": "evolution",
            "options": ours,
            "predictor": "local",
            "first_fit": KEPT * len(groups),  # what the known points give
            "pool": POOL,
            "fidelities": (),  # few samples are a signal already, and the better chosen ones
        },
    )


def _bundled_room(options: SolverScheduleOptions) -> _Room:
    from searchlab.evaluators.sampling import SamplingEvaluator
    from searchlab.experiments.solver_schedule_problems import digits_problem, mixture_problem
    from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace

    if options.problem == "mixture":
        problem, distance = mixture_problem(), None
        end = problem.noise.end
        within = ScheduleRange(options.calls, (end, end), endings=("stop",))
        samples, held_out = (64, options.samples or 2048), options.held_out or 2048
    else:
        problem, distance = digits_problem(
            label=options.label, reference_steps=options.reference_steps or 60
        )
        within = ScheduleRange(options.calls, (0.002, 0.1), first=("model", "zero", "mean"))
        if options.objective != "rmse":
            samples, held_out = (500, options.samples or 2000), options.held_out or 4000
        else:
            samples, held_out = (64, options.samples or 256), options.held_out or 2000
    counts: tuple[int, ...] = samples if samples[0] < samples[1] else samples[1:]
    space = SolverScheduleSpace(problem.noise, within)
    known = _known_points(space, "mixture" if options.problem == "mixture" else "digits")
    evaluator = SamplingEvaluator(
        space,
        problem,
        objective=options.objective,
        distance=distance,
        samples=counts,
        held_out=held_out,
        seed=options.data_seed,
        cheap=_cheap(space, known, counts[-1]),
    )
    return _Room(space, evaluator, known, screened=len(counts) > 1)


def _cheap(space: SolverScheduleSpace, known: Seeds, truth: int) -> CheapSignals | None:
    """Signals of few samples; None where an evaluation is hardly more."""
    import numpy as np

    from searchlab.evaluators.schedule_signals import TRIED, CheapSignals

    samples = max(32, truth // 8)
    if truth < 3 * samples:
        return None
    plain = [row for row, origin in enumerate(known.origin) if origin.startswith("baseline:")]
    rows = np.unique(np.linspace(0, len(plain) - 1, TRIED).round().astype(int))
    panel = space.plans(known.population.take([plain[row] for row in rows.tolist()]))
    return CheapSignals(tuple(panel), samples)


def _known_points(space: SolverScheduleSpace, family: Literal["digits", "mixture"]) -> Seeds:
    """The whole family of known solvers at every number of calls, analytic variants apart.

    They take seconds, and runs of one process often have equal spaces: the latest are kept.
    """
    key = space.fingerprint, family
    if key not in _KNOWN:
        while len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = _make_known_points(space, family)
    return _KNOWN[key]


def _make_known_points(space: SolverScheduleSpace, family: Literal["digits", "mixture"]) -> Seeds:
    from searchlab.algorithms.base import Seeds
    from searchlab.spaces.solver_schedule.families import analytic_first_family, fixed_family

    schedules: list[Any] = []
    origin: list[str] = []
    low, high = space.within.nfe
    for nfe in range(low, high + 1):
        plain = fixed_family(space.noise, nfe, family=family)
        schedules += plain.values()
        origin += [f"baseline:{name}" for name in plain]
        firsts: tuple[Literal["zero", "mean"], ...] = ("zero", "mean")
        for first in firsts:
            if first not in space.within.first:
                continue
            analytic = analytic_first_family(
                space.noise, nfe, family=family, first_evaluation=first
            )
            schedules += analytic.values()
            origin += [f"baseline-analytic:{name}" for name in analytic]
    return Seeds(space.of_schedules(schedules), tuple(origin))


def _pipeline_room(options: SolverScheduleOptions) -> _Room:
    from searchlab.evaluators.pipeline_options import PipelineOptions
    from searchlab.experiments.solver_schedule_pipeline import pipeline_room

    assert options.pipeline is not None
    space, evaluator, known, _ = pipeline_room(
        PipelineOptions(
            options.pipeline,
            prompts=options.prompts,
            size=options.size,
            dtype=options.dtype or "fp32",
            device=options.device,
            reference_steps=options.reference_steps or 50,
            guidance_scale=options.guidance,
            metric=options.metric,
            metric_direction=options.metric_direction,
            num_frames=options.num_frames,
            n_noise=options.n_noise,
            seed=options.data_seed,
            path=options.path,
        ),
        options.calls,
    )
    return _Room(space, evaluator, known, screened=len(evaluator.fidelities) > 1, kept=8)


def export(config: SearchConfig, result: Result, directory: Path, form: str) -> list[Path]:
    """Writes the winners, see `solver_schedule_export`."""
    from searchlab.experiments.solver_schedule_export import export as write

    return write(config, result, directory, form)


def sections(config: SearchConfig, result: Result) -> Sequence[Section]:
    """Report sections of this room."""
    from searchlab.experiments.solver_schedule_report import sections as make

    return make(config, result)


RECIPE = Recipe(
    "solver_schedule",
    "which solver takes each step of a diffusion model's sampling (USF / S3)",
    SolverScheduleOptions,
    build,
    sections=sections,
    export=export,
)
