"""Algorithms behind one ask/tell contract."""

from searchlab.algorithms.aging import RegularisedEvolution
from searchlab.algorithms.base import Algorithm, Draw, Seeds, Told
from searchlab.algorithms.eda import EDA
from searchlab.algorithms.evolution import Evolution, ParentRule
from searchlab.algorithms.front import NSGA2, NSGA3
from searchlab.algorithms.halving import SuccessiveHalving
from searchlab.algorithms.local_search import LocalSearch
from searchlab.algorithms.paired_race import PairedRace
from searchlab.algorithms.racing import Race
from searchlab.algorithms.simple import Listed, Random
from searchlab.algorithms.variation import UniformVariation, Variation

__all__ = [
    "EDA",
    "NSGA2",
    "NSGA3",
    "Algorithm",
    "Draw",
    "Evolution",
    "Listed",
    "LocalSearch",
    "PairedRace",
    "ParentRule",
    "Race",
    "Random",
    "RegularisedEvolution",
    "Seeds",
    "SuccessiveHalving",
    "Told",
    "UniformVariation",
    "Variation",
]
