"""Racing a given list on common noise: what is proven worse, at a stated level, is left behind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told
from searchlab.errors import ConfigError
from searchlab.population import Jobs
from searchlab.space import Space

__all__ = ["PairedRace"]

Test = Literal["t", "bernstein", "hoeffding"]


class PairedRace(Algorithm):
    """Measures its seeds block after block, each block with the same noise for all of them.

    Block r is replicate r: the evaluator uses one set of items or random numbers for all
    candidates, so that differences are paired. After each block whatever is significantly worse
    than the candidate with the lowest mean is dropped, until `keep` are left.

    The level is that of the whole race: with probability 1 - `alpha` at least, the candidate with
    the lowest true mean is not dropped. Look k spends alpha * 6 / (pi * k)**2, divided by the
    number of rivals. This is exact for "bernstein" and "hoeffding", where values lie in a range of
    known width, and for "t" where differences are normal.

    A candidate that fails in a block, or breaks an outcome constraint there, is dropped. Where the
    records are summed up, candidates that were dropped come after those that were not.

    Source: Hoeffding races (Maron and Moore 1994); empirical Bernstein bounds, arXiv 0907.3740,
    theorem 4.

    Args:
        space, seed, first_id: see `Algorithm`.
        seeds: the candidates; repeated ones are dropped.
        alpha: see above.
        test: what decides; "t" needs no `width`.
        width: of the range that a single value lies in, in the objective's unit.
        first_blocks: blocks before the first look.
        blocks: most blocks of one candidate.
        keep: how many are wanted.
        quantum: candidates per block; by default as many as there are seeds.

    Raises:
        ConfigError: settings out of range, a missing or needless width, more seeds than a block
            holds.
    """

    name: ClassVar[str] = "paired_race"
    pools = False
    levels = True

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        alpha: float = 0.05,
        test: Test = "t",
        width: float | None = None,
        first_blocks: int = 3,
        blocks: int = 64,
        keep: int = 1,
        quantum: int | None = None,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        if test not in ("t", "bernstein", "hoeffding"):
            raise ConfigError(f"test {test!r}; allowed: t, bernstein, hoeffding")
        if (width is None) != (test == "t") or (width is not None and not 0 < width < math.inf):
            raise ConfigError(f"width {width} with test {test!r}; allowed: above 0, none for t")
        if not 0 < alpha < 1 or first_blocks < 2 or blocks < first_blocks or keep < 1:
            raise ConfigError(
                f"alpha {alpha}, first_blocks {first_blocks}, blocks {blocks}, keep {keep}; "
                "allowed: between 0 and 1, 2 or more, not fewer than the first, 1 or more"
            )
        n = len(self.seeds.population)
        if quantum is not None and (quantum < 1 or n > quantum):
            raise ConfigError(f"quantum {quantum} for {n} candidates; allowed: as many or more")
        self._given_quantum = quantum
        self.quantum = quantum or max(1, n)
        self.max_lag = self.quantum
        self.alpha = alpha
        self.test: Test = test
        self.width = width
        self.first_blocks = first_blocks
        self.blocks = blocks
        self.keep = keep
        self._losses = np.full((0, n), np.nan)  # told so far, a row per block
        self._alive = [np.ones(n, dtype=bool)]  # who takes part in block 0, 1, ...

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "quantum": self._given_quantum,  # the number of seeds is none of the settings
            "alpha": self.alpha,
            "test": self.test,
            "width": self.width,
            "first_blocks": self.first_blocks,
            "blocks": self.blocks,
            "keep": self.keep,
        }

    def _width(self) -> int:
        return 0

    def _learn(self, told: Told) -> None:
        block, at = np.divmod(told.ids - self.first_id, self.quantum)
        more = int(block.max()) + 1 - len(self._losses)
        if more > 0:
            rest = np.full((more, self._losses.shape[1]), np.nan)
            self._losses = np.concatenate([self._losses, rest])
        self._losses[block, at] = np.where(told.violation > 0, np.inf, told.losses[:, 0])

    def survivors(self, block: int) -> NDArray[np.bool_]:
        """Which seeds take part in a block, as far as the blocks before it are told."""
        alive = self._alive[min(block, len(self._alive) - 1)]
        for before in range(len(self._alive) - 1, block):
            known = len(self._losses) > before
            missing = np.isnan(self._losses[before]) & alive if known else alive
            if before == 0 and known:  # repeated seeds have no job
                missing = missing & ~self._repeats
            if missing.any() or not alive.any():
                return alive
            alive = self._look(before, alive)
            self._alive.append(alive)
        return alive

    @property
    def _repeats(self) -> NDArray[np.bool_]:
        keys = self.space.keys(self.seeds.population)
        return np.array([key in keys[:row] for row, key in enumerate(keys)], dtype=bool)

    def _look(self, block: int, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Who goes on after a block that is told."""
        losses = self._losses[: block + 1]
        alive = alive & np.isfinite(losses[block])
        looks, rivals = block + 2 - self.first_blocks, len(self.seeds.population) - 1
        if looks < 1 or alive.sum() <= self.keep:
            return alive
        level = self.alpha * 6 / (math.pi * looks) ** 2 / max(1, rivals)
        rows = np.flatnonzero(alive)
        means = losses[:, rows].mean(axis=0)
        order = np.argsort(means, kind="stable")
        worse = self._worse(losses[:, rows] - losses[:, rows[order[:1]]], level)
        worse[order[: self.keep]] = False
        out = alive.copy()
        out[rows[worse]] = False
        return out

    def _worse(self, differences: NDArray[np.float64], level: float) -> NDArray[np.bool_]:
        """Which columns of paired differences (blocks, n) have a mean above 0 at this level."""
        n = len(differences)
        mean, spread = differences.mean(axis=0), differences.std(axis=0, ddof=1)
        if self.test == "t":
            from scipy.stats import t

            return np.asarray(mean > t.ppf(1 - level, n - 1) * spread / math.sqrt(n))
        assert self.width is not None
        reach = 2 * self.width  # of a difference
        if self.test == "hoeffding":
            return np.asarray(mean > reach * math.sqrt(math.log(1 / level) / (2 * n)))
        log = math.log(2 / level)
        return np.asarray(mean > spread * math.sqrt(2 * log / n) + 7 * reach * log / (3 * (n - 1)))

    def ask(self, first_id: int, n: int) -> Jobs:
        """See `Algorithm.ask`; at most up to the end of the block that holds the first id."""
        block, start = divmod(first_id - self.first_id, self.quantum)
        stop = min(start + n, self.quantum)
        if block == 0:
            return replace(super().ask(first_id, stop - start), replicate=0)
        alive = self.survivors(block)
        if block >= self.blocks or alive.sum() <= self.keep:
            return super().ask(first_id, 0)
        rows = np.flatnonzero(alive)
        rows = rows[(rows >= start) & (rows < stop)]
        population = self.seeds.population.take(rows)
        return Jobs(
            ids=first_id - start + rows.astype(np.int64),
            population=population,
            keys=self.space.keys(population) if len(rows) else (),
            replicate=block,
            told_at_ask=self.n_told,
            origin=tuple(self.seeds.origin[row] for row in rows),
            parents=np.full((len(rows), 2), -1, dtype=np.int64),
        )

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        return None
