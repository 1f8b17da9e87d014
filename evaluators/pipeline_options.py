"""From what a user types to a pipeline evaluator, with every check before anything costs time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from searchlab.errors import ConfigError, DataError
from searchlab.evaluators.pipeline import PipelineEvaluator
from searchlab.evaluators.pipeline_loading import PipelineSource, denoisers_of, parse_dtype
from searchlab.evaluators.pipeline_metric import load_metric
from searchlab.evaluators.pipeline_settings import PipelineSettings
from searchlab.spaces.solver_schedule.installed import describe
from searchlab.spaces.solver_schedule.noise_schedule import NoiseSchedule

__all__ = [
    "PipelineOptions",
    "build_pipeline_evaluator",
    "parse_size",
    "read_prompts",
    "validity_of",
]


@dataclass(frozen=True)
class PipelineOptions:
    """What a user says about their pipeline.

    Attributes:
        pipeline: directory or hub id.
        prompts: text file with one prompt per line; None for unconditional pipelines.
        size: "WIDTHxHEIGHT" or one number, in pixels; None = the pipeline's own.
        dtype: fp32, bf16 or fp16.
        device: torch device; None = cuda where there is one, else cpu.
        reference_steps: model calls of the reference.
        guidance_scale: None = the pipeline's default.
        metric: "module:function" of `f(images uint8 (N, H, W, 3), prompts) -> N numbers`.
        metric_direction: whether more or less of it is better.
        num_frames: for video pipelines.
        n_noise: start noises per prompt; None = 1, or 16 without prompts.
        seed: of the start noise.
        max_rows: samples per call of the pipeline.
        path: see `PipelineSettings`.
    """

    pipeline: str
    prompts: str | Path | None = None
    size: str | None = None
    dtype: str = "fp32"
    device: str | None = None
    reference_steps: int = 50
    guidance_scale: float | None = None
    metric: str | None = None
    metric_direction: Literal["min", "max"] = "max"
    num_frames: int | None = None
    n_noise: int | None = None
    seed: int = 0
    max_rows: int = 16
    path: Literal["auto", "pipeline", "rows"] = "auto"

    def __post_init__(self) -> None:
        if self.metric_direction not in ("min", "max"):
            raise ConfigError(f"metric_direction {self.metric_direction!r}; allowed: min, max")


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of "1024x768" or "512".

    Raises:
        ConfigError: another form.
    """
    if size is None:
        return None, None
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", size)
    if found is None:
        raise ConfigError(f"size {size!r}; allowed: WIDTHxHEIGHT or one number, such as 1024x1024")
    width = int(found[1])
    return width, int(found[2]) if found[2] else width


def read_prompts(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: it cannot be read as UTF-8 text, or has no prompt.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"prompts {str(path)!r} are not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read prompts {str(path)!r}: {error.strerror or error}") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"{str(path)!r} has no prompt; allowed: one per line")
    return prompts


def build_pipeline_evaluator(
    options: PipelineOptions,
) -> tuple[PipelineEvaluator, NoiseSchedule, dict[str, Any]]:
    """Loads the pipeline and checks everything that can be checked in a few model calls.

    In this order: options, prompts and metric (no model needed), the pipeline itself, one step, the
    probe for batching, the metric on two images. The reference is made later, by `setup`.

    Returns:
        The evaluator, whose `plans` are still to be set; the noise schedule for the space; and what
        schedules found with it are valid for, see `installed.describe`.

    Raises:
        ConfigError, DataError, EvaluationError: whatever is wrong, in one line.
    """
    width, height = parse_size(options.size)
    parse_dtype(options.dtype)
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    metric = None if options.metric is None else load_metric(options.metric)
    settings = PipelineSettings(
        width=width,
        height=height,
        guidance_scale=options.guidance_scale,
        num_frames=options.num_frames,
        reference_steps=options.reference_steps,
        n_noise=options.n_noise,
        seed=options.seed,
        max_rows=options.max_rows,
        path=options.path,
    )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    evaluator = PipelineEvaluator(
        PipelineSource(options.pipeline, options.dtype, device),
        prompts,
        settings=settings,
        metric=metric,
        metric_direction=options.metric_direction,
    )
    evaluator.prepare()
    return evaluator, evaluator.noise, validity_of(evaluator, options.pipeline)


def validity_of(evaluator: PipelineEvaluator, name: str | None = None) -> dict[str, Any]:
    """What schedules found with this evaluator are valid for."""
    sampler = evaluator.sampler
    width, height = evaluator.size
    return describe(
        sampler.scheduler,
        model=name,
        model_class=type(denoisers_of(sampler.pipeline)[0]).__name__,
        width=width,
        height=height,
        guidance_scale=evaluator.guidance_scale,
        mu=evaluator.mu,
    )
