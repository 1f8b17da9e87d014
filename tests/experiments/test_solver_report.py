"""What solver schedules add to a report, with images and distances and without."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from searchlab.algorithms.base import Seeds
from searchlab.config import AlgorithmSpec, Budget, Final, SearchConfig, Stage
from searchlab.evaluator import REPORT_REPLICATE
from searchlab.evaluators.noise import split_seed
from searchlab.evaluators.sampling import SamplingEvaluator
from searchlab.experiments.solver_schedule_figures import figure_samples, figure_steps, image_shape
from searchlab.experiments.solver_schedule_problems import digits_problem, mixture_problem
from searchlab.experiments.solver_schedule_report import FD_NOTE, SAMPLES, sections
from searchlab.population import Population
from searchlab.report import write_report
from searchlab.result import Result
from searchlab.search import run, search
from searchlab.space import Space
from searchlab.spaces.solver_schedule.families import fixed_family
from searchlab.spaces.solver_schedule.noise_schedule import Flow
from searchlab.spaces.solver_schedule.points import ddim
from searchlab.spaces.solver_schedule.schedule import Schedule
from searchlab.spaces.solver_schedule.space import ScheduleRange, SolverScheduleSpace
from searchlab.spaces.solver_schedule.variation import ScheduleVariation
from searchlab.variables import Real

GROUPS = (3, 4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _run(
    space: SolverScheduleSpace, evaluator: SamplingEvaluator, family: str
) -> tuple[SearchConfig, Result]:
    populations, names = [], []
    for nfe in GROUPS:
        known = fixed_family(space.noise, nfe, family=family)  # type: ignore[arg-type]
        some = dict(list(known.items())[::60])
        populations.append(space.of_schedules(list(some.values())))
        names += [f"baseline:{name}" for name in some]
    algorithm = AlgorithmSpec(
        "evolution",
        {"n_random": 0, "variation": ScheduleVariation(), "niche": "nfe", "niches": GROUPS},
    )
    seeds = Seeds(Population.concat(populations), tuple(names))
    stage = Stage("search", space, evaluator, algorithm, Budget(16), seeds=seeds)
    config = SearchConfig(
        (stage,), group_by="nfe", groups=GROUPS, upto=True, final=Final(k=2, report=2)
    )
    return config, run(config)


@pytest.fixture(scope="module")
def mixture() -> tuple[SearchConfig, Result]:
    problem = mixture_problem()
    space = SolverScheduleSpace(
        problem.noise, ScheduleRange(GROUPS, (1e-3, 1e-3), endings=("stop",))
    )
    return _run(space, SamplingEvaluator(space, problem, samples=(16,), held_out=16), "mixture")


@pytest.fixture(scope="module")
def digits() -> tuple[SearchConfig, Result]:
    problem, distance = digits_problem(reference_steps=20)
    space = SolverScheduleSpace(
        problem.noise, ScheduleRange(GROUPS, (0.002, 0.1), first=("model", "zero", "mean"))
    )
    evaluator = SamplingEvaluator(space, problem, distance=distance, samples=(32,), held_out=128)
    return _run(space, evaluator, "digits")


def test_a_problem_without_images_has_timesteps_and_tables_only(
    mixture: tuple[SearchConfig, Result],
) -> None:
    config, result = mixture
    parts = sections(config, result)
    assert [part.title for part in parts] == [
        "Timesteps and decisions",
        "Schedule, nfe 3",
        "Schedule, nfe 4",
    ]
    for group, part in zip(result.groups, parts[1:], strict=True):
        assert group.winner is not None
        plan = result.space.plans(group.winner.population)[0]
        assert isinstance(plan, Schedule)
        assert part.pre == str(plan)


def test_digits_have_everything(digits: tuple[SearchConfig, Result], tmp_path: Path) -> None:
    config, result = digits
    parts = sections(config, result)
    assert [part.title for part in parts] == [
        "RMSE and Fréchet distance",
        "Samples, nfe 3",
        "Samples, nfe 4",
        "Timesteps and decisions",
        "Schedule, nfe 3",
        "Schedule, nfe 4",
    ]
    text = write_report(result, tmp_path / "report.html", sections=parts).read_text()
    assert not re.search(r"(src|href)=.?https?:", text)
    assert text.count("<img ") == 2 + 3


def test_both_objectives_are_those_of_a_second_measurement(
    digits: tuple[SearchConfig, Result],
) -> None:
    config, result = digits
    table = sections(config, result)[0].table
    assert table is not None
    evaluator = config.stages[-1].evaluator
    assert isinstance(evaluator, SamplingEvaluator)
    assert evaluator.distance is not None
    fresh = replace(evaluator)
    winner = result.groups[0].winner
    assert winner is not None
    plan = result.space.plans(winner.population)
    rmse, fd, reference_fd = [], [], []
    for number in range(2):
        finals = fresh.sample(plan, REPORT_REPLICATE + number, fresh.held_out)[0]
        start = fresh.problem.start(split_seed(0, "report", number), fresh.held_out)
        solution = fresh.problem.reference(start)
        rmse.append(float((finals.double() - solution.double()).square().mean().sqrt()))
        fd.append(_distance(fresh, finals))
        reference_fd.append(_distance(fresh, solution))
    assert table[0]["what"] == "searched"
    assert _mean(table[0]["RMSE to reference"]) == pytest.approx(np.mean(rmse), rel=1e-3)
    assert _mean(table[0]["Fréchet distance"]) == pytest.approx(np.mean(fd), rel=1e-3)
    assert table[-1]["what"] == "reference"
    assert _mean(table[-1]["Fréchet distance"]) == pytest.approx(np.mean(reference_fd), rel=1e-3)
    assert FD_NOTE in sections(config, result)[0].text


def _distance(evaluator: SamplingEvaluator, samples: torch.Tensor) -> float:
    from searchlab.evaluators.distances import frechet_distances

    assert evaluator.distance is not None
    features = evaluator.distance.features(samples)[None]
    return float(frechet_distances(features, evaluator.distance.reference)[0])


def _mean(text: str) -> float:
    return float(text.split(" ± ")[0])


def test_pictures_show_the_reports_own_noise(digits: tuple[SearchConfig, Result]) -> None:
    """The figure of a section is the one drawn from a second sampling of the report split."""
    config, result = digits
    group = result.groups[0]
    evaluator = config.stages[-1].evaluator
    assert isinstance(evaluator, SamplingEvaluator)
    base = group.best_baseline()
    assert group.winner is not None
    assert base is not None
    rows = {}
    for name, contender in (("searched", group.winner), ("best baseline", base)):
        plans = result.space.plans(contender.population)
        finals = evaluator.sample(plans, REPORT_REPLICATE, SAMPLES)[0]
        rows[name] = finals.double().numpy()
    start = evaluator.problem.start(split_seed(evaluator.seed, "report", 0), SAMPLES)
    reference = evaluator.problem.reference(start).double().numpy()
    part = sections(config, result)[1]
    assert part.figure == figure_samples(reference, rows, (8, 8))
    assert base.name in part.caption


def test_sections_leave_the_evaluators_memory_alone(digits: tuple[SearchConfig, Result]) -> None:
    config, result = digits
    evaluator = config.stages[-1].evaluator
    assert isinstance(evaluator, SamplingEvaluator)
    before = (list(evaluator._banks), replace(evaluator.work))
    sections(config, result)
    assert (list(evaluator._banks), evaluator.work) == before


def test_differences_are_visible_and_pictures_are_in_place() -> None:
    """Strips hold the pixels given: white where the picture is, a bright spot where it differs."""
    from PIL import Image

    reference = np.full((2, 64), -1.0)
    other = reference.copy()
    other[1, :8] = 1.0
    svg = figure_samples(reference, {"other": other}, (8, 8)).decode()
    embedded = re.findall(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)", svg)
    strips = [np.array(Image.open(BytesIO(base64.b64decode(s))).convert("L")) for s in embedded]
    assert len(strips) == 3
    same, different, difference = strips
    assert same.max() < 10 or same[:, : same.shape[1] // 3].max() < 10
    half = difference.shape[1] // 2
    assert different[:, half + 20 :].max() > 240
    assert difference[:, half + 20 :].max() > 200
    assert difference[:, : half - 20].max() < 10


def test_what_is_no_run_of_schedules_adds_nothing() -> None:
    result = search(Space(x=Real(0.0, 1.0)), lambda x: x, budget=4)
    space = result.space
    stage = Stage("s", space, mixture_evaluator(space), AlgorithmSpec("random"))
    assert sections(SearchConfig((stage,)), result) == []


def mixture_evaluator(space: Space) -> SamplingEvaluator:
    return SamplingEvaluator(space, mixture_problem(), samples=(32,), held_out=64)


def test_a_run_without_winner_adds_nothing(mixture: tuple[SearchConfig, Result]) -> None:
    config, result = mixture
    groups = [replace(group, winner=None) for group in result.groups]
    assert sections(config, replace(result, groups=groups)) == []


def test_a_run_without_final_has_no_table_of_objectives(
    digits: tuple[SearchConfig, Result],
) -> None:
    config, _ = digits
    result = run(replace(config, final=None))
    titles = [part.title for part in sections(config, result)]
    assert "RMSE and Fréchet distance" not in titles
    assert "Samples, nfe 3" in titles


def test_infinite_log_snr_at_both_ends_is_drawn() -> None:
    """A flow starts at alpha = 0 and may end at sigma = 0."""
    schedule = ddim(np.array([1.0, 0.6, 0.3, 0.0]), Flow())
    assert not np.isfinite(schedule.noise.log_snr(np.array(schedule.times))[[0, -1]]).any()
    svg = figure_steps([("a", schedule, None), ("b", schedule, schedule)])
    assert svg.startswith(b"<svg")
    assert b"nan" not in svg.split(b"</defs>", 1)[1].split(b"<image")[0].lower()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64,), (8, 8)),
        ((4,), None),
        ((16, 12), (16, 12)),
        ((3, 32, 32), (3, 32, 32)),
        ((4, 32, 32), None),
        ((2, 3), None),
    ],
)
def test_which_shapes_are_images(shape: tuple[int, ...], expected: tuple[int, ...] | None) -> None:
    assert image_shape(shape) == expected
