"""Linear combinations of the checkpoints of a training run as a search space (LCSC).

Source: arXiv 2404.02241. Checkpoints are matched by name and kept in a bank that mixes whole
populations from one read; coefficients sum to one and may be negative.
"""

from searchlab.spaces.checkpoint_mix.bank import CheckpointBank, MemoryPlan
from searchlab.spaces.checkpoint_mix.merge import merge, states
from searchlab.spaces.checkpoint_mix.sources import CheckpointSource, find_checkpoints
from searchlab.spaces.checkpoint_mix.space import CheckpointMixSpace, Mix, MixSubspace

__all__ = [
    "CheckpointBank",
    "CheckpointMixSpace",
    "CheckpointSource",
    "MemoryPlan",
    "Mix",
    "MixSubspace",
    "find_checkpoints",
    "merge",
    "states",
]
