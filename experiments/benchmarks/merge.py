"""Mixing checkpoints: exactness, speed beside plain ways, memory, and what searches find.

    python -m searchlab.experiments.benchmarks.merge [--quick] [--check] [--out F] [--part PART]...

Parts: `exact` (moving averages, single checkpoints, precision, linearity, streaming, batches),
`distances` (exact values and bias of the metrics), `speed` (CPU seconds of one thread, every method
and its rivals in turn in one process, the best of several turns), `memory` (a bank four times as
large as the memory it may take, in a process of its own, beside a read of its file from the disk),
`device` (a bank that lies on a GPU; skipped, and said so, where there is none; single operations
are in the benchmark `kernels`), `ring` (a flow that is trained here: searches of 400 evaluations
against the best of all known averages, on noise and reference data that the search never saw),
`digits` and `digits_more` (the bundled checkpoints, the recipe as it is). With `--part` and `--out`
the lines of the other parts stay in the file.

The rivals: an axpy loop (`acc.add_(row, alpha=a)` over the checkpoints, a float32 accumulator), and
multiply-and-sum (`(rows * a[:, None]).sum(0)` in the stored dtype), which is how merging tools that
take one tensor of all models at a time do it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from searchlab.experiments.benchmarks._common import Aim, Journal, flags, other_parts, run_parts
from searchlab.experiments.benchmarks._merge_searches import digits, digits_more, ring
from searchlab.spaces.checkpoint_mix import CheckpointBank, find_checkpoints, merge, states
from searchlab.spaces.checkpoint_mix.baselines import ema
from searchlab.spaces.checkpoint_mix.export import write_merged
from searchlab.spaces.checkpoint_mix.merge import convex, move
from searchlab.spaces.checkpoint_mix.variation import project

PARTS = ("exact", "distances", "speed", "memory", "device", "ring", "digits", "digits_more")

HALF = (torch.float16, torch.bfloat16)


def write_bank(folder: Path, k: int, size: int, dtype: torch.dtype = torch.float32) -> list[Path]:
    """K random checkpoints like those of one run: weights of rms 0.05 that differ by 0.002."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    common = 0.05 * torch.randn(size, generator=generator)
    paths = []
    for step in range(1, k + 1):
        paths.append(folder / f"step_{step:04d}.safetensors")
        own = common + 0.002 * torch.randn(size, generator=generator)
        save_file({"a": own[: size // 3].to(dtype), "b": own[size // 3 :].to(dtype)}, paths[-1])
    return paths


def random_rows(p: int, k: int, *, size: float = 1.0, seed: int = 0) -> Any:
    """(p, k) signed coefficients with sum one."""
    return project(size * np.random.default_rng(seed).normal(size=(p, k)))


# -- exact ----------------------------------------------------------------------------------------


def exact(journal: Journal, quick: bool, folder: Path) -> None:
    """Everything that has to be equal, or nearly."""
    k, size = (12, 20_011) if quick else (50, 400_013)
    for dtype in (torch.float64, torch.float32):
        bank = _bank(write_bank(folder / f"ema-{dtype}", k, size, dtype))
        worst = 0.0
        for rate in (0.5, 0.9, 0.99):
            running = bank.row(0).double()
            for place in range(1, k):
                running = rate * running + (1 - rate) * bank.row(place).double()
            found = merge(bank, ema(k, rate)[None])[0][0].double()
            worst = max(worst, float((found - running).abs().max() / running.abs().max()))
        limit = 1e-12 if dtype is torch.float64 else 2e-6
        name = f"moving averages, {_name(dtype)}"
        journal.case(name, {"error": worst}, aims=[Aim("error", worst, "at most", limit)])
    for dtype in (torch.float32, *HALF):
        _of_dtype(journal, folder / f"bank-{dtype}", k, size, dtype)
    rows = random_rows(10_000, 40, size=3.0)
    sums = np.abs(rows.sum(axis=1) - 1).max()
    again = float(np.abs(project(rows) - rows).max())
    share = np.random.default_rng(1).random((5000, 1))
    children = share * rows[:5000] + (1 - share) * rows[5000:]
    off = float(max(sums, np.abs(children.sum(axis=1) - 1).max()))
    aims = [Aim("sum", off, "at most", 1e-12), Aim("projected twice", again, "at most", 1e-12)]
    journal.case("projection, 10,000 rows", {"sum": off, "projected_twice": again}, aims=aims)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bank(paths: Sequence[Path], **options: Any) -> CheckpointBank:
    return CheckpointBank(find_checkpoints(paths), **options)


def _of_dtype(journal: Journal, folder: Path, k: int, size: int, dtype: torch.dtype) -> None:
    paths = write_bank(folder, k, size, dtype)
    place = folder / "bank"
    bank = _bank(paths)
    streamed = _bank(paths, folder=place, storage="streamed", memory=max(2**22, 6 * 8 * size))
    other = _bank(paths, tile=1024)
    same = 0
    for held in (bank, streamed):
        for path, state in zip(paths, states(held, np.eye(k)), strict=True):
            same += all(torch.equal(state[n], t) for n, t in load_file(path).items())
    rows = random_rows(20, k, size=50 / (0.8 * k))
    norms = np.abs(rows).sum(axis=1)
    stacked = torch.stack([bank.row(j).double() for j in range(k)])
    largest = float(stacked.abs().max())
    expected = torch.from_numpy(rows) @ stacked
    found = merge(bank, rows)[0]
    error = float((found.double() - expected).abs().max() / (norms.max() * largest))
    along = merge(streamed, rows)[0]
    apart = float((merge(other, rows)[0] - found).abs().max() / found.abs().max())
    alone = [merge(bank, rows[:p])[0] for p in (1, 3, 20)]
    differing = sum(not torch.equal(part, found[: len(part)]) for part in alone)
    a, b = rows[0], rows[1]
    mixed = merge(bank, (0.3 * a + 0.7 * b)[None])[0][0]
    scale = largest * (norms[0] + norms[1])
    linear = float((convex(found[0], found[1], 0.3) - mixed).abs().max() / scale)
    total = merge(bank, np.ones((1, k)))[0]
    held_row, row, generator = [found[0]], a.copy(), np.random.default_rng(2)
    for _ in range(32):
        change = np.zeros(k)
        change[generator.integers(k, size=2)] = 0.1 * generator.normal(size=2)
        change -= change.sum() / k
        held_row, row = move(bank, held_row, change, total=[total[0]]), row + change
    drift = float((held_row[0] - merge(bank, row[None])[0][0]).abs().max() / scale)
    out = folder / "merged"
    out.mkdir(exist_ok=True)
    write_merged(bank, a, out)
    (state,) = states(bank, a[None])
    there = load_file(out / "merged.safetensors")
    whole = bool(torch.equal(along, found))
    exported = all(torch.equal(there[n], state[n]) for n in there)
    figures: dict[str, Any] = {
        "checkpoints": k,
        "values": size,
        "one_hot_equal": same,
        "error_over_norm": error,
        "streamed_equal": whole,
        "other_tiles_relative": apart,
        "batches_differing": differing,
        "convex_relative": linear,
        "after_32_moves_relative": drift,
        "exported_equal": exported,
        "norm": float(norms.max()),
    }
    if dtype in HALF:
        figures["bfloat16_arithmetic_error"] = _stored_dtype_error(bank, rows[0], expected[0])
        difference = merge(_bank(paths, delta=_name(dtype)), rows)[0].double() - expected
        figures["difference_bank_error"] = float(difference.abs().max())
    aims = [
        Aim("single checkpoints equal", same, "at least", 2 * k),
        Aim("error over norm", error, "at most", 1e-6),
        Aim("streamed equal", float(whole), "at least", 1),
        Aim("other tiles", apart, "at most", 1e-6),
        Aim("batches differing", differing, "at most", 0),
        Aim("convex", linear, "at most", 1e-6),
        Aim("32 moves", drift, "at most", 1e-6),
        Aim("exported equal", float(exported), "at least", 1),
    ]
    journal.case(f"mixing {_name(dtype)}", figures, aims=aims)


def _stored_dtype_error(bank: CheckpointBank, row: Any, expected: Tensor) -> float:
    """Multiply and sum in bfloat16, coefficients rounded to it too."""
    rows = torch.stack([bank.row(j).bfloat16() for j in range(len(bank))])
    weights = torch.from_numpy(row).bfloat16()
    return float(((rows * weights[:, None]).sum(0).double() - expected).abs().max())


# -- distances ------------------------------------------------------------------------------------


def distances(journal: Journal, quick: bool, folder: Path) -> None:
    """Exact values of the metrics, their bias, and the time of one distance."""
    from scipy.linalg import sqrtm

    from searchlab.evaluators.distances import (
        FrechetReference,
        frechet_distance,
        frechet_distances,
        kid,
    )

    eye = FrechetReference(np.zeros(4), np.eye(4))
    generator = np.random.default_rng(0)
    white = generator.normal(size=(5000, 4))
    white = (white - white.mean(0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(white.T)).T
    )  # exactly white
    found = float(frechet_distances((2 * white + [1, 0, 0, 0])[None], eye)[0])
    own = float(frechet_distances(white[None], FrechetReference.from_features(white))[0])
    kernel = kid(np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]]))[0]
    aims = [
        Aim("distance - 5", abs(found - 5), "at most", 1e-8),
        Aim("distance of equals", own, "at most", 1e-8),
        Aim("kernel distance + 13", abs(kernel + 13), "at most", 1e-9),
    ]
    figures = {"frechet": found, "frechet_of_equals": own, "kernel": kernel}
    journal.case("exact distances", figures, aims=aims)
    for d, n in ((16, 1000),) if quick else ((16, 1000), (16, 4000), (64, 2000)):
        white_reference = FrechetReference(np.zeros(d), np.eye(d))
        values = [
            float(frechet_distances(generator.normal(size=(1, n, d)), white_reference)[0])
            for _ in range(40)
        ]
        formula = d / n + d * (d + 1) / (4 * n)
        off = float(abs(np.mean(values) / formula - 1))
        figures = {"mean": float(np.mean(values)), "formula": formula, "repetitions": 40}
        name = f"bias of the distance, d {d}, N {n}"
        journal.case(name, figures, aims=[Aim("off the formula", off, "at most", 0.05)])
    d = 128 if quick else 768
    x, y = generator.normal(size=(2 * d, d)), generator.normal(size=(2 * d, d)) * 1.1
    reference = FrechetReference.from_features(y)
    statistics = reference.statistics()
    statistics.add(x)
    ours, slow = _cpu(lambda: frechet_distance(statistics, reference)), 0.0
    started = time.process_time()
    root = sqrtm(statistics.covariance() @ reference.covariance)
    slow = time.process_time() - started
    offset = float(((statistics.mean() - reference.mean) ** 2).sum())
    classic = offset + np.trace(statistics.covariance() + reference.covariance - 2 * root.real)
    error = float(abs(frechet_distance(statistics, reference) / float(classic) - 1))
    aims = [Aim("relative to sqrtm", error, "at most", 1e-6)]
    if not quick:
        aims.append(Aim("times faster", slow / ours, "at least", 10))
    figures = {"relative_error": error, "cpu_s": ours, "sqrtm_cpu_s": slow}
    journal.case(f"symmetric form, d {d}", figures, aims=aims)


