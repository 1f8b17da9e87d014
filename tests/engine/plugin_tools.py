"""A tiny distribution of others, made on the spot: its entry points add names to searchlab."""

from __future__ import annotations

from pathlib import Path

MODULE = '''
import time
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import searchlab as sl
from searchlab.algorithms.base import Draw, no_parents
from searchlab.algorithms.simple import Random
from searchlab.config import AlgorithmSpec, Budget, SearchConfig, Stage
from searchlab.recipes import Recipe


class Corners(Random):
    """Proposes the ends of every range."""

    name: ClassVar[str] = "corners"

    def _draw(self, ids, u, strength):
        population = self.space.sample((u > 0.5) * 0.999999999)
        return Draw(population, ["corner"] * len(ids), no_parents(len(ids)))


@dataclass(frozen=True)
class Options:
    budget: int = field(default=20, metadata={"help": "evaluations"})
    delay: float = field(default=0.0, metadata={"help": "seconds per evaluation"})
    algorithm: str = field(default="random", metadata={"help": "a registered name"})
    seed: int = field(default=0, metadata={"help": "the seed"})


def build(options):
    space = sl.Space(x=sl.Real(0.0, 1.0), y=sl.Choice(["a", "b", "c"]))

    def value(x, y):
        time.sleep(options.delay)
        return (x - 0.4) ** 2 + "abc".index(y)

    evaluator = sl.FunctionEvaluator(value, space, version=1)
    stage = Stage("search", space, evaluator, AlgorithmSpec(options.algorithm),
                  Budget(options.budget))
    return SearchConfig((stage,), name="tiny", seed=options.seed, recipe="tiny",
                        options={"budget": options.budget, "seed": options.seed})


RECIPE = Recipe("tiny", "a parabola", Options, build)
NO_RECIPE = 3
'''

ENTRY_POINTS = """
[searchlab.algorithms]
corners = tiny_plugin:Corners
broken = tiny_plugin:Missing
evolution = tiny_plugin:Corners

[searchlab.recipes]
tiny = tiny_plugin:RECIPE
three = tiny_plugin:NO_RECIPE

[searchlab.executors]
broken = no_such_module:Executor
"""


def install(folder: Path) -> Path:
    """Writes the distribution into a folder that then belongs on `sys.path`."""
    info = folder / "tiny_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "tiny_plugin.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder
