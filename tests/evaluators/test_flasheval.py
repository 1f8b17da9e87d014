"""FlashEval's tables: blocks of common prompts, their noise, and the search on them."""

from __future__ import annotations

import csv
import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import ConfigError, DataError, SearchlabError
from searchlab.evaluator import Evaluator, identity_digest
from searchlab.evaluators.flasheval import DATASETS, METRICS, FlashEval, flasheval_folder
from searchlab.search import run
from searchlab.space import Space
from searchlab.testing.evaluator import EvaluatorSuite, jobs_of

DATA = Path(os.environ.get("SEARCHLAB_DATA", "/nowhere")) / "flasheval"
needs_data = pytest.mark.skipif(
    not (DATA / "configs.csv").is_file(), reason="no flasheval in $SEARCHLAB_DATA"
)


def write_twin(folder: Path, prompts: int = 120) -> None:
    """Tables of the release's shape with made-up scores, for machines without them."""
    generator = np.random.default_rng(0)
    settings = [
        (model, solver, steps, bits)
        for model, solver, steps, bits in itertools.product(
            ("a", "b", "c"), ("DDIM", "PNDM", "DPM"), (10, 20, 50), (32, 8, 6)
        )
        if not (solver == "DPM" and steps == 50) and not (solver == "PNDM" and bits < 32)
    ]
    with open(folder / "configs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["config_id", "model", "solver", "steps", "weight_bits"])
        writer.writerows((number, *setting) for number, setting in enumerate(settings))
    quality = np.array([[len(m), s / 50, b / 32] for m, _, s, b in settings]).sum(axis=1)
    for dataset, part in (("diffusiondb", slice(None)), ("coco", slice(0, 20))):
        ids = np.arange(len(settings))[part]
        noise = generator.normal(size=(4, len(settings), prompts)) + generator.normal(size=prompts)
        scores = (quality[:, None] + noise)[:, part].astype(np.float16)
        np.savez(
            folder / f"{dataset}.npz",
            scores=scores,
            config_id=ids.astype(np.int16),
            prompt_id=np.arange(prompts, dtype=np.int32),
            metrics=np.array(["HPS", "CLIP", "Aesthetic", "ImageReward"]),
        )


LEVELS = (10, 30, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_twin(tmp_path)
    return tmp_path


class TestFlashEval(EvaluatorSuite):
    @pytest.fixture
    def evaluator(self, folder: Path) -> Evaluator:
        return FlashEval(folder, prompts=LEVELS, trade=True, pilot=20)

    @pytest.fixture
    def space(self, evaluator: Any) -> Space:
        space: Space = evaluator.space
        return space


def every(evaluator: FlashEval, **more: Any) -> Any:
    return evaluator.evaluate(jobs_of(evaluator.space, evaluator.space.enumerate(), **more))


def test_values_are_means_over_common_prompts(folder: Path) -> None:
    evaluator = FlashEval(folder, metric="HPS", prompts=LEVELS)
    with np.load(folder / "diffusiondb.npz") as file:
        scores = file["scores"][0].astype(np.float64)
    rows = evaluator.rows_of(evaluator.space.enumerate())
    for level, number in enumerate((10, 30, 120)):
        columns = evaluator.block(number, 0)
        assert len(set(columns.tolist())) == number
        found = every(evaluator, fidelity=level)
        part = scores[rows][:, columns]
        assert found.values[:, 0] == pytest.approx(part.mean(axis=1))
        assert found.std_error[:, 0] == pytest.approx(part.std(axis=1, ddof=1) / np.sqrt(number))
    assert evaluator.truth()[rows] == pytest.approx(scores[rows].mean(axis=1))


def test_blocks_lie_in_one_another_and_replicates_do_not_overlap(folder: Path) -> None:
    evaluator = FlashEval(folder, prompts=LEVELS)
    assert set(evaluator.block(10, 0)) < set(evaluator.block(30, 0)) < set(evaluator.block(120, 0))
    seen = np.concatenate([evaluator.block(30, replicate) for replicate in range(4)])
    assert sorted(seen.tolist()) == list(range(120))
    assert evaluator.block(30, 4).tolist() != evaluator.block(30, 0).tolist()  # a new order
    again = FlashEval(folder, prompts=LEVELS, seed=1)
    assert again.block(30, 0).tolist() != evaluator.block(30, 0).tolist()
    top = [every(evaluator, fidelity=2, replicate=r).values for r in (0, 1, 2**20)]
    assert (top[0] == top[1]).all()
    assert (top[0] == top[2]).all()


def test_cost_and_pilot_are_signals(folder: Path) -> None:
    evaluator = FlashEval(folder, prompts=LEVELS, pilot=20)
    names = ["cost", "HPS on 20", "Aesthetic on 20", "CLIP on 20"]
    assert [signal.name for signal in evaluator.signals] == names
    population = evaluator.space.enumerate()
    plans = evaluator.space.decode(population)
    columns = evaluator.static_signals(population)
    speed = {32: 1.0, 8: 0.6, 6: 0.5}
    assert columns[:, 0].tolist() == [(p["steps"] + 2) * speed[p["weight_bits"]] for p in plans]
    assert len(np.unique(columns[:, 1])) > 30
    traded = every(FlashEval(folder, trade=True, prompts=LEVELS), fidelity=1)
    assert traded.values[:, 1].tolist() == columns[:, 0].tolist()
    assert (traded.std_error[:, 1] == 0).all()


def test_the_other_dataset_is_a_signal_where_it_has_the_setting(folder: Path) -> None:
    evaluator = FlashEval(folder, metric="HPS", prompts=LEVELS, elsewhere=True)
    assert [signal.name for signal in evaluator.signals] == ["cost", "HPS on coco"]
    coco = FlashEval(folder, dataset="coco", metric="HPS", prompts=LEVELS)
    settings = evaluator.space.enumerate()
    known = dict(zip(coco.config_ids.tolist(), coco.truth().tolist(), strict=True))
    column = evaluator.static_signals(settings)[:, 1]
    ids = evaluator.config_ids[evaluator.rows_of(settings)].tolist()
    assert np.isnan(column).sum() == len(ids) - len(known)
    assert column[~np.isnan(column)].tolist() == [known[i] for i in ids if i in known]
    assert identity_digest(evaluator) != identity_digest(
        FlashEval(folder, metric="HPS", prompts=LEVELS)
    )


def test_identity_and_space(folder: Path) -> None:
    one = FlashEval(folder, prompts=LEVELS)
    same: list[Any] = [{"metric": "CLIP"}, {"seed": 1}, {"pilot": 5}]
    for more in same:
        other = FlashEval(folder, prompts=LEVELS, **more)
        assert identity_digest(other) != identity_digest(one)
        assert other.space.fingerprint == one.space.fingerprint
    assert FlashEval(folder, dataset="coco", prompts=LEVELS).space.count() == 20
    again = pickle.loads(pickle.dumps(one))
    assert (every(again).values == every(one).values).all()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"dataset": "imagenet"}, "dataset 'imagenet'; allowed: diffusiondb, coco"),
        ({"metric": "FID"}, "metric 'FID'; allowed: ImageReward"),
        ({"prompts": ()}, r"prompts \[\]; allowed: ascending, 1 to 120"),
        ({"prompts": (30, 10)}, "allowed: ascending"),
        ({"prompts": (500,)}, "1 to 120"),
        ({"pilot": 121}, "pilot of 121 prompts; allowed: 0 to 120"),
    ],
)
def test_bad_settings_are_named(folder: Path, more: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        FlashEval(folder, **{"prompts": LEVELS, **more})


def test_bad_folders_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEARCHLAB_DATA", raising=False)
    with pytest.raises(ConfigError, match="SEARCHLAB_DATA"):
        flasheval_folder()
    with pytest.raises(ConfigError, match=r"one with configs\.csv"):
        FlashEval(folder / "none")
    monkeypatch.setenv("SEARCHLAB_DATA", str(folder.parent))
    with pytest.raises(ConfigError, match="allowed: one with"):
        flasheval_folder()
    (folder / "coco.npz").write_bytes(b"PK\x03\x04 not a table")
    with pytest.raises(DataError, match=r"coco\.npz' is no table of FlashEval"):
        FlashEval(folder, dataset="coco")
    with np.load(folder / "diffusiondb.npz") as file:
        parts = dict(file)
    np.savez(folder / "diffusiondb.npz", **{**parts, "config_id": parts["config_id"] + 900})
    with pytest.raises(SearchlabError, match="no config_id"):
        FlashEval(folder, prompts=LEVELS)


def spent(evaluator: FlashEval, quantum: int, budget: float, seed: int) -> tuple[float, float]:
    """Shortfall of successive halving on common prompts, and its cost in full evaluations."""
    stage = Stage(
        "halving",
        evaluator.space,
        evaluator,
        AlgorithmSpec("successive_halving", {"quantum": quantum}),
        Budget(int(budget)),
    )
    result = run(SearchConfig((stage,), seed=seed))
    best = result.best.contender
    row = int(evaluator.rows_of(best.among.take([best.row]))[0])
    truth = evaluator.truth()
    shortfall = (truth.max() - truth[row]) / truth.std(ddof=1)
    return float(shortfall), float(result.counts["worth_full_evaluations"])


def test_halving_on_prompts_finds_a_good_setting_cheaply(folder: Path) -> None:
    evaluator = FlashEval(folder, prompts=LEVELS)
    shortfall, cost = spent(evaluator, 60, 12, 0)
    assert shortfall < 0.5
    assert cost <= 12


@needs_data
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("metric", METRICS)
def test_the_standard_error_is_the_empirical_one(dataset: Any, metric: Any) -> None:
    evaluator = FlashEval(DATA, dataset=dataset, metric=metric, prompts=(100, 0))
    drawn = [evaluator._block_means(100, replicate) for replicate in range(200)]
    empirical = np.stack([mean for mean, _ in drawn]).std(axis=0, ddof=1)
    stated = np.stack([error for _, error in drawn]).mean(axis=0)
    assert np.median(stated / empirical) == pytest.approx(1.0, abs=0.1)


@needs_data
def test_the_release() -> None:
    evaluator = FlashEval(DATA)
    assert len(evaluator) == 78
    assert len(FlashEval(DATA, dataset="coco")) == 57
    truth = evaluator.truth()
    assert truth.std(ddof=1) == pytest.approx(0.243, abs=0.003)
