"""The recipe for experts: from the command line to a checkpoint, and what it refuses."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from searchlab.cli import main
from searchlab.errors import ConfigError, DataError, SearchlabError
from searchlab.experiments import experts_setup
from searchlab.experiments.experts import RECIPE, ExpertsOptions, build
from searchlab.experiments.experts_judge import check_command, judge
from searchlab.experiments.experts_setup import prepare
from searchlab.experiments.zoo.characters import CHARACTERS, task_path
from searchlab.population import Jobs
from searchlab.recipes import load_recipe
from searchlab.testing.tiny_moe import TINY_MOE, tiny_moe
from searchlab.uniforms import uniforms


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def few_items(path: Path, per_split: int = 4) -> Path:
    """A small task: words to reverse."""
    left = dict.fromkeys(("search", "selection", "report"), per_split)
    kept = []
    for line in task_path("reversal").read_text("utf-8").splitlines():
        split = json.loads(line)["split"]
        if left[split]:
            left[split] -= 1
            kept.append(line)
    path.write_text("\n".join(kept) + "\n", "utf-8")
    return path


def tiny_folder(folder: Path, name: str, **changes: Any) -> Path:
    """A tiny model of a family with the character model's tokenizer, as files."""
    from transformers import AutoTokenizer

    tiny_moe(name, vocab_size=99, eos_token_id=None, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHARACTERS).save_pretrained(folder)
    return folder


def run(folder: Path, *arguments: str) -> Path:
    """`searchlab run experts` with its files in a folder; the run's folder."""
    out = folder / "run"
    place = ["--out", str(out), "--database", str(folder / "study.db"), "--quiet"]
    assert main(["run", "experts", *arguments, *place]) == 0
    return out


# -- from the command line to a checkpoint --------------------------------------------------------


