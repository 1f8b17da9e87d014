"""Recipes for evaluators that are other programs: `command` runs them, `ask` waits for results.

Both read a space file and search it with the algorithm that `auto` chooses. All objectives and
constraints are recorded with every candidate, and candidates that meet the constraints come first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.auto import AUTO, parse_baselines
from searchlab.config import ALGORITHMS, known_names
from searchlab.errors import ConfigError, SpaceError, unknown_name
from searchlab.external import (
    load_json,
    parse_fidelity,
    parse_objective,
    parse_seconds,
    read_space_file,
)
from searchlab.outcomes import parse_constraint
from searchlab.recipes import Recipe

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.auto import BaselineRule
    from searchlab.config import SearchConfig
    from searchlab.evaluator import Evaluator, Fidelity, Objective
    from searchlab.outcomes import Constraint
    from searchlab.report import Section
    from searchlab.result import Result
    from searchlab.space import Space

__all__ = ["ASK", "RECIPE", "AskOptions", "CommandOptions"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class _Options:
    """What both recipes have. Files are read once: their content becomes part of the options."""

    space: str = _option("", "space file (YAML)")
    objective: tuple[str, ...] = _option(
        (), "NAME:min or NAME:max; repeatable: several give a front"
    )
    steer: str | None = _option(None, "name of the one objective to optimise; others are recorded")
    reference: tuple[str, ...] = _option((), "NAME=VALUE from which hypervolumes are measured")
    constraint: tuple[str, ...] = _option((), "NAME>=BOUND or NAME<=BOUND; repeatable")
    fidelity: tuple[str, ...] = _option((), "NAME:COST, cheapest first; repeatable")
    baseline: tuple[str, ...] = _option((), "JSON file of known candidates; repeatable")
    budget: int | None = _option(None, "evaluations to pay for, baselines apart")
    algorithm: str = _option("auto", "a registered name, or auto: by space, budget and objectives")
    baselines: str = _option("auto", "auto (a third of the budget at most), all, none or names")
    seed: int = _option(0, "the one seed of the search")
    data_seed: int = _option(0, "seed handed to the program, the same for searches to be compared")

    def __post_init__(self) -> None:
        if not self.space:
            raise ConfigError("no space; allowed: --space FILE")
        if not self.objective:
            raise ConfigError("no objective; allowed: --objective NAME:min or NAME:max")
        if self.budget is not None and self.budget < 0:
            raise ConfigError(f"budget {self.budget}; allowed: 0 or more")
        known = [AUTO, *known_names(ALGORITHMS, "algorithm")]
        if self.algorithm not in known:
            raise unknown_name("algorithm", self.algorithm, known)
        self.rule()
        if not 0 <= self.data_seed < 2**40:
            raise ConfigError(f"data_seed {self.data_seed}; allowed: 0 to 2**40 - 1")
        if not self.space.lstrip().startswith("{"):
            text = json.dumps(read_space_file(self.space), sort_keys=True)
            object.__setattr__(self, "space", text)
        content = tuple(map(_baseline_text, self.baseline))
        object.__setattr__(self, "baseline", content)
        self.parts()

    def rule(self) -> BaselineRule:
        """Which baselines are scored. Raises ConfigError."""
        return parse_baselines(self.baselines)

    def parts(self) -> _Parts:
        """The texts as what they stand for. Raises ConfigError or SpaceError naming them."""
        fidelities = tuple(map(parse_fidelity, self.fidelity)) or (_full(),)
        costs = [fidelity.cost for fidelity in fidelities]
        if costs != sorted(costs):
            raise ConfigError(f"fidelities cost {costs}; allowed: cheapest first, the truth last")
        objectives = tuple(map(parse_objective, self.objective))
        names = [objective.name for objective in objectives]
        if self.steer is not None and self.steer not in names:
            raise unknown_name("objective", self.steer, names)
        return _Parts(
            objectives,
            tuple(map(parse_constraint, self.constraint)),
            fidelities,
            _reference(self.reference, names),
        )


@dataclass(frozen=True)
class _Parts:
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    fidelities: tuple[Fidelity, ...]
    reference: dict[str, float] | None


def _reference(texts: Sequence[str], names: Sequence[str]) -> dict[str, float] | None:
    """Reads NAME=VALUE. Raises ConfigError naming the text."""
    out: dict[str, float] = {}
    for text in texts:
        name, found, value = text.partition("=")
        try:
            out[name] = float(value)
        except ValueError:
            found = ""
        if not found or name not in names:
            raise ConfigError(
                f"reference {text!r}; allowed: NAME=VALUE for each of {', '.join(names)}"
            )
    return out or None


def _full() -> Fidelity:
    from searchlab.evaluator import Fidelity

    return Fidelity("full")


@dataclass(frozen=True)
class CommandOptions(_Options):
    """Options of the recipe `command`, all JSON values."""

    command: str = _option("", "with {plan} and {out}; also {fidelity} {seed} {id}")
    shell: bool = _option(False, "run it by /bin/sh")
    timeout: str = _option("1h", "deadline of one attempt: 90s, 30min, 2h")
    grace: str = _option("5s", "time between asking the command to end and making it")
    attempts_again: int = _option(2, "further attempts after exit code 75")
    output_limit: int = _option(2**20, "bytes kept of standard output and error each")
    devices: str | None = _option(None, "CUDA_VISIBLE_DEVICES of the command")
    version: int = _option(1, "raise it when the command's values change")
    screen: int = _option(0, "evaluations at each cheaper fidelity; the best quarter goes on")
    finalists: int = _option(0, "candidates scored again with other seeds at the end; 0 = none")
    report_replicates: int = _option(3, "seeds of the report split, with finalists")
    lag: int | None = _option(None, "jobs open at once; fixed when the run is opened")

    def __post_init__(self) -> None:
        if not self.command:
            raise ConfigError("no command; allowed: --command 'PROGRAM ... {plan} ... {out}'")
        if self.screen < 0 or self.finalists < 0:
            raise ConfigError(
                f"screen {self.screen}, finalists {self.finalists}; allowed: 0 or more"
            )
        if self.screen and len(self.fidelity) < 2:
            raise ConfigError("screen needs a cheaper fidelity; allowed: two or more --fidelity")
        super().__post_init__()
        parse_seconds(self.timeout)
        parse_seconds(self.grace)


@dataclass(frozen=True)
class AskOptions(_Options):
    """Options of the recipe `ask`, all JSON values."""


def _baseline_text(given: str) -> str:
    """The content of a baseline file: {name: values}, as JSON text."""
    if given.lstrip().startswith("{"):
        return given
    path = Path(given)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"baseline file {given!r}: {error.strerror or error}") from None
    data = load_json(raw, f"baseline file {given!r}")
    if not isinstance(data, dict):
        raise ConfigError(
            f"baseline file {given!r}; allowed: an object of values, or of names and values"
        )
    if not data or not all(isinstance(part, dict) for part in data.values()):
        data = {path.stem: data}
    return json.dumps(data, sort_keys=True)


def _space(options: _Options) -> Space:
    from searchlab.space import space_from_json

    data = load_json(options.space.encode(), "the space")
    return space_from_json(data)


def _seeds(options: _Options, space: Space) -> Seeds | None:
    from searchlab.algorithms.base import Seeds

    named: dict[str, Mapping[str, Any]] = {}
    for text in options.baseline:
        for name, values in load_json(text.encode(), "a baseline").items():
            if name in named:
                raise ConfigError(f"baseline {name!r} is given twice; allowed: once")
            named[name] = values
    if not named:
        return None
    try:
        population = space.population(list(named.values()))
    except SpaceError as error:
        raise ConfigError(f"baselines {', '.join(named)}: {error}") from None
    for name, feasible in zip(named, space.is_feasible(population).tolist(), strict=True):
        if not feasible:
            raise ConfigError(f"baseline {name!r} is not allowed by the space")
    return Seeds(population, tuple(f"baseline:{name}" for name in named))


# -- command ------------------------------------------------------------------------------------


def build(options: CommandOptions) -> SearchConfig:
    """The run of one command."""
    from searchlab.config import AdoptBest, AlgorithmSpec, Budget, Final, SearchConfig, Stage
    from searchlab.evaluators.command import CommandEvaluator

    space, parts = _space(options), options.parts()
    evaluator = CommandEvaluator(
        space,
        options.command,
        parts.objectives,
        constraints=parts.constraints,
        fidelities=parts.fidelities,
        by_shell=options.shell,
        timeout_s=parse_seconds(options.timeout),
        grace_s=parse_seconds(options.grace),
        retries=options.attempts_again,
        output_limit=options.output_limit,
        devices=options.devices,
        seed=options.data_seed,
        version=options.version,
    )
    seeds = _seeds(options, space)
    algorithm = AlgorithmSpec(options.algorithm)
    stages = []
    cheaper = parts.fidelities[:-1] if options.screen else ()
    for index, fidelity in enumerate(cheaper):
        stages.append(
            Stage(
                f"screen at {fidelity.name}",
                space,
                evaluator,
                algorithm,
                Budget(options.screen),
                fidelity=index,
                seeds=seeds,
                adopt=AdoptBest(max(1, options.screen // 4)) if index else None,
                chunk=1,
                baselines=options.rule(),
                steer=options.steer,
            )
        )
    stages.append(
        Stage(
            "search",
            space,
            evaluator,
            algorithm,
            Budget(_budget(options)),
            seeds=seeds,
            adopt=AdoptBest(max(1, options.screen // 4)) if cheaper else None,
            chunk=1,
            baselines=options.rule(),
            steer=options.steer,
        )
    )
    final = None
    if options.finalists:
        final = Final(k=options.finalists, report=options.report_replicates)
    return SearchConfig(
        tuple(stages),
        name=RECIPE.name,
        seed=options.seed,
        lag=options.lag,
        final=final,
        recipe=RECIPE.name,
        options=asdict(options),
        reference=parts.reference,
    )


def _budget(options: CommandOptions) -> int:
    return 100 if options.budget is None else options.budget


# -- ask ----------------------------------------------------------------------------------------


def build_ask(options: AskOptions) -> SearchConfig:
    """A run whose values are told."""
    from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
    from searchlab.evaluators.told import ToldEvaluator

    space, parts = _space(options), options.parts()
    evaluator: Evaluator = ToldEvaluator(
        parts.objectives, parts.constraints, parts.fidelities, seed=options.data_seed
    )
    stage = Stage(
        "search",
        space,
        evaluator,
        AlgorithmSpec(options.algorithm),
        Budget(options.budget),
        seeds=_seeds(options, space),
        chunk=1,
        baselines=options.rule(),
        steer=options.steer,
    )
    return SearchConfig(
        (stage,),
        name=ASK.name,
        seed=options.seed,
        recipe=ASK.name,
        options=asdict(options),
        reference=parts.reference,
    )


# -- report -------------------------------------------------------------------------------------


def sections(config: SearchConfig, result: Result) -> Sequence[Section]:
    """The candidates that nothing else beats, where there is more to weigh than one figure."""
    from searchlab.report import Section

    stage = config.stages[-1]
    rows = front_rows(config, result)
    if not rows:
        return ()
    names = ", ".join(f"{o.name} ({o.direction})" for o in stage.evaluator.objectives)
    steered = f" The search was steered by {stage.steer}." if stage.steer else ""
    return (
        Section(
            "Trade-offs",
            f"Candidates that meet the constraints and that none beats in all of: {names}."
            + steered,
            table=rows,
        ),
    )


def front_rows(config: SearchConfig, result: Result) -> list[dict[str, Any]]:
    """One row per candidate that is not dominated: id, origin, objectives, constraints, values."""
    import numpy as np

    from searchlab.outcomes import constraints_of, violation
    from searchlab.population import OK

    stage = config.stages[-1]
    objectives, constraints = stage.evaluator.objectives, constraints_of(stage.evaluator)
    records = result.records
    if records is None or (len(objectives) < 2 and not constraints):
        return []
    here = (records.stage == len(config.stages) - 1) & (records.state == OK)
    part = records.take(np.flatnonzero(here))
    part = part.take(np.flatnonzero(violation(part.constraints, constraints) == 0))
    signs = np.array([1.0 if o.direction == "min" else -1.0 for o in objectives])
    losses = part.values[:, : len(objectives)] * signs
    no_worse = (losses[:, None] <= losses[None]).all(-1)
    better = (losses[:, None] < losses[None]).any(-1)
    kept = np.flatnonzero(~(no_worse & better).any(0))
    kept = kept[np.argsort(losses[kept, 0], kind="stable")][:50]
    plans = stage.space.decode(stage.space.unpack([part.genotypes[i] for i in kept]))
    return [
        {
            "id": int(part.ids[at]),
            "origin": part.origin[at],
            **{o.name: float(part.values[at, j]) for j, o in enumerate(objectives)},
            **{
                c.name: float(part.constraints[at, j])
                for j, c in enumerate(constraints)
                if c.name not in {o.name for o in objectives}
            },
            "values": json.dumps(plan, default=str),
        }
        for at, plan in zip(kept.tolist(), plans, strict=True)
    ]


RECIPE = Recipe(
    "command",
    "a space file, scored by a command that reads a plan and writes a result",
    CommandOptions,
    build,
    sections=sections,
)
ASK = Recipe(
    "ask",
    "a space file, scored elsewhere: searchlab ask hands out plans, searchlab tell takes results",
    AskOptions,
    build_ask,
    sections=sections,
    opens_only=True,
)
