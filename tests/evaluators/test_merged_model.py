"""Scoring mixes of checkpoints: functions, models, samples, losses and commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from searchlab.errors import ConfigError, DataError, EvaluationError
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE, Evaluator, Objective
from searchlab.evaluators.generated_samples import NoiseLevelLoss
from searchlab.evaluators.merged_command import MergedCommandEvaluator
from searchlab.evaluators.merged_model import FunctionScore, MergedModelEvaluator
from searchlab.experiments.checkpoint_mix_problems import Ring, digits_loss, ring_score, train_ring
from searchlab.population import FAILED, OK, Population
from searchlab.space import Space
from searchlab.spaces.checkpoint_mix import CheckpointBank, CheckpointMixSpace, find_checkpoints
from searchlab.spaces.checkpoint_mix.baselines import named
from searchlab.testing.evaluator import EvaluatorSuite, jobs_of


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> CheckpointBank:
    folder = tmp_path_factory.mktemp("ring")
    train_ring(folder, steps=160, after=40, every=20)
    return CheckpointBank(find_checkpoints([folder]))


@pytest.fixture
def space(bank: CheckpointBank) -> CheckpointMixSpace:
    return CheckpointMixSpace(bank.names)


def mixes(space: CheckpointMixSpace, n: int) -> Population:
    rows = list(named(len(space.checkpoints)).values())
    return space.of_coefficients(np.stack(rows[:n]))


def first_weight(state: dict[str, Tensor]) -> float:
    return float(state["net.0.weight"][0, 0])


class TestFunction(EvaluatorSuite):
    @pytest.fixture
    def space(self, bank: CheckpointBank) -> Space:
        return CheckpointMixSpace(bank.names)

    @pytest.fixture
    def population(self, space: Space) -> Population:
        assert isinstance(space, CheckpointMixSpace)
        return mixes(space, self.rows)

    @pytest.fixture
    def evaluator(self, space: Any, bank: CheckpointBank) -> Evaluator:
        return MergedModelEvaluator(space, bank, FunctionScore(first_weight, "first"))


class TestSamples(TestFunction):
    @pytest.fixture
    def evaluator(self, space: Any, bank: CheckpointBank) -> Evaluator:
        return MergedModelEvaluator(space, bank, ring_score(samples=(32, 64), held_out=64))


def evaluated(evaluator: Any, population: Population, replicate: int = 0) -> Any:
    return evaluator.evaluate(jobs_of(evaluator.space, population, replicate=replicate))


def test_a_value_does_not_depend_on_the_batch(
    bank: CheckpointBank, space: CheckpointMixSpace
) -> None:
    evaluator = MergedModelEvaluator(space, bank, ring_score(samples=(64,), held_out=64))
    population = mixes(space, 8)
    whole = evaluated(evaluator, population).values
    for row in (0, 3, 7):
        assert evaluated(evaluator, population.take([row])).values == whole[row]
    report = evaluated(evaluator, population, REPORT_REPLICATE).values
    assert (report != whole).all()


def test_models_are_loaded_strictly(bank: CheckpointBank, space: CheckpointMixSpace) -> None:
    def of_model(model: nn.Module, seed: int) -> float:
        assert isinstance(model, Ring)
        assert not model.training
        return first_weight(model.state_dict()) + 1e-9 * (seed % 7919)

    score = FunctionScore(of_model, "model", model=Ring)
    evaluator = MergedModelEvaluator(space, bank, score)
    population = mixes(space, 3)
    values = evaluated(evaluator, population).values[:, 0]
    by_state = MergedModelEvaluator(space, bank, FunctionScore(first_weight, "f"))
    np.testing.assert_allclose(values, evaluated(by_state, population).values[:, 0], atol=1e-5)
    assert (evaluated(evaluator, population, SELECTION_REPLICATE).values[:, 0] != values).all()
    wrong = FunctionScore(of_model, "model", model=lambda: nn.Linear(2, 2))
    with pytest.raises(DataError, match="not of the model"):
        evaluated(MergedModelEvaluator(space, bank, wrong), population)


def test_failures_are_results(bank: CheckpointBank, space: CheckpointMixSpace) -> None:
    def moody(state: dict[str, Tensor]) -> Any:
        if torch.equal(state["net.0.weight"], bank.sources[-1].tensor("net.0.weight")):
            raise RuntimeError("no")
        return 1.0

    found = evaluated(MergedModelEvaluator(space, bank, FunctionScore(moody, "m")), mixes(space, 2))
    assert found.state.tolist() == [FAILED, OK]
    assert found.reason[0] == "RuntimeError: no"
    for answer, text in ((None, "returned None"), ([1.0, 2.0], "1 number"), ({"x": 1}, "no value")):
        score = FunctionScore(lambda s, a=answer: a, "f")
        found = evaluated(MergedModelEvaluator(space, bank, score), mixes(space, 1))
        assert found.state.tolist() == [FAILED]
        assert text in found.reason[0]


def test_a_checkpoint_that_is_not_finite_fails_its_mixes_only(tmp_path: Path) -> None:
    for step in range(4):
        state = {"w": torch.full((70,), float(step)), "v": torch.ones(3) * step}
        if step == 1:
            state["v"][2] = float("inf")
        save_file(state, tmp_path / f"step_{step}.safetensors")
    bank = CheckpointBank(find_checkpoints([tmp_path]))
    space = CheckpointMixSpace(bank.names)
    rows = np.array([[0.5, 0, 0.5, 0], [0.25] * 4, [0, 0, 0, 1]])
    evaluator = MergedModelEvaluator(space, bank, FunctionScore(lambda s: s["v"][2], "v"))
    found = evaluated(evaluator, space.of_coefficients(rows))
    assert found.state.tolist() == [OK, FAILED, OK]
    assert "step_1" in found.reason[1]
    assert found.values[[0, 2], 0].tolist() == [1.0, 3.0]


def test_loss_at_fixed_noise_levels() -> None:
    def loss(state: Any, data: Tensor, noise: Tensor, level: float) -> Tensor:
        return ((data + level * noise - state["guess"]) ** 2).mean(dim=1)

    data = torch.arange(30.0)[:, None].repeat(1, 4)
    score = NoiseLevelLoss(loss, data, (0.0, 1.0), {"toy": 1}, samples=(10,), held_out=10)
    state = {"guess": torch.zeros(4)}
    values, items = score.score(state, 0, 0)
    assert items.shape == (10,)
    np.testing.assert_allclose(values[0], items.mean(), rtol=1e-6)
    assert score.score(state, 0, 0)[0] == values
    own = {r: score.score(state, 0, r)[1] for r in (0, SELECTION_REPLICATE, REPORT_REPLICATE)}
    assert len({row.tobytes() for row in own.values()}) == 3
    with pytest.raises(ConfigError, match="levels"):
        NoiseLevelLoss(loss, data, (), {})
    assert digits_loss().identity()["levels"]


SCRIPT = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
model, out = Path(sys.argv[1]), sys.argv[2]
state = load_file(model / "merged.safetensors")
value = float(state["net.0.weight"][0, 0])
json.dump({"objectives": {"first": value}}, open(out, "w"))
"""