def test_a_run_leaves_a_checkpoint_that_scores_as_in_the_search(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    task = few_items(tmp_path / "words.jsonl", 12)
    options = ["--task", str(task), "--keep", "25%", "--budget", "16", "--random", "3"]
    options += ["--smooth", "0"]
    script = tmp_path / "judge.py"
    script.write_text(
        "import json, sys\n"
        "config = json.load(open(sys.argv[1] + '/config.json'))\n"
        "found = {'objectives': {'experts': config['num_local_experts']}}\n"
        "json.dump(found, open(sys.argv[2], 'w'))\n"
    )
    command = f"command: {sys.executable} {script} {{export}} {{out}}"
    out = run(tmp_path, *options, "--final", command)
    result = json.loads((out / "result.json").read_text("utf-8"))
    assert result["counts"]["evaluations"] == 16
    names = {row["name"] for row in result["rows"] if row["kind"] == "baseline"}
    # Rankings that keep the same experts are one candidate, under the name of the first.
    assert "frequency" in names <= {"frequency", "soft", "ean", "reap", "naee"}
    model, said = AutoModelForCausalLM.from_pretrained(out / "export", output_loading_info=True)
    assert not said["missing_keys"]
    assert model.config.num_local_experts == 2
    genotype = json.loads((out / "export" / "genotype.json").read_text("utf-8"))
    assert all(len(row) == 2 for row in genotype["kept"].values())
    page = (out / "report.html").read_text("utf-8")
    for text in (
        "random, mean of 3",
        "full",
        "tokens/s",
        "vllm serve",
        "Judged by the command",
        "naee",
    ):
        assert text in page

    # The exported checkpoint, as one of somebody else's, gets the winner's values.
    config = build(
        ExpertsOptions(
            task=str(task), keep="25%", budget=2, random=0, baseline=(f"mine={out / 'export'}",)
        )
    )
    from searchlab.experiments.experts_report import compared
    from searchlab.search import run as search

    found = search(config)
    loaded = experts_setup.loaded_of(config)
    assert loaded is not None
    entries = {entry.name: entry for entry in compared(loaded, config, found)}
    winner = next(row for row in result["rows"] if row["kind"] == "searched")
    for split in ("search", "selection", "report"):
        figures, items = entries["mine"].splits[split]
        assert figures.value == pytest.approx(winner[split])
        assert len(items) == 12


@pytest.mark.parametrize("name", TINY_MOE)
def test_the_recipe_serves_every_family(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    model = tiny_folder(tmp_path / "model", name)
    task = few_items(tmp_path / "words.jsonl")
    arguments = ["--model", str(model), "--task", str(task), "--keep", "50%", "--budget", "4"]
    out = run(tmp_path, *arguments, "--random", "2")
    config = AutoConfig.from_pretrained(out / "export")
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    assert {getattr(config, key) for key in counts if hasattr(config, key)} == {4}
    result = json.loads((out / "result.json").read_text("utf-8"))
    assert result["counts"]["failed"] == 0


def test_merging_never_falls_behind_the_best_pruned_model(tmp_path: Path) -> None:
    from searchlab.search import run as search

    task = few_items(tmp_path / "words.jsonl", 8)
    config = build(
        ExpertsOptions(task=str(task), keep="2", budget=30, metric="perplexity", merge=True)
    )
    result = search(config)
    records = result.records
    assert records is not None
    pruned, merged = (records.values[records.stage == stage, 0] for stage in (0, 1))
    assert np.nanmin(merged) <= np.nanmin(pruned) * (1 + 1e-4)  # other passes: last bits
    assert result.counts["evaluations"] == 30


def test_the_paper_preset_makes_402_evaluations(tmp_path: Path) -> None:
    from searchlab.search import run as search

    model = tiny_folder(tmp_path / "model", "mixtral")
    task = few_items(tmp_path / "words.jsonl", 2)
    config = build(
        ExpertsOptions(preset="paper", model=str(model), task=str(task), keep="4", groups="2")
    )
    result = search(config)
    assert result.counts["evaluations"] == 31 + 70 + 301
    assert result.counts["failed"] == 0
    assert result.records is not None
    assert list(result.records.origin)[:31] == ["random"] * 31


@pytest.mark.parametrize("merge", [False, True])
def test_evaluators_reach_worker_processes_as_their_options(tmp_path: Path, merge: bool) -> None:
    task = few_items(tmp_path / "words.jsonl")
    config = build(ExpertsOptions(task=str(task), keep="2", budget=20, merge=merge))
    stage = config.stages[-1]
    sent = pickle.dumps(stage.evaluator)
    assert len(sent) < 4096
    there = pickle.loads(sent)
    space = stage.space
    population = space.sample(uniforms(1, 0, 0, 3, space.sample_width))
    jobs = Jobs(np.arange(3), population, space.keys(population))
    assert there.identity() == stage.evaluator.identity()
    here = stage.evaluator.evaluate(jobs).values
    assert np.array_equal(there.evaluate(jobs).values, here)


# -- bad input ------------------------------------------------------------------------------------


def refused(monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """What the recipe says before any weights are loaded."""

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(experts_setup, "load_model", loads)
    with pytest.raises(SearchlabError) as caught:
        build(ExpertsOptions(**options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": "1"}, "keep 1 experts"),
        ({"keep": "half"}, "keep 'half'"),
        ({"keep": "9"}, "keep 9 experts"),
        ({"memory": "1KiB"}, "memory '1KiB'"),
        ({"active": 3}, "3 active experts"),
        ({"groups": "4"}, "4 groups of 3 blocks"),
        ({"task": "poems"}, "poems"),
        ({"model": "/nowhere", "task": "x"}, "x"),
        ({"family": "/nowhere.yaml"}, "nowhere.yaml"),
        ({"baseline": ("mine=/nowhere",)}, "/nowhere"),
        ({"chat": "on"}, "chat template"),
        ({"metric": "kl_self", "new_tokens": 400}, "context has 256"),
    ],
)
def test_wrong_options_are_named_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    assert said in refused(monkeypatch, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": "2", "memory": "1GiB"}, "keep with memory"),
        ({"groups": "many"}, "groups 'many'"),
        ({"router_mode": "logit"}, "for --merge"),
        ({"preset": "paper", "budget": 40}, "it makes 402"),
        ({"merge": True, "per_block": True}, "one count"),
        ({"model": "somewhere"}, "no task"),
        ({"baseline": ("mine",)}, "NAME=FOLDER"),
        ({"baseline": ("a=b", "a=c")}, "given twice"),
        ({"final": "bash x {export}"}, "allowed: 'command:"),
        ({"final": "command: x"}, "does not use {export}"),
        ({"final": "command: x {export} {where}"}, "placeholder {where}"),
        ({"together": 0}, "together 0"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExpertsOptions(**options)
    assert said in str(caught.value)


def test_wrong_items_and_models_are_named_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = ['{"prompt": "a", "options": ["b", "c"], "answer": 0}'] * 2
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join([*lines, '{"options": ["b"]}']), "utf-8")
    assert "line 3: no field 'prompt'" in refused(monkeypatch, task=str(path))
    path.write_text('{"prompt": "a", "options": [], "answer": 0}', "utf-8")
    assert "line 1: empty options" in refused(monkeypatch, task=str(path))
    rows = [{"prompt": "a" * 300 + str(i), "options": ["b", "c"], "answer": 0} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert "the model's context has 256" in refused(monkeypatch, task=str(path))

    task = str(few_items(tmp_path / "words.jsonl"))
    dense = tmp_path / "dense"
    dense.mkdir()
    tokenizer = (CHARACTERS / "tokenizer.json").read_bytes()
    (dense / "tokenizer.json").write_bytes(tokenizer)
    settings = json.loads((CHARACTERS / "tokenizer_config.json").read_text("utf-8"))
    (dense / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (dense / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    assert "dense" in refused(monkeypatch, model=str(dense), task=task)

    del settings["pad_token"]
    (dense / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (dense / "config.json").write_bytes((CHARACTERS / "config.json").read_bytes())
    assert "no padding token" in refused(monkeypatch, model=str(dense), task=task)


def test_group_routing_refuses_uneven_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_folder(tmp_path / "model", "deepseek_v3")
    task = str(few_items(tmp_path / "words.jsonl"))
    said = refused(monkeypatch, model=str(model), task=task, keep="5")
    assert "keep 5 experts in 2 groups" in said


def test_what_is_kept_follows_from_files_alone(tmp_path: Path) -> None:
    prepared = prepare(ExpertsOptions(keep="50%"))
    assert (prepared.keep, prepared.total) == (4, None)
    size = (CHARACTERS / "model.safetensors").stat().st_size
    half = size - 3 * 4 * prepared.layout.expert_bytes
    assert prepare(ExpertsOptions(memory=f"{half}B")).keep == 4
    assert prepare(ExpertsOptions(memory=f"{half - 1}B")).keep == 3
    assert prepare(ExpertsOptions(memory=f"{half - 1}B", per_block=True)).total == 11


def test_the_recipe_has_its_alias() -> None:
    assert load_recipe("eep") is RECIPE


# -- judges ---------------------------------------------------------------------------------------


def test_a_judge_reads_results_and_says_what_went_wrong(tmp_path: Path) -> None:
    def said(code: str, timeout: float = 30.0) -> Any:
        script = tmp_path / "script.py"
        script.write_text(code)
        return judge(
            f"{sys.executable} {script} {{export}} {{out}}", "x", tmp_path, timeout_s=timeout
        )

    harness = (
        "import json, os, sys\n"
        "os.makedirs(sys.argv[2] + '/model')\n"
        "row = {'exact_match,strict': 0.5, 'exact_match_stderr,strict': 1}\n"
        "table = {'results': {'gsm8k': row}}\n"
        "json.dump(table, open(sys.argv[2] + '/model/results_1.json', 'w'))\n"
    )
    assert said(harness).values == {"gsm8k exact_match": 0.5}
    assert "was not written" in said("pass").reason
    assert said("import sys; sys.exit('no memory')").reason == "exit code 1: no memory"
    assert "deadline of 0.5 s" in said("import time; time.sleep(30)", 0.5).reason
    assert "no object 'objectives'" in said("import sys; open(sys.argv[2], 'w').write('{}')").reason
    with pytest.raises(ConfigError, match="cannot be split"):
        check_command("x '{export}")
    with pytest.raises((ConfigError, DataError)):
        check_command("x {out}")
