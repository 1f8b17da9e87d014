"""What a solver schedule is worth: error against a long reference, or distance of its samples."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluator import (
    REPORT_REPLICATE,
    SELECTION_REPLICATE,
    Fidelity,
    Objective,
    Reproducibility,
    Signal,
)
from searchlab.evaluators.distances import FrechetReference, frechet_distances, kid
from searchlab.evaluators.noise import Split, noise_bank, split_seed
from searchlab.evaluators.schedule_signals import CheapSignals, ScheduleSignals
from searchlab.evaluators.trajectories import MAX_BYTES, MIN_ROWS, PrefixTree, Work
from searchlab.population import FAILED, OK, Evaluations, Jobs, Population
from searchlab.space import Space
from searchlab.spaces.solver_schedule.noise_schedule import NoiseSchedule
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.table import compile_schedule

__all__ = ["SampleDistance", "SamplingEvaluator", "SamplingProblem", "split_of"]

VERSION = 1
REMEMBERED_BANKS = 2
REMEMBERED_SIGNALS = 200_000  # candidates
KID_BLOCK = 500  # rows per block of the kernel distance: its cost grows with the square


def split_of(replicate: int) -> tuple[Split, int]:
    """Which split a replicate belongs to, and its number there."""
    if replicate >= REPORT_REPLICATE:
        return "report", replicate - REPORT_REPLICATE
    if replicate >= SELECTION_REPLICATE:
        return "selection", replicate - SELECTION_REPLICATE
    return "search", replicate


class Features(Protocol):
    """Features of samples: (B, ...) -> (B, d), with a hash of what computes them."""

    @property
    def model_hash(self) -> str: ...
    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class SampleDistance:
    """Distance of samples to data, in a feature space.

    Attributes:
        features: the extractor.
        reference: mean and covariance of the data's features.
        rows: (m, d) the data's features themselves; needed for the kernel distance.
    """

    features: Features
    reference: FrechetReference
    rows: Tensor | None = None


@dataclass(frozen=True)
class SamplingProblem:
    """A diffusion model to sample from.

    Attributes:
        name: for tables.
        noise: its noise schedule, which gives times their meaning.
        denoise: (x (B, *shape), t (B,)) -> data prediction (B, *shape).
        shape: of one sample.
        scale: start states are `scale` times standard normal noise.
        reference: start states (B, *shape) -> the (nearly) exact solutions (B, *shape).
        mean: data mean, for schedules with an analytic first evaluation.
        dtype: of the states.
        identity: JSON that determines the model (hashes) and the reference.
        device: where the states live.
    """

    name: str
    noise: NoiseSchedule
    denoise: Callable[[Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    scale: float
    reference: Callable[[Tensor], Tensor]
    identity: Mapping[str, Any]
    mean: Tensor | None = None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def start(self, seed: int, n: int) -> Tensor:
        """The first n start states of a noise bank, (n, *shape)."""
        noise = noise_bank(seed, 0, n, self.shape)
        return torch.from_numpy(noise).to(self.device, self.dtype) * self.scale


@dataclass
class _Bank:
    tree: PrefixTree
    reference: Tensor | None = None


@dataclass
class SamplingEvaluator:
    """Runs schedules on a problem, all on the same start noise.

    Objective "rmse": root mean square difference to the reference solution of the same noise, in
    data units; items are the samples' mean square errors. Objective "fd": Fréchet distance of
    features; "kid": kernel distance (unbiased, may be negative). On the selection and report splits
    the signal is "rmse" for a distance and "fd" for "rmse" (NaN in the search).

    With `cheap`, `static_signals` gives figures of candidates that were never evaluated; they are
    not filled in by `evaluate`. `signal_work` counts the model calls that they took, and the search
    bank's reference solution is shared with the evaluations.

    Args:
        space: `plans` of it are schedules.
        problem: what to sample from.
        objective: "rmse", "fd" or "kid".
        distance: needed for the latter two.
        samples: samples per fidelity, ascending; the last is the truth of the search.
        held_out: samples on the selection and report splits.
        seed: of the noise banks; never the search's seed, so that searches share values.
        max_bytes: bound of the prefix tree per bank.
        max_rows: rows per model call at first; see `micro_batch`.
        remember: use the prefix tree.
        cheap: which figures there are without an evaluation; None = none.
    """

    space: Space
    problem: SamplingProblem
    objective: Literal["rmse", "fd", "kid"] = "rmse"
    distance: SampleDistance | None = None
    samples: tuple[int, ...] = (64, 256)
    held_out: int = 2000
    seed: int = 0
    max_bytes: int = MAX_BYTES
    max_rows: int = 4000
    remember: bool = True
    cheap: CheapSignals | None = None
    work: Work = field(default_factory=Work)
    remembers: ClassVar[bool] = True  # static signals: asking again costs nothing

    def __post_init__(self) -> None:
        if self.objective not in ("rmse", "fd", "kid"):
            raise ConfigError(f"objective {self.objective!r}; allowed: rmse, fd, kid")
        if self.objective != "rmse" and self.distance is None:
            raise ConfigError(
                f"objective {self.objective!r} needs a feature extractor and a reference set"
            )
        if self.objective == "kid" and (self.distance is None or self.distance.rows is None):
            raise ConfigError("objective 'kid' needs the reference set's features")
        if not self.samples or list(self.samples) != sorted(set(self.samples)):
            raise ConfigError(f"samples {self.samples}; allowed: rising numbers")
        if self.samples[0] < 2 or self.held_out < 2:
            raise ConfigError("samples and held_out are 2 or more")
        self._banks: OrderedDict[tuple[int, int], _Bank] = OrderedDict()
        self._at_once = self.max_rows
        self._cheap: ScheduleSignals | None = None
        self._figures: dict[bytes, NDArray[np.float64]] = {}

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return (Objective(self.objective, "min"),)

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        truth = self.samples[-1]
        return tuple(Fidelity(f"{n} samples", n / truth) for n in self.samples)

    @property
    def signals(self) -> tuple[Signal, ...]:
        evaluated: tuple[Signal, ...] = ()
        if self.distance is not None:
            evaluated = (Signal("fd" if self.objective == "rmse" else "rmse"),)
        if self.cheap is None:
            return evaluated
        unit = f"{self.cheap.samples} of {self.samples[-1]} samples"
        static = tuple(
            Signal(name, unit="no model call" if name == "truncation" else unit, when="static")
            for name in self.cheap.names
        )
        return (*evaluated, *static)

    @property
    def signal_work(self) -> Work:
        """What the static signals took so far, in this process."""
        return Work() if self._cheap is None else self._cheap.work

    def static_signals(self, population: Population) -> NDArray[np.float64]:
        """Figures of candidates without an evaluation, float64 (n, signals), NaN = not among them.

        They are remembered, so that a candidate is paid for once.
        """
        out = np.full((len(population), len(self.signals)), np.nan)
        if self.cheap is None or not len(population):
            return out
        keys = self.space.keys(population)
        fresh = {key: row for row, key in enumerate(keys) if key not in self._figures}
        if len(self._figures) + len(fresh) > REMEMBERED_SIGNALS:
            self._figures.clear()
            fresh = {key: row for row, key in enumerate(keys)}
        if fresh:
            rows = np.array(list(fresh.values()), dtype=np.int64)
            with torch.no_grad():
                figures = self._signals()(self.space.plans(population.take(rows)))
            self._figures.update(zip(fresh, figures, strict=True))
        out[:, len(self.signals) - len(self.cheap.names) :] = [self._figures[key] for key in keys]
        return out

    def _signals(self) -> ScheduleSignals:
        if self._cheap is None:
            assert self.cheap is not None
            n = self.samples[-1]
            reference = self._reference(0, n)
            start = self.problem.start(split_seed(self.seed, "search", 0), n)
            problem = self.problem
            self._cheap = ScheduleSignals(
                self.cheap,
                problem.denoise,
                start,
                reference,
                noise=problem.noise,
                mean=problem.mean,
            )
        return self._cheap

    @property
    def reproducibility(self) -> Reproducibility:
        return "exact" if self.problem.device == "cpu" else "batch"

    @property
    def micro_batch(self) -> int:
        """Rows per model call; fewer than `MIN_ROWS` would change the last bits of their values."""
        return self._at_once

    @micro_batch.setter
    def micro_batch(self, rows: int) -> None:
        self._at_once = max(rows, min(MIN_ROWS, self._at_once))
        for bank in self._banks.values():
            bank.tree.max_rows = self._at_once

    def setup(self) -> None:
        """Nothing beyond the problem that was handed in."""

    def forget(self) -> None:
        """Drops remembered trajectories, so that the next values are computed afresh."""
        for bank in self._banks.values():
            bank.tree.forget()

    def identity(self) -> Mapping[str, Any]:
        out: dict[str, Any] = {
            "version": VERSION,
            "problem": dict(self.problem.identity),
            "noise": self.problem.noise.to_json(),
            "objective": self.objective,
            "samples": list(self.samples),
            "held_out": self.held_out,
            "seed": self.seed,
            "dtype": str(self.problem.dtype),
        }
        if self.distance is not None:
            out["features"] = self.distance.features.model_hash
            out["reference"] = self.distance.reference.digest
        if self.cheap is not None:
            out["signals"] = list(self.cheap.names)
        return out

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """Values of the jobs' schedules; a schedule that cannot run fails with its reason."""
        n_jobs = len(jobs)
        values = np.full((n_jobs, 1), np.nan)
        signals = np.full((n_jobs, len(self.signals)), np.nan)
        state = np.full(n_jobs, OK, dtype=np.int8)
        reason = [""] * n_jobs
        items: list[NDArray[np.floating[Any]] | None] = [None] * n_jobs
        schedules: list[Schedule] = self.space.plans(jobs.population)
        split, _ = split_of(jobs.replicate)
        n = self.samples[jobs.fidelity] if split == "search" else self.held_out
        finals = self.sample(schedules, jobs.replicate, n)
        finite = torch.isfinite(finals).flatten(1).all(dim=1).cpu().numpy()
        both = split != "search"
        if self.objective == "rmse" or both:
            errors = self._errors(finals, jobs.replicate, n)
            rmse = np.sqrt(errors.mean(axis=1))
            if self.objective == "rmse":
                values[:, 0] = rmse
                items = [row.astype(np.float32) for row in errors]
            else:
                signals[:, 0] = rmse
        if self.distance is not None and (self.objective != "rmse" or both):
            distances = self._distances(finals, kernel=self.objective == "kid")
            if self.objective == "rmse":
                signals[:, 0] = distances
            else:
                values[:, 0] = distances
        for row in np.flatnonzero(~finite):
            state[row] = FAILED
            reason[row] = "the samples are not finite"
        return Evaluations(values=values, state=state, reason=reason, signals=signals, items=items)

    def sample(self, schedules: Sequence[Schedule], replicate: int, n: int) -> Tensor:
        """Final states (C, n, *shape) of the schedules on the first n samples of a noise bank."""
        bank = self._bank(replicate, n)
        before = bank.tree.work
        bank.tree.work = Work()
        with torch.no_grad():
            finals = bank.tree.run([compile_schedule(schedule) for schedule in schedules])
        done = bank.tree.work
        bank.tree.work = before
        self.work.evaluations += done.evaluations
        self.work.run += done.run
        self.work.calls += done.calls
        self.work.rows += done.rows
        return finals

    def _bank(self, replicate: int, n: int) -> _Bank:
        key = (replicate, n)
        bank = self._banks.get(key)
        if bank is None:
            split, number = split_of(replicate)
            start = self.problem.start(split_seed(self.seed, split, number), n)
            tree = PrefixTree(
                self.problem.denoise,
                start,
                mean=self.problem.mean,
                max_bytes=self.max_bytes,
                max_rows=self._at_once,
                split=True,
                remember=self.remember,
            )
            bank = self._banks[key] = _Bank(tree)
            while len(self._banks) > REMEMBERED_BANKS:
                self._banks.popitem(last=False)
        self._banks.move_to_end(key)
        return bank

    def _reference(self, replicate: int, n: int) -> Tensor:
        """The reference solution of the first n samples of a noise bank, (n, *shape) float64."""
        bank = self._bank(replicate, n)
        if bank.reference is None:
            split, number = split_of(replicate)
            start = self.problem.start(split_seed(self.seed, split, number), n)
            with torch.no_grad():
                bank.reference = self.problem.reference(start).double()
            if not torch.isfinite(bank.reference).all():
                raise EvaluationError(
                    f"the reference solution of {self.problem.name} is not finite"
                )
        return bank.reference

    def _errors(self, finals: Tensor, replicate: int, n: int) -> NDArray[np.float64]:
        """Mean square error per candidate and sample, float64 (C, n)."""
        difference = (finals.double() - self._reference(replicate, n)).flatten(2)
        return np.asarray((difference**2).mean(dim=2).cpu().numpy())

    def _distances(self, finals: Tensor, *, kernel: bool) -> NDArray[np.float64]:
        assert self.distance is not None
        c, n = finals.shape[:2]
        with torch.no_grad():
            features = torch.stack([self.distance.features(row) for row in finals])
        if not kernel:
            return frechet_distances(features.reshape(c, n, -1), self.distance.reference)
        rows = self.distance.rows
        assert rows is not None
        whole = torch.isfinite(features).flatten(1).all(dim=1)
        block = min(KID_BLOCK, n, len(rows))
        return np.array(
            [
                kid(part, rows, block=block)[0] if ok else np.nan
                for part, ok in zip(features, whole, strict=True)
            ]
        )
