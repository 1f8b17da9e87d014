"""Checkpoints of adapters (LoRA): what is mixed, the factors or their products.

An adapter adds B A to a layer. Mixing the factors (`factor`, what the paper does and what a bank
does with any checkpoint) gives (sum a_k B_k) (sum a_k A_k), which is not the mix of what the
checkpoints do: sum a_k B_k A_k. That one (`product`) is again an adapter, of the ranks' sum: the A
below each other, the B beside each other times their coefficients. It is exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from searchlab.errors import DataError, SpaceError
from searchlab.spaces.checkpoint_mix.bank import CheckpointBank
from searchlab.spaces.checkpoint_mix.merge import states

__all__ = ["Pair", "lora_pairs", "product_config", "product_state"]

_DOWN = re.compile(r"(lora_A|lora_down|lora\.down)(?=\.|$)")
_UP = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}


@dataclass(frozen=True)
class Pair:
    """The two factors of one layer's adapter.

    Attributes:
        down: name of A, (r, inputs).
        up: name of B, (outputs, r).
    """

    down: str
    up: str


def lora_pairs(names: list[str]) -> list[Pair]:
    """The factor pairs among tensor names (peft, diffusers and kohya spellings).

    Raises:
        DataError: an A without its B.
    """
    out = []
    for name in sorted(names):
        found = _DOWN.search(name)
        if found is None:
            continue
        up = name[: found.start()] + _UP[found[1]] + name[found.end() :]
        if up not in names:
            raise DataError(f"adapter tensor {name!r} has no {up!r} beside it")
        out.append(Pair(name, up))
    return out


def product_state(bank: CheckpointBank, coefficients: NDArray[Any]) -> dict[str, Tensor]:
    """The adapter whose products are the mix of the checkpoints' products.

    Its rank is r times the number of coefficients other than zero. The coefficients go into B.
    Tensors that are no factors are mixed as they are; alphas that lie in the file are multiplied by
    as much as the rank, so that alpha / rank stays.

    Args:
        bank: K adapter checkpoints.
        coefficients: (K,).

    Raises:
        DataError: no adapter among the tensors, or convolutions, whose products are no matrices.
    """
    row = np.asarray(coefficients, dtype=np.float64)
    if row.shape != (len(bank),):
        raise SpaceError(f"coefficients of shape {row.shape}; allowed: ({len(bank)},)")
    pairs = lora_pairs(list(bank.layout.order))
    if not pairs:
        raise DataError(f"checkpoint {str(bank.sources[-1].path)!r} holds no adapter (lora_A)")
    (state,) = states(bank, row[None])
    used = np.flatnonzero(row).tolist()
    for k in used:
        if k in bank.broken:
            raise DataError(f"{bank.broken[k]}; allowed: checkpoints whose values are finite")
    for pair in pairs:
        downs = [bank.sources[k].tensor(pair.down) for k in used]
        ups = [bank.sources[k].tensor(pair.up) for k in used]
        if downs[0].dim() != 2:
            raise DataError(f"adapter tensor {pair.down!r} is no matrix; allowed: factor mixing")
        wide = torch.float64 if downs[0].dtype is torch.float64 else torch.float32
        state[pair.down] = torch.cat(downs, dim=0)
        scaled = [float(row[k]) * up.to(wide) for k, up in zip(used, ups, strict=True)]
        state[pair.up] = torch.cat(scaled, dim=1).to(ups[0].dtype)
    for name in state:
        if name.endswith(".alpha"):
            state[name] = state[name] * len(used)
    return state


def product_config(config: dict[str, Any], used: int) -> dict[str, Any]:
    """An `adapter_config.json` for the product of `used` checkpoints: the scale stays the same."""
    out = dict(config)
    for name in ("r", "lora_alpha"):
        if isinstance(out.get(name), int | float):
            out[name] = out[name] * used
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(out.get(name), dict):
            out[name] = {key: value * used for key, value in out[name].items()}
    return out
