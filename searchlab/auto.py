"""`auto`: which algorithm fits a stage, settled when its run is opened and kept by the run.

The choice depends on the budget, so it must not follow a budget that grows: a resumed run reads
what was settled, with the reason, from its own record. The same holds for the number of baselines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from searchlab.errors import ConfigError, StudyError, unknown_name
from searchlab.variables import Affine, Choice, Real

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.config import AlgorithmSpec, SearchConfig, Stage
    from searchlab.space import Space
    from searchlab.study import Store

__all__ = [
    "AUTO",
    "BaselineRule",
    "Chosen",
    "check_baselines",
    "choose",
    "chosen_for",
    "kept_baselines",
    "parse_baselines",
    "reasons",
    "settled",
]

AUTO = "auto"
SMALL = 60  # evaluations; up to here every single one is thought over
MEDIUM = 300  # up to here a predictor pays for itself
MANY_OBJECTIVES = 4  # from here on crowding says little, and directions spread a front better
FIRST = 10  # random candidates of a mixed space, and labels of the first fit there
CLIMB = 50  # most evaluations in which guided search of choices goes up from the best
EACH = 2  # of them per element, without signals to tell one hill from another
SHARE_OF_BASELINES = 3  # baselines get at most one part in so many of the budget
_META = "auto"

BaselineRule = Literal["auto", "all", "none"] | tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """What `auto` settled on, and why, in a few words."""

    spec: AlgorithmSpec
    reason: str


# -- the rule -----------------------------------------------------------------------------------


def choose(
    space: Space,
    *,
    evaluations: int | None,
    objectives: int = 1,
    fidelities: Sequence[float] = (1.0,),
    prunes: bool = False,
    signals: bool = False,
    registered: Callable[[str], bool] | None = None,
) -> Chosen:
    """The algorithm for a search.

    Args:
        space: what varies.
        evaluations: the budget; None = it is limited in another way.
        objectives: how many.
        fidelities: relative costs of those that candidates may be measured at, cheapest first.
        prunes: the evaluator stops early where a bound allows it.
        signals: the evaluator says something of candidates before they are evaluated.
        registered: whether an algorithm of a name exists; the registry by default.
    """
    from searchlab.config import ALGORITHMS, AlgorithmSpec, known_names

    if registered is None:
        registered = set(known_names(ALGORITHMS, "algorithm")).__contains__
    many = "any number of evaluations" if evaluations is None else f"{evaluations} evaluations"
    if objectives >= 2:
        name = "nsga3" if objectives >= MANY_OBJECTIVES else "nsga2"
        return Chosen(AlgorithmSpec(name), f"{objectives} objectives")
    if (reals := _reals(space)) >= 2:
        return Chosen(AlgorithmSpec("cma"), f"one objective over {reals} real coordinates")
    if evaluations is not None and evaluations <= SMALL and len(fidelities) >= 2:
        options = {"fidelities": list(fidelities)}
        reason = f"{many} and {len(fidelities)} fidelities to rank by"
        return Chosen(AlgorithmSpec("successive_halving", options), reason)
    what = _kinds(space)
    reason = f"{many} of {what}"
    if evaluations is not None and evaluations <= MEDIUM:
        if registered("guided"):
            # No option follows the budget: a larger one goes on where this one ends.
            return Chosen(AlgorithmSpec("guided", _first_steps(space, signals)), reason)
        reason += ", without a predictor"
    if prunes:
        return Chosen(
            AlgorithmSpec("evolution", {"race": True}), f"{reason}; the evaluator can stop early"
        )
    return Chosen(AlgorithmSpec("evolution"), reason)


def _first_steps(space: Space, signals: bool) -> dict[str, Any]:
    """Options of guided search for its first evaluations."""
    if all(isinstance(variable, Choice) for variable in space.variables.values()):
        return {"options": {"climb": CLIMB if signals else min(CLIMB, EACH * space.size)}}
    return {"options": {"n_random": FIRST, "spread": True}, "first_fit": FIRST}


def chosen_for(stage: Stage) -> Chosen:
    """What `auto` settles on for a stage."""
    evaluator = stage.evaluator
    costs = tuple(fidelity.cost for fidelity in evaluator.fidelities)
    # A stage below the truth, or after one that has ranked already, has one fidelity to go by.
    ranks = stage.fidelity_index == len(costs) - 1 and stage.adopt is None
    return choose(
        stage.space,
        evaluations=stage.budget.evaluations,
        objectives=len(evaluator.objectives) if stage.trades else 1,
        fidelities=costs if ranks else costs[stage.fidelity_index :][:1],
        prunes=bool(getattr(evaluator, "prunes", False)) and not stage.main,
        signals=any(signal.when == "static" for signal in evaluator.signals),
    )


def _reals(space: Space) -> int:
    """Free coordinates of a space of real vectors without constraints; 0 = it is another one."""
    if space.constraints:
        return 0
    total = 0
    for variable in space.variables.values():
        if not isinstance(variable, Real | Affine) or variable.when:
            return 0
        if getattr(variable, "step", None) is not None:
            return 0
        if variable.unit_count == 1:
            continue
        total += variable.size
        if isinstance(variable, Affine):
            total -= variable.size // variable.n  # each vector's sum is given
    return total


def _kinds(space: Space) -> str:
    count: dict[str, int] = {}
    for variable in space.variables.values():
        count[variable.kind] = count.get(variable.kind, 0) + variable.size
    parts = [f"{number} {kind}" for kind, number in count.items()]
    return " + ".join(parts) + " elements" + (" under constraints" if space.constraints else "")


# -- baselines ----------------------------------------------------------------------------------


def parse_baselines(text: str) -> BaselineRule:
    """`auto`, `all`, `none`, or names divided by commas."""
    words: dict[str, BaselineRule] = {"auto": "auto", "all": "all", "none": "none"}
    if text in words:
        return words[text]
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise ConfigError(f"baselines {text!r}; allowed: auto, all, none or names with commas")
    return names


def check_baselines(rule: BaselineRule, origins: Sequence[str]) -> None:
    """Raises ConfigError for a rule that is none, or a name that no baseline has."""
    if not isinstance(rule, tuple):
        if rule not in ("auto", "all", "none"):
            raise ConfigError(f"baselines {rule!r}; allowed: auto, all, none or a tuple of names")
        return
    names = [text.partition(":")[2] for text in origins if text.startswith("baseline")]
    for name in rule:
        if name not in names:
            raise unknown_name("baseline", name, names)


def kept_baselines(seeds: Seeds, rule: BaselineRule, limit: int | None) -> Seeds:
    """The seeds without the baselines that a rule leaves out; other seeds stay.

    Args:
        seeds: baselines have an origin "baseline:NAME" or "baseline-KIND:NAME".
        rule: see `Stage`.
        limit: how many baselines "auto" keeps, from the front; None = all.
    """
    from searchlab.algorithms.base import Seeds

    at = [i for i, text in enumerate(seeds.origin) if text.startswith("baseline")]
    names = {i: seeds.origin[i].partition(":")[2] for i in at}
    if isinstance(rule, tuple):
        kept = {i for i in at if names[i] in rule}
    elif rule == "auto":
        kept = set(at if limit is None else at[:limit])
    else:
        kept = set(at if rule == "all" else ())
    rows = [i for i in range(len(seeds.origin)) if i in kept or i not in names]
    if len(rows) == len(seeds.origin):
        return seeds
    return Seeds(seeds.population.take(rows), tuple(seeds.origin[i] for i in rows))


def _limit(stage: Stage) -> int | None:
    """A third of the budget that a stage is opened with, at least one."""
    budget = stage.budget.evaluations
    return None if budget is None else max(1, budget // SHARE_OF_BASELINES)


# -- settling -----------------------------------------------------------------------------------


def settled(config: SearchConfig, store: Store | None = None) -> SearchConfig:
    """The configuration with every `auto` replaced by what it stands for in this run.

    Args:
        config: as it was asked for; what is settled in it already stays.
        store: the run; keeps what is settled when it is opened. None = as a new run would be.

    Raises:
        ConfigError: options for `auto`.
        StudyError: the settled algorithm has other settings by now.
    """
    kept: dict[str, dict[str, Any]] = (store.get_meta(_META) if store is not None else None) or {}
    notes, stages = dict(kept), []
    for index, stage in enumerate(config.stages):
        key = str(index)
        if stage.algorithm.name == AUTO or stage.baselines == "auto":
            if key not in notes:
                notes[key] = _note(stage, config.seed)
            stage = _applied(stage, notes[key], config.seed, config.name)
        if stage.seeds is not None and stage.baselines != "all":
            limit = notes[key]["baselines"] if stage.baselines == "auto" else None
            seeds = kept_baselines(stage.seeds, stage.baselines, limit)
            stage = replace(stage, seeds=seeds, baselines="all")
        stages.append(stage)
    if store is not None and notes != kept:
        store.set_meta(_META, notes)
    return replace(config, stages=tuple(stages))


def _note(stage: Stage, seed: int) -> dict[str, Any]:
    """What a run keeps of a stage."""
    note: dict[str, Any] = {"baselines": _limit(stage)}
    if stage.algorithm.name != AUTO:
        return note
    if stage.algorithm.options:
        names = ", ".join(stage.algorithm.options)
        raise ConfigError(f"options of auto: {names}; allowed: none (name the algorithm)")
    chosen = chosen_for(stage)
    return note | {
        "algorithm": chosen.spec.name,
        "options": dict(chosen.spec.options),
        "reason": chosen.reason,
        "settings": _settings(stage, chosen.spec, seed),
    }


def _settings(stage: Stage, spec: AlgorithmSpec, seed: int) -> Any:
    algorithm = replace(stage, algorithm=spec).build_algorithm(seed=seed, first_id=0, seeds=None)
    return json.loads(json.dumps(algorithm.settings()))


def _applied(stage: Stage, note: dict[str, Any], seed: int, run: str) -> Stage:
    from searchlab.config import AlgorithmSpec

    if stage.algorithm.name != AUTO:
        return stage
    spec = AlgorithmSpec(note["algorithm"], note["options"])
    if _settings(stage, spec, seed) != note["settings"]:
        raise StudyError(
            f"run {run!r} was opened with other settings of {spec.name} than this version has; "
            "start under a new name"
        )
    return replace(stage, algorithm=spec, chosen=_text(note))


def _text(note: dict[str, Any]) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in note["options"].items())
    settings = f" with {options}" if options else ""
    return f"{note['algorithm']}{settings}, chosen by auto: {note['reason']}"


def reasons(config: SearchConfig, store: Store) -> dict[str, str]:
    """What proposes in each stage of a run, and why where `auto` chose it."""
    kept: dict[str, dict[str, Any]] = store.get_meta(_META) or {}
    return {
        stage.name: _text(kept[str(index)])
        if stage.algorithm.name == AUTO and str(index) in kept
        else stage.chosen or stage.algorithm.name
        for index, stage in enumerate(config.stages)
    }
