"""Search of real numbers by a smooth model of the losses: for few, costly evaluations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from searchlab._variable import normals
from searchlab.algorithms._coordinates import Coordinates
from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told, no_parents
from searchlab.errors import ConfigError
from searchlab.population import Population
from searchlab.space import Space

__all__ = ["Kriging"]

Array = NDArray[Any]

_CAP = 0.9  # quantile of the labels above which a loss is only known to be bad
_LEAST = 4  # labels of a fit
_STARTS = 5  # of the descent on a drawn acquisition
_STEPS = 40  # of each of them
_FIT_STEPS = 30
_JITTER = 1e-8

# Median and sd of what is fitted, a priori: log of the length in units of the labels' usual
# distance, and log of the share of the variance that is noise.
_LENGTH, _NOISE = (0.0, 1.0), (-6.0, 2.0)
_BEGINNINGS = ((0.0, -6.0), (1.5, -8.0))
_BOUNDS = ((-2.0, 4.0), (-13.0, 0.0))


class Kriging(Algorithm):
    """A Gaussian process in the coordinates that `cma` moves in, minimised for every proposal.

    The first groups are normal steps around the best of what is told (the seeds), or the middle of
    the ranges. Then a process with a squared exponential kernel of one length is fitted to the
    `keep` best labels by evidence with weak priors, and every id descends, by gradients from some
    of the best labels, on its own lower confidence bound: mean - kappa x a x sd, where a is the
    size of a normal number. The later ids of a group take what is expected of the earlier ones for
    measured, so that they look elsewhere.

    A loss counts as no further above the labels' 0.9 quantile than the best is below it; failed and
    violating candidates count as that. A proposal takes tens of milliseconds, however much was
    told.

    Args:
        space, seed, first_id, seeds: see `Algorithm`; the space as in `Coordinates`.
        population: candidates a group, which are told before the next group is asked for.
        first: candidates after the seeds that are drawn before the first fit.
        sigma: standard deviation of the first candidates as a fraction of each range.
        keep: labels that the process is fitted to.
        kappa: how daring proposals are; 0 = none looks for what is little known.

    Raises:
        ConfigError: a space of other variables, or of a single coordinate; numbers out of range.

    Source: Srinivas et al., arXiv:0912.3995 (confidence bounds), Ginsbourger et al., "Kriging is
    well-suited to parallelize optimization", 2010 (believed values); a is drawn, not a schedule.
    """

    name: ClassVar[str] = "kriging"
    pools = False

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        first_id: int = 0,
        seeds: Seeds | None = None,
        population: int = 8,
        first: int = 16,
        sigma: float = 0.1,
        keep: int = 160,
        kappa: float = 0.3,
    ) -> None:
        super().__init__(space, seed=seed, first_id=first_id, seeds=seeds)
        self._coordinates = Coordinates(space, name=self.name)
        if self._coordinates.size < 2:
            raise ConfigError(
                f"kriging on {self._coordinates.size} coordinates; allowed: 2 or more (the "
                "algorithm 'es11' takes fewer)"
            )
        for what, number, least in (("population", population, 1), ("first", first, _LEAST)):
            if number < least:
                raise ConfigError(f"{what} {number}; allowed: {least} or more")
        if not 16 <= keep <= 1000:
            raise ConfigError(f"keep {keep}; allowed: 16 to 1000")
        if not (0 < sigma <= 1 and 0 <= kappa <= 10):
            raise ConfigError(f"sigma {sigma}, kappa {kappa}; allowed: in (0, 1] and in [0, 10]")
        self.quantum = self.max_lag = population
        self.first, self.sigma, self.keep, self.kappa = first, sigma, keep, kappa
        groups = -(-len(self.seeds.population) // population) + -(-first // population)
        self._start = first_id + groups * population
        self._vectors = np.empty((0, self._coordinates.size))
        self._losses = np.empty(0)
        self._chains: dict[int, tuple[_Process, list[Array]]] = {}

    def settings(self) -> dict[str, Any]:
        own = {"first": self.first, "sigma": self.sigma, "keep": self.keep, "kappa": self.kappa}
        return {**super().settings(), **own}

    def _width(self) -> int:
        return 1 + self._coordinates.size + self.space.repair_width

    def _learn(self, told: Told) -> None:
        losses = np.where(told.violation > 0, np.inf, told.losses[:, 0])
        self._vectors = np.concatenate([self._vectors, self._coordinates.vectors(told.population)])
        self._losses = np.concatenate([self._losses, losses])
        self.__dict__.pop("_model", None)
        self._chains.clear()

    @cached_property
    def _model(self) -> _Process | None:
        """Of what is told; None = too few labels, or all alike."""
        good = self._losses[np.isfinite(self._losses)]
        if len(good) < _LEAST:
            return None
        best = np.sort(good)[: self.keep]
        usual = float(np.quantile(best, _CAP))
        cap = 2 * usual - best[0]
        labels = np.minimum(self._losses, cap)
        rows = np.argsort(labels, kind="stable")[: self.keep]
        labels = labels[rows]
        spread = labels.std()
        if not spread > 1e-12 * max(1.0, abs(labels).max()):
            return None
        return _Process.fitted(self._vectors[rows], (labels - labels.mean()) / spread)

    @property
    def _best(self) -> Array:
        """The best vector so far; the middle while there is none."""
        if not len(self._losses) or not np.isfinite(self._losses).any():
            return self._coordinates.centre
        best: Array = self._vectors[int(np.argmin(self._losses))]
        return best

    def _draw(self, ids: NDArray[np.int64], u: NDArray[np.float64], strength: float) -> Draw | None:
        d = self._coordinates.size
        z = normals(u[:, 1 : 1 + d])
        vectors = self._best + self.sigma * strength * z
        late = np.flatnonzero(ids >= self._start)
        model = self._model if len(late) else None
        for row in late if model is not None else ():
            assert model is not None
            vectors[row] = self._proposed(model, int(ids[row]))
            if strength > 1:
                vectors[row] += 0.02 * strength * model.length / np.sqrt(d) * z[row]
        population: Population = self._coordinates.population(vectors, u[:, 1 + d :])
        return Draw(population, [self.name] * len(ids), no_parents(len(ids)))

    def _proposed(self, model: _Process, i: int) -> Array:
        """The vector of an id, after those of the lower ids of its group."""
        start = i - (i - self.first_id) % self.quantum
        process, chain = self._chains.get(start, (model, []))
        for other in range(start + len(chain), i + 1):
            u = self._uniforms(np.array([other]), 0)[0, 0]
            vector = process.proposal(np.random.default_rng(int(u * 2**53)), self.kappa)
            process = process.believing(vector)
            chain.append(vector)
        self._chains[start] = process, chain
        return chain[i - start]


@dataclass(frozen=True)
class _Process:
    """A Gaussian process given labels; losses have mean 0 and variance 1 over them.

    Attributes:
        x: (n, d) labelled vectors, the best first.
        y: (n,) labels.
        length: of the kernel, in the vectors' unit.
        mean, variance: of the process.
        weights: (n,), the prediction is mean + kernel @ weights.
        root: what `cho_factor` gives of the labels' covariances, in units of the variance.
        noise: on their diagonal.
        labelled: how many are measured; the rest is believed.
    """

    x: Array
    y: Array
    length: float
    mean: float
    variance: float
    weights: Array
    root: tuple[Array, bool]
    noise: float
    labelled: int

    @classmethod
    def fitted(cls, x: Array, y: Array) -> _Process:
        """By the greatest evidence times prior, of two descents."""
        from scipy.linalg import cho_factor, cho_solve
        from scipy.optimize import minimize

        n = len(y)
        squares = _squares(x)
        usual = float(np.median(squares[np.triu_indices(n, 1)])) or 1.0
        diagonal, ones = np.diag_indices(n), np.ones(n)

        def solved(log: Array) -> tuple[Array, tuple[Array, bool], Array, float, float]:
            kernel = np.exp(-squares / (2 * usual * np.exp(2 * log[0])))
            noisy = kernel.copy()
            noisy[diagonal] += np.exp(log[1]) + _JITTER
            root = cho_factor(noisy, lower=True)
            one = cho_solve(root, ones)
            mean = float(one @ y / one.sum())
            weights = cho_solve(root, y - mean)
            return kernel, root, weights, mean, float((y - mean) @ weights / n)

        def misfit(log: Array) -> tuple[float, Array]:
            kernel, root, weights, _, variance = solved(log)
            inner = cho_solve(root, np.eye(n)) - np.outer(weights, weights) / variance
            by_length = kernel * squares / (usual * np.exp(2 * log[0]))
            slope = np.array(
                [0.5 * (inner * by_length).sum(), 0.5 * np.exp(log[1]) * np.trace(inner)]
            )
            away = (log - (_LENGTH[0], _NOISE[0])) / (_LENGTH[1], _NOISE[1])
            value = 0.5 * n * np.log(variance) + np.log(np.diag(root[0])).sum()
            return float(value + 0.5 * (away**2).sum()), slope + away / (_LENGTH[1], _NOISE[1])

        found = [
            minimize(
                misfit,
                np.array(begin),
                jac=True,
                method="L-BFGS-B",
                bounds=_BOUNDS,
                options={"maxiter": _FIT_STEPS},
            )
            for begin in _BEGINNINGS
        ]
        log = min(found, key=lambda one: float(one.fun)).x
        _, root, weights, mean, variance = solved(log)
        length, noise = float(np.sqrt(usual) * np.exp(log[0])), float(np.exp(log[1]) + _JITTER)
        return cls(x, y, length, mean, variance, weights, root, noise, n)

    def believing(self, x: Array) -> _Process:
        """The process that takes its own mean at x for measured."""
        from scipy.linalg import cho_factor, cho_solve

        rows = np.concatenate([self.x, x[None]])
        labels = np.append(self.y, self.bound(x, 0.0)[0])
        noisy = np.exp(-_squares(rows) / (2 * self.length**2))
        noisy[np.diag_indices(len(rows))] += self.noise
        root = cho_factor(noisy, lower=True)
        weights = cho_solve(root, labels - self.mean)
        return replace(self, x=rows, y=labels, weights=weights, root=root)

    def bound(self, x: Array, kappa: float) -> tuple[float, Array]:
        """mean - kappa sd at x (d,), and its gradient."""
        from scipy.linalg import cho_solve

        away = self.x - x
        kernel = np.exp(-(away**2).sum(axis=1) / (2 * self.length**2))
        solved = cho_solve(self.root, kernel, check_finite=False)
        left = max(1 - float(kernel @ solved), 1e-10)
        sd = float(np.sqrt(self.variance * left))
        rows = self.weights + kappa * self.variance / sd * solved
        slope = (kernel * rows) @ away / self.length**2
        return self.mean + float(kernel @ self.weights) - kappa * sd, slope

    def proposal(self, generator: np.random.Generator, kappa: float) -> Array:
        """The lowest point that descents from some of the best labels come to, (d,)."""
        from scipy.optimize import minimize

        kappa *= abs(generator.normal())
        d = self.x.shape[1]
        low, high = self.x.min(axis=0) - self.length, self.x.max(axis=0) + self.length
        reach = list(zip(low.tolist(), high.tolist(), strict=True))
        best: Any = None
        for _ in range(_STARTS):
            row = min(int(generator.exponential(2.0)), self.labelled - 1)
            step = self.length * abs(generator.normal()) / np.sqrt(d)
            found = minimize(
                self.bound,
                self.x[row] + step * generator.normal(size=d),
                args=(kappa,),
                jac=True,
                method="L-BFGS-B",
                bounds=reach,
                options={"maxiter": _STEPS},
            )
            if best is None or found.fun < best.fun:
                best = found
        out: Array = best.x
        return out


def _squares(x: Array) -> Array:
    """Squared distances (n, n)."""
    lengths = (x**2).sum(axis=1)
    out: Array = np.maximum(lengths[:, None] + lengths - 2 * x @ x.T, 0.0)
    return out
