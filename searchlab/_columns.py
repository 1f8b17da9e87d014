"""Separable programs with several budgets, or few distinct labels per group: column generation.

A column is one block of elements with a label for each. Given prices of the budgets a block's best
column is found exactly: without a limit every element takes its own best label, with a limit every
set of so many labels is tried for every block at once. The master program over the columns found so
far, a linear one by HiGHS, gives new prices; any prices give a lower bound. What makes a plan of
columns is `searchlab._many_budgets`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._label_program import Many
from searchlab.errors import ConfigError

__all__ = ["MOST_SETS", "Generation"]

Array = NDArray[Any]

MOST_SETS = 20_000  # sets of labels that are tried per block
ROUNDS = 200  # of column generation
SETS = 8  # per block, that the last program looks at
FLIPS = 7  # elements of a block that may leave their best label there
COLUMN_NODES = 60
BLOCK = 32  # elements of a block where nothing else groups them
_AT_ONCE = 4_000_000  # entries of the table of sets
_FAR = 1e4  # price of leaving a budget, in units of the largest loss per unit of budget


@dataclass
class _Columns:
    """The columns found so far."""

    seen: set[tuple[int, bytes]] = field(default_factory=set)
    block: list[int] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    cost: list[Array] = field(default_factory=list)
    used: list[Array] = field(default_factory=list)  # bool (k,), the labels in it


class Generation:
    """Column generation for one problem."""

    def __init__(self, problem: Many) -> None:
        self.problem = problem
        e = len(problem.losses)
        self.labels = np.flatnonzero(np.isfinite(problem.losses).any(axis=0))
        self.limited = problem.groups is not None and problem.most < len(self.labels)
        if problem.groups is not None and self.limited:
            self.blocks = problem.groups
        else:
            self.blocks = np.arange(e) // max(BLOCK, -(-e // 64))
        self.order = np.argsort(self.blocks, kind="stable")
        sizes = np.bincount(self.blocks)
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.members = np.split(self.order, self.starts[1:])
        self.sets = self._sets()
        self.open = np.ones((len(sizes), 0 if self.sets is None else len(self.sets)), dtype=bool)
        self.columns = _Columns()
        finite = problem.losses[np.isfinite(problem.losses)]
        self.unit = float(finite.max()) or 1.0
        self.bound = -np.inf
        self.empty = False
        self.prices = np.zeros(len(problem.upper))

    def _sets(self) -> NDArray[np.int64] | None:
        if not self.limited:
            return None
        k = len(self.labels)
        count = math.comb(k, self.problem.most)
        if count > MOST_SETS:
            raise ConfigError(
                f"at most {self.problem.most} of {k} labels per group are {count} sets; allowed: "
                f"{MOST_SETS} (a lower limit, or fewer labels)"
            )
        return np.array(list(itertools.combinations(self.labels, self.problem.most)))

    # -- prices to columns ----------------------------------------------------------------------

    def _priced(self, prices: Array) -> Array:
        out: Array = self.problem.losses + np.tensordot(prices, self.problem.costs, axes=1)
        return out

    def _value(self, prices: Array, least: Array) -> float:
        """The lower bound that prices prove, given the least priced sum of every block."""
        up, low = prices > 0, prices < 0
        ends = prices[up] @ self.problem.upper[up] + prices[low] @ self.problem.lower[low]
        return float(least.sum() - ends)

    def _best_columns(self, prices: Array) -> tuple[Array, Array]:
        """The best labels of every element under its block's best set; sums per block."""
        priced = self._priced(prices)[self.order]
        labels = np.empty(len(priced), dtype=np.int64)
        if self.sets is None:
            found = priced.argmin(axis=1)
            least = np.take_along_axis(priced, found[:, None], 1)[:, 0]
            labels[self.order] = found
            return labels, np.add.reduceat(least, self.starts)
        sums = np.where(self.open, self._set_sums(priced), np.inf)
        chosen = self.sets[sums.argmin(axis=1)]
        mine = chosen[self.blocks[self.order]]
        within = np.take_along_axis(priced, mine, 1).argmin(axis=1)
        labels[self.order] = np.take_along_axis(mine, within[:, None], 1)[:, 0]
        return labels, sums.min(axis=1)

    def _set_sums(self, priced: Array) -> Array:
        """What every block's elements, in block order, cost at least under every set; (g, s)."""
        assert self.sets is not None
        step = max(1, _AT_ONCE // len(priced))
        parts = []
        for start in range(0, len(self.sets), step):
            some = self.sets[start : start + step]
            least = priced[:, some[:, 0]]
            for column in some.T[1:]:
                least = np.minimum(least, priced[:, column])
            parts.append(np.add.reduceat(least, self.starts, axis=0))
        return np.concatenate(parts, axis=1)

    def _take(self, labels: Array) -> int:
        """Adds the columns of one plan; how many were new."""
        own = np.arange(len(labels))
        losses = self.problem.losses[own, labels]
        costs = self.problem.costs[:, own, labels]
        new = 0
        for number, rows in enumerate(self.members):
            mark = number, labels[rows].tobytes()
            if mark in self.columns.seen or not np.isfinite(losses[rows]).all():
                continue
            self.columns.seen.add(mark)
            self.columns.block.append(number)
            self.columns.labels.append(labels[rows])
            self.columns.loss.append(float(losses[rows].sum()))
            self.columns.cost.append(costs[:, rows].sum(axis=1))
            used = np.zeros(self.problem.losses.shape[1], dtype=bool)
            used[labels[rows]] = True
            self.columns.used.append(used)
            new += 1
        return new

    # -- the master -----------------------------------------------------------------------------

    def run(self, close: float) -> None:
        """Generates columns until the bound is as close to the linear program's value."""
        zero = np.zeros(len(self.problem.upper))
        far = _FAR * self.unit
        for prices in (zero, *(far * np.eye(len(zero))), np.full(len(zero), far)):
            labels, least = self._best_columns(prices)
            self._take(labels)
            self._note(prices, least)
        if len(set(self.columns.block)) < len(self.members):  # a block that no set serves
            self.empty = True
            return
        _, outside = self._generate(close, ROUNDS)
        self.empty = outside > 1e-9

    def _generate(self, close: float, rounds: int) -> tuple[Array, float]:
        """Weights of all columns in the master, and by how much it leaves the budgets."""
        for _ in range(rounds):
            reached, prices, weights, outside = self._master()
            labels, least = self._best_columns(prices)
            proved = self._note(prices, least)
            if not self._take(labels) or reached - proved <= max(close, 1e-7) * reached + 1e-12:
                break
        return weights, outside

    def dive(self) -> NDArray[np.bool_]:
        """Labels bool (e, k), of one set per block, that lose little against the bound.

        Blocks whose share in the linear program lies in one set take it; one of the others is
        decided at a time, and the program solved again.
        """
        assert self.sets is not None
        k = self.problem.losses.shape[1]
        member = np.zeros((len(self.sets), k), dtype=bool)
        member[np.arange(len(self.sets))[:, None], self.sets] = True
        bound, prices = self.bound, self.prices
        self.open = np.isfinite(self._set_sums(self._priced(prices)[self.order]))
        while True:
            weights, _ = self._generate(1e-4, 20)
            block = np.array(self.columns.block)[: len(weights)]
            used = np.array(self.columns.used)
            shares = {}
            for number in np.flatnonzero(self.open.sum(axis=1) > 1).tolist():
                rows = np.flatnonzero((block == number) & (weights > 1e-9))
                fits = ~(used[rows][:, None] & ~member[None]).any(axis=2)  # columns x sets
                share = weights[rows] @ fits
                shares[number] = int(share.argmax()), float(share.max())
            if not shares:
                break
            most = max(part for _, part in shares.values())
            for number, (chosen, part) in shares.items():
                if part >= min(most, 0.999):
                    self.open[number] = False
                    self.open[number, chosen] = True
        self.bound, self.prices = bound, prices  # what fixed sets prove holds for them only
        out: NDArray[np.bool_] = member[self.open.argmax(axis=1)][self.blocks]
        return out

    def _note(self, prices: Array, least: Array) -> float:
        proved = self._value(prices, least)
        if proved > self.bound:
            self.bound, self.prices = proved, prices
        return proved

    def _rows(self) -> tuple[Array, Any]:
        from scipy.sparse import csr_matrix

        block = np.array(self.columns.block)
        n = len(block)
        ones = csr_matrix((np.ones(n), (block, np.arange(n))), shape=(len(self.members), n))
        return np.array(self.columns.cost).T, ones

    def _master(self) -> tuple[float, Array, Array, float]:
        """Value, prices and weights of the linear program; by how much it leaves the budgets."""
        from scipy.optimize import linprog
        from scipy.sparse import csr_matrix, hstack

        cost, ones = self._rows()
        ends = [(cost, self.problem.upper), (-cost, -self.problem.lower)]
        rows = np.concatenate([part[np.isfinite(end)] for part, end in ends])
        limits = np.concatenate([end[np.isfinite(end)] for _, end in ends])
        n, m = len(self.columns.loss), len(limits)
        answer = linprog(
            np.concatenate([self.columns.loss, np.full(m, _FAR * self.unit)]),
            A_ub=hstack([csr_matrix(rows), csr_matrix(-np.eye(m))], format="csr"),
            b_ub=limits,
            A_eq=hstack([ones, csr_matrix((len(self.members), m))], format="csr"),
            b_eq=np.ones(len(self.members)),
            bounds=[(0.0, most) for most in [*self._usable().tolist(), *[np.inf] * m]],
            method="highs",
        )
        duals = np.maximum(-answer.ineqlin.marginals, 0.0)
        prices, at = np.zeros(len(self.problem.upper)), 0
        for sign, (_, end) in zip((1.0, -1.0), ends, strict=True):
            for b in np.flatnonzero(np.isfinite(end)):
                prices[b] += sign * duals[at]
                at += 1
        weights: Any = answer.x
        return float(answer.fun or 0.0), prices, weights[:n], float(weights[n:].sum())

    def _usable(self) -> Array:
        """1 for the columns that the open sets allow, else 0."""
        if self.sets is None:
            return np.ones(len(self.columns.loss))
        fixed = np.flatnonzero(self.open.sum(axis=1) == 1)
        allowed = np.ones((len(self.members), self.problem.losses.shape[1]), dtype=bool)
        allowed[fixed] = False
        chosen = self.sets[self.open[fixed].argmax(axis=1)]
        allowed[fixed[:, None], chosen] = True
        outside = np.array(self.columns.used) & ~allowed[np.array(self.columns.block)]
        return np.asarray(~outside.any(axis=1), dtype=np.float64)

    # -- from the bound to a plan ---------------------------------------------------------------

    def priced_sums(self) -> tuple[Array, Array]:
        """Losses plus costs at the best prices, (e, k); every block's least sum under every set."""
        priced = self._priced(self.prices)
        return priced, self._set_sums(priced[self.order])

    def reduced(self) -> Array:
        """What every label costs under the best prices beyond its element's best; no limit."""
        priced = self._priced(self.prices)
        return np.asarray(priced - priced.min(axis=1, keepdims=True))

    def improved(self, plan: Array, gap: float) -> NDArray[np.int64]:
        """A plan of columns near the bound, by an integer program over them; `plan` where none.

        For every block the sets that can still be part of a better plan are tried with all
        combinations of the few label changes that cost least.
        """
        assert self.sets is not None
        room = self.problem.loss(plan) - self.bound
        priced, sums = self.priced_sums()
        flips = (np.arange(2**FLIPS)[:, None] >> np.arange(FLIPS)) & 1
        found: list[Array] = []
        for number, rows in enumerate(self.members):
            parts = [plan[rows][None]]
            order = np.argsort(sums[number], kind="stable")[:SETS]
            for some in self.sets[order[sums[number, order] <= sums[number].min() + room]]:
                part = np.sort(priced[rows][:, some], axis=1)
                rank = some[np.argsort(priced[rows][:, some], axis=1, kind="stable")]
                delta = part[:, min(1, len(some) - 1)] - part[:, 0]
                cheap = np.argsort(delta, kind="stable")[:FLIPS]
                cheap = cheap[np.isfinite(delta[cheap]) & (len(some) > 1)]
                use = flips[: 2 ** len(cheap), : len(cheap)]
                use = use[use @ delta[cheap] + part[:, 0].sum() <= sums[number].min() + room / 2]
                block = np.repeat(rank[:, 0][None], len(use), axis=0)
                block[:, cheap] = np.where(
                    use == 1, rank[cheap, min(1, len(some) - 1)], rank[cheap, 0]
                )
                parts.append(block)
            found.append(np.unique(np.concatenate(parts), axis=0))
        return self._combined(found, plan, gap)

    def _combined(self, found: list[Array], plan: Array, gap: float) -> NDArray[np.int64]:
        """The best plan that takes one of the given assignments for every block."""
        b, n = len(self.problem.upper), max(map(len, found))
        losses = np.full((len(found), n), np.inf)
        costs = np.zeros((b, len(found), n))
        for number, (rows, labels) in enumerate(zip(self.members, found, strict=True)):
            losses[number, : len(labels)] = self.problem.losses[rows, labels].sum(axis=1)
            costs[:, number, : len(labels)] = self.problem.costs[:, rows, labels].sum(axis=2)
        limit = self.problem.loss(plan)
        priced = losses + np.tensordot(self.prices, costs, axes=1)
        near = priced - priced.min(axis=1, keepdims=True) <= limit - self.bound
        program = Many(losses, costs, self.problem.lower, self.problem.upper)
        some, _ = program.program(near, limit).solve(gap=gap / 2, nodes=COLUMN_NODES)
        out = np.array(plan)
        if some is not None:
            for number, rows in enumerate(self.members):
                out[rows] = found[number][some[number]]
        better = self.problem.keeps(out) and self.problem.loss(out) < limit
        return out if better else plan

    def useful(self, reach: float) -> NDArray[np.bool_]:
        """Labels that a plan better than the bound plus `reach` can take."""
        allowed = np.isfinite(self.problem.losses)
        if not np.isfinite(reach):
            return allowed
        room = reach * (1 + 1e-9) + 1e-12
        if self.sets is None:
            priced = self._priced(self.prices)
            near: NDArray[np.bool_] = priced - priced.min(axis=1, keepdims=True) <= room
            return allowed & near
        _, sums = self.priced_sums()
        block, number = np.nonzero(sums - sums.min(axis=1, keepdims=True) <= room)
        used = np.zeros((len(sums), allowed.shape[1]), dtype=bool)
        used[block[:, None], self.sets[number]] = True
        allowed &= used[self.blocks]
        return allowed
