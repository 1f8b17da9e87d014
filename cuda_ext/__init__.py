"""Tensor operations with a CPU path and a reference; no search code."""

from __future__ import annotations

from searchlab.cuda_ext.route_topk import route_topk
from searchlab.cuda_ext.solver_update import solver_update
from searchlab.cuda_ext.weighted_sum import merge_experts, weighted_sum

__all__ = ["merge_experts", "route_topk", "solver_update", "weighted_sum"]
