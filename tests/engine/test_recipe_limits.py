"""Options of the bundled recipe that end a run, as they come from the command line."""

from __future__ import annotations

from typing import Any

import pytest

from searchlab.config import Budget
from searchlab.errors import ConfigError
from searchlab.recipes import load_recipe, options_from


def _options(**values: Any) -> Any:
    return options_from(load_recipe("solver_schedule"), values)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, Budget(7)),
        ({"budget": "400"}, Budget(400)),
        ({"budget": 400}, Budget(400)),
        ({"budget": "90min"}, Budget(None, 5400.0)),
        ({"budget": "50usd", "gpu_price": "2"}, Budget(price=50.0, gpu_price=2.0)),
        ({"budget": 5, "target": "0.1"}, Budget(5, target=0.1)),
    ],
)
def test_texts_become_limits(values: dict[str, Any], wanted: Budget) -> None:
    assert _options(**values).limits(7) == wanted


def test_a_lag_is_a_number_or_free() -> None:
    assert _options(lag="16").lag == 16
    assert _options(lag="free").lag == "free"
    assert _options().lag is None


@pytest.mark.parametrize(
    "values", [{"budget": "soon"}, {"budget": "5usd"}, {"lag": "loose"}, {"budget": "-1"}]
)
def test_other_texts_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        _options(**values)
