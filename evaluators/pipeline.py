"""A user's own diffusion pipeline as an evaluator of solver schedules.

The objective is the latent RMSE to a many-step reference from the same start noise; a user's metric
on decoded images is taken on the shortlist. The number of function evaluations of a schedule counts
time steps at which the denoiser is asked: guidance doubles the rows of such a call, or in pipelines
that call the denoiser once with and once without the prompt the calls, but not this number.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab._looking import only_looking
from searchlab.errors import ConfigError, EvaluationError, SearchlabError
from searchlab.evaluator import Fidelity, Objective, Reproducibility, Signal
from searchlab.evaluators.noise import Split
from searchlab.evaluators.pipeline_loading import PipelineSource, pipeline_digest
from searchlab.evaluators.pipeline_metric import Metric, checked_metric
from searchlab.evaluators.pipeline_rows import RowDenoiser, in_blocks
from searchlab.evaluators.pipeline_samples import SampleSet
from searchlab.evaluators.pipeline_sampling import Capture, PipelineSampler, Rows
from searchlab.evaluators.pipeline_settings import PipelineSettings, reference_schedule
from searchlab.evaluators.sampling import split_of
from searchlab.evaluators.trajectories import MIN_ROWS, PrefixTree
from searchlab.population import FAILED, OK, Evaluations, Jobs, Population
from searchlab.spaces.solver_schedule.grids import time_grid
from searchlab.spaces.solver_schedule.installed import without_ends
from searchlab.spaces.solver_schedule.noise_schedule import NoiseSchedule
from searchlab.spaces.solver_schedule.points import ddim, dpmpp_2m
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.table import compile_schedule

__all__ = ["PipelineEvaluator"]

VERSION = 1
_REMEMBERED_BANKS = 3
_PROBE_ROWS = 4
# What the two ways of sampling may differ by, relative: rounding of single and of half precision.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
# Bytes of states at one time step; the whole trajectories held are about 30 times that.
_STATE_BYTES = 64 * 2**20


@dataclass
class _Bank:
    """Samples of one split and replicate: what conditions them, their reference."""

    rows: Rows
    prompts: list[str]
    captures: list[Capture] = field(default_factory=list)
    denoiser: RowDenoiser | None = None
    trees: dict[int, PrefixTree] = field(default_factory=dict)
    reference: Tensor | None = None


class PipelineEvaluator:
    """Scores schedules by how near they come to a long run of the user's pipeline.

    Fidelities are the first quarter of the samples, and all of them. Items are each sample's mean
    square error. On the selection and report splits prompts differ (from 8 prompts up) and so does
    the noise; there the metric is a signal.

    Args:
        pipeline: a loaded pipeline, or where each worker loads its own from.
        prompts: texts; None for an unconditional pipeline or where `tensors` has the conditioning.
        settings: what is fixed.
        plans: population -> schedules, such as `SolverScheduleSpace.plans`; may be set later.
        metric: `f(images uint8 (N, H, W, 3), prompts) -> N numbers`.
        metric_direction: whether more or less of it is better.
        tensors: conditioning by name of the pipeline's argument, a row per "prompt".

    Attributes:
        path: which way samples are made, known after `prepare`.
        remarks: one line per thing worth telling the user.
        reference_error: estimated RMSE of the reference itself, known after `setup`.

    Raises:
        ConfigError: no prompts, or tensors whose rows differ.
    """

    objectives = (Objective("rmse", "min"),)

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str] | None = None,
        *,
        settings: PipelineSettings | None = None,
        plans: Callable[[Population], list[Schedule]] | None = None,
        metric: Metric | None = None,
        metric_direction: Literal["min", "max"] = "max",
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings = settings or PipelineSettings()
        self.plans = plans
        self.metric = metric
        self.metric_direction = metric_direction
        self.samples = SampleSet(
            prompts, tensors or {}, n_noise=self.settings.n_noise, seed=self.settings.seed
        )
        self._source = pipeline if isinstance(pipeline, PipelineSource) else None
        self._given = None if self._source is not None else pipeline
        self._reset()

    def _reset(self) -> None:
        self._sampler: PipelineSampler | None = None
        self._hooks = (False, False)
        self._digest = ""
        self._banks: OrderedDict[tuple[Split, int], _Bank] = OrderedDict()
        self._at_once = self.settings.max_rows
        self.path: Literal["pipeline", "rows"] = "pipeline"
        self.reproducibility: Reproducibility = "batch"
        self.remarks: list[str] = []
        self.reference_error = float("nan")
        self.mu: float | None = None
        self._ready = False

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._source is not None:
            # A worker loads the pipeline itself; what is known about it goes along.
            state.update(_sampler=None, _banks=OrderedDict(), _given=None, _ready=False)
        return state

    @property
    def sampler(self) -> PipelineSampler:
        """The pipeline at work; loaded on first use."""
        if self._sampler is None:
            pipeline = self._source.load() if self._source is not None else self._given
            sampler = PipelineSampler(
                pipeline, settings=self.settings.call(), max_rows=self._at_once
            )
            if sampler.takes_prompts != bool(self.samples.conditions):
                rule = "needs prompts, got none" if sampler.takes_prompts else "takes no prompts"
                raise ConfigError(f"{type(pipeline).__name__} {rule}")
            self._digest = pipeline_digest(pipeline)
            self._sampler = sampler
        return self._sampler

    @property
    def micro_batch(self) -> int:
        """Samples per call of the pipeline or of its network."""
        return self._at_once

    @micro_batch.setter
    def micro_batch(self, rows: int) -> None:
        self._at_once = self.sampler.max_rows = rows
        for bank in self._banks.values():
            bank.trees.clear()

    @property
    def noise(self) -> NoiseSchedule:
        """The noise schedule schedules must have."""
        return self.sampler.noise

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Width and height in pixels: as set, or as the states show them; None where unknown."""
        width, height = self.settings.width, self.settings.height
        shape = self._bank("search", 0).captures[0].start.shape
        if len(shape) == 4:  # packed states do not show it
            scale = int(getattr(self.sampler.pipeline, "vae_scale_factor", 1))
            width, height = width or shape[3] * scale, height or shape[2] * scale
        return width, height

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale in use: the given one, or the default of the pipeline's call."""
        scale = self.sampler.default("guidance_scale", self.settings.guidance_scale)
        return None if scale is None else float(scale)

    @property
    def signals(self) -> tuple[Signal, ...]:
        return () if self.metric is None else (Signal("metric", self.metric_direction),)

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        counts = self.samples.counts()
        return tuple(Fidelity(f"{n} samples", n / counts[-1]) for n in counts)

    def identity(self) -> Mapping[str, Any]:
        """Model, prompts, settings, noise and reference; not what the probe found equal."""
        sampler = self.sampler
        s = self.settings
        metric = self.metric
        return {
            "version": VERSION,
            "model": self._digest,
            "conditions": self.samples.digest(),
            "noise": sampler.noise.to_json(),
            "settings": {k: v for k, v in s.call().items() if v is not None},
            "reference_steps": s.reference_steps,
            "n_noise": self.samples.n_noise,
            "seed": s.seed,
            "path": s.path,
            "max_rows": s.max_rows,
            "metric": None if metric is None else f"{metric.__module__}:{_name(metric)}",
        }

    def prepare(self) -> None:
        """All checks that cost little: one step, the probe of both ways, the metric on two images.

        Raises:
            ConfigError: no prompts for a pipeline that needs them.
            EvaluationError: the pipeline or the metric does not work; says how.
        """
        if self._ready:
            return
        bank = self._bank("search", 0)
        first = bank.captures[0]
        self.mu = first.mu
        self._hooks = (first.reads_scale, first.reads_input)
        self.remarks = []
        self.path = self._probe(bank)
        self.reproducibility = self._proven(bank)
        if self.metric is not None and not only_looking():
            rows = bank.rows.take(slice(0, 2))
            rows = rows if len(rows) == 2 else _two(rows)
            prompts = (bank.prompts * 2)[:2]
            images = self.sampler.images(self._probes()[0], rows)
            checked_metric(self.metric, images, prompts)
        self._ready = True

    def setup(self) -> None:
        """`prepare`, the reference of the first noise bank, and an estimate of its own error."""
        self.prepare()
        bank = self._bank("search", 0)
        reference = self._reference(bank)
        n = min(_PROBE_ROWS, len(bank.rows))
        half = self._finals([self._long(self.settings.reference_steps // 2)], bank, n)[0]
        # Halving the steps of a second-order solver makes its error fourfold.
        difference = _mean_square(half, reference[:n]).mean() ** 0.5
        self.reference_error = float(difference) / 3
        self.remarks.append(
            f"reference: {self.settings.reference_steps} steps of DPM-Solver++(2M), own error about"
            f" {self.reference_error:.2g} (estimated from half the steps, {n} samples)"
        )

    def _long(self, steps: int) -> Schedule:
        sampler = self.sampler
        return reference_schedule(sampler.noise, steps, scheduler=sampler.scheduler, mu=self.mu)

    def evaluate(self, jobs: Jobs) -> Evaluations:
        """RMSE of each candidate's final states; one that cannot run fails with its reason."""
        if self.plans is None:
            raise EvaluationError("the evaluator has no plans; set plans to the space's")
        self.prepare()
        split, index = split_of(jobs.replicate)
        bank = self._bank(split, index)
        n = len(bank.rows)
        if split == "search":
            n = min(n, self.samples.counts()[jobs.fidelity])
        reference = self._reference(bank)[:n]
        schedules = self.plans(jobs.population)
        reason = [self._refused(schedule) for schedule in schedules]
        finals: list[Tensor | None] = [None] * len(schedules)
        cost = np.zeros(len(schedules))
        good = [i for i, text in enumerate(reason) if not text]
        for group in [good] if self.path == "rows" and good else [[i] for i in good]:
            began = time.perf_counter()
            try:
                states = self._finals([schedules[i] for i in group], bank, n)
            except SearchlabError as error:
                for i in group:
                    reason[i] = str(error)
                continue
            for i, state in zip(group, states, strict=True):
                finals[i] = state
                cost[i] = (time.perf_counter() - began) / len(group)
        return self._evaluations(schedules, finals, reference, reason, cost, bank, split)

    def _evaluations(
        self,
        schedules: Sequence[Schedule],
        finals: Sequence[Tensor | None],
        reference: Tensor,
        reason: list[str],
        cost: NDArray[np.float64],
        bank: _Bank,
        split: Split,
    ) -> Evaluations:
        n = len(schedules)
        values, errors = np.full((n, 1), np.nan), np.full((n, 1), np.nan)
        signals = np.full((n, len(self.signals)), np.nan)
        state = np.full(n, OK, np.int8)
        items: list[NDArray[np.floating[Any]] | None] = [None] * n
        for i, final in enumerate(finals):
            if final is None or not bool(torch.isfinite(final).all()):
                state[i] = FAILED
                reason[i] = reason[i] or "the final states are not finite"
                continue
            squares = _mean_square(final, reference)
            values[i, 0] = rmse = float(np.sqrt(squares.mean()))
            if len(squares) > 1 and rmse > 0:
                spread = float(squares.std(ddof=1)) / len(squares) ** 0.5
                errors[i, 0] = spread / (2 * rmse)
            items[i] = squares.astype(np.float32)
            if self.metric is not None and split != "search":
                try:
                    images = self.sampler.images(schedules[i], bank.rows)
                    signals[i, 0] = checked_metric(self.metric, images, bank.prompts).mean()
                except SearchlabError as error:
                    state[i], reason[i] = FAILED, str(error)
        return Evaluations(
            values=values,
            state=state,
            reason=reason,
            std_error=errors,
            signals=signals,
            items=items,
            cost_s=cost,
            notes={"path": self.path, "reference_error": self.reference_error},
        )

    def _refused(self, schedule: Schedule) -> str:
        """Why a schedule cannot run in this pipeline; empty if it can."""
        if without_ends(schedule.noise) != without_ends(self.noise):
            return f"noise schedule {schedule.noise.family} is not the pipeline's"
        if schedule.nfe < 1:
            return "a schedule without model calls"
        if schedule.first_evaluation == "mean":
            return "the pipeline's data mean is not known; allowed: model, zero"
        if schedule.first_evaluation != "model" and not self._hooks[0]:
            return "the pipeline does not scale its noise; allowed first evaluation: model"
        return ""

    def _bank(self, split: Split, index: int) -> _Bank:
        key = (split, index)
        bank = self._banks.get(key)
        if bank is None:
            bank = self._new_bank(split, index)
            self._banks[key] = bank
            while len(self._banks) > _REMEMBERED_BANKS:
                self._banks.popitem(last=False)
        self._banks.move_to_end(key)
        return bank

    def _new_bank(self, split: Split, index: int) -> _Bank:
        sampler = self.sampler
        rows, prompts = self.samples.rows(split, index, device=sampler.pipeline.device)
        captures = [
            sampler.capture(rows.take(slice(start, start + sampler.max_rows)))
            for start in range(0, len(rows), sampler.max_rows)
        ]
        return _Bank(rows, prompts, captures)

    def _other(self, bank: _Bank) -> Capture:
        """A capture of another number of rows than the bank's first."""
        n = len(bank.captures[0].start)
        return self.sampler.capture(bank.rows.take(slice(0, n - 1)) if n > 1 else _two(bank.rows))

    def _reference(self, bank: _Bank) -> Tensor:
        if bank.reference is None:
            long = self._long(self.settings.reference_steps)
            reference = self._finals([long], bank, len(bank.rows))[0].double()
            if not bool(torch.isfinite(reference).all()):
                raise EvaluationError("the reference run of the pipeline is not finite")
            bank.reference = reference
        return bank.reference

    def _finals(self, schedules: Sequence[Schedule], bank: _Bank, n: int) -> list[Tensor]:
        """Final states (n, ...) of each schedule on the first n samples of a bank."""
        if self.path == "rows":
            return self._by_rows(schedules, bank, n)
        rows = bank.rows.take(slice(0, n))
        return [self.sampler.latents(schedule, rows) for schedule in schedules]

    def _by_rows(self, schedules: Sequence[Schedule], bank: _Bank, n: int) -> list[Tensor]:
        if bank.denoiser is None:
            bank.denoiser = RowDenoiser(
                self.sampler,
                bank.captures,
                other=self._other(bank),
                guidance_scale=self.guidance_scale,
            )
        if n not in bank.trees:
            start = bank.denoiser.start[:n].float()
            # The lower bound is for bit-equality on a CPU; on a GPU memory goes first.
            low = MIN_ROWS if start.device.type == "cpu" else 1
            call = in_blocks(bank.denoiser, n, max(low, self._at_once))
            at_once = _STATE_BYTES // (start[0].numel() * start.element_size())
            bank.trees[n] = PrefixTree(call, start, min_rows=1, max_rows=at_once)
        tables = [compile_schedule(schedule) for schedule in schedules]
        with torch.no_grad():
            return list(bank.trees[n].run(tables))

    def _probes(self) -> list[Schedule]:
        """Two cheap schedules that differ in order, times and length."""
        noise = self.noise
        end = noise.end if noise.end > 0 else noise.clean
        return [
            ddim(time_grid(noise, 3, noise.start, end), noise),
            dpmpp_2m(np.append(time_grid(noise, 4, noise.start, end)[:-1], noise.clean), noise),
        ]

    def _probe(self, bank: _Bank) -> Literal["pipeline", "rows"]:
        """Whether batching at the network gives what the pipeline gives."""
        asked = self.settings.path
        if asked == "pipeline":
            return "pipeline"
        n = min(_PROBE_ROWS, len(bank.rows))
        tolerance = _TOLERANCE.get(bank.captures[0].start.dtype, 1e-4)
        try:
            fast = self._by_rows(self._probes(), bank, n)
            slow = [self.sampler.latents(s, bank.rows.take(slice(0, n))) for s in self._probes()]
            worst = max(_relative(a, b) for a, b in zip(fast, slow, strict=True))
            problem = "" if worst <= tolerance else f"results differ by {worst:.2g}, relative"
        except Exception as error:  # an unknown network may fail in any way; the other path works
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if not problem:
            self.remarks.append(f"schedules share model calls (probe: {worst:.1g} relative)")
            return "rows"
        if asked == "rows":
            raise EvaluationError(f"path 'rows' does not work with this pipeline: {problem}")
        self.remarks.append(f"one schedule per pipeline call, since batching fails: {problem}")
        return "pipeline"

    def _proven(self, bank: _Bank) -> Reproducibility:
        """Bit-equality, alone and beside another schedule; only claimed on a CPU."""
        if self.sampler.pipeline.device.type != "cpu":
            return "batch"
        n = min(_PROBE_ROWS, len(bank.rows))
        answers = []
        for order in ([0], [1, 0], [0, 1]):
            bank.trees.clear()
            schedules = [self._probes()[i] for i in order]
            answers.append(self._finals(schedules, bank, n)[order.index(0)])
        bank.trees.clear()
        same = all(torch.equal(answers[0], other) for other in answers[1:])
        return "exact" if same else "batch"


def _mean_square(final: Tensor, reference: Tensor) -> NDArray[np.float64]:
    difference = (final.double() - reference.double()).flatten(1)
    return np.asarray((difference**2).mean(dim=1).cpu().numpy())


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


def _two(rows: Rows) -> Rows:
    """A single row twice."""
    return Rows(
        rows.seeds * 2,
        None if rows.prompts is None else rows.prompts * 2,
        {name: torch.cat([value, value]) for name, value in rows.tensors.items()},
    )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
