"""The published coefficient files of EEP as plans.

A file is a zip archive with a pickled dictionary of small tensors. Nothing in it is run: the few
instructions that such a dictionary consists of are interpreted here, and any other is refused.
"""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import DataError
from searchlab.spaces.experts.model import one_hot
from searchlab.spaces.experts.plan import ExpertPlan

__all__ = ["read_published"]

_KEY = re.compile(r"(layers|transfer)\.(?:(\d+)|\[(\d+)-(\d+)\])")
_MAX_BYTES = 2**24
_BAD = (
    *(OSError, zipfile.BadZipFile, LookupError, TypeError, ValueError),
    *(AttributeError, ArithmeticError, RuntimeError),
)


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
        data = _content(path)
    except _BAD as error:
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


_REBUILD = "torch._utils _rebuild_tensor_v2"
_STORAGE = "torch FloatStorage"
_DICTIONARY = "collections OrderedDict"
_MARK = object()


def _content(path: Path) -> Any:
    """What the archive's pickle describes; tensors as float32 arrays.

    Raises:
        ValueError, LookupError, TypeError: anything but dictionaries of float32 tensors.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes inside")
        names = set(archive.namelist())
        (main,) = [name for name in names if name.endswith("/data.pkl")]
        root = main.removesuffix("data.pkl")
        if root + "byteorder" in names and archive.read(root + "byteorder") != b"little":
            raise ValueError("numbers are not stored in little-endian order")

        def storage(key: str) -> NDArray[np.float32]:
            return np.frombuffer(archive.read(f"{root}data/{key}"), dtype="<f4")

        return _interpreted(archive.read(main), storage)


def _interpreted(text: bytes, storage: Callable[[str], NDArray[np.float32]]) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def above_mark() -> list[Any]:
        at = max(i for i, value in enumerate(stack) if value is _MARK)
        found = stack[at + 1 :]
        del stack[at:]
        return found

    for code, argument, _ in pickletools.genops(text):
        given: Any = argument
        match code.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "NEWFALSE":
                stack.append(False)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2":
                stack.append(given)
            case "GLOBAL" if given in (_REBUILD, _STORAGE, _DICTIONARY):
                stack.append(given)
            case "BINPUT" | "LONG_BINPUT":
                memo[given] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[given])
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(code.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPERSID":
                kind, of, key, _, _ = stack.pop()
                if (kind, of) != ("storage", _STORAGE):
                    raise ValueError(f"holds {kind!r} of {of!r}")
                stack.append(storage(str(key)))
            case "REDUCE":
                values, name = stack.pop(), stack.pop()
                stack.append(_called(name, values))
            case "SETITEM":
                item = stack.pop()
                stack[-2][stack.pop()] = item
            case "SETITEMS":
                items = above_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case _:
                raise ValueError(f"holds the instruction {code.name} {given!r}")
    raise ValueError("ends too early")


def _called(name: Any, values: Any) -> Any:
    if name == _DICTIONARY and values == ():
        return {}
    if name != _REBUILD:
        raise ValueError(f"calls {name!r}")
    numbers, start, shape, stride, _, _ = values
    steps = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if not isinstance(numbers, np.ndarray) or stride != steps:
        raise ValueError(f"a tensor of shape {shape} with strides {stride}")
    return numbers[start : start + math.prod(shape)].reshape(shape)


def _rows(table: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())


def _matrix(path: Path, key: Any, value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    good = isinstance(key, str) and isinstance(value, np.ndarray) and value.ndim == 2
    if not good or value.shape != shape or shape[0] > shape[1]:
        raise DataError(
            f"coefficients {str(path)!r}: {key!r} is no matrix of {shape}; allowed: (E', E) floats"
        )
    table: NDArray[np.float64] = value.astype(np.float64)
    if not np.isfinite(table).all():
        raise DataError(f"coefficients {str(path)!r}: {key!r} is not finite")
    return table
