"""Many compiled schedules at once: equal first steps are run once, the rest share model calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from searchlab.errors import EvaluationError
from searchlab.spaces.solver_schedule.table import CoefficientTable

__all__ = ["MAX_BYTES", "MIN_ROWS", "PrefixTree", "Work", "prefix_digests"]

Denoiser = Callable[[Tensor, Tensor], Tensor]

MIN_ROWS = 16
"""Matrix products of fewer rows use other kernels, whose results differ in the last bits."""

MAX_BYTES = 512 * 2**20
"""Of what a tree remembers by default; about 60 schedules of 8 calls for 2,000 digits."""


@dataclass
class Work:
    """What was done: model calls saved are `evaluations` - `run`."""

    evaluations: int = 0  # trajectory evaluations that the schedules need, each of all samples
    run: int = 0  # those that were run
    calls: int = 0  # model calls they were packed into
    rows: int = 0  # rows of those calls


@dataclass
class _Node:
    """One point of a trajectory: the state a model is called at and what it answered."""

    state: Tensor
    restart: Tensor | None  # what later steps start from at the point before, if corrected
    output: Tensor | None
    digest: bytes
    bytes: int = field(default=0)


def prefix_digests(table: CoefficientTable) -> list[bytes]:
    """Digests of the evaluations 0..K-1 and of the result; equal digests = equal trajectories.

    Built on the weights themselves, so that schedules which are spelled differently but run alike
    share their work.
    """
    k = table.evaluations
    digest = blake2b(
        table.first_evaluation.encode() + (table.times[:1] + 0.0).tobytes(), digest_size=16
    ).digest()
    out = [digest]
    states, outputs = table.states + 0.0, table.outputs + 0.0
    for i in range(1, k + 1):
        time = table.times[i] if i < k else table.end_time
        rows = (2 * i - 1, 2 * i)
        parts = [digest, b"end" if i == k else b"", np.float64(time + 0.0).tobytes()]
        for r in rows:
            parts += [states[r, :r].tobytes(), outputs[r, : (r + 1) // 2].tobytes()]
        digest = blake2b(b"".join(parts), digest_size=16).digest()
        out.append(digest)
    return out


class PrefixTree:
    """Runs schedules from one bank of start noise.

    Schedules form a tree: a node is everything that determines a model call's input. Each node is
    run once while it is remembered; nodes of one depth share model calls of at most `max_rows`
    rows. Results do not depend on what was remembered or batched: bit-equal on the CPU for a
    denoiser whose rows are independent from `MIN_ROWS` rows up (states are combined in a fixed
    order, element by element); within the repeat noise on a GPU.

    Args:
        denoise: (x (rows, ...), t (rows,) native time) -> data prediction (rows, ...).
        x: (B, ...) start states. Fewer than `MIN_ROWS` are padded by repeating the last.
        mean: data mean for analytic first evaluations.
        max_bytes: bound of what is remembered between and within calls of `run`.
        max_rows: rows per model call; the number of nodes per call is max(1, max_rows // B), a
            function of the sample count, never of timing. May be set later.
        split: a node with more rows takes several calls, of `MIN_ROWS` rows at least; not for
            denoisers that know a sample by its place.
        remember: keep nodes between schedules; off = every schedule runs whole.
    """

    def __init__(
        self,
        denoise: Denoiser,
        x: Tensor,
        *,
        mean: Tensor | None = None,
        max_bytes: int = MAX_BYTES,
        max_rows: int = 4000,
        remember: bool = True,
        min_rows: int = MIN_ROWS,
        split: bool = False,
    ) -> None:
        if x.ndim < 2 or not x.is_floating_point() or not len(x):
            raise EvaluationError(
                f"start states of shape {tuple(x.shape)} {x.dtype}; allowed: (B >= 1, ...) floats"
            )
        self._denoise = denoise
        self._rows = len(x)
        pad = max(0, min_rows - len(x))
        self._x = torch.cat([x, x[-1:].expand(pad, *x.shape[1:])]) if pad else x
        self._mean = mean
        self._max_bytes = max_bytes
        self.max_rows, self._split = max_rows, split
        self._remember = remember
        self._nodes: OrderedDict[bytes, _Node] = OrderedDict()
        self._held = 0
        self.work = Work()

    @property
    def _per_call(self) -> int:
        return max(1, self.max_rows // len(self._x))

    @property
    def held_bytes(self) -> int:
        """Bytes of remembered tensors; at most `max_bytes`."""
        return self._held

    def forget(self) -> None:
        """Drops what is remembered."""
        self._nodes.clear()
        self._held = 0

    def run(self, tables: Sequence[CoefficientTable]) -> Tensor:
        """Final states (C, B, ...) of C schedules, in their order."""
        digests = [prefix_digests(table) for table in tables]
        out: list[Tensor | None] = [None] * len(tables)
        # Neighbours in this order share the longest prefixes, so that little has to be remembered.
        order = sorted(range(len(tables)), key=lambda i: digests[i])
        for start in range(0, len(order), self._per_call):
            batch = order[start : start + self._per_call]
            for i, state in zip(
                batch,
                self._batch([tables[i] for i in batch], [digests[i] for i in batch]),
                strict=True,
            ):
                out[i] = state
        return torch.stack([state for state in out if state is not None])

    def _batch(
        self, tables: Sequence[CoefficientTable], digests: Sequence[list[bytes]]
    ) -> list[Tensor]:
        paths: list[list[_Node]] = [[] for _ in tables]
        deepest = max(table.evaluations for table in tables)
        for k in range(deepest + 1):
            level: dict[bytes, _Node] = {}
            waiting: list[tuple[_Node, float]] = []
            for index, table in enumerate(tables):
                if k > table.evaluations:
                    continue
                digest = digests[index][k] if self._remember else digests[index][k] + bytes([index])
                node = level.get(digest) or self._nodes.get(digest)
                if node is None:
                    node = self._arrive(table, k, paths[index], digest)
                    if k < table.evaluations:
                        if k == 0 and table.first_evaluation != "model":
                            node.output = self._analytic(table.first_evaluation)
                        else:
                            waiting.append((node, float(table.times[k])))
                level[digest] = node
                paths[index].append(node)
                if k < table.evaluations and not (k == 0 and table.first_evaluation != "model"):
                    self.work.evaluations += 1
            self._call(waiting)
            if self._remember:
                for node in level.values():
                    # A result has no output: equal schedules are rare, and cheap to combine again.
                    if node.output is not None:
                        self._keep(node)
        for path in paths:
            # Ancestors are touched last: what is dropped first is never above what stays.
            for node in reversed(path):
                if node.digest in self._nodes:
                    self._nodes.move_to_end(node.digest)
        self._shrink()
        return [path[-1].state[: self._rows] for path in paths]

    def _arrive(self, table: CoefficientTable, k: int, path: list[_Node], digest: bytes) -> _Node:
        if k == 0:
            return _Node(self._x, None, None, digest)
        restart = None
        if not table.is_copy(2 * k - 1):
            restart = self._combine(table, 2 * k - 1, path, None)
        state = self._combine(table, 2 * k, path, restart)
        return _Node(state, restart, None, digest)

    def _combine(
        self, table: CoefficientTable, row: int, path: list[_Node], restart: Tensor | None
    ) -> Tensor:
        total: Tensor | None = None
        weights = table.states[row]
        for c in np.flatnonzero(weights).tolist():
            value = path[c // 2].state
            if c % 2:
                after = restart if c // 2 + 1 == len(path) else path[c // 2 + 1].restart
                value = value if after is None else after
            total = _add(total, float(weights[c]), value)
        outputs = table.outputs[row]
        for j in np.flatnonzero(outputs).tolist():
            output = path[j].output
            assert output is not None
            total = _add(total, float(outputs[j]), output)
        return torch.zeros_like(self._x) if total is None else total

    def _analytic(self, first: str) -> Tensor:
        if first == "zero":
            return torch.zeros_like(self._x)
        if self._mean is None:
            raise EvaluationError("a schedule starts from the data mean, but none was given")
        return self._mean.to(self._x).expand_as(self._x)

    def _call(self, waiting: list[tuple[_Node, float]]) -> None:
        size = len(self._x)
        for start in range(0, len(waiting), self._per_call):
            part = waiting[start : start + self._per_call]
            x = part[0][0].state if len(part) == 1 else torch.cat([node.state for node, _ in part])
            times = torch.tensor([time for _, time in part], dtype=torch.float64, device=x.device)
            answer = self._answer(x, times.repeat_interleave(size).to(x.dtype))
            if answer.shape != x.shape:
                raise EvaluationError(
                    f"the model answered {tuple(answer.shape)}; allowed: {tuple(x.shape)}"
                )
            for (node, _), output in zip(part, torch.split(answer, size), strict=True):
                # A part of a shared answer would keep all of it in memory.
                node.output = output.clone() if self._remember and len(part) > 1 else output
            self.work.run += len(part)
            self.work.rows += len(x)

    def _answer(self, x: Tensor, times: Tensor) -> Tensor:
        """The model's answer to some rows, in several calls where they are too many for one."""
        pieces = min(-(-len(x) // self.max_rows), len(x) // MIN_ROWS) if self._split else 1
        pieces = max(1, pieces)
        self.work.calls += pieces
        if pieces == 1:
            return self._denoise(x, times)
        parts = zip(x.tensor_split(pieces), times.tensor_split(pieces), strict=True)
        return torch.cat([self._denoise(*part) for part in parts])

    def _keep(self, node: _Node) -> None:
        if node.digest in self._nodes:
            return
        node.bytes = sum(
            t.numel() * t.element_size()
            for t in (node.state, node.restart, node.output)
            if t is not None
        )
        self._nodes[node.digest] = node
        self._held += node.bytes

    def _shrink(self) -> None:
        while self._held > self._max_bytes:
            _, node = self._nodes.popitem(last=False)
            self._held -= node.bytes


def _add(total: Tensor | None, weight: float, value: Tensor) -> Tensor:
    if total is None:
        return value if weight == 1.0 else weight * value
    # Product and sum are rounded apart: a fused multiply-add is used for whole vectors but not for
    # the tail, and the bits of a sample would depend on its place in the batch.
    return total + weight * value
