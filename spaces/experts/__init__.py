"""Fewer experts in mixture-of-experts language models as a search space (EEP).

Source: arXiv 2407.00945. Experts are kept (or merged) per block of layers; one resident model is
evaluated with any of them.
"""

from searchlab.spaces.experts.families import (
    ExpertLayout,
    Family,
    families,
    family_of,
    layout_of,
    read_family,
)
from searchlab.spaces.experts.model import ResidentExperts
from searchlab.spaces.experts.plan import ExpertPlan, read_plan
from searchlab.spaces.experts.space import PruningSpace, kept, pruning_space, resolve_keep

__all__ = [
    "ExpertLayout",
    "ExpertPlan",
    "Family",
    "PruningSpace",
    "ResidentExperts",
    "families",
    "family_of",
    "kept",
    "layout_of",
    "pruning_space",
    "read_family",
    "read_plan",
    "resolve_keep",
]
