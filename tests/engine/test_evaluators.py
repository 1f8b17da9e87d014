"""Evaluators and executors: the conformance suites, and what a Python function may be."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import searchlab.evaluators
from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluator import (
    Evaluator,
    EvaluatorFunction,
    FunctionEvaluator,
    Objective,
    evaluator,
    identity_digest,
    losses,
)
from searchlab.evaluators.sampling import SamplingEvaluator
from searchlab.executors import Chunk, evaluate_chunk
from searchlab.experiments.solver_schedule_problems import mixture_problem
from searchlab.population import FAILED, OK, Evaluations, Population
from searchlab.space import Space
from searchlab.spaces.solver_schedule.families import fixed_family
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace
from searchlab.testing.evaluator import EvaluatorSuite, jobs_of
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Real

ROOT = Path(__file__).resolve().parents[2]


def toy_space() -> Space:
    return Space(x=Real(0, 1), kind=Choice(("a", "b")))


def toy(x: float, kind: str) -> float:
    return x * x + (kind == "a")


def toy_batch(plans: list[dict[str, Any]], fidelity: str, seed: int) -> list[float]:
    return [plan["x"] / (1 + seed) for plan in plans]


def toy_columns(columns: dict[str, Any], fidelity: str, seed: int) -> Any:
    return np.stack([columns["x"], columns["kind"]], axis=1)


class TestPlainFunction(EvaluatorSuite):
    @pytest.fixture
    def space(self) -> Space:
        return toy_space()

    @pytest.fixture
    def evaluator(self, space: Space) -> Evaluator:
        return FunctionEvaluator(toy, space)


class TestBatchFunction(EvaluatorSuite):
    @pytest.fixture
    def space(self) -> Space:
        return toy_space()

    @pytest.fixture
    def evaluator(self, space: Space) -> Evaluator:
        return evaluator(fidelities={"low": 0.1, "high": 1}, version=1)(toy_batch).build(space)


class TestColumnFunction(EvaluatorSuite):
    @pytest.fixture
    def space(self) -> Space:
        return toy_space()

    @pytest.fixture
    def evaluator(self, space: Space) -> Evaluator:
        made = evaluator(objectives={"a": "min", "b": "max"}, columns=True)(toy_columns)
        return made.build(space)


def sampling_space() -> SolverScheduleSpace:
    problem = mixture_problem()
    end = problem.noise.end  # type: ignore[attr-defined]
    return SolverScheduleSpace(problem.noise, ScheduleRange((4, 6), (end, end), endings=("stop",)))


def known_points(space: SolverScheduleSpace) -> Population:
    family = fixed_family(space.noise, 5, family="mixture")
    return space.of_schedules(list(family.values())[::40][:5])


class TestSampling(EvaluatorSuite):
    rows = 6

    @pytest.fixture
    def space(self) -> Space:
        return sampling_space()

    @pytest.fixture
    def evaluator(self, space: Space) -> Evaluator:
        return SamplingEvaluator(space, mixture_problem(), samples=(16, 64), held_out=64)

    @pytest.fixture
    def population(self, space: SolverScheduleSpace) -> Population:  # type: ignore[override]
        drawn = space.sample(uniforms(5, 0, 0, 3, space.sample_width))
        return Population.concat([drawn, known_points(space)])


def _found(package: Any, needed: tuple[str, ...]) -> set[type]:
    """Public classes of a package's modules that have these methods, protocols apart."""
    out = set()
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        for cls in vars(module).values():
            own = inspect.isclass(cls) and cls.__module__ == module.__name__
            concrete = own and not getattr(cls, "_is_protocol", False)
            if concrete and all(callable(getattr(cls, name, None)) for name in needed):
                out.add(cls)
    return out


def test_every_evaluator_has_a_suite() -> None:
    found = _found(searchlab.evaluators, ("evaluate", "identity", "setup"))
    suites = {SamplingEvaluator: TestSampling}
    elsewhere = {
        "CommandEvaluator": "evaluators/test_command.py",
        "FlashEval": "evaluators/test_flasheval.py",
        "MergedCommandEvaluator": "evaluators/test_merged_model.py",
        "MergedModelEvaluator": "evaluators/test_merged_model.py",
        "PipelineEvaluator": "evaluators/test_pipeline_suite.py",
        "TableEvaluator": "evaluators/test_table.py",
    }
    # Values of "told" candidates come from outside: it evaluates nothing that could be held.
    found = {cls for cls in found if cls.__name__ != "ToldEvaluator"}
    assert {cls.__name__ for cls in found} == {*elsewhere, *(cls.__name__ for cls in suites)}
    for name, path in elsewhere.items():
        text = (Path(__file__).parents[1] / path).read_text("utf-8")
        assert name in text
        assert "(EvaluatorSuite)" in text


