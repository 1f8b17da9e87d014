"""A user's own figure of merit of images: found by name, checked before it is relied on."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab._looking import only_looking
from searchlab.errors import ConfigError, EvaluationError

__all__ = ["Metric", "checked_metric", "load_metric"]

Metric = Callable[[NDArray[np.uint8], list[str]], Any]


def load_metric(name: str) -> Metric:
    """The function that "module:function" names; modules of the working directory are found too.

    Raises:
        ConfigError: another form, a module that cannot be imported, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name.isidentifier():
        raise ConfigError(f"metric {name!r}; allowed: module:function")
    if only_looking():
        return _named(module_name, function_name)
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise ConfigError(
            f"cannot import {module_name!r} of metric {name!r}: {type(error).__name__}: {error}"
        ) from None
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = sorted(n for n in vars(module) if callable(getattr(module, n)) and n[0] != "_")
        raise ConfigError(
            f"module {module_name!r} has no function {function_name!r}; it has:"
            f" {', '.join(known) or 'none'}"
        )
    return function  # type: ignore[no-any-return]


def _named(module: str, function: str) -> Metric:
    """A metric that has only its name: for looking at a run of anybody."""

    def unknown(images: NDArray[np.uint8], prompts: list[str]) -> Any:
        raise ConfigError(f"metric {module}:{function} is not loaded while a run is looked at")

    unknown.__module__, unknown.__qualname__, unknown.__name__ = module, function, function
    return unknown


def checked_metric(
    metric: Metric, images: NDArray[np.uint8], prompts: Sequence[str]
) -> NDArray[np.float64]:
    """The metric's values, float64 (N,).

    Args:
        metric: `f(images, prompts)`.
        images: (N, H, W, 3) uint8.
        prompts: N texts, empty where there are none.

    Raises:
        EvaluationError: the metric raised, or answered with another shape or with values that are
            not finite numbers; says what was given and what is allowed.
    """
    n = len(images)
    try:
        answer = metric(images, list(prompts))
    except Exception as error:  # whatever a user's function raises is that function's failure
        text = (str(error).splitlines() or [""])[0]
        raise EvaluationError(f"the metric raised {type(error).__name__}: {text}") from error
    if hasattr(answer, "detach"):
        answer = answer.detach().cpu().numpy()
    try:
        values = np.asarray(answer, dtype=np.float64)
    except (TypeError, ValueError):
        raise EvaluationError(
            f"the metric returned {type(answer).__name__}; allowed: {n} numbers for {n} images"
        ) from None
    if values.shape != (n,):
        raise EvaluationError(
            f"the metric returned shape {values.shape} for images of shape {images.shape};"
            f" allowed: ({n},)"
        )
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise EvaluationError(
            f"the metric returned {values[bad]} for image {bad}; allowed: finite numbers"
        )
    return values
