"""The published coefficient files of EEP as plans.

A file is a dictionary of small tensors, read by torch's weights-only loader, which runs no code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from searchlab.errors import DataError
from searchlab.spaces.experts.model import one_hot
from searchlab.spaces.experts.plan import ExpertPlan

__all__ = ["read_published"]

_KEY = re.compile(r"(layers|transfer)\.(?:(\d+)|\[(\d+)-(\d+)\])")
_MAX_BYTES = 2**24


def read_published(path: str | Path, *, family: str = "mixtral", top_k: int = 2) -> ExpertPlan:
    """One of the published `.pth` files.

    Keys `layers.7` or `layers.[8-15]` name the layers of a matrix of the experts, `transfer...`
    those of a router's; `others` and `others_transfer` are for the layers that are left, as many as
    each named group has.

    Args:
        path: of the file.
        family: of the model; the files are for Mixtral 8x7B.
        top_k: active experts per token.

    Returns:
        The plan: layers from 0, `router_mode` "prob"; without matrices where all are one-hot.

    Raises:
        DataError: a file that is missing or holds anything else.

    Source: arXiv 2407.00945, code imagination-research/EEP.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(f"{str(path)!r} has {size} bytes; allowed: at most {_MAX_BYTES}")
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # whatever a reader of foreign bytes meets
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"coefficients {str(path)!r} cannot be read: {reason}") from None
    tables: dict[str, dict[int, NDArray[np.float64]]] = {"layers": {}, "transfer": {}}
    widths: set[int] = set()
    if not isinstance(data, dict) or not {"others", "others_transfer"} <= set(data):
        raise DataError(f"coefficients {str(path)!r}: no dictionary with 'others'")
    shape = tuple(getattr(data["others"], "shape", ()))
    for key, value in data.items():
        table = _matrix(path, key, value, shape)
        if key in ("others", "others_transfer"):
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise DataError(
                f"coefficients {str(path)!r} have {key!r}; allowed: layers.N, transfer.N, "
                "layers.[N-M], transfer.[N-M]"
            )
        first = int(match[2] or match[3])
        last = int(match[2] or match[4])
        widths.add(last - first + 1)
        for layer in range(first, last + 1):
            tables[match[1]][layer] = table
    named = sorted(tables["layers"])
    if named != list(range(len(named))) or sorted(tables["transfer"]) != named or len(widths) != 1:
        raise DataError(f"coefficients {str(path)!r} do not name groups of equal size from layer 0")
    for kind, rest in (("layers", "others"), ("transfer", "others_transfer")):
        for layer in range(len(named), len(named) + next(iter(widths))):
            tables[kind][layer] = _matrix(path, rest, data[rest], shape)
    merge = [tables["layers"][layer] for layer in sorted(tables["layers"])]
    route = [tables["transfer"][layer] for layer in sorted(tables["transfer"])]
    kept = tuple(tuple(table.argmax(axis=1).tolist()) for table in merge)
    rising = all(list(row) == sorted(set(row)) for row in kept)
    pure = all(
        np.array_equal(a, one_hot(a)) and np.array_equal(a, b)
        for a, b in zip(merge, route, strict=True)
    )
    matrices = not (pure and rising)
    return ExpertPlan(
        family=family,
        blocks=tuple(range(len(merge))),
        experts=shape[1],
        top_k=top_k,
        kept=kept,
        router_mode="prob",
        merge=tuple(_rows(table) for table in merge) if matrices else (),
        route=tuple(_rows(table) for table in route) if matrices else (),
        about=(("published", path.name), ("groups", len(merge) // next(iter(widths)))),
    )


def _rows(table: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def _matrix(path: Path, key: Any, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    good = isinstance(key, str) and isinstance(value, torch.Tensor) and value.is_floating_point()
    if not good or value.ndim != 2 or tuple(value.shape) != shape or shape[0] > shape[1]:
        raise DataError(
            f"coefficients {str(path)!r}: {key!r} is no matrix of {shape}; allowed: (E', E) floats"
        )
    table: NDArray[np.float64] = value.double().numpy()
    if not np.isfinite(table).all():
        raise DataError(f"coefficients {str(path)!r}: {key!r} is not finite")
    return table
