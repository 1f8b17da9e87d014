"""Algorithms behind one ask/tell contract."""

from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told
from searchlab.algorithms.evolution import Evolution, ParentRule
from searchlab.algorithms.front import NSGA2, NSGA3
from searchlab.algorithms.racing import Race
from searchlab.algorithms.simple import Listed, Random
from searchlab.algorithms.variation import UniformVariation, Variation

__all__ = [
    "NSGA2",
    "NSGA3",
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
