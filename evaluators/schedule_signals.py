"""Cheap figures of solver schedules: few samples run together, and errors on known paths.

A schedule's error is carried by few of its samples, so that the first ones of a bank say little
about it. The samples that are run here were drawn by how hard they are for a panel of known
schedules, and are weighted to stand for the whole bank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError
from searchlab.evaluators.trajectories import MIN_ROWS, Denoiser, Work
from searchlab.spaces.solver_schedule.grids import GRIDS
from searchlab.spaces.solver_schedule.noise_schedule import NoiseSchedule
from searchlab.spaces.solver_schedule.points import dpmpp_3m
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.table import CoefficientTable, compile_schedule

__all__ = [
    "CheapSignals",
    "Paths",
    "ScheduleSignals",
    "final_states",
    "hard_samples",
    "known_paths",
]

Floats = NDArray[np.float64]
Seen = Callable[[NDArray[np.int64], int, Tensor], None]

NAMES = ("few", "typical", "path", "truncation")
EVEN = 0.3  # share of the chance of being drawn that all samples have alike
TRIED, KEPT = 96, 3  # schedules of the panel that are tried; kept of each number of evaluations
FEWEST = 8  # of the panel in all, where that many were tried
POINTS = 96  # of a known path
PROBE = 0.02  # length of a step that shows a denoiser's slope, in data units


@dataclass(frozen=True)
class CheapSignals:
    """Which figures `SamplingEvaluator.static_signals` gives, and from what.

    - "few": root of the weighted mean square error of few samples, in data units;
    - "typical": their geometric mean error, which no single sample rules;
    - "path": error of the data predictions along the way, against the exact path of each sample;
    - "truncation": errors of single steps that start on the exact path, carried on to the end by
      the denoiser's mean slope. It takes no model call.

    Attributes:
        panel: known schedules, which show which samples are hard.
        samples: how many samples are run for a candidate; 16 or more.
        names: the figures.
    """

    panel: tuple[Schedule, ...]
    samples: int = 64
    names: tuple[str, ...] = ("few", "typical")

    def __post_init__(self) -> None:
        if self.samples < MIN_ROWS:
            raise ConfigError(f"signals of {self.samples} samples; allowed: {MIN_ROWS} or more")
        if not self.names or set(self.names) - set(NAMES) or len(set(self.names)) < len(self.names):
            raise ConfigError(f"signals {self.names}; allowed: some of {', '.join(NAMES)}")
        if not self.panel:
            raise ConfigError("a panel of no schedules; allowed: 1 or more")

    def to_json(self) -> dict[str, Any]:
        """What determines the figures, the panel's schedules apart from it."""
        return {"samples": self.samples, "names": list(self.names), "panel": len(self.panel)}


def _alike(tables: Sequence[CoefficientTable], size: int) -> Iterator[NDArray[np.int64]]:
    """Rows of equally many evaluations that begin alike, at most `size` at once."""
    kinds = [(table.evaluations, table.first_evaluation) for table in tables]
    for kind in sorted(set(kinds)):
        rows = np.array([row for row, own in enumerate(kinds) if own == kind], dtype=np.int64)
        yield from (rows[first : first + size] for first in range(0, len(rows), size))


def _node(
    states: Floats, outputs: Floats, nodes: Sequence[Tensor], answers: Sequence[Tensor]
) -> Tensor:
    """Sums of weights (C, j) times values (C, B, d), in an order that does not depend on C."""
    total: Tensor | None = None
    for weights, values in ((states, nodes), (outputs, answers)):
        for j in np.flatnonzero(weights[:, : len(values)].any(axis=0)).tolist():
            weight = torch.from_numpy(weights[:, j].copy()).to(values[j])
            part = weight[:, None, None] * values[j]
            total = part if total is None else total + part
    return torch.zeros_like(nodes[0]) if total is None else total


