"""Our spaces and evaluators as problems of pymoo, for any algorithm of that library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.evaluator import Evaluator, EvaluatorFunction, losses
from searchlab.outcomes import constraints_of
from searchlab.population import Jobs, Population
from searchlab.search import as_evaluator
from searchlab.space import Space
from searchlab.uniforms import derived
from searchlab.variables import Choice, Integer, Subset

if TYPE_CHECKING:
    from pymoo.core.problem import Problem

__all__ = ["Codes", "as_problem"]

Array = NDArray[Any]

FAILED = 1e30  # the loss of a failed candidate: algorithms of pymoo subtract losses


class Codes:
    """Candidates as rows of numbers, one per element, and back.

    Choices are codes 0 .. k - 1, members of a subset 0 or 1, integers and reals themselves.

    Args:
        space: any space whose variables have labels or ranges.

    Raises:
        ConfigError: a variable that has neither.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        low: list[float] = []
        high: list[float] = []
        whole: list[bool] = []
        for key, variable in space.variables.items():
            if isinstance(variable, Choice):
                ends: tuple[Any, Any] = (0, len(variable.labels) - 1)
            elif isinstance(variable, Subset):
                ends = (0, 1)
            else:
                ends = (getattr(variable, "low", None), getattr(variable, "high", None))
            if None in ends:
                raise ConfigError(
                    f"{key!r} is a {variable.kind}; allowed for pymoo: choices, subsets and "
                    "numbers within a range"
                )
            low += [float(ends[0])] * variable.size
            high += [float(ends[1])] * variable.size
            whole += [isinstance(variable, Choice | Integer | Subset)] * variable.size
        self.low, self.high = np.array(low), np.array(high)
        self.whole = np.array(whole)

    def rows(self, population: Population) -> NDArray[np.float64]:
        """float64 (n, size) of candidates; where to start an algorithm from."""
        parts = [
            population[key].reshape(len(population), variable.size).astype(np.float64)
            for key, variable in self.space.variables.items()
        ]
        return np.concatenate(parts, axis=1)

    def population(self, rows: Any) -> Population:
        """Valid candidates next to any rows (n, size) or one row (size,).

        Codes and integers are rounded, everything else is left to `Space.repair`. Equal rows
        always give equal candidates.
        """
        table = np.atleast_2d(np.asarray(rows, dtype=np.float64))
        if table.shape[1] != len(self.low) or not np.isfinite(table).all():
            raise ConfigError(
                f"rows of shape {table.shape}; allowed: (n, {len(self.low)}), finite numbers"
            )
        table = np.clip(np.where(self.whole, np.rint(table), table), self.low, self.high)
        # Repair may have to draw: from numbers that are a function of the row.
        words = np.ascontiguousarray(table + 0.0).view(np.uint64)
        u = derived(words, 0, self.space.repair_width)
        columns, start = {}, 0
        for key, variable in self.space.variables.items():
            block = table[:, start : start + variable.size]
            columns[key] = block.reshape(len(table), *variable.shape).astype(variable.dtype)
            start += variable.size
        return self.space.repair(self.space.canonicalise(Population(columns)), u)


def as_problem(
    space: Space,
    evaluator: Callable[..., Any] | Evaluator | EvaluatorFunction[..., Any],
    *,
    direction: Literal["min", "max"] = "min",
    objectives: Mapping[str, Literal["min", "max"]] | None = None,
    fidelity: int = -1,
) -> Problem:
    """A `pymoo.core.problem.Problem` over a space; whole populations are evaluated at once.

    The problem's variables are the columns of `Codes`; `problem.codes` is that codec,
    `problem.population(X)` gives the candidates that rows stand for, `problem.decode(X)` their
    plans, and `problem.start(n, seed)` rows of valid random candidates to sample from. F has the
    objectives, negated where more is better; G the outcome constraints,
    zero where kept and in units of their scale where broken.
    A failed candidate has the loss 1e30 and breaks every constraint by as much. Repeated rows are
    evaluated once per call.

    Args:
        space: see `Codes`.
        evaluator: as for `searchlab.search`: a function, a decorated one, or an Evaluator.
        direction: of a plain function.
        objectives: of a plain function that returns several; name -> direction.
        fidelity: index into the evaluator's fidelities.

    Raises:
        ConfigError: a variable without labels or range, or an unknown fidelity.
    """
    from pymoo.core.problem import Problem

    judge = as_evaluator(space, evaluator, direction, objectives, "pymoo")
    codes = Codes(space)
    if not -len(judge.fidelities) <= fidelity < len(judge.fidelities):
        raise ConfigError(f"fidelity {fidelity}; allowed: 0..{len(judge.fidelities) - 1}")
    constraints = constraints_of(judge)
    judge.setup()

    class SpaceProblem(Problem):  # type: ignore[misc]
        """Candidates of one space under one evaluator."""

        def __init__(self) -> None:
            super().__init__(
                n_var=len(codes.low),
                n_obj=len(judge.objectives),
                n_ieq_constr=len(constraints),
                xl=codes.low,
                xu=codes.high,
            )
            self.codes = codes
            self.space = space
            self.evaluated = 0

        def population(self, rows: Any) -> Population:
            """The candidates that rows stand for."""
            return codes.population(rows)

        def decode(self, rows: Any) -> list[dict[str, Any]]:
            """The plans that rows stand for, one dict each."""
            return space.decode(codes.population(rows))

        def start(self, n: int, seed: int = 0) -> NDArray[np.float64]:
            """Rows of n random valid candidates: a `sampling` for any algorithm."""
            from searchlab.uniforms import uniforms

            return codes.rows(space.sample(uniforms(seed, 0, 0, n, space.sample_width)))

        def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            population = codes.population(x)
            keys = space.keys(population)
            first = {key: row for row, key in reversed(list(enumerate(keys)))}
            rows = sorted(first.values())
            jobs = Jobs(
                ids=np.arange(self.evaluated, self.evaluated + len(rows)),
                population=population.take(rows),
                keys=tuple(keys[row] for row in rows),
                fidelity=fidelity % len(judge.fidelities),
            )
            answers = judge.evaluate(jobs)
            self.evaluated += len(rows)
            place = {keys[row]: at for at, row in enumerate(rows)}
            at = np.array([place[key] for key in keys])
            values = losses(answers, judge.objectives)
            failed = np.isinf(values).any(axis=1)
            out["F"] = np.where(failed[:, None], FAILED, values)[at]
            if constraints:
                assert answers.constraints is not None
                broken = np.stack(
                    [
                        part.excess(answers.constraints[:, column])
                        for column, part in enumerate(constraints)
                    ],
                    axis=1,
                )
                bad = failed[:, None] | ~np.isfinite(broken)
                out["G"] = np.where(bad, FAILED, broken)[at]

    return SpaceProblem()
