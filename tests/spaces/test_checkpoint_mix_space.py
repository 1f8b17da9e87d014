"""Mixes as spaces: sums of one, groups, main directions, and the operators of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from searchlab.algorithms.cma import CMA
from searchlab.config import Answers
from searchlab.errors import ConfigError, SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.checkpoint_mix import CheckpointBank, CheckpointMixSpace, MixSubspace
from searchlab.spaces.checkpoint_mix.baselines import ema, named
from searchlab.spaces.checkpoint_mix.sources import find_checkpoints
from searchlab.spaces.checkpoint_mix.space import AdoptMixes
from searchlab.spaces.checkpoint_mix.subspace import gram_matrix
from searchlab.spaces.checkpoint_mix.variation import CoefficientVariation, project
from searchlab.testing.space import SpaceSuite
from searchlab.uniforms import uniforms

NAMES = tuple(f"step_{i}" for i in range(7))


class TestAffineMixes(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return CheckpointMixSpace(NAMES)


class TestGroupedMixes(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return CheckpointMixSpace(NAMES, groups=("early", "late"))


class TestSimplexMixes(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return CheckpointMixSpace(NAMES, constraint="simplex")


def gram(k: int = 7) -> Any:
    rows = np.random.default_rng(0).normal(size=(k, 30)) * np.geomspace(3, 0.1, 30)
    return rows @ rows.T


class TestMainDirections(SpaceSuite):
    @pytest.fixture
    def space(self) -> Space:
        return MixSubspace(NAMES, gram(), rank=3)


def test_children_keep_the_sum() -> None:
    space = CheckpointMixSpace(NAMES, groups=("a", "b"))
    rows = np.stack(list(named(7).values()))
    parents = space.of_coefficients(rows)
    variation = CoefficientVariation()
    u = uniforms(0, 5, 0, 5000, variation.width(space))
    first = parents.take(np.arange(5000) % len(parents))
    second = parents.take((np.arange(5000) * 7 + 3) % len(parents))
    children = variation.vary(space, first, second, u)
    assert np.abs(children["alpha"].sum(axis=-1) - 1).max() <= 1e-12
    assert (children["alpha"] < 0).any()
    assert space.is_feasible(children).all()
    alone = variation.vary(space, first.take([7]), second.take([7]), u[7:8])
    assert alone.equals(children.take([7]))


def test_the_projection_is_the_nearest_point() -> None:
    np.testing.assert_allclose(project(np.ones((1, 4))), [[0.25] * 4])
    rows = np.random.default_rng(0).normal(size=(10_000, 40)) * 5
    moved = project(rows)
    assert np.abs(moved.sum(axis=1) - 1).max() <= 1e-12
    assert np.abs(project(moved) - moved).max() <= 1e-13
    assert np.ptp(moved - rows, axis=1).max() <= 1e-12


def test_directions_are_those_of_the_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(500, generator=generator)
    for step in range(6):
        noise = 0.01 * torch.randn(500, generator=generator)
        save_file({"w": step * line + noise}, tmp_path / f"step_{step}.safetensors")
    bank = CheckpointBank(find_checkpoints([tmp_path]))
    space = MixSubspace(bank.names, gram_matrix(bank), rank=2, origin=ema(6, 0.5))
    assert space.share[0] > 0.99
    one = space.coefficients(Population({"z": np.array([[1.0, 0.0], [0.0, 0.0]])}))[:, 0]
    np.testing.assert_allclose(one[1], ema(6, 0.5), atol=1e-15)
    moved = (one[0] - one[1]) @ np.arange(6)
    assert abs(moved) == pytest.approx(np.arange(6).std(), rel=1e-2)
    np.testing.assert_allclose(one.sum(axis=1), 1, atol=1e-12)
    answers = Answers(
        space,
        Population({"z": np.array([[1.0, 0.0], [0.0, 0.0]])}),
        ("cma", "cma"),
        np.array([[2.0], [1.0]]),
    )
    seeds = AdoptMixes(1)(answers, CheckpointMixSpace(bank.names))
    np.testing.assert_allclose(seeds.population["alpha"], [ema(6, 0.5)], atol=1e-12)


def test_cma_starts_at_the_best_average_with_small_steps() -> None:
    space = CheckpointMixSpace(NAMES)
    algorithm = CMA(space, sigma=0.05 / space.unit)
    jobs = algorithm.ask(0, 64)
    spread = jobs.population["alpha"].std(axis=0).mean()
    assert 0.03 < spread < 0.07


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CheckpointMixSpace(("one",)), "two or more"),
        (lambda: CheckpointMixSpace(NAMES, groups=("a", "a")), "repeat"),
        (lambda: CheckpointMixSpace(NAMES, constraint="free"), "affine, simplex"),  # type: ignore[arg-type]
        (lambda: CheckpointMixSpace(NAMES).of_coefficients(np.ones((1, 7))), "sum 7"),
        (lambda: CheckpointMixSpace(NAMES).of_coefficients(np.ones((1, 6))), "shape"),
        (lambda: MixSubspace(NAMES, gram(), rank=7), "1 to 6"),
        (lambda: MixSubspace(NAMES, gram(6), rank=2), "7, 7"),
    ],
)
def test_bad_settings_of_spaces(make: Any, text: str) -> None:
    with pytest.raises(SpaceError, match=text):
        make()


def test_bad_settings_of_the_operator() -> None:
    with pytest.raises(ConfigError, match="rate 0"):
        CoefficientVariation(rate=0)
    with pytest.raises(ConfigError, match="sigma -1"):
        CoefficientVariation(sigma=-1)
