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

__all__ = [
    "ExpertLayout",
    "Family",
    "ResidentExperts",
    "families",
    "family_of",
    "layout_of",
    "read_family",
]