def sampled_digest() -> str:
    space = sampling_space()
    made = SamplingEvaluator(space, mixture_problem(), samples=(16,), held_out=64)
    values = made.evaluate(jobs_of(space, known_points(space))).values
    return hashlib.blake2b(values.tobytes()).hexdigest()


def test_another_process_finds_the_same_values() -> None:
    code = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('t', {str(Path(__file__))!r})\n"
        "m = u.module_from_spec(spec); spec.loader.exec_module(m); print(m.sampled_digest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip() == sampled_digest()


# -- functions as evaluators --------------------------------------------------------------------


def _score(function: Any, **more: Any) -> Evaluations:
    space = toy_space()
    rows = space.population([{"x": 0.5, "kind": "a"}, {"x": 0.25, "kind": "b"}])
    return FunctionEvaluator(function, space, **more).evaluate(jobs_of(space, rows))


def test_a_plain_function_gets_decoded_values() -> None:
    assert _score(toy).values[:, 0].tolist() == [1.25, 0.0625]


def test_one_candidates_failure_is_its_own() -> None:
    def picky(x: float, kind: str) -> float:
        if kind == "a":
            raise RuntimeError("no a")
        return x

    got = _score(picky)
    assert got.state is not None
    assert got.state.tolist() == [FAILED, OK]
    assert got.reason == ["RuntimeError: no a", ""]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "None"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        ("much", "numbers"),
        ((1.0, 2.0), "objectives"),
        ({}, "returned no value"),
    ],
)
def test_odd_answers_are_failures_with_a_reason(answer: Any, reason: str) -> None:
    got = _score(lambda x, kind: answer)
    assert got.state is not None
    assert got.state.tolist() == [FAILED, FAILED]
    assert got.reason is not None
    assert all(reason in text for text in got.reason)


def test_several_objectives_from_one_function() -> None:
    got = _score(lambda x, kind: (x, -x), objectives=(Objective("a"), Objective("b", "max")))
    assert got.values.tolist() == [[0.5, -0.5], [0.25, -0.25]]
    assert losses(got, (Objective("a"), Objective("b", "max"))).tolist() == [
        [0.5, 0.5],
        [0.25, 0.25],
    ]


def test_an_answer_of_another_type_is_a_failure() -> None:
    class Odd(FunctionEvaluator):
        def evaluate(self, jobs: Any) -> Any:
            return None

    space = toy_space()
    jobs = jobs_of(space, space.population([{"x": 0.5, "kind": "a"}]))
    done = evaluate_chunk(Odd(toy, space), Chunk(jobs))
    assert done.evaluations.reason == [
        "EvaluationError: evaluator returned NoneType; allowed: Evaluations"
    ]


def test_the_decorator_leaves_the_function_as_it_was() -> None:
    @evaluator(objectives={"nll": "max"}, reproducibility="batch", version=3)
    def score(plans: list[int], fidelity: str, seed: int = 4) -> list[int]:
        """Doubles."""
        return [2 * plan + seed for plan in plans]

    assert isinstance(score, EvaluatorFunction)
    assert score([1, 2], "full") == [6, 8]
    assert score.__name__ == "score"  # type: ignore[attr-defined]
    assert score.__doc__ == "Doubles."
    built = score.build(toy_space())
    assert (built.objectives, built.reproducibility) == ((Objective("nll", "max"),), "batch")
    assert built.identity()["version"] == 3


@pytest.mark.parametrize(
    "options",
    [
        {"reproducibility": "sure"},
        {"objectives": {}},
        {"fidelities": {}},
        {"objectives": {"a": "up"}},
    ],
)
def test_the_decorator_refuses_wrong_settings(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        evaluator(**options)(toy_batch)


def test_identities_differ_where_values_may() -> None:
    space = toy_space()
    digests = {
        identity_digest(made)
        for made in (
            FunctionEvaluator(toy, space),
            FunctionEvaluator(toy, space, private="run a"),
            FunctionEvaluator(toy, space, version=1),
            FunctionEvaluator(toy, space, version=2),
            FunctionEvaluator(toy, space, version=2, seed=1),
            FunctionEvaluator(toy, space, version=2, objectives=(Objective("value", "max"),)),
        )
    }
    assert len(digests) == 6


def test_an_identity_that_is_not_json_is_refused() -> None:
    made = FunctionEvaluator(toy, toy_space(), version={1})  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="not JSON"):
        identity_digest(made)