# -- speed ----------------------------------------------------------------------------------------


def _cpu(run: Callable[[], object], repeats: int = 3) -> float:
    """The least CPU seconds of several turns."""
    best = math.inf
    for _ in range(repeats):
        started = time.process_time()
        run()
        best = min(best, time.process_time() - started)
    return best


def _interleaved(runs: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The least CPU seconds of each, all taking turns."""
    best = dict.fromkeys(runs, math.inf)
    for _ in range(turns):
        for name, run in runs.items():
            best[name] = min(best[name], _cpu(run, 1))
    return best


def speed(journal: Journal, quick: bool, folder: Path) -> None:
    """Merges beside a plain read, an axpy loop and multiply-and-sum."""
    k, size = 50, 200_000 if quick else 2_000_000
    for dtype in (torch.float32,) if quick else (torch.float32, torch.float16, torch.bfloat16):
        _speed_of(journal, folder / f"speed-{dtype}", k, size, dtype, 2 if quick else 7)


def _speed_of(
    journal: Journal, folder: Path, k: int, size: int, dtype: torch.dtype, turns: int
) -> None:
    paths = write_bank(folder, k, size, dtype)
    bank = _bank(paths)
    for path in paths:
        path.unlink()
    rows = random_rows(20, k)
    flat = torch.stack([tile.reshape(-1) for _, tile in bank.walk(0)])
    plain = torch.stack([_row_of(bank, j) for j in range(k)])
    weights = torch.from_numpy(rows).float()

    def axpy() -> Tensor:
        out = torch.zeros(plain.shape[1])
        for j in range(k):
            out.add_(plain[j], alpha=float(rows[0, j]))
        return out

    def multiply() -> Tensor:
        return (plain * weights[0, :, None].to(dtype)).sum(0)

    read: Callable[[], object] = flat.sum
    if dtype in HALF:
        read = flat.view(torch.int16).view(torch.float32 if flat.numel() % 2 == 0 else dtype).sum
    best = _interleaved(
        {
            "read": read,
            "single": lambda: merge(bank, rows[:1], alone=True),
            "axpy": axpy,
            "batch": lambda: merge(bank, rows),
            "multiply_and_sum": multiply,
        },
        turns,
    )
    each = best["batch"] / len(rows)
    figures = {
        "checkpoints": k,
        "values": size,
        "cpu_ms": {name: round(1e3 * value, 3) for name, value in best.items()},
        "batch_per_candidate_cpu_ms": round(1e3 * each, 3),
        "single_over_read": best["single"] / best["read"],
        "single_over_axpy": best["single"] / best["axpy"],
        "batch_over_axpy": each / best["axpy"],
        "batch_over_multiply_and_sum": each / best["multiply_and_sum"],
    }
    full = turns > 2  # a short form is too short to be judged by the clock
    aims = [
        Aim("P = 20, each, over axpy", each / best["axpy"], "at most", 0.25, full),
        Aim("each over multiply and sum", each / best["multiply_and_sum"], "at most", 0.05, full),
    ]
    if dtype is torch.float32:
        aims.append(Aim("single over read", best["single"] / best["read"], "at most", 1.3, full))
    else:
        aims.append(Aim("single over axpy", best["single"] / best["axpy"], "at most", 1.0, full))
    journal.case(f"speed {_name(dtype)}", figures, aims=aims)


def _row_of(bank: CheckpointBank, k: int) -> Tensor:
    """Checkpoint k from the tiles: its files are gone."""
    return torch.cat([tile[k] for _, tile in bank.walk(0)])[: bank.layout.size]


# -- memory ---------------------------------------------------------------------------------------


def memory(journal: Journal, quick: bool, folder: Path) -> None:
    """Streaming a bank four times as large as the memory allowed, measured in a new process."""
    k, size = (16, 500_000) if quick else (40, 6_000_000)
    for dtype in (torch.float16,) if quick else (torch.float16, torch.float32):
        run = folder / f"large-{dtype}"
        write_bank(run, k, size * 2 // dtype.itemsize, dtype)
        for p in (1,) if quick else (1, 8, 20):
            _streamed(journal, run, p, quick, dtype)


def _streamed(journal: Journal, run: Path, p: int, quick: bool, dtype: torch.dtype) -> None:
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else _MODULE]
    done = subprocess.run(
        [*command, "--child", str(run), str(p)], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    limit = figures["planned_bytes"] + 200 * 2**20
    figures["over_read"] = figures["merge_s"] / figures["read_s"]
    figures["cached_over_read"] = figures["cached_merge_cpu_s"] / figures["cached_read_cpu_s"]
    aims = [
        Aim("peak beyond the start, bytes", figures["peak_bytes"], "at most", limit),
        Aim("bank over memory", figures["bank_bytes"] / figures["memory"], "at least", 3.99),
    ]
    if not quick:
        aims.append(Aim("over a read from the disk", figures["over_read"], "at most", 2.5))
    journal.case(f"streamed bank, {_name(dtype)}, P = {p}", figures, aims=aims)


_MODULE = "searchlab.experiments.benchmarks.merge"


def _child(run: Path, p: int) -> None:
    """One streamed merge, and one plain read of the same file.

    Both from the disk (the system is told to forget the file before each) by the clock, and both
    from the system's cache in CPU seconds. A bank that does not fit into memory is the first case.
    """
    torch.set_num_threads(1)
    torch.mm(torch.ones(8, 8), torch.ones(8, 8))
    base = _peak()  # what the modules alone take
    sources = find_checkpoints([run])
    total = sum(path.stat().st_size for source in sources for path in source.files)
    limit = total // 4
    place = run / "bank"
    one = CheckpointBank(sources, memory=limit, folder=place, storage="streamed")
    rows = random_rows(p, len(one))
    merge(one, rows[:1])
    start = _peak()
    (file,) = place.glob("*.bin")
    buffer = bytearray(2**24)

    def read() -> None:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                torch.frombuffer(buffer, dtype=torch.float32).sum()

    def forget() -> None:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)

    runs: dict[str, Callable[[], object]] = {"read": read, "merge": lambda: merge(one, rows)}
    cached = _interleaved(runs, 3)
    best = dict.fromkeys(runs, math.inf)
    for _ in range(3):
        for name, call in runs.items():
            forget()
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
    figures = {
        "bank_bytes": one.bytes,
        "memory": limit,
        "planned_bytes": one.plan.bank + p * one.output_bytes,
        "peak_bytes": max(0, _peak() - base),
        "peak_before_timing_bytes": max(0, start - base),
        "read_s": best["read"],
        "merge_s": best["merge"],
        "cached_read_cpu_s": cached["read"],
        "cached_merge_cpu_s": cached["merge"],
        "candidates": p,
    }
    print(json.dumps(figures))


def _peak() -> int:
    """The most bytes that this program has held.

    Not `ru_maxrss`, which also knows what the process was before it became this program.
    """
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


# -- GPU ------------------------------------------------------------------------------------------


def device(journal: Journal, quick: bool, folder: Path) -> None:
    """A bank that lies on a GPU: its mixes beside those of the CPU, and the time of a pass."""
    if not torch.cuda.is_available():
        journal.skip("a bank on a GPU", "no CUDA device here")
        return
    k, size = 50, 1_000_000 if quick else 20_000_000
    paths = write_bank(folder, k, size, torch.bfloat16)
    plain, bank = _bank(paths), _bank(paths, device="cuda")
    rows = random_rows(20, k)
    norms, largest = np.abs(rows).sum(axis=1).max(), float(plain.row(k - 1).abs().max())
    for p in (1, 8, 20):
        found = merge(bank, rows[:p])[0]
        error = float((found.cpu() - merge(plain, rows[:p])[0]).abs().max() / (norms * largest))
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            started = time.perf_counter()
            merge(bank, rows[:p])
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        figures = {
            "device": torch.cuda.get_device_name(),
            "checkpoints": k,
            "values": size,
            "candidates": p,
            "error_over_norm": error,
            "merge_s": float(np.median(times)),
            "gigabytes_per_second": bank.bytes / float(np.median(times)) / 1e9,
        }
        aims = [Aim("error over norm", error, "at most", 1e-6)]
        journal.case(f"a bank on a GPU, P = {p}", figures, aims=aims)


# -- front ----------------------------------------------------------------------------------------

_RUNS: dict[str, Callable[[Journal, bool, Path], None]] = {
    "exact": exact,
    "distances": distances,
    "speed": speed,
    "memory": memory,
    "device": device,
    "ring": ring,
    "digits": digits,
    "digits_more": digits_more,
}


def _parts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; repeatable")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["--child"]:
        _child(Path(given[1]), int(given[2]))
        return 0
    options = flags(__doc__, arguments, add=_parts)
    torch.set_num_threads(1)
    journal = Journal("merge", options, lines=other_parts(options))
    return run_parts(journal, _RUNS, options.part)


if __name__ == "__main__":
    sys.exit(main())
