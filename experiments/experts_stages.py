"""The stages of a search for experts: pruning from known rankings on, merging, and the paper's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab.algorithms.evolution import ParentRule
from searchlab.config import AlgorithmSpec, Final, Stage
from searchlab.errors import ConfigError
from searchlab.spaces.experts.merging import AdoptPruned
from searchlab.spaces.experts.variation import MergingVariation, PruningVariation

if TYPE_CHECKING:
    from searchlab.algorithms.base import Seeds
    from searchlab.experiments.experts_setup import Loaded

__all__ = ["FEW", "algorithm_of", "final_of", "known_points", "stages_of"]

FEW = 60  # evaluations up to which nothing is drawn at random
_STARTS = 8  # random subsets of a longer search
_FINALISTS = 8
_POOL = 12  # the best that may be parents; what is worse stops early
_SHARE = 0.6  # of the evaluations for pruning, where merging follows
_PARENTS, _MATES = 0.03, 0.01  # of accuracy: 3 points and 1 point below the best


def stages_of(loaded: Loaded) -> list[Stage]:
    """The stages of a run.

    Raises:
        ConfigError: a merging stage under a budget that is not in evaluations.
    """
    options = loaded.prepared.options
    if options.preset == "paper":
        return _paper(loaded)
    budget = options.limits()
    known = known_points(loaded)
    if not options.merge:
        spec = algorithm_of(loaded, budget.evaluations)
        return [
            Stage(
                "prune",
                loaded.space,
                loaded.evaluator,
                spec,
                budget,
                seeds=known,
                chunk=_chunk(loaded),
            )
        ]
    if budget.evaluations is None:
        raise ConfigError("merge needs a budget in evaluations")
    first = int(_SHARE * budget.evaluations)
    space = loaded.prepared.merging()
    spec = algorithm_of(loaded, first)
    merge = AlgorithmSpec(
        "evolution",
        {
            "n_random": 0,
            "mating": 0.3,
            "parents": ParentRule("power", start=4),
            "variation": MergingVariation(),
        },
    )
    return [
        Stage(
            "prune",
            loaded.space,
            loaded.evaluator,
            spec,
            replace(budget, evaluations=first),
            seeds=known,
            chunk=_chunk(loaded),
        ),
        Stage(
            "merge",
            space,
            loaded.merged(space),
            merge,
            replace(budget, evaluations=budget.evaluations - first),
            adopt=AdoptPruned(5),
            chunk=1,
        ),
    ]


def final_of(loaded: Loaded) -> Final:
    """The final: rankings of experts may win it, and are all reported. The paper's has none."""
    return Final(
        k=_FINALISTS,
        report=1,
        named=tuple(loaded.known),
        known=loaded.prepared.options.preset == "default",
    )


def _chunk(loaded: Loaded) -> int:
    """Candidates of one call: as many as share a pass, unless few are evaluated at all."""
    options = loaded.prepared.options
    count = options.limits().evaluations
    return options.together if count is None or count > FEW else max(1, min(4, options.together))


def known_points(loaded: Loaded) -> Seeds | None:
    """What the rankings of experts keep, as baselines."""
    from searchlab.algorithms.base import Seeds

    if not loaded.known:
        return None
    population = loaded.space.of_masks(np.stack(list(loaded.known.values())))
    return Seeds(population, tuple(f"baseline:{name}" for name in loaded.known))


def algorithm_of(loaded: Loaded, evaluations: int | None) -> AlgorithmSpec:
    """Evolution from the known points; with few evaluations, nothing is drawn at random."""
    options = loaded.prepared.options
    few = evaluations is not None and evaluations <= FEW
    settings: dict[str, Any] = {
        "n_random": 0 if few and loaded.known else _STARTS,
        "quantum": _chunk(loaded),
        "race": options.race and not options.guided,
        "parents": ParentRule(limit=_POOL),
    }
    if loaded.space.keep is not None:
        settings["variation"] = PruningVariation()
    if options.guided:
        return AlgorithmSpec("guided", {"wraps": "evolution", "options": settings})
    return AlgorithmSpec("evolution", settings)


def _paper(loaded: Loaded) -> list[Stage]:
    """The released search: random subsets, children of them, then merged children of all of those.

    It is one stage whose operator changes, in the space of merged experts, so that everything that
    was scored stays a parent.

    Source: the released code of arXiv 2407.00945. It scores a candidate again when it comes up
    again; here another one is drawn, so that the numbers of evaluations are the same.
    """
    from searchlab.experiments.experts import PAPER

    space = loaded.prepared.merging()
    starts, pruned, _ = PAPER
    limit = sum(PAPER)
    if loaded.evaluator.objectives[0].direction == "max":
        near = ParentRule("threshold", margin=_PARENTS, limit=limit)
        nearer = ParentRule("threshold", margin=_MATES, limit=limit, least=6)
    else:  # points of an accuracy say nothing of a divergence
        near = nearer = ParentRule("rank", mu=20)
    settings: dict[str, Any] = {
        "n_random": starts,
        "parents": near,
        "variation": MergingVariation(),
        "mating": 0.3,
        "mates": nearer,
        "early": PruningVariation.released(),
        "early_until": starts + pruned,
    }
    spec = AlgorithmSpec("evolution", settings)
    budget = loaded.prepared.options.limits()
    return [Stage("prune and merge", space, loaded.merged(space), spec, budget, chunk=1)]
