"""Crossover and mutation of solver schedules: ours, and the operator of the released code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError, SpaceError
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.solver_schedule.space import (
    CORRECTORS,
    RELAXATIONS,
    SolverScheduleSpace,
)
from searchlab.variables import Choice, Ordered, Real, normals, reflect

__all__ = ["ReleasedVariation", "ScheduleVariation"]

Array = NDArray[Any]

PER_STEP = (
    "prediction",
    "order",
    "start",
    "active",
    "estimate",
    "relaxation",
    "corrector",
    "coefficient",
    "scale_2",
    "scale_3",
)
_LINEAR = RELAXATIONS.index("linear")


class _Uniforms:
    """Hands out the columns of one block of uniforms, each once."""

    def __init__(self, u: Array) -> None:
        self._u = u
        self._at = 0

    def one(self) -> Array:
        return self.block(1)[:, 0]

    def block(self, k: int) -> Array:
        self._at += k
        if self._at > self._u.shape[1]:
            raise SpaceError(f"operator needs {self._at} uniforms, got {self._u.shape[1]}")
        return self._u[:, self._at - k : self._at]


def _copy(population: Population) -> dict[str, Array]:
    return {name: np.array(column) for name, column in population.columns.items()}


def _solver_space(space: Space) -> SolverScheduleSpace:
    if not isinstance(space, SolverScheduleSpace):
        raise SpaceError(f"a schedule operator on {space!r}; allowed: a SolverScheduleSpace")
    return space


def _choose(u: Array, weights: dict[int, float]) -> Array:
    """Codes drawn with given weights."""
    codes = np.array(list(weights))
    edges = np.cumsum(list(weights.values()))
    return codes[np.minimum(np.searchsorted(edges / edges[-1], u, side="right"), len(codes) - 1)]


def insert_step(columns: dict[str, Array], rows: Array, where: Array, share: Array) -> None:
    """A step more in these rows: step `where` is doubled, its point lands `share` into the gap."""
    if not rows.any():
        return
    m = columns["order"].shape[1]
    index = np.arange(m)
    source = np.where(index <= where[:, None], index, index - 1)
    chosen = np.flatnonzero(rows)
    take = source[chosen]
    for name in (*PER_STEP, "log_snr"):
        columns[name][chosen] = np.take_along_axis(columns[name][chosen], take, axis=1)
    at = where[chosen]
    log_snr = columns["log_snr"]
    after = log_snr[chosen, at]
    before = np.where(at > 0, log_snr[chosen, np.maximum(at - 1, 0)], np.nan)
    first = after - np.abs(log_snr[chosen, np.minimum(at + 2, m - 1)] - after)
    before = np.where(np.isnan(before), first, before)
    log_snr[chosen, at] = before + share[chosen] * (after - before)
    columns["points"][chosen] += 1


def delete_step(columns: dict[str, Array], rows: Array, where: Array) -> None:
    """A step less in these rows: step `where` goes, the last noisy point stays."""
    if not rows.any():
        return
    m = columns["order"].shape[1]
    index = np.arange(m)
    source = np.minimum(np.where(index < where[:, None], index, index + 1), m - 1)
    chosen = np.flatnonzero(rows)
    for name in (*PER_STEP, "log_snr"):
        columns[name][chosen] = np.take_along_axis(columns[name][chosen], source[chosen], axis=1)
    columns["points"][chosen] -= 1


def _meet_targets(
    space: SolverScheduleSpace, columns: dict[str, Array], targets: Array, u: _Uniforms
) -> None:
    """Inserts or deletes steps until the number of model calls is the target, where it can be."""
    for _ in range(3):
        where_u, share = u.one(), u.one()
        population = space.canonicalise(Population(columns))
        for name, column in population.columns.items():
            columns[name] = np.array(column)
        missing = targets - np.rint(space.cost(population)["nfe"]).astype(np.int64)
        count = columns["points"]
        grow = (missing > 0) & (count < space.most)
        shrink = (missing < 0) & (count > 1)
        insert_step(columns, grow, (where_u * count).astype(np.int64), share)
        delete_step(columns, shrink, (where_u * (count - 1)).astype(np.int64))


def _mix(
    space: SolverScheduleSpace, columns: dict[str, Array], b: Population, mixed: Array, u: _Uniforms
) -> None:
    """Crossover of rows with equally many points: decisions per step from either parent."""
    m = space.most
    same = mixed & (columns["points"] == b["points"]) & (columns["ending"] == b["ending"])
    whole_times = u.one() < 0.5
    swap = u.block(m) < 0.5
    cut = (u.one() * m).astype(np.int64)
    by_cut = u.one() < 0.5
    part = np.where(by_cut[:, None], np.arange(m) >= cut[:, None], swap) & same[:, None]
    for name in PER_STEP:
        columns[name] = np.where(part, b[name], columns[name]).astype(columns[name].dtype)
    times = np.where(by_cut[:, None], part, (same & whole_times)[:, None])
    columns["log_snr"] = np.where(times, b["log_snr"], columns["log_snr"])


def _keep_head(columns: dict[str, Array], a: Population, rows: Array, u: Array) -> None:
    """Steps before one drawn evenly are those of `a` again, where the number of points is."""
    count, m = columns["points"], columns["order"].shape[1]
    rows = rows & (count == a["points"])
    kept = np.where(rows, (u * count).astype(np.int64), 0)[:, None]
    head = np.arange(m) < kept
    for name in PER_STEP:
        columns[name] = np.where(head, a[name], columns[name]).astype(columns[name].dtype)
    for name in ("first", "interpolation"):
        whole = kept[:, 0] > 0
        columns[name] = np.where(whole, a[name], columns[name]).astype(columns[name].dtype)
    # The rest is pushed beyond the head: times are sorted later, and would mix with it.
    last = np.take_along_axis(a["log_snr"], np.maximum(kept - 1, 0), axis=1)
    rest = np.where(kept > 0, np.maximum(columns["log_snr"], last), columns["log_snr"])
    columns["log_snr"] = np.where(head, a["log_snr"], rest)


@dataclass(frozen=True)
class ScheduleVariation:
    """Our operator: small moves of the numbers half of the time, else decisions and structure too.

    Attributes:
        crossover: probability that decisions come from two parents.
        blend: probability that times and coefficients lie on the line through two parents.
        fine: probability that only numbers move.
        structure: probability of a step moved elsewhere (one inserted, one deleted).
        decisions: expected number of redrawn decisions where decisions move.
        first: probability that what stands in for the first evaluation is redrawn then.
        smallest, largest: limits of the standard deviation of a move of log-SNR, drawn
            log-uniformly per child; coefficients and scales move by `ratio` times as much.
        head: probability that everything before a step, drawn evenly, is as the first parent has
            it, so that both runs share their beginning.
    """

    crossover: float = 0.3
    blend: float = 0.3
    fine: float = 0.5
    structure: float = 0.1
    decisions: float = 1.5
    first: float = 0.1
    smallest: float = 0.01
    largest: float = 0.4
    ratio: float = 0.6
    head: float = 0.3

    def __post_init__(self) -> None:
        for name in ("crossover", "blend", "fine", "structure", "first", "head"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)}; allowed: 0 to 1")
        if not 0 < self.smallest <= self.largest:
            raise ConfigError(f"moves {self.smallest}..{self.largest}; allowed: rising, above 0")

    def settings(self) -> dict[str, Any]:
        return {"name": "schedule", **asdict(self)}

    def width(self, space: Space) -> int:
        m = _solver_space(space).most
        mix, targets, structure = m + 3, 12, 3
        numbers = 2 + 3 + 2 * m + 3 * 2 * m
        decisions = 1 + len(PER_STEP[:7]) * 2 * m + 8
        head = 2
        return 4 + mix + targets + structure + numbers + decisions + head + space.repair_width

    def vary(
        self,
        space: Space,
        a: Population,
        b: Population,
        u: Array,
        *,
        strength: float = 1.0,
        targets: Array | None = None,
    ) -> Population:
        space = _solver_space(space)
        draw = _Uniforms(u)
        columns = _copy(a)
        mixed = draw.one() < self.crossover
        blended = draw.one() < self.blend
        wild = draw.one() >= (self.fine if strength == 1.0 else 0.0)
        moved = (draw.one() < self.structure * strength) & wild
        _mix(space, columns, b, mixed, draw)
        self._structure(space, columns, moved, draw)
        self._decisions(space, columns, wild, strength, draw)
        self._numbers(space, columns, b, blended, strength, draw)
        _keep_head(columns, a, draw.one() < self.head, draw.one())
        if targets is not None:
            _meet_targets(space, columns, targets, draw)
        return space.repair(Population(columns), u[:, u.shape[1] - space.repair_width :])

    def _structure(
        self, space: SolverScheduleSpace, columns: dict[str, Array], rows: Array, draw: _Uniforms
    ) -> None:
        where_in, where_out, share = draw.one(), draw.one(), draw.one()
        count = columns["points"]
        rows = rows & (count > 1) & (count < space.most)
        insert_step(columns, rows, (where_in * count).astype(np.int64), share)
        delete_step(columns, rows, (where_out * (columns["points"] - 1)).astype(np.int64))

    def _decisions(
        self,
        space: SolverScheduleSpace,
        columns: dict[str, Array],
        rows: Array,
        strength: float,
        draw: _Uniforms,
    ) -> None:
        m = space.most
        inside = np.arange(m) < columns["points"][:, None]
        names = PER_STEP[:7]
        total = np.maximum(1, columns["points"] * len(names))
        rate = np.minimum(1.0, self.decisions * strength / total)[:, None]
        weights = {
            "relaxation": {0: 0.25, 1: 0.1, 2: 0.15, _LINEAR: 0.4, 4: 0.05, 5: 0.05},
            "order": {0: 0.15, 1: 0.35, 2: 0.35, 3: 0.15},
            "corrector": {0: 0.45, 1: 0.45, 2: 0.1},
            "start": {0: 0.9, 1: 0.07, 2: 0.03},
        }
        draw.one()
        for name in names:
            choice = space.variables[name]
            assert isinstance(choice, Choice)
            hit = (draw.block(m) < rate) & inside & rows[:, None]
            k = len(choice.labels)
            known = weights.get(name)
            if known is None:
                known = {code: 1.0 for code in range(k)}
            fresh = _choose(draw.block(m), {c: w for c, w in known.items() if c < k})
            columns[name] = np.where(hit, fresh, columns[name]).astype(choice.dtype)
        for name, chance in (("first", self.first), ("ending", 0.05), ("interpolation", 0.05)):
            choice = space.variables[name]
            assert isinstance(choice, Choice)
            hit = (draw.one() < min(1.0, chance * strength)) & rows
            fresh = (draw.one() * len(choice.labels)).astype(choice.dtype)
            columns[name] = np.where(hit, fresh, columns[name]).astype(choice.dtype)

    def _numbers(
        self,
        space: SolverScheduleSpace,
        columns: dict[str, Array],
        b: Population,
        blended: Array,
        strength: float,
        draw: _Uniforms,
    ) -> None:
        m = space.most
        same = blended & (columns["points"] == b["points"])
        weight = np.where(same, -0.3 + 1.6 * draw.one(), 0.0)[:, None]
        size = np.exp(
            np.log(self.smallest) + draw.one() * (np.log(self.largest) - np.log(self.smallest))
        )
        size = np.minimum(1.0, size * np.sqrt(strength))[:, None]
        share = np.array([0.15, 0.4, 1.0])[(draw.one() * 3).astype(np.int64)][:, None]
        ordered = space.variables["log_snr"]
        assert isinstance(ordered, Ordered)
        sure = (draw.one() * columns["points"]).astype(np.int64)[:, None] == np.arange(m)
        quiet = (draw.one() < 0.15)[:, None]  # some children keep their times
        hit = ((draw.block(m) < share) | sure) & ~quiet
        log_snr = columns["log_snr"] + weight * (b["log_snr"] - columns["log_snr"])
        log_snr = log_snr + np.where(hit, normals(draw.block(m)) * size, 0.0)
        columns["log_snr"] = np.clip(log_snr, ordered.low, ordered.high)
        for name in ("coefficient", "scale_2", "scale_3"):
            real = space.variables[name]
            assert isinstance(real, Real)
            hit = draw.block(m) < share
            both = columns[name] + weight * (b[name] - columns[name])
            moved = both + np.where(hit, normals(draw.block(m)) * size * self.ratio, 0.0)
            columns[name] = reflect(moved, real.low, real.high)


@dataclass(frozen=True)
class ReleasedVariation:
    """The released code's operator, with the v3 prediction type and skip coefficients left out.

    Source: the code of arXiv 2312.07243, settings of its CIFAR-10 search: a child of two parents
    with probability 0.3, then every table entry of every step changes with its own probability.
    Times move in native time as there; where that code reverts a time that leaves its neighbours'
    order, here the times are sorted and kept `gap` apart (its missing gap made NaN).
    """

    crossover: float = 0.3
    mixing: float = 0.5
    insert: float = 0.2
    delete: float = 0.2
    step: float = 0.3
    time_scale: float = 0.08
    coefficient_scale: float = 0.03

    def settings(self) -> dict[str, Any]:
        return {"name": "released", **asdict(self)}

    def width(self, space: Space) -> int:
        m = _solver_space(space).most
        return (
            9 + 3 * m + 6 + 2 * m + 2 * m + 4 * m + 2 * m + 2 * m + 2 * m + 4 + space.repair_width
        )

    def vary(
        self,
        space: Space,
        a: Population,
        b: Population,
        u: Array,
        *,
        strength: float = 1.0,
        targets: Array | None = None,
    ) -> Population:
        space = _solver_space(space)
        draw = _Uniforms(u)
        m = space.most
        columns = _copy(a)
        self._cross(columns, b, draw, m)
        count = columns["points"]
        where, share = draw.one(), draw.one()
        grow = (draw.one() < self.insert) & (count < m)
        insert_step(columns, grow, (where * count).astype(np.int64), share)
        gone, where = draw.one(), draw.one()
        shrink = (gone < self.delete) & (columns["points"] > 2)
        delete_step(columns, shrink, (where * (columns["points"] - 1)).astype(np.int64))
        draw.one()
        self._times(space, columns, draw, m)
        hit = draw.block(m) < self.step
        order = _choose(draw.block(m), {0: 0.2, 1: 0.4, 2: 0.3, 3: 0.1})
        columns["order"] = np.where(hit, order, columns["order"]).astype(np.uint8)
        for name, neutral in (("estimate", 0), ("relaxation", 0)):
            columns[name] = np.where(hit, neutral, columns[name]).astype(np.uint8)
        columns["coefficient"] = np.where(hit, 0.0, columns["coefficient"])
        self._scaling(columns, draw, m)
        for name, weights in (
            ("estimate", {1: 0.5, 2: 0.5}),
            ("prediction", {0: 0.5, 1: 0.5}),
            ("corrector", {0: 0.5, CORRECTORS.index("pseudo"): 0.5}),
        ):
            hit = draw.block(m) < self.step
            fresh = _choose(draw.block(m), weights)
            columns[name] = np.where(hit, fresh, columns[name]).astype(np.uint8)
        self._first(space, columns, draw)
        return space.repair(Population(columns), u[:, u.shape[1] - space.repair_width :])

    def _cross(self, columns: dict[str, Array], b: Population, draw: _Uniforms, m: int) -> None:
        """Whole keys from either parent of equal length, then mixing step by step."""
        chosen = (draw.one() < self.crossover) & (columns["points"] == b["points"])
        chosen &= columns["ending"] == b["ending"]
        mixing = chosen & (draw.one() < self.mixing)
        steps = draw.block(m) < 0.5
        keys = {
            "log_snr": ("log_snr",),
            "prediction": ("prediction",),
            "order": ("order", "estimate", "relaxation", "coefficient", "scale_2", "scale_3"),
        }
        order_part = None
        for key, names in keys.items():
            whole = (chosen & (draw.one() < 0.5))[:, None]
            part = whole ^ (steps & mixing[:, None]) if key != "log_snr" else whole
            order_part = part if key == "order" else order_part
            for name in names:
                columns[name] = np.where(part, b[name], columns[name]).astype(columns[name].dtype)
        assert order_part is not None
        # Correctors are rebuilt with the orders they belong to.
        columns["corrector"] = np.where(order_part, b["corrector"], columns["corrector"]).astype(
            np.uint8
        )

    def _times(
        self, space: SolverScheduleSpace, columns: dict[str, Array], draw: _Uniforms, m: int
    ) -> None:
        ordered = space.variables["log_snr"]
        assert isinstance(ordered, Ordered)
        old = space.noise.time_of_log_snr(columns["log_snr"])
        hit = draw.block(m) < self.step
        new = old * (1 + self.time_scale * normals(draw.block(m)))
        last = np.arange(m) == columns["points"][:, None] - 1
        low, high = space.within.last
        final = low + (high - low) * draw.block(m)
        new = np.where(last, final, new)
        inside = (new > low) & (new < space.start_time * (1 - 1e-3)) | last
        log_snr = space.noise.log_snr(np.where(hit & inside, new, old))
        columns["log_snr"] = np.clip(
            np.where(hit & inside, log_snr, columns["log_snr"]), ordered.low, ordered.high
        )

    def _scaling(self, columns: dict[str, Array], draw: _Uniforms, m: int) -> None:
        hit = draw.block(m) < self.step
        also = hit & (draw.block(m) < self.step)
        columns["relaxation"] = np.where(hit, _LINEAR, columns["relaxation"]).astype(np.uint8)
        draw.block(m)
        moved = columns["coefficient"] + self.coefficient_scale * normals(draw.block(m))
        columns["coefficient"] = np.where(also, moved, columns["coefficient"])

    def _first(
        self, space: SolverScheduleSpace, columns: dict[str, Array], draw: _Uniforms
    ) -> None:
        choice = space.variables["first"]
        assert isinstance(choice, Choice)
        weights = {"model": 0.3, "zero": 0.3, "mean": 0.4}
        known = {code: weights[label] for code, label in enumerate(choice.labels)}
        hit = draw.one() < self.step
        fresh = _choose(draw.one(), known)
        columns["first"] = np.where(hit, fresh, columns["first"]).astype(choice.dtype)
