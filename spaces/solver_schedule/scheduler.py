"""A searched solver schedule as a diffusers scheduler.

Import this module before `from_pretrained` of a pipeline that was saved with such a scheduler:
diffusers only finds classes of modules that are already imported.

    import searchlab.spaces.solver_schedule.scheduler
    pipeline = DiffusionPipeline.from_pretrained("my-pipeline")

Or put one into any pipeline: ``pipeline.scheduler = SearchedScheduler.from_schedules(schedule,
like=pipeline.scheduler)`` and call it with ``num_inference_steps`` = model calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from searchlab.errors import ConfigError, DataError, SpaceError
from searchlab.spaces.solver_schedule.installed import (
    describe,
    export_sigmas,
    noise_schedule_of,
    prediction_type_of,
    sigma_data_of,
    times_of,
    without_ends,
)
from searchlab.spaces.solver_schedule.model_outputs import (
    default_prediction_type,
    native_times,
    prediction_weights,
)
from searchlab.spaces.solver_schedule.noise_schedule import (
    Edm,
    Flow,
    NoiseSchedule,
    VpDiscrete,
)
from searchlab.spaces.solver_schedule.pipeline_run import NetworkForm, PipelineRun
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.schedule_file import (
    ScheduleBundle,
    brief,
    bundle_of,
    load_bundle,
    warn_elsewhere,
)

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import (
        KarrasDiffusionSchedulers,
        SchedulerMixin,
        SchedulerOutput,
    )
except ImportError as error:
    raise ConfigError(
        f'this needs diffusers; install it with: pip install "searchlab[diffusers]" ({error})'
    ) from None

__all__ = [
    "SearchedScheduler",
    "export_sigmas",
    "noise_schedule_of",
    "times_of",
]

_COPIED = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "num_train_timesteps",
    "shift",
    "flow_shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)


class SearchedScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Runs searched schedules inside unmodified diffusers pipelines.

    `num_inference_steps` is the number of model calls; the schedule with that number is taken from
    the bundle. Time steps are fractional float32, one per model call: an implicit corrector
    publishes its time twice. States are combined in float32 and returned in the type they came in.
    Image-to-image runs start at a later point: the rest of the schedule is compiled anew with its
    orders capped by the history it then has. Noise schedules are run in the network's own scaling:
    VP and flow unscaled, EDM with its input scaling.

    Args:
        schedules: model calls (as text) -> `Schedule.to_json()`.
        prediction_type: epsilon, sample, v_prediction or flow_prediction.
        num_train_timesteps: what flow times are multiplied by; length of a VP table.
        sigma_data: EDM's standard deviation of the data.
        mean: data mean as nested lists, broadcastable to a state.
        validity: what the schedules were searched for, see `installed.describe`.
        use_flow_sigmas: true for flow matching; keeps pipelines from handing over their own grid.
        others: of the scheduler this one replaces, so that `from_config` works in both directions
            and pipelines compute the same dynamic shift.
    """

    _compatibles: ClassVar[list[str]] = [e.name for e in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        schedules: dict[str, Any] | None = None,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        sigma_data: float = 0.5,
        mean: list[Any] | float | None = None,
        validity: dict[str, Any] | None = None,
        use_flow_sigmas: bool = False,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        shift: float = 1.0,
        flow_shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        steps_offset: int = 1,
        clip_sample: bool = False,
    ) -> None:
        try:
            stored = {int(n): Schedule.from_json(s) for n, s in (schedules or {}).items()}
        except ValueError as error:
            raise DataError(f"schedules of a scheduler's config: {error}") from None
        self.schedules: dict[int, Schedule] = bundle_of(stored) if stored else {}
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self.sigmas = torch.empty(0)
        self._begin_index: int | None = None
        self._run: PipelineRun | None = None
        self._told = False
        self.mu: float | None = None
        if self.schedules:
            prediction_weights(
                self.noise, prediction_type, self.noise.end or 0.5, sigma_data=sigma_data
            )

    @classmethod
    def from_schedules(
        cls,
        schedules: Schedule | list[Schedule] | Mapping[int, Schedule],
        *,
        like: Any = None,
        prediction_type: str | None = None,
        mean: list[Any] | float | None = None,
        validity: Mapping[str, Any] | None = None,
    ) -> SearchedScheduler:
        """A scheduler that runs these schedules.

        Args:
            schedules: one, several with different numbers of model calls, or {calls: schedule}.
            like: the scheduler it replaces (``pipeline.scheduler``), or a noise schedule, or None.
            prediction_type: what the network predicts; default that of `like`, or the family's.
            mean: data mean, for schedules that begin with it.
            validity: see `installed.describe`; kept and written to files.

        Raises:
            SpaceError: schedules of another noise schedule than `like`'s.
            ConfigError: a prediction type that does not go with the noise schedule.
        """
        bundle = bundle_of(dict(schedules) if isinstance(schedules, Mapping) else schedules)
        noise = next(iter(bundle.values())).noise
        settings: dict[str, Any] = {}
        sigma_data = 0.5
        if isinstance(like, NoiseSchedule):
            theirs: NoiseSchedule | None = like
        elif like is not None:
            theirs = noise_schedule_of(like)
            config = like.config
            settings = {k: config[k] for k in _COPIED if config.get(k) is not None}
            prediction_type = prediction_type or prediction_type_of(like)
            sigma_data = sigma_data_of(like)
        else:
            theirs = None
        if theirs is not None and without_ends(theirs) != without_ends(noise):
            raise SpaceError(
                f"the schedules have noise schedule {brief(noise.to_json())}, the scheduler to be"
                f" replaced has {brief(theirs.to_json())}; allowed: equal ones"
            )
        if isinstance(noise, VpDiscrete):
            settings["num_train_timesteps"] = noise.num_train_timesteps
        answer: SearchedScheduler = cls(
            schedules={str(n): s.to_json() for n, s in bundle.items()},
            prediction_type=prediction_type or default_prediction_type(noise),
            sigma_data=sigma_data,
            mean=mean,
            validity=None if validity is None else dict(validity),
            use_flow_sigmas=isinstance(noise, Flow),
            **settings,
        )
        return answer

    def save_json(self, path: str | Path) -> None:
        """Write schedules and validity as plain JSON that needs no diffusers to be read.

        Raises:
            ConfigError: there is no schedule to write.
        """
        self._need_schedules()
        c = self.config
        ScheduleBundle(
            self.schedules, c.prediction_type, c.sigma_data, c.mean, c.validity or {}
        ).save(path)

    @classmethod
    def load_json(
        cls,
        path: str | Path,
        *,
        like: Any = None,
        width: int | None = None,
        height: int | None = None,
        guidance_scale: float | None = None,
        mu: float | None = None,
    ) -> SearchedScheduler:
        """Read what `save_json` wrote.

        Args:
            path: the file.
            like: the pipeline or scheduler it is for. Where that, or a figure below, is not what
                the schedules were searched for, one `SearchlabWarning` lists the differences.
            width, height: pixels of the images to be made.
            guidance_scale, mu: as the pipeline will use them.

        Raises:
            DataError: not such a file, or one of a newer version.
        """
        bundle = load_bundle(path)
        scheduler = getattr(like, "scheduler", like)
        here: dict[str, Any] = {
            "width": width,
            "height": height,
            "guidance_scale": guidance_scale,
            "mu": mu,
        }
        if scheduler is not None and not isinstance(scheduler, NoiseSchedule):
            denoiser = getattr(like, "unet", None) or getattr(like, "transformer", None)
            name = None if denoiser is None else type(denoiser).__name__
            here = describe(scheduler, model_class=name, **here)
        stored = {**bundle.validity, "prediction_type": bundle.prediction_type}
        noise = next(iter(bundle.schedules.values())).noise
        stored["noise"] = without_ends(noise).to_json()
        if "noise" in here:
            here["noise"] = without_ends(noise_schedule_of(scheduler)).to_json()
        warn_elsewhere(stored, here)
        keep = scheduler is not None and here.get("noise") in (None, stored["noise"])
        answer = cls.from_schedules(
            bundle.schedules,
            like=scheduler if keep else None,
            prediction_type=bundle.prediction_type,
            mean=bundle.mean,
            validity=bundle.validity,
        )
        answer.register_to_config(sigma_data=bundle.sigma_data)
        return answer

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @property
    def noise(self) -> NoiseSchedule:
        """The noise schedule of the bundle.

        Raises:
            ConfigError: there is no schedule.
        """
        self._need_schedules()
        return next(iter(self.schedules.values())).noise

    @property
    def step_index(self) -> int | None:
        """Number of the next time step; None before the first."""
        return None if self._run is None else self._run.index

    @property
    def begin_index(self) -> int | None:
        """Number of the time step the pipeline said it begins at."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which time step the run begins (image-to-image)."""
        self._begin_index = begin_index

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies its unit noise by; an analytic first step is folded in."""
        scale = 1.0
        if self.schedules and isinstance(self.noise, Edm):
            start = self.noise.start if self._run is None else self._run.schedule.start_time
            scale = float((start**2 + 1.0) ** 0.5)
        if self._run is None:
            return scale
        self._run.read_scale = True
        return scale * self._run.first_scale

    def _need_schedules(self) -> None:
        if not self.schedules:
            raise ConfigError(
                "this SearchedScheduler holds no schedule; use from_schedules or load_json"
            )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Take the schedule with this number of model calls and forget any run in progress.

        Args:
            num_inference_steps: model calls.
            device: where `timesteps` goes.
            sigmas, timesteps: only their length counts, since pipelines hand over default grids
                unasked; the times are those of the schedule.
            mu: dynamic shift the pipeline computed; the schedule's times have theirs already. A
                value other than the one it was searched for gives a warning, once.

        Raises:
            ConfigError: no schedule with this number; says which there are.
        """
        self._need_schedules()
        for grid in (sigmas, timesteps):
            if grid is not None:
                num_inference_steps = len(grid)
        if num_inference_steps not in self.schedules:
            raise ConfigError(
                f"no schedule with num_inference_steps = {num_inference_steps};"
                f" stored: {', '.join(map(str, self.schedules))}"
            )
        self.mu = mu
        if mu is not None and not self._told:
            self._told = True
            warn_elsewhere(self.config.validity or {}, {"mu": mu})
        mean = self.config.mean
        self._begin_index = None
        self._run = PipelineRun(
            self.schedules[num_inference_steps],
            self._form(),
            None if mean is None else torch.tensor(mean, dtype=torch.float32),
        )
        self.num_inference_steps = num_inference_steps
        self.timesteps = self._run.published.to(device)
        self.sigmas = self._run.sigmas

    def _form(self) -> NetworkForm:
        c = self.config
        return NetworkForm(c.prediction_type, c.num_train_timesteps, c.sigma_data)

    def _at(self, timestep: Any) -> PipelineRun:
        """The run, with its first time step found."""
        if self._run is None:
            raise ConfigError("no run in progress; call set_timesteps(num_inference_steps) first")
        if self._run.index is None:
            begin = self._begin_index
            self._run.index = self._run.nearest(float(timestep)) if begin is None else begin
        return self._run

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The state as the network takes it: EDM's input scaling, and an analytic start's mean."""
        if self._run is None:
            return sample
        return self._at(self._run.published[0] if timestep is None else timestep).model_input(
            sample
        )

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """From one model call to the state of the next.

        Args:
            model_output: (B, ...) what the network gave; twice the channels means that a learned
                variance follows, which is not used.
            timestep: the published time step it was called with.
            sample: (B, ...) the state before input scaling.
            generator: accepted and unused; schedules are deterministic.
            return_dict: whether to wrap the answer in a `SchedulerOutput`.

        Raises:
            ConfigError: `set_timesteps` was not called, all steps are done, the shapes differ, or
                the pipeline lacks a hook that an analytic first evaluation needs.
        """
        x = sample if sample.dtype == torch.float64 else sample.float()
        answer = self._at(timestep).step(model_output, x).to(sample.dtype)
        return SchedulerOutput(prev_sample=answer) if return_dict else (answer,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean data at published time steps: ``alpha(t) x_0 + sigma(t) noise``.

        Args:
            original_samples, noise: (B, ...).
            timesteps: (B,) or (1,) time steps, as published.
        """
        if self._run is not None:
            self._run.noised = True
        t = native_times(
            self.noise,
            timesteps.detach().to("cpu", torch.float64).reshape(-1).numpy(),
            num_train_timesteps=self.config.num_train_timesteps,
        )
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (
            torch.as_tensor(f(t), dtype=torch.float32, device=original_samples.device).view(shape)
            for f in (self.noise.alpha, self.noise.sigma)
        )
        noisy = alpha * original_samples.float() + sigma * noise.float()
        return noisy.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` in the calling form of the flow-matching pipelines."""
        return self.add_noise(sample, noise, timestep)