def final_states(
    denoise: Denoiser,
    start: Tensor,
    tables: Sequence[CoefficientTable],
    *,
    mean: Tensor | None = None,
    max_rows: int = 4096,
    work: Work | None = None,
    seen: Seen | None = None,
) -> Tensor:
    """Final states (C, B, ...) of C schedules from the start states (B, ...).

    What `PrefixTree` does, without its memory: for few samples of many schedules, keeping track
    costs more than it saves. A row of the answer depends on its own schedule only, for denoisers
    whose rows are independent from `MIN_ROWS` rows up.

    Args:
        denoise: (x (rows, ...), t (rows,)) -> data prediction (rows, ...).
        start: at least `MIN_ROWS` states.
        tables: the schedules.
        mean: of the data, for analytic first evaluations.
        max_rows: of a model call.
        work: where calls are counted.
        seen: is told of every evaluation: rows of `tables`, its number, data predictions
            (rows, B, d).
    """
    b, shape = len(start), start.shape[1:]
    out = start.new_zeros((len(tables), b, *shape))
    for some in _alike(tables, max(1, max_rows // b)):
        states = np.stack([tables[row].states for row in some])
        outputs = np.stack([tables[row].outputs for row in some])
        times = np.stack([tables[row].times for row in some])
        c, k = times.shape
        nodes = [start.reshape(1, b, -1).expand(c, b, -1)]
        answers: list[Tensor] = []
        for r in range(2 * k + 1):
            if r:
                nodes.append(_node(states[:, r], outputs[:, r], nodes, answers))
            if r % 2 or r == 2 * k:
                continue
            first = tables[some[0]].first_evaluation if r == 0 else "model"
            if first == "model":
                at = torch.from_numpy(times[:, r // 2].copy()).repeat_interleave(b)
                x = nodes[-1].reshape(c * b, *shape)
                answers.append(denoise(x, at.to(x)).reshape(c, b, -1))
                if work is not None:
                    work.evaluations += c
                    work.run += c
                    work.calls += 1
                    work.rows += c * b
            else:
                answers.append(_analytic(first, mean, nodes[0]))
            if seen is not None:
                seen(some, r // 2, answers[-1])
        out[torch.from_numpy(some)] = nodes[-1].reshape(c, b, *shape)
    return out


def _analytic(first: str, mean: Tensor | None, like: Tensor) -> Tensor:
    if first == "zero":
        return torch.zeros_like(like)
    if mean is None:
        raise ConfigError("a schedule starts from the data mean, but none was given")
    return mean.to(like).reshape(1, 1, -1).expand_as(like)


def hard_samples(errors: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """Samples to stand for a bank, and their weights: sums of weight * error estimate the mean.

    A sample is drawn with a chance that grows with its share of the panel's errors; those whose
    chance reaches 1 are taken for sure. The others are drawn systematically along their shares, so
    that easy and hard ones are there alike. Nothing is random.

    Args:
        errors: (p, n) mean square errors of p schedules at n samples.
        k: how many samples, at most n.

    Returns:
        int64 (k,) rising, float64 (k,).
    """
    n = errors.shape[1]
    k = min(k, n)
    finite = errors[np.isfinite(errors).all(axis=1)]
    finite = finite[finite.sum(axis=1) > 0]
    shares = np.full(n, 1 / n)
    if len(finite):
        shares = (finite / finite.sum(axis=1, keepdims=True)).mean(axis=0)
    chance = (1 - EVEN) * shares + EVEN / n
    sure = np.zeros(n, dtype=bool)
    while True:
        left = k - int(sure.sum())
        scaled = np.where(sure, 1.0, 0.0)
        rest = ~sure
        if left > 0 and rest.any():
            scaled[rest] = left * chance[rest] / chance[rest].sum()
        more = rest & (scaled >= 1.0)
        if not more.any():
            break
        sure |= more
    open_ = np.flatnonzero(rest)
    order = open_[np.argsort(chance[open_], kind="stable")]
    marks = np.cumsum(scaled[order])
    drawn = order[np.searchsorted(marks, np.arange(left) + 0.5)] if left else order[:0]
    rows = np.sort(np.concatenate([np.flatnonzero(sure), drawn]))
    weights: Floats = 1.0 / (n * scaled[rows])
    return rows, weights


@dataclass(frozen=True)
class Paths:
    """Nearly exact paths of some samples, known at the points of a fine grid.

    Attributes:
        log_snr: (g,) rising.
        data: (g, B, d) data predictions at the points.
        noise: (g, B, d) noise predictions there; the state is alpha data + sigma noise.
        slope: (g,) mean of v'Jv / v'v of the data prediction over random directions v.
        schedule: what turns times into alpha, sigma and log-SNR.
        calls: rows that the model was called with.
    """

    log_snr: Floats
    data: Tensor
    noise: Tensor
    slope: Floats
    schedule: NoiseSchedule
    calls: int

    def at(self, times: Floats) -> tuple[Tensor, Tensor, Floats]:
        """States and data predictions (..., B, d), and slopes (...), at native times (...)."""
        where = np.clip(self.schedule.log_snr(times), self.log_snr[0], self.log_snr[-1])
        high = np.clip(np.searchsorted(self.log_snr, where), 1, len(self.log_snr) - 1)
        low = high - 1
        share = (where - self.log_snr[low]) / (self.log_snr[high] - self.log_snr[low])
        one, two = torch.from_numpy(low), torch.from_numpy(high)
        weight = torch.from_numpy(share)[..., None, None].to(self.data)
        data = self.data[one] * (1 - weight) + self.data[two] * weight
        noise = self.noise[one] * (1 - weight) + self.noise[two] * weight
        alpha, sigma = (
            torch.from_numpy(np.asarray(scale(times)))[..., None, None].to(data)
            for scale in (self.schedule.alpha, self.schedule.sigma)
        )
        slope: Floats = self.slope[low] * (1 - share) + self.slope[high] * share
        return alpha * data + sigma * noise, data, slope


def known_paths(denoise: Denoiser, start: Tensor, noise: NoiseSchedule) -> Paths:
    """Follows the samples from start states (B, ...) to the end by many steps of third order."""
    times = GRIDS["log_snr"](noise, POINTS, noise.start, noise.end)
    table = compile_schedule(dpmpp_3m(times, noise, lower_order_final=False))
    b, shape = len(start), start.shape[1:]
    generator = torch.Generator().manual_seed(0)
    nodes = [start.reshape(1, b, -1)]
    answers: list[Tensor] = []
    data, other, slope = [], [], []
    for r in range(2 * POINTS + 1):
        if r:
            nodes.append(_node(table.states[None, r], table.outputs[None, r], nodes, answers))
        if r % 2:
            continue
        time = float(times[r // 2])
        alpha, sigma = float(noise.alpha(time)), float(noise.sigma(time))
        x = nodes[-1][0]
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * PROBE * alpha
        both = torch.cat([x, x + step]).reshape(2 * b, *shape)
        answer = denoise(both, torch.full((2 * b,), time).to(x)).reshape(2 * b, -1)
        here, moved = answer[:b], answer[b:]
        slope.append(float(((moved - here) * step).sum() / (step * step).sum()))
        answers.append(here[None])
        data.append(here)
        other.append((x - alpha * here) / sigma)
    return Paths(
        np.asarray(noise.log_snr(times), dtype=np.float64),
        torch.stack(data),
        torch.stack(other),
        np.array(slope),
        noise,
        2 * b * (POINTS + 1),
    )


def truncation(
    paths: Paths, tables: Sequence[CoefficientTable], weights: Tensor, *, mean: Tensor | None
) -> Floats:
    """Root mean square of what the errors of single steps come to at the end, float64 (C,).

    Every node is made from exact states and predictions; its error is added to what the table
    makes of the errors before it, where an error e of a state changes the prediction by slope * e.
    """
    out = np.empty(len(tables))
    for some in _alike(tables, 64):
        states = np.stack([tables[row].states for row in some])
        outputs = np.stack([tables[row].outputs for row in some])
        times = np.stack([[*tables[row].times, tables[row].end_time] for row in some])
        x, m, slopes = paths.at(times)
        gain = torch.from_numpy(slopes).to(x)[..., None, None]
        k = times.shape[1] - 1
        exact = [x[:, r // 2] for r in range(2 * k + 1)]
        known = [m[:, j] for j in range(k)]
        errors = [torch.zeros_like(exact[0])]
        wrong: list[Tensor] = []
        for r in range(2 * k + 1):
            if r:
                made = _node(states[:, r], outputs[:, r], exact[:r], known[: (r + 1) // 2])
                carried = _node(states[:, r], outputs[:, r], errors, wrong)
                errors.append(carried + made - exact[r])
            if r % 2 == 0 and r < 2 * k:
                first = tables[some[0]].first_evaluation if r == 0 else "model"
                if first == "model":
                    wrong.append(gain[:, r // 2] * errors[-1])
                else:
                    wrong.append(_analytic(first, mean, exact[0]) - known[0])
        squares = errors[-1].double().square().mean(dim=2)
        out[some] = (squares * weights).sum(dim=1).sqrt().numpy()
    return out


class ScheduleSignals:
    """The figures of `CheapSignals` for one bank of start states.

    Made once: the panel is tried on the first samples, its best are run on the whole bank, and the
    samples are drawn. `work` counts all of that and every candidate; a figure that is not finite
    is infinite.

    Args:
        options: which figures.
        denoise: (x (rows, ...), t (rows,)) -> data prediction (rows, ...).
        start: (n, ...) start states of the whole bank.
        reference: (n, ...) exact solutions of them.
        noise: the noise schedule.
        mean: of the data.
    """

    def __init__(
        self,
        options: CheapSignals,
        denoise: Denoiser,
        start: Tensor,
        reference: Tensor,
        *,
        noise: NoiseSchedule,
        mean: Tensor | None = None,
    ) -> None:
        self.options, self.work = options, Work()
        self._denoise, self._mean = denoise, mean
        panel = self._best(start, reference)
        finals = self._finals(panel, start)
        errors = _squares(finals, reference)
        rows, weights = hard_samples(errors, max(MIN_ROWS, options.samples))
        self.rows, self.weights = rows, weights
        at = torch.from_numpy(rows)
        self._start, self._reference = start[at], reference[at]
        self._paths: Paths | None = None
        if {"path", "truncation"} & set(options.names):
            self._paths = known_paths(denoise, self._start, noise)
            self.work.rows += self._paths.calls

    def _finals(self, tables: Sequence[CoefficientTable], start: Tensor, **more: Any) -> Tensor:
        rows = max(4096, len(start))
        return final_states(
            self._denoise, start, tables, mean=self._mean, max_rows=rows, work=self.work, **more
        )

    def _best(self, start: Tensor, reference: Tensor) -> list[CoefficientTable]:
        """Tables of the best of the panel on the first samples, of every number of evaluations."""
        schedules = self.options.panel
        some = np.unique(np.linspace(0, len(schedules) - 1, TRIED).round().astype(np.int64))
        tables = [compile_schedule(schedules[row]) for row in some.tolist()]
        few = start[:MIN_ROWS]
        errors = _squares(self._finals(tables, few), reference[: len(few)]).mean(axis=1)
        errors = np.where(np.isfinite(errors), errors, np.inf)
        calls = np.array([table.nfe for table in tables])
        kept = max(KEPT, -(-FEWEST // len(np.unique(calls))))
        chosen = []
        for number in np.unique(calls):
            rows = np.flatnonzero(calls == number)
            chosen += rows[np.argsort(errors[rows], kind="stable")][:kept].tolist()
        return [tables[row] for row in sorted(chosen)]

    def __call__(self, schedules: Sequence[Schedule]) -> Floats:
        """The figures (C, names) of C schedules; each row is a function of its schedule only."""
        tables = [compile_schedule(schedule) for schedule in schedules]
        out: dict[str, Floats] = {}
        wanted = set(self.options.names)
        weights = self.weights / self.weights.sum()
        if wanted - {"truncation"}:
            along = np.zeros(len(tables))
            counts = np.array([table.evaluations for table in tables])
            seen = self._watch(tables, along) if "path" in wanted else None
            squares = _squares(self._finals(tables, self._start, seen=seen), self._reference)
            out["few"] = np.sqrt((squares * self.weights).sum(axis=1))
            with np.errstate(divide="ignore"):
                out["typical"] = np.exp(0.5 * (np.log(squares) * weights).sum(axis=1))
            out["path"] = np.sqrt(along / np.maximum(counts, 1))
        if "truncation" in wanted:
            assert self._paths is not None
            own = torch.from_numpy(weights)
            out["truncation"] = truncation(self._paths, tables, own, mean=self._mean)
        columns = np.stack([out[name] for name in self.options.names], axis=1)
        return np.where(np.isfinite(columns), columns, np.inf)

    def _watch(self, tables: Sequence[CoefficientTable], along: Floats) -> Seen:
        """Adds the weighted mean square errors of data predictions to `along` (C,)."""
        paths = self._paths
        assert paths is not None
        weights = self.weights / self.weights.sum()

        def seen(rows: NDArray[np.int64], k: int, answers: Tensor) -> None:
            exact = paths.at(np.array([tables[row].times[k] for row in rows]))[1]
            squares = _squares(answers, exact)
            along[rows] += (squares * weights).sum(axis=1)

        return seen


def _squares(finals: Tensor, reference: Tensor) -> Floats:
    """Mean square error per candidate and sample, float64 (C, B)."""
    difference = (finals.double() - reference.double()).flatten(2)
    return np.ascontiguousarray((difference**2).mean(dim=2).cpu().numpy())
