"""Solver schedules of diffusion models as a search space: every choice of an ODE solver, per step.

The numerical core: noise schedules, the plan (`Schedule`, `Step`), its coefficients, and the table
a plan compiles to. Two parts of the original space are left out: the v3 prediction type, which
needs statistics that are not published, and the U-Net skip coefficients, which are no property of a
solver. Source: arXiv 2312.07243.
"""

from searchlab.spaces.solver_schedule.noise_schedule import (
    Edm,
    Flow,
    NoiseSchedule,
    VpDiscrete,
    VpLinear,
    noise_schedule_from_json,
    shifted,
)
from searchlab.spaces.solver_schedule.schedule import MAX_ORDER, MIN_LOG_SNR_GAP, Schedule, Step
from searchlab.spaces.solver_schedule.table import CoefficientTable, compile_schedule

__all__ = [
    "MAX_ORDER",
    "MIN_LOG_SNR_GAP",
    "CoefficientTable",
    "Edm",
    "Flow",
    "NoiseSchedule",
    "Schedule",
    "Step",
    "VpDiscrete",
    "VpLinear",
    "compile_schedule",
    "noise_schedule_from_json",
    "shifted",
]