COUNTING = 'printf \'{"objectives": {"size": %s}}\' $(wc -c < {model}/merged.safetensors) > {out}'


class TestMergedCommand(EvaluatorSuite):
    """The size of the merged file, which all mixes share."""

    rows = 3

    @pytest.fixture
    def space(self, bank: CheckpointBank) -> Space:
        return CheckpointMixSpace(bank.names)

    @pytest.fixture
    def population(self, space: Space) -> Population:
        assert isinstance(space, CheckpointMixSpace)
        return mixes(space, self.rows)

    @pytest.fixture
    def evaluator(
        self, space: Any, bank: CheckpointBank, tmp_path: Path
    ) -> Iterator[MergedCommandEvaluator]:
        made = MergedCommandEvaluator(
            space, COUNTING, (Objective("size"),), bank=bank, folder=tmp_path, by_shell=True
        )
        yield made
        made.close()


def test_a_command_reads_merged_weights(
    tmp_path: Path, bank: CheckpointBank, space: CheckpointMixSpace
) -> None:
    script = tmp_path / "score.py"
    script.write_text(SCRIPT)
    command = f"{sys.executable} {script} {{model}} {{out}}"
    objective = (Objective("first"),)
    evaluator = MergedCommandEvaluator(space, command, objective, bank=bank, folder=tmp_path)
    population = mixes(space, 1)
    try:
        found = evaluated(evaluator, population)
    finally:
        evaluator.close()
    direct = MergedModelEvaluator(space, bank, FunctionScore(first_weight, "f"))
    assert found.values == evaluated(direct, population).values
    assert not (tmp_path / "candidates" / "0" / "model").exists()
    with pytest.raises(ConfigError, match="model"):
        MergedCommandEvaluator(space, "x {plan} {out}", objective, bank=bank)
    with pytest.raises(ConfigError, match="needs a bank"):
        MergedCommandEvaluator(space, command, objective)


def test_settings_of_scores() -> None:
    for settings in ({"samples": (5, 3)}, {"samples": (1,)}, {"held_out": 0}):
        with pytest.raises(ConfigError):
            ring_score(**settings)  # type: ignore[arg-type]
    score = ring_score(samples=(16,), held_out=16)
    broken = {n: torch.full_like(t, float("nan")) for n, t in Ring().state_dict().items()}
    with pytest.raises(EvaluationError, match="not finite"):
        score.score(broken, 0, 0)


def test_generators_of_the_splits_differ(bank: CheckpointBank, space: CheckpointMixSpace) -> None:
    """Those of torch look at the lower 32 bits of a seed only."""
    seen: list[float] = []

    def draw(state: dict[str, Tensor], seed: int) -> float:
        seen.append(float(torch.rand(1, generator=torch.Generator().manual_seed(seed))))
        return seen[-1]

    score = FunctionScore(draw, "draw")
    places = [0, 1, SELECTION_REPLICATE, REPORT_REPLICATE, REPORT_REPLICATE + 1]
    for replicate in places:
        score.score({}, 0, replicate)
    assert len(set(seen)) == len(places)
    score.score({}, 0, REPORT_REPLICATE)
    assert seen[-1] == seen[3]


class Tied(nn.Module):
    """An embedding that is the output layer too, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_tensors_may_be_missing_and_no_others() -> None:
    score = FunctionScore(lambda model: float(model.head.weight.detach().sum()), "sum", model=Tied)
    weights = torch.arange(15.0).view(5, 3)
    assert score.score({"embed.weight": weights}, 0, 0)[0] == [105.0]
    with pytest.raises(DataError, match=r"they lack 'embed.weight' and 1 more"):
        score.check({})
    with pytest.raises(DataError, match="they have 'more'"):
        score.check({"embed.weight": weights, "more": weights})
