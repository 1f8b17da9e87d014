"""The conformance suite of evaluators on a tiny pipeline of the real class."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers")

from searchlab.evaluator import Evaluator
from searchlab.evaluators.pipeline import PipelineEvaluator
from searchlab.evaluators.pipeline_settings import PipelineSettings
from searchlab.population import Population
from searchlab.space import Space
from searchlab.spaces.solver_schedule.grids import time_grid
from searchlab.spaces.solver_schedule.points import ddim, dpmpp_2m
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.testing.evaluator import EvaluatorSuite
from searchlab.testing.tiny_pipelines import tiny_ddpm
from searchlab.variables import Choice

pytestmark = pytest.mark.diffusers


class TestPipeline(EvaluatorSuite):
    rows = 4

    @pytest.fixture
    def space(self) -> Space:
        return Space(which=Choice((0, 1, 2, 3)))

    @pytest.fixture
    def population(self, space: Space) -> Population:
        return space.population([{"which": i} for i in range(self.rows)])

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        settings = PipelineSettings(reference_steps=6, n_noise=6)
        made = PipelineEvaluator(tiny_ddpm(), settings=settings)
        noise = made.noise
        schedules: list[Schedule] = []
        for nfe in (3, 5):
            grid = np.append(time_grid(noise, nfe, noise.start, noise.end)[:-1], noise.clean)
            schedules += [ddim(grid, noise), dpmpp_2m(grid, noise)]
        made.plans = lambda population: [schedules[i] for i in population["which"]]
        return made
