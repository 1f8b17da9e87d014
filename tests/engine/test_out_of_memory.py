"""Out of memory: the same chunk in smaller pieces, and what a run says of that afterwards."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from process_tools import mixed_space

from searchlab.cli import main
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.errors import EvaluationError
from searchlab.evaluator import FunctionEvaluator, Reproducibility
from searchlab.evaluators.sampling import SamplingEvaluator
from searchlab.evaluators.trajectories import PrefixTree
from searchlab.executors import LocalExecutor, ProcessExecutor, evaluate_chunk
from searchlab.executors.out_of_memory import evaluate_within_memory, is_out_of_memory
from searchlab.population import Evaluations, Jobs
from searchlab.search import run, stored_result
from searchlab.study import Database, MemoryRun
from searchlab.testing.executor import chunk


def value(kind: list[int], x: float, n: int) -> float:
    """Of one candidate."""
    return float(sum(kind) + x + n)


class Wide(FunctionEvaluator):
    """Holds so many bytes per row at once; `limit` of them fit."""

    micro_batch = 16
    limit = 4

    def __init__(self, claims: Reproducibility) -> None:
        super().__init__(value, mixed_space(), version=1, reproducibility=claims)

    def evaluate(self, jobs: Jobs) -> Evaluations:
        for start in range(0, len(jobs), self.micro_batch):
            rows = min(self.micro_batch, len(jobs) - start)
            if rows > self.limit:
                torch.empty(rows * 10**15)
        return super().evaluate(jobs)


def config_of(claims: Reproducibility) -> SearchConfig:
    algorithm = AlgorithmSpec("evolution", {"quantum": 8})
    stage = Stage("search", mixed_space(), Wide(claims), algorithm, Budget(32))
    return SearchConfig((stage,), seed=3, chunk=8, lag=16)


@pytest.mark.parametrize("claims", ["exact", "batch"])
@pytest.mark.parametrize("processes", [False, True])
def test_records_environment_and_result_say_so(
    claims: Reproducibility, processes: bool, tmp_path: Path
) -> None:
    executor = ProcessExecutor(workers=2) if processes else LocalExecutor()
    config = config_of(claims)
    base = Database(tmp_path / "study.db")
    store = base.open_run("run", config=config.describe(), space="", seed=0, out="")
    result = run(config, store=store, executor=executor)
    store = base.read("run")
    records = store.records()
    assert (records.state == 0).all()
    assert {text.rpartition(", ")[2] for text in records.worker} == {"micro-batch 4"}
    (environment,) = store.environments().values()
    assert environment["micro_batches"] == [4]
    assert store.get_meta("micro_batches") is not None
    (note,) = result.meta["notes"]
    assert "out of memory: values came from smaller micro-batches (32 with 4)" in note
    assert ("no trace is claimed" in note) == (claims == "batch")
    assert stored_result(config, store).meta["notes"] == [note]


def test_an_exact_evaluator_keeps_the_trace() -> None:
    narrow, roomy = MemoryRun(), MemoryRun()
    run(config_of("exact"), store=narrow)
    config = config_of("exact")
    config.stages[0].evaluator.limit = 16  # type: ignore[attr-defined]
    run(config, store=roomy)
    assert narrow.records().trace() == roomy.records().trace()
    assert set(roomy.records().worker) == {"local"}


@pytest.mark.parametrize("claims", ["exact", "batch"])
def test_a_recipe_says_so_and_verify_repeats_it(
    claims: Reproducibility,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--problem", "mixture", "--nfe", "4", "--samples", "64", "--held-out", "64"]
    words += ["--report-banks", "2", "--quiet", "--budget", "8"]
    assert main(["run", "solver_schedule", *words, "--out", "roomy", "--database", "roomy.db"]) == 0
    answer = PrefixTree._answer

    def narrow(tree: PrefixTree, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        if min(len(x), tree.max_rows) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return answer(tree, x, times)

    monkeypatch.setattr(PrefixTree, "_answer", narrow)
    monkeypatch.setattr(SamplingEvaluator, "reproducibility", claims)
    assert (
        main(["run", "solver_schedule", *words, "--out", "narrow", "--database", "narrow.db"]) == 0
    )
    both = []
    for name in ("roomy", "narrow"):
        with Database(tmp_path / f"{name}.db") as base:
            run = base.read(name)
            both.append(run.records())
            (environment,) = run.environments().values()
    assert both[0].trace() == both[1].trace()
    assert environment["micro_batches"] == [31]
    written = json.loads((tmp_path / "narrow" / "result.json").read_text("utf-8"))
    assert "smaller micro-batches" in written["notes"][-1]
    capsys.readouterr()
    assert main(["verify", "narrow"]) == 0
    printed = capsys.readouterr().out
    assert "out of memory" in printed
    assert ("no trace is claimed" in printed) == (claims == "batch")


class Slotted:
    """Takes no further attribute."""

    __slots__ = ()
    micro_batch = 8

    def evaluate(self, jobs: Jobs) -> Evaluations:
        raise MemoryError("8 rows")


def test_where_nothing_smaller_fits_the_rows_fail() -> None:
    wide = Wide("exact")
    wide.limit = 0
    jobs = chunk(0, 4)
    done = evaluate_chunk(wide, jobs)
    assert all("memory" in reason for reason in done.evaluations.reason or [])
    assert wide.micro_batch == 1
    with pytest.raises(MemoryError):
        evaluate_within_memory(Slotted(), jobs.jobs)  # type: ignore[arg-type]
    plain = FunctionEvaluator(value, mixed_space())
    assert evaluate_chunk(plain, jobs).evaluations.notes.get("micro_batch") is None


def test_other_errors_are_no_want_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(EvaluationError("out of memory"))


class Shared:
    """Called by two threads that run out of memory together."""

    def __init__(self) -> None:
        self.micro_batch = 8
        self.calls: list[int] = []
        self.both = threading.Barrier(2, timeout=10)

    def evaluate(self, jobs: Jobs) -> Evaluations:
        size = self.micro_batch
        self.calls.append(size)
        if size == 8:
            self.both.wait()
            raise MemoryError
        return Evaluations(np.full(len(jobs), float(size)))


def test_threads_that_fail_together_halve_it_once() -> None:
    shared, sizes = Shared(), []

    def once() -> None:
        answer: tuple[Any, int] = evaluate_within_memory(shared, chunk(0, 2).jobs)  # type: ignore[arg-type]
        sizes.append(answer[1])

    threads = [threading.Thread(target=once) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sizes == [4, 4]
    assert sorted(shared.calls) == [4, 4, 8, 8]
