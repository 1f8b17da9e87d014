"""Algorithms behind one ask/tell contract."""

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told
from searchlab.algorithms.evolution import Evolution, ParentRule
from searchlab.algorithms.racing import Race
from searchlab.algorithms.simple import Listed, Random
from searchlab.algorithms.variation import UniformVariation, Variation

__all__ = [
    "Algorithm",
    "Draw",
    "Evolution",
    "Listed",
    "ParentRule",
    "Race",
    "Random",
    "Seeds",
    "Told",
    "UniformVariation",
    "Variation",
]
