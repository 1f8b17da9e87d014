"""Memory, active operations and quality of fewer experts at once; workers of that and of others."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from searchlab.cli import main
from searchlab.errors import ConfigError, SearchlabError
from searchlab.experiments import experts_setup
from searchlab.experiments.experts import ExpertsOptions, build
from searchlab.experiments.zoo.characters import CHARACTERS, task_path
from searchlab.population import Jobs
from searchlab.spaces.experts.files import ExpertFiles
from searchlab.testing import ray_nodes
from searchlab.testing.tiny_moe import tiny_moe


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small task: words to reverse."""
    left = dict.fromkeys(("search", "selection", "report"), 12)
    kept = []
    for line in task_path("reversal").read_text("utf-8").splitlines():
        split = json.loads(line)["split"]
        if left[split]:
            left[split] -= 1
            kept.append(line)
    path = tmp_path_factory.mktemp("task") / "words.jsonl"
    path.write_text("\n".join(kept) + "\n", "utf-8")
    return str(path)


def tiny_folder(folder: Path, name: str) -> str:
    """A tiny model of a family with the character model's tokenizer, as files."""
    from transformers import AutoTokenizer

    tiny_moe(name, vocab_size=99, eos_token_id=None).save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHARACTERS).save_pretrained(folder)
    return str(folder)


def run(folder: Path, *arguments: str) -> Path:
    """`searchlab run experts` with its files in a folder; the run's folder."""
    folder.mkdir(exist_ok=True)
    out = folder / "run"
    place = ["--out", str(out), "--database", str(folder / "study.db"), "--quiet"]
    assert main(["run", "experts", *arguments, *place]) == 0
    return out


def weights(folder: Path) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(tensor.size for tensor in ExpertFiles(folder).tensors.values())


def test_every_member_of_a_front_becomes_the_checkpoint_it_promises(
    tmp_path: Path, words: str
) -> None:
    from transformers import AutoModelForCausalLM

    out = run(tmp_path, "--task", words, "--items", "6", "--front", "--budget", "16")
    result = json.loads((out / "result.json").read_text("utf-8"))
    trades = result["trade_offs"]
    assert [o["name"] for o in trades["objectives"]] == ["accuracy", "bytes", "flops"]
    assert {row["name"] for row in result["rows"] if row["kind"] == "baseline"} > {"full"}
    members = {member["id"]: member for member in trades["members"]}
    losses = np.array(
        [
            [-m["values"]["accuracy"], m["values"]["bytes"], m["values"]["flops"]]
            for m in members.values()
        ]
    )
    worse = (losses[:, None] >= losses[None]).all(2) & (losses[:, None] > losses[None]).any(2)
    assert not worse.any()
    files = {path.stem: path for path in (out / "export" / "front").glob("*.json")}
    assert set(files) == {str(number) for number in members}
    full = weights(CHARACTERS)
    layout = experts_setup.prepare(ExpertsOptions(task=words)).layout
    for number in (min(members), max(members)):
        member = members[number]
        target = tmp_path / f"member{number}"
        assert main(["apply", str(files[str(number)]), str(target), "--model", "zoo"]) == 0
        model = AutoModelForCausalLM.from_pretrained(target)
        counts = {len(row) for row in member["plan"]["kept"].values()}
        assert counts == {model.config.num_local_experts}
        assert model.config.num_experts_per_tok == member["plan"]["top_k"]
        # What the search counted is what the files lack.
        counted = layout.total_bytes - member["values"]["bytes"]
        assert full - weights(target) == counted
    page = (out / "report.html").read_text("utf-8")
    for text in (
        "Quality against memory",
        "members of the front on the same items",
        "more than full",
        "MFLOP/token",
        "searchlab apply",
        "Kept experts",
        "tokens/s",
        "vllm serve",
    ):
        assert text in page


def test_counts_per_block_and_fixed_active_experts(tmp_path: Path, words: str) -> None:
    from searchlab.search import run as search

    model = tiny_folder(tmp_path / "model", "deepseek_v3")
    options = ExpertsOptions(
        model=model,
        task=words,
        items=4,
        keep="75%",
        front=True,
        per_block=True,
        active=2,
        budget=16,
    )
    result = search(build(options))
    trades = result.to_json()["trade_offs"]
    assert [o["name"] for o in trades["objectives"]] == ["accuracy", "bytes"]
    assert result.counts["failed"] == 0
    for member in trades["members"]:
        kept = list(member["plan"]["kept"].values())
        assert sum(map(len, kept)) <= 0.75 * 8 * len(kept)
        for row in kept:  # two groups of four experts, equally many of each
            assert sum(expert < 4 for expert in row) * 2 == len(row) >= 4


