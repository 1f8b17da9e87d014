"""Budgets as text: `400`, `90min`, `6gpuh`, `50usd`, or several of them with commas between."""

from __future__ import annotations

import math
import re

from searchlab.config import Budget
from searchlab.errors import ConfigError

__all__ = ["BUDGET_FORMS", "parse_budget"]

BUDGET_FORMS = "400 (evaluations), 90s, 90min, 2h, 6gpuh, 50usd; several with commas between"

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)", re.ASCII)


def parse_budget(
    text: int | str | Budget, *, gpu_price: float | None = None, target: float | None = None
) -> Budget:
    """The budget that a text stands for; a stage stops at whichever limit it meets first.

    Args:
        text: a number of evaluations, or a text as above: evaluations, wall time, hours of devices
            or US dollars. A `Budget` is taken as it is.
        gpu_price: US dollars per device hour; needed for dollars, and fills in a budget's own.
        target: a value of the first objective, in the user's sign, at which the search may stop.

    Raises:
        ConfigError: what stands there and what is allowed.
    """
    if isinstance(text, Budget):
        if gpu_price is not None or target is not None:
            raise ConfigError("gpu_price and target belong to the Budget that is given")
        return text
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise ConfigError(f"budget {text!r}; allowed: {BUDGET_FORMS}")
    limits: dict[str, float] = {}
    for part in str(text).split(","):
        name, value = _limit(part.strip().lower(), text)
        if name in limits:
            raise ConfigError(f"budget {text!r} says {name} twice; allowed: each limit once")
        limits[name] = value
    if "price" in limits and gpu_price is None:
        raise ConfigError(
            f"budget {text!r} is in dollars; allowed with the price of a device hour (--gpu-price)"
        )
    evaluations = limits.pop("evaluations", None)
    return Budget(
        None if evaluations is None else int(evaluations),
        limits.get("seconds"),
        device_hours=limits.get("device_hours"),
        price=limits.get("price"),
        gpu_price=gpu_price,
        target=target,
    )


def _limit(part: str, text: object) -> tuple[str, float]:
    found = _PART.fullmatch(part)
    number = float(found.group(1)) if found else math.nan
    unit = found.group(2) if found else ""
    if unit == "" and number == number and re.fullmatch("[0-9]{1,15}", part):
        return "evaluations", int(part)
    if math.isfinite(number):
        if unit in _SECONDS:
            return "seconds", number * _SECONDS[unit]
        if unit in ("gpuh", "usd"):
            return ("device_hours" if unit == "gpuh" else "price"), number
    raise ConfigError(f"budget {text!r}; allowed: {BUDGET_FORMS}")
