"""Guided search: fits and predictions take one thread of the linear algebra library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from searchlab.algorithms.base import Told
from searchlab.algorithms.guided import Guided
from searchlab.predictors.ridge import Ridge
from searchlab.space import Space
from searchlab.variables import Choice

SPACE = Space(x=Choice(range(6), shape=(12,)))
METHODS = ("fit", "draw", "predict")


def threads() -> int:
    """The most that any of the libraries would use."""
    return max(part["num_threads"] for part in threadpool_info() if part["user_api"] == "blas")


def test_fits_and_predictions_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {name: set() for name in METHODS}

    def watched(name: str) -> Any:
        method = getattr(Ridge, name)

        def watching(*args: Any, **options: Any) -> Any:
            seen[name].add(threads())
            return method(*args, **options)

        return watching

    for name in METHODS:
        monkeypatch.setattr(Ridge, name, watched(name))
    algorithm = Guided(SPACE, pool=20, predictor="ridge", guard="always")
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        for i in range(14):
            jobs = algorithm.ask(i, 1)
            losses = np.array([[float(i)]])
            told = Told(jobs.ids, jobs.population, losses, np.zeros(1), jobs.predicted)
            algorithm.tell(told)
        after = threads()
    assert algorithm.final() is not None
    assert before == after == 2
    assert seen == {name: {1} for name in METHODS}
