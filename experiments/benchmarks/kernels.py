"""Fused operations beside plain torch, and beside the limit of memory.

    python -m searchlab.experiments.benchmarks.kernels [--quick] [--check] [--out FILE]

On the CPU: weighted sums of 50 sources, one and twenty at a time, against a plain read of the
sources, a loop of multiply-adds, and multiply-then-sum as merging tools do it; CPU time of one
thread, all sides taking turns. On a GPU: every operation against plain, compiled and graph-captured
torch, and against the copy bandwidth measured in the same run. Without a GPU that part is skipped,
and its line says so.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from searchlab.cuda_ext import library, merge_experts, route_topk, solver_update, weighted_sum
from searchlab.experiments.benchmarks._common import Aim, Journal, flags

SOURCES = 50
CPU_SIZE = 4_000_000
TOGETHER = 20


def main(arguments: Sequence[str] | None = None) -> int:
    journal = Journal("kernels", flags(__doc__, arguments))
    torch.set_num_threads(1)
    on_cpu(journal)
    if torch.cuda.is_available():
        on_gpu(journal)
    else:
        journal.skip("operations on a GPU", "no CUDA device here")
    return journal.close()


# -- CPU ----------------------------------------------------------------------------------------


def on_cpu(journal: Journal) -> None:
    quick = journal.options.quick
    size, rounds = (CPU_SIZE // 8, 3) if quick else (CPU_SIZE, 9)
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        bank = torch.randn(SOURCES, size, generator=generator).to(dtype)
        table = torch.randn(TOGETHER, SOURCES, generator=generator)
        one, many = torch.empty(1, size), torch.empty(TOGETHER, size)
        sides: dict[str, Callable[[], object]] = {
            "read": partial(torch.sum, bank, dtype=torch.float32),
            "one": partial(weighted_sum, bank, table[:1], one),
            "many": partial(weighted_sum, bank, table, many),
            "loop": partial(_loop, bank, table[0].tolist(), one[0]),
            "multiply_and_sum": partial(_multiply_and_sum, bank, table[0]),
        }
        took = _turns(sides, rounds)
        each = took["many"] / TOGETHER
        single = dtype == torch.float32
        limit, against = (1.3, "read") if single else (1.0, "loop")
        aims = [
            Aim(
                f"one sum over {against}", took["one"] / took[against], "at most", limit, not quick
            ),
            Aim("one of twenty over the loop", each / took["loop"], "at most", 0.25, not quick),
        ]
        if single:
            ratio = each / took["multiply_and_sum"]
            aims.append(
                Aim("one of twenty over multiply and sum", ratio, "at most", 0.05, not quick)
            )
        figures = {
            "sources": SOURCES,
            "elements": size,
            "cpu_ms": {name: round(1e3 * seconds, 3) for name, seconds in took.items()},
            "gigabytes_per_second": round(bank.nbytes / took["one"] / 1e9, 2),
        }
        journal.case(
            f"weighted_sum on the CPU, {str(dtype).removeprefix('torch.')}",
            figures,
            aims=aims,
        )


def _loop(bank: Iterable[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """What one would write: a multiply-add per source into one float32 result."""
    out.zero_()
    for source, weight in zip(bank, weights, strict=True):
        out.add_(source, alpha=weight)


def _multiply_and_sum(bank: Tensor, weights: Tensor) -> Tensor:
    return (bank * weights.to(bank.dtype)[:, None]).sum(0)


def _turns(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least CPU seconds of every side; they take turns, so that all meet the same machine."""
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


# -- GPU ----------------------------------------------------------------------------------------


def on_gpu(journal: Journal) -> None:
    device = torch.device("cuda")
    quick = journal.options.quick
    where = {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "kernels": str(library.load() is not None),
    }
    bandwidth = _copy_bandwidth(device, quick)
    journal.case("copy bandwidth", {**where, "gigabytes_per_second": round(bandwidth / 1e9, 1)})
    _sums_on_gpu(journal, where, bandwidth, quick)
    _experts_on_gpu(journal, where, bandwidth, quick)
    _steps_on_gpu(journal, where, bandwidth, quick)
    _routes_on_gpu(journal, where, bandwidth, quick)


