"""Fronts: the conformance suite, survival, hypervolume, and whole searches with two objectives."""

from __future__ import annotations

import pytest

from searchlab.algorithms import NSGA2, NSGA3
from searchlab.testing.algorithm import AlgorithmSuite, Build


class TestNSGA2(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: NSGA2(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=6, population=8
        )


class TestNSGA2InGenerations(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: NSGA2(
            space,
            seed=seed,
            first_id=first_id,
            seeds=seeds,
            n_random=6,
            population=8,
            quantum=8,
            every=8,
        )


class TestNSGA3(AlgorithmSuite):
    @pytest.fixture
    def build(self) -> Build:
        return lambda space, seed, first_id, seeds: NSGA3(
            space, seed=seed, first_id=first_id, seeds=seeds, n_random=6, population=8, every=5
        )
