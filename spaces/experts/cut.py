"""A model with experts cut out of its weights: what an export is, and what masks stand for."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from searchlab.errors import SpaceError
from searchlab.spaces.experts.families import Family
from searchlab.spaces.experts.model import ResidentExperts

__all__ = ["cut_config", "cut_model"]


def cut_model(
    resident: ResidentExperts,
    kept: NDArray[np.bool_],
    *,
    top_k: int | None = None,
    flat: bool = False,
) -> Any:
    """A copy of the model that has the kept experts only.

    Counts may differ between blocks; such a copy works, but transformers cannot load it again.

    Args:
        resident: of the whole model.
        kept: bool (L, E).
        top_k: experts per token, if others than the model's.
        flat: routing without groups.

    Raises:
        SpaceError: masks of another shape, or that the model cannot be cut to.
    """
    shape = (len(resident.blocks), resident.layout.experts)
    if kept.shape != shape or kept.dtype != np.bool_:
        raise SpaceError(f"mask of shape {kept.shape}, {kept.dtype}; allowed: {shape} bool")
    resident.check(kept[None], top_k=top_k, flat=flat)
    model: Any = copy.deepcopy(resident.model)
    copied = ResidentExperts(model, resident.family)
    k = resident.layout.top_k if top_k is None else top_k
    for row, block, router, experts in zip(
        kept, copied.blocks, copied.routers, copied.experts, strict=True
    ):
        index = torch.from_numpy(np.flatnonzero(row))
        for name in resident.family.router_tensors:
            _select(router, name, index)
        for name in [key for key, _ in experts.named_parameters(recurse=False)]:
            _select(experts, name, index)
        for module in (router, experts):
            module.num_experts = len(index)  # type: ignore[assignment]
        for module in (block, router):
            if hasattr(module, "top_k"):
                module.top_k = k  # type: ignore[assignment]
        if flat and hasattr(router, "num_group"):
            router.num_group = router.topk_group = 1  # type: ignore[assignment]
    counts = kept.sum(axis=1)
    if (counts == counts[0]).all():
        cut_config(model.config, resident.family, int(counts[0]), top_k=k, flat=flat)
        if hasattr(model, "num_experts"):
            model.num_experts = int(counts[0])
    return model


def cut_config(config: Any, family: Family, count: int, *, top_k: int, flat: bool) -> None:
    """Sets counts in a configuration, or in config.json as a dict."""
    values: dict[str, Any] = dict.fromkeys(family.count_keys, count)
    values[family.top_k_key] = top_k
    if flat and family.groups is not None:
        values[family.groups.count] = values[family.groups.kept] = 1
    for key, value in values.items():
        if isinstance(config, dict):
            config[key] = value
        else:
            setattr(config, key, value)


def _select(module: nn.Module, name: str, index: Tensor) -> None:
    old: Tensor = getattr(module, name)
    new = old.detach().index_select(0, index.to(old.device)).contiguous()
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(new, requires_grad=False)
    else:
        module._buffers[name] = new