def _seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median seconds of a call on the device, by events, after three calls that do not count."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(rounds):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph that is replayed."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _copy_bandwidth(device: torch.device, quick: bool) -> float:
    count = (1 if quick else 8) * 2**28
    source = torch.empty(count, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _sums_on_gpu(journal: Journal, where: dict[str, Any], bandwidth: float, quick: bool) -> None:
    size = 3 * 10**6 if quick else 3 * 10**8
    bank = torch.empty(SOURCES, size, dtype=torch.bfloat16, device="cuda")
    for row in bank:
        row.normal_()
    rows = list(bank.unbind(0))
    for results, least in ((1, 0.85), (8, 0.70), (20, None), (32, None)):
        table = torch.randn(results, SOURCES, device="cuda")
        out = torch.empty(results, size, dtype=torch.bfloat16, device="cuda")
        ours = _seconds(partial(weighted_sum, rows, table, out))
        moved = bank.nbytes + out.nbytes
        figures = {
            **where,
            "results": results,
            "elements": size,
            "seconds": ours,
            "share_of_copy_bandwidth": moved / ours / bandwidth,
        }
        if results == 1:
            total = torch.empty(size, device="cuda")
            figures["loop_seconds"] = _seconds(partial(_loop, rows, table[0].tolist(), total), 5)
        else:
            figures["matmul_with_rounded_coefficients_seconds"] = _seconds(
                partial(torch.mm, table.bfloat16(), bank, out=out), 5
            )
        aims = []
        if least is not None and not quick:
            share = moved / ours / bandwidth
            aims = [Aim("share of the copy bandwidth", share, "at least", least)]
        journal.case(f"weighted_sum on a GPU, {results} at once", figures, aims=aims)


def _experts_on_gpu(journal: Journal, where: dict[str, Any], bandwidth: float, quick: bool) -> None:
    """One block of Mixtral 8x7B: 8 experts of 176 million weights to 4."""
    hidden, inner = (512, 1792) if quick else (4096, 14336)
    stacks = [
        torch.randn(8, 2 * inner, hidden, dtype=torch.bfloat16, device="cuda"),
        torch.randn(8, hidden, inner, dtype=torch.bfloat16, device="cuda"),
    ]
    merged = [torch.empty_like(stack[:4]) for stack in stacks]
    matrix = torch.randn(4, 8, device="cuda")
    host = matrix.tolist()

    def ours() -> None:
        for stack, out in zip(stacks, merged, strict=True):
            merge_experts(matrix, stack, out)

    def plain() -> None:
        for stack, out in zip(stacks, merged, strict=True):
            for i, row in enumerate(host):
                out[i].zero_()
                for j, weight in enumerate(row):
                    out[i].add_(stack[j], alpha=weight)

    took, others = _seconds(ours), _seconds(plain, 5)
    moved = sum(x.nbytes for x in (*stacks, *merged))
    aims = [
        Aim("time over a copy of its bytes", took * bandwidth / moved, "at most", 1.5),
        Aim("times faster than a loop of add", others / took, "at least", 4.0),
    ]
    figures = {**where, "bytes": moved, "seconds": took, "loop_seconds": others}
    journal.case("merge_experts, a block of Mixtral 8x7B", figures, aims=[] if quick else aims)


def _steps_on_gpu(journal: Journal, where: dict[str, Any], bandwidth: float, quick: bool) -> None:
    for batch, size in ((8, 4 * 64 * 64), (64, 4 * 128 * 128)):
        inputs = [torch.randn(batch, size, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        table = torch.randn(batch, 2, 4, device="cuda")

        seconds = _ways(partial(solver_update, inputs, table), _plain_step, (inputs, table), quick)
        moved = 6 * inputs[0].nbytes
        figures = {**where, "bytes": moved, "seconds": seconds, "limit_seconds": moved / bandwidth}
        journal.case(f"solver_update, {batch} x {size}", figures)


def _routes_on_gpu(journal: Journal, where: dict[str, Any], bandwidth: float, quick: bool) -> None:
    for tokens in (32, 65_536):
        logits = torch.randn(tokens, 128, dtype=torch.bfloat16, device="cuda")
        masks = torch.rand(16, 128, device="cuda") < 0.5
        masks[:, :8] = True
        rows = torch.arange(tokens, device="cuda") % 16

        fused = partial(route_topk, logits, 8, masks=masks, rows=rows)
        seconds = _ways(fused, _plain_route, (logits, masks, rows), quick)
        moved = logits.nbytes + masks.numel() + rows.nbytes + tokens * 8 * 12
        figures = {**where, "bytes": moved, "seconds": seconds, "limit_seconds": moved / bandwidth}
        journal.case(f"route_topk, {tokens} tokens, 128 experts, 16 masks", figures)


def _ways(
    fused: Callable[[], object], plain: Callable[..., object], given: tuple[Any, ...], quick: bool
) -> dict[str, float]:
    """Seconds of the fused operation and of plain torch, as they are, captured and compiled."""
    usual = partial(plain, *given)
    seconds = {
        "fused": _seconds(fused),
        "plain": _seconds(usual),
        "fused, captured": _seconds(_captured(fused)),
        "plain, captured": _seconds(_captured(usual)),
    }
    if not quick:
        compiled: Callable[..., object] = torch.compile(plain)
        seconds["plain, compiled"] = _seconds(partial(compiled, *given))
    return seconds


def _plain_step(inputs: list[Tensor], table: Tensor) -> list[Tensor]:
    x = [value.float() for value in inputs]
    out = []
    for o in range(table.shape[1]):
        total = table[:, o, 0, None] * x[0]
        for j in range(1, len(x)):
            total = total + table[:, o, j, None] * x[j]
        out.append(total.to(inputs[0].dtype))
    return out


def _plain_route(logits: Tensor, masks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.softmax(logits.float().masked_fill(~masks[rows], -torch.inf), -1)
    value, index = share.topk(8)
    return value / value.sum(-1, keepdim=True), index


if __name__ == "__main__":
    sys.exit(main())