def test_candidates_have_their_own_active_experts(words: str) -> None:
    config = build(ExpertsOptions(task=words, front=True, items=6, metric="kl_self", new_tokens=4))
    stage = config.stages[0]
    space: Any = stage.space
    evaluator = stage.evaluator
    masks = np.ones((3, 3, 8), dtype=bool)
    masks[2, :, 1:3] = False
    population = space.of_masks(masks, np.array([1, 2, 2]))

    def values(target: Any, rows: list[int]) -> Any:
        own = population.take(np.array(rows))
        return target.evaluate(Jobs(np.arange(len(rows)), own, space.keys(own))).values

    together = values(evaluator, [0, 1, 2])
    assert together[1, 0] == 0.0  # the full model, measured against itself
    assert together[0, 0] > 0.0
    for row in range(3):
        assert np.array_equal(values(evaluator, [row])[0], together[row])
    there = pickle.loads(pickle.dumps(evaluator))
    assert there.identity() == evaluator.identity()
    assert np.array_equal(values(there, [0, 1, 2]), together)
    # A search with one active expert for all measures against the unchanged model, too.
    single = build(
        ExpertsOptions(task=words, items=6, keep="8", active=1, metric="kl_self", new_tokens=4)
    )
    other = single.stages[0]
    full: Any = other.space
    own = full.of_masks(masks[:1])
    done = other.evaluator.evaluate(Jobs(np.arange(1), own, full.keys(own)))
    assert done.values[0, 0] == together[0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"front": True, "merge": True}, "front with merge"),
        ({"front": True, "guided": True}, "front with guided"),
        ({"front": True, "preset": "paper"}, "front with preset paper"),
        ({"front": True, "target": 0.9}, "front with target 0.9"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExpertsOptions(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"front": True, "active": 3}, "3 active experts"),
        ({"front": True, "keep": "1", "active": 2}, "keep 1 experts"),
        ({"front": True, "memory": "1KiB"}, "memory '1KiB'"),
        ({"front": True, "per_block": True, "groups": "2"}, "groups 2"),
    ],
)
def test_fronts_that_cannot_be_are_named_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(experts_setup, "load_model", loads)
    with pytest.raises(SearchlabError, match=said):
        build(ExpertsOptions(**options))


# -- workers --------------------------------------------------------------------------------------


def trace(folder: Path, words: str, model: str, *where: str) -> list[tuple[str, ...]]:
    """Candidates, origins and values of a run, final included, by the table it exports."""
    options = ["--model", model, "--task", words, "--items", "4", "--keep", "50%", "--lag", "8"]
    options += ["--metric", "perplexity", "--budget", "12", "--random", "0"]
    out = run(folder, *options, *where)
    table = folder / "rows.csv"
    place = ["--database", str(folder / "study.db"), "--csv", str(table)]
    assert main(["export", str(out), *place]) == 0
    kept = ("id", "stage", "state", "reason", "key", "replicate", "perplexity", "origin")
    with table.open(encoding="utf-8", newline="") as lines:
        return [tuple(row[name] for name in kept) for row in csv.DictReader(lines)]


def test_worker_processes_leave_the_same_trace(tmp_path: Path, words: str) -> None:
    model = tiny_folder(tmp_path / "model", "mixtral")
    here = trace(tmp_path / "here", words, model)
    there = trace(tmp_path / "there", words, model, "--executor", "processes", "--workers", "2")
    assert here == there
    assert len({row[6] for row in here}) > 12  # values that tell candidates apart


@pytest.mark.ray
def test_workers_of_a_cluster_leave_the_same_trace(tmp_path: Path, words: str) -> None:
    model = tiny_folder(tmp_path / "model", "mixtral")
    here = trace(tmp_path / "here", words, model)
    with ray_nodes.head(cpus=2) as (address, _):
        where = ["--executor", "ray", "--workers", "2", "--ray-address", address]
        there = trace(tmp_path / "there", words, model, *where)
    assert here == there
