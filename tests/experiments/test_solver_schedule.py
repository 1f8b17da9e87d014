"""The solver-schedule recipe: options, presets, exports, and a user's pipeline from a folder."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from searchlab.cli import main
from searchlab.errors import ConfigError, SpaceError
from searchlab.evaluators.gaussian_mixture import MixtureProblem
from searchlab.evaluators.trajectories import PrefixTree
from searchlab.experiments.solver_schedule import RECIPE, SolverScheduleOptions, build
from searchlab.experiments.solver_schedule_export import export
from searchlab.experiments.solver_schedule_problems import (
    digits_problem,
    mixture_problem,
    reference_schedule,
)
from searchlab.search import run
from searchlab.spaces.solver_schedule.families import fixed_family
from searchlab.spaces.solver_schedule.schedule_file import load_bundle
from searchlab.spaces.solver_schedule.table import compile_schedule
from searchlab.study import MemoryRun

TINY = {"problem": "mixture", "nfe": "5..6", "budget": 32, "samples": 96, "held_out": 64}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"nfe": "9..3"}, "nfe"),
        ({"nfe": "many"}, "nfe"),
        ({"nfe": "0..3"}, "nfe"),
        ({"budget": -1}, "budget"),
        ({"quantum": 0}, "quantum"),
        ({"report_banks": 1}, "report_banks"),
        ({"samples": 3}, "samples"),
        ({"prompts": "x.txt"}, "for --pipeline"),
        ({"problem": "mixture", "objective": "fd"}, "mixture"),
        ({"problem": "mixture", "label": 3}, "mixture"),
        ({"label": 12}, "label"),
        ({"pipeline": "x", "objective": "fd"}, "pipeline"),
        ({"threads": 0}, "threads"),
        ({"data_seed": 2**40}, "data_seed"),
    ],
)
def test_options_that_cannot_be_are_named(values, text):
    with pytest.raises(ConfigError, match=text):
        SolverScheduleOptions(**values)


def test_presets_differ_in_what_the_released_code_does():
    ours = build(SolverScheduleOptions(**TINY)).stages[-1].algorithm.options
    released = build(SolverScheduleOptions(**TINY, preset="released")).stages[-1].algorithm.options
    assert released["repeats"] == "allow"
    assert released["parents"].kind == "rank"
    assert released["parents"].mu == 15
    assert released["variation"].settings()["name"] == "released"
    assert ours["variation"].settings()["name"] == "schedule"


def test_presets_with_a_predictor_wrap_our_evolution():
    config = build(SolverScheduleOptions(**TINY, preset="guided"))
    guided, evaluator = config.stages[-1].algorithm, config.stages[-1].evaluator
    assert guided.name == "guided"
    assert guided.options["options"]["niches"] == (5, 6)
    assert evaluator.cheap is not None
    assert [signal.when for signal in evaluator.signals] == ["static", "static"]
    small = build(SolverScheduleOptions(**{**TINY, "samples": 64}, preset="guided"))
    assert small.stages[-1].evaluator.cheap is None
    paper = build(SolverScheduleOptions(**TINY, preset="paper")).stages[-1].algorithm
    assert paper.name == "staged"
    assert paper.options["first"] > 48  # the known points alone are no first sample


def test_the_predictor_chooses_once_the_known_points_are_told():
    options = SolverScheduleOptions(**{**TINY, "nfe": "5", "budget": 48}, preset="guided")
    store = MemoryRun()
    result = run(build(options), store=store)
    origins = store.records().origin
    assert sum(text.startswith("guided:") for text in origins) >= 32
    assert result.counts["evaluations"] == 48
    assert result.counts["failed"] == 0


def test_the_published_search_has_stages():
    options = SolverScheduleOptions(
        **{**TINY, "nfe": "5", "budget": 20, "samples": 64, "held_out": 32}, preset="paper"
    )
    config = build(options)
    spec = config.stages[-1].algorithm
    quick = {"first": 30, "batch": 6, "generations": 3, "children": 12}
    spec = replace(spec, options={**spec.options, **quick, "predictor_options": {"epochs": 10}})
    config = replace(
        config, stages=(*config.stages[:-1], replace(config.stages[-1], algorithm=spec))
    )
    store = MemoryRun()
    run(config, store=store)
    assert sum(text == "staged" for text in store.records().origin) >= 6


@pytest.mark.parametrize("preset", ["default", "guided", "released"])
def test_a_run_has_every_known_point_and_ends_with_a_sentence(preset):
    result = run(build(SolverScheduleOptions(**TINY, preset=preset)))
    assert [group.group for group in result.groups] == [5, 6]
    assert result.counts["evaluations"] == 32
    assert result.counts["failed"] == 0
    # 224 names per number of calls, 204 of them different points, and the 24 best scored in full.
    assert result.counts["baseline_evaluations"] >= 2 * (200 + 24)
    assert "against" in result.verdict()
    for group in result.groups:
        assert len(group.winner.report) == 4
        assert group.best_baseline().report


def test_exports_say_what_they_are_for(tmp_path):
    config = build(SolverScheduleOptions(**TINY))
    result = run(config)
    path, text = export(config, result, tmp_path, "")
    bundle = load_bundle(path)
    assert set(bundle.schedules) <= {5, 6}
    assert bundle.prediction_type == "sample"
    assert bundle.validity["model"] == "searchlab mixture M"
    assert "model calls" in text.read_text()
    with pytest.raises(ConfigError, match="sigmas"):
        export(config, result, tmp_path, "pickle")
    winner = result.space.plans(result.groups[0].winner.population)[0]
    if winner.canonical().steps[1].order > 1 or winner.first_evaluation != "model":
        with pytest.raises(SpaceError, match="list of sigmas"):
            export(config, result, tmp_path, "sigmas")


def test_plain_sigmas_of_a_known_solver(tmp_path):
    config = build(SolverScheduleOptions(**{**TINY, "nfe": "5", "budget": 0}))
    result = run(config)
    plain = fixed_family(result.space.noise, 5, family="mixture")["log_snr/data/q1/none/none/final"]
    group = result.groups[0]
    group.winner = replace(
        group.best_baseline(),
        among=result.space.of_schedules([plain]),
        row=0,
        origin="seed:plain",
    )
    (path,) = export(config, result, tmp_path, "sigmas")
    sigmas = json.loads(path.read_text())["5"]
    assert len(sigmas) == 6
    assert (np.diff(sigmas) < 0).all()


def test_the_reference_is_far_better_than_what_is_searched():
    problem, _ = digits_problem()
    x = problem.start(5, 64)
    tree = PrefixTree(problem.denoise, x, remember=False)
    tables = [compile_schedule(reference_schedule(problem.noise, n)) for n in (60, 200)]
    short, long = tree.run(tables)
    assert float((short - long).square().mean().sqrt()) < 1e-3


def test_what_runs_of_a_process_share_is_what_each_would_make():
    reference, mixture = mixture_problem().reference, MixtureProblem()
    x = mixture_problem().start(3, 5)
    ends = {"start": mixture.noise.start, "end": mixture.noise.end}
    reference(x).zero_()  # whoever writes into an answer does not write into the next one
    assert torch.equal(reference(x), mixture.reference_solution(x, **ends))
    assert torch.equal(reference(2 * x), mixture.reference_solution(2 * x, **ends))
    known = [build(SolverScheduleOptions(**TINY)).stages[0].seeds for _ in range(2)]
    assert known[0] is known[1]
    other = build(SolverScheduleOptions(**{**TINY, "nfe": "5"})).stages[0].seeds
    assert other.origin == known[0].origin[: len(other.origin)]
    assert len(other.origin) == len(known[0].origin) // 2


@pytest.mark.diffusers
def test_a_pipeline_from_a_folder_to_a_scheduler(tmp_path, monkeypatch, capsys):
    pytest.importorskip("diffusers")
    from searchlab.testing.tiny_pipelines import tiny_stable_diffusion

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    pipeline = tiny_stable_diffusion(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\na tree\n")
    (tmp_path / "brightness.py").write_text(
        "def mean(images, prompts):\n    return images.reshape(len(images), -1).mean(axis=1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = (
        "run s3 --pipeline model --prompts prompts.txt --size 16x16 --nfe 4..5 --budget 16 "
        "--reference-steps 12 --report-banks 2 --metric brightness:mean --quiet --name mine"
    )
    assert main(arguments.split()) == 0
    shown = capsys.readouterr().out
    assert "rmse: nfe 4:" in shown.splitlines()[-1]
    bundle = load_bundle(tmp_path / "runs/mine/export/schedules.json")
    assert bundle.validity["guidance_scale"] is not None
    assert (bundle.validity["width"], bundle.validity["height"]) == (16, 16)

    from searchlab.spaces.solver_schedule.scheduler import SearchedScheduler

    pipeline.scheduler = SearchedScheduler.load_json(tmp_path / "runs/mine/export/schedules.json")
    nfe = max(bundle.schedules)
    images = pipeline(
        "a cat", num_inference_steps=nfe, height=16, width=16, output_type="np"
    ).images
    assert np.isfinite(images).all()
    assert main(["verify", "mine"]) == 0
    assert main(["export", "mine", "out", "--to", "diffusers"]) == 0
    assert SearchedScheduler.from_pretrained(tmp_path / "out/scheduler").schedules


def test_the_recipe_names_all_its_options():
    from searchlab.recipes import flags_of

    assert all(text for _, text, _, _ in flags_of(RECIPE))
