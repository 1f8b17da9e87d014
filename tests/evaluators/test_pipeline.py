"""Tiny pipelines of the real classes as evaluators of solver schedules."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE, Evaluator, identity_digest
from searchlab.evaluators.pipeline import PipelineEvaluator
from searchlab.evaluators.pipeline_options import (
    PipelineOptions,
    build_pipeline_evaluator,
)
from searchlab.evaluators.pipeline_samples import SampleSet
from searchlab.evaluators.pipeline_settings import PipelineSettings, reference_schedule
from searchlab.population import Jobs, Population
from searchlab.spaces.solver_schedule.grids import time_grid
from searchlab.spaces.solver_schedule.noise_schedule import Flow
from searchlab.spaces.solver_schedule.points import ddim, dpmpp_2m, unipc
from searchlab.spaces.solver_schedule.scheduler import SearchedScheduler
from searchlab.testing.tiny_pipelines import (
    TINY_PIPELINES,
    embeddings,
    tiny_ddpm,
    tiny_stable_diffusion,
)

pytestmark = pytest.mark.diffusers

NAMES = ("ddpm", "sd", "sdxl", "sd3", "flux", "wan")
PROMPTS = ["a red cat", "dog"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    built = {name: make() for name, make in TINY_PIPELINES.items()}
    built["sd"] = tiny_stable_diffusion(tmp_path_factory.mktemp("tokenizer"))
    return built


@pytest.fixture(scope="module")
def saved(pipelines, tmp_path_factory):
    """Stable Diffusion as a directory on disk, with its tokenizer and text encoder."""
    directory = tmp_path_factory.mktemp("pipeline")
    pipelines["sd"].save_pretrained(directory)
    return directory


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n\n  dog  \nred dog\n", encoding="utf-8")
    return path


def evaluator_of(pipelines, name, **options):
    settings = {"reference_steps": 6, "n_noise": 6 if name == "ddpm" else 3}
    if name != "ddpm":
        settings.update(width=16, height=16)
    if name == "wan":
        settings.update(width=32, height=32, num_frames=5)
    if name == "sd":
        settings.update(guidance_scale=5.0)
    rest = {k: options.pop(k) for k in ("metric", "metric_direction") if k in options}
    settings.update(options)
    return PipelineEvaluator(
        pipelines[name],
        PROMPTS if name == "sd" else None,
        settings=PipelineSettings(**settings),
        tensors=embeddings(name, 2),
        **rest,
    )


def candidates(noise):
    """Different lengths, orders and correctors."""
    ends = [
        np.append(time_grid(noise, n, noise.start, noise.end)[:-1], noise.clean) for n in (4, 6, 8)
    ]
    return [ddim(ends[0], noise), dpmpp_2m(ends[1], noise), unipc(ends[2], noise)]


def jobs(rows, *, fidelity=-1, replicate=0):
    rows = np.asarray(rows)
    return Jobs(
        np.arange(len(rows)),
        Population({"which": rows}),
        tuple(bytes([r]) for r in rows),
        fidelity=fidelity,
        replicate=replicate,
    )


def with_plans(evaluator, schedules):
    evaluator.plans = lambda population: [schedules[i] for i in population["which"]]
    return evaluator


@pytest.mark.parametrize("name", NAMES)
def test_both_paths_agree_and_leave_the_pipeline_as_it_was(pipelines, name):
    pipeline = pipelines[name]
    own = pipeline.scheduler
    values = {}
    for path in ("auto", "pipeline"):
        evaluator = evaluator_of(pipelines, name, path=path)
        with_plans(evaluator, candidates(evaluator.noise))
        evaluator.setup()
        answer = evaluator.evaluate(jobs([0, 1, 2]))
        assert answer.reason == ["", "", ""]
        values[evaluator.path] = answer
    assert set(values) == {"rows", "pipeline"}
    assert np.allclose(values["rows"].values, values["pipeline"].values, rtol=1e-3)
    for fast, slow in zip(values["rows"].items, values["pipeline"].items, strict=True):
        assert np.allclose(fast, slow, rtol=1e-2)
    assert pipeline.scheduler is own
    assert "encode_prompt" not in vars(pipeline)


def test_it_is_an_evaluator_with_falling_errors(pipelines):
    evaluator = evaluator_of(pipelines, "sd", reference_steps=24)
    assert isinstance(evaluator, Evaluator)
    noise = evaluator.noise
    long = reference_schedule(noise, 24, scheduler=evaluator.sampler.scheduler)
    grids = [np.append(time_grid(noise, n, 999.0, 0.0)[:-1], -1.0) for n in (3, 6, 12)]
    with_plans(evaluator, [dpmpp_2m(g, noise) for g in grids] + [long])
    evaluator.setup()
    answer = evaluator.evaluate(jobs([0, 1, 2, 3]))
    rmse = answer.values[:, 0]
    assert rmse[0] > 1.3 * rmse[1] > 1.3 * 1.3 * rmse[2] > 0
    assert rmse[3] < 1e-5
    for value, items in zip(rmse, answer.items, strict=True):
        assert len(items) == 6
        assert np.isclose(np.sqrt(items.mean()), value, rtol=1e-5)
    spread = np.asarray(answer.items[0], np.float64).std(ddof=1) / np.sqrt(6) / (2 * rmse[0])
    assert np.isclose(answer.std_error[0, 0], spread, rtol=1e-4)
    assert (answer.cost_s > 0).all()


def test_value_is_the_distance_of_plain_pipeline_calls(pipelines):
    """Everything recomputed by hand: seeds, our scheduler, the pipeline's own latent output."""
    evaluator = evaluator_of(pipelines, "sd")
    schedule = candidates(evaluator.noise)[1]
    with_plans(evaluator, [schedule])
    evaluator.setup()
    value = evaluator.evaluate(jobs([0])).values[0, 0]
    pipeline = pipelines["sd"]
    own = pipeline.scheduler
    rows, prompts = evaluator.samples.rows("search", 0, device=torch.device("cpu"))
    states = []
    for plan in (schedule, reference_schedule(evaluator.noise, 6, scheduler=own)):
        pipeline.scheduler = SearchedScheduler.from_schedules(plan, like=own)
        generators = [torch.Generator().manual_seed(s) for s in rows.seeds]
        states.append(
            pipeline(
                prompts,
                width=16,
                height=16,
                guidance_scale=5.0,
                num_inference_steps=plan.nfe,
                generator=generators,
                output_type="latent",
            )[0].double()
        )
    pipeline.scheduler = own
    assert np.isclose(float(((states[0] - states[1]) ** 2).mean().sqrt()), value, rtol=1e-4)


@pytest.mark.parametrize(("name", "path"), [("sd", "auto"), ("ddpm", "auto"), ("sd", "pipeline")])
def test_exact_values_depend_on_the_candidate_alone(pipelines, name, path):
    evaluator = evaluator_of(pipelines, name, path=path)
    with_plans(evaluator, candidates(evaluator.noise))
    evaluator.setup()
    assert evaluator.reproducibility == "exact"
    together = evaluator.evaluate(jobs([0, 1, 2])).values[:, 0]
    shuffled = evaluator.evaluate(jobs([2, 0, 1])).values[:, 0]
    assert np.array_equal(shuffled, together[[2, 0, 1]])
    fresh = with_plans(evaluator_of(pipelines, name, path=path), candidates(evaluator.noise))
    alone = [fresh.evaluate(jobs([i])).values[0, 0] for i in range(3)]
    assert np.array_equal(alone, together)


def test_cheap_fidelity_is_a_prefix_of_the_samples(pipelines):
    evaluator = evaluator_of(pipelines, "ddpm", n_noise=12)
    assert [f.name for f in evaluator.fidelities] == ["3 samples", "12 samples"]
    assert [f.cost for f in evaluator.fidelities] == [0.25, 1.0]
    with_plans(evaluator, candidates(evaluator.noise))
    few = evaluator.evaluate(jobs([1], fidelity=0)).items[0]
    every = evaluator.evaluate(jobs([1], fidelity=1)).items[0]
    assert np.array_equal(few, every[:3])


def test_replicates_choose_the_noise(pipelines):
    evaluator = evaluator_of(pipelines, "ddpm")
    with_plans(evaluator, candidates(evaluator.noise))
    replicates = (0, 1, SELECTION_REPLICATE, REPORT_REPLICATE, REPORT_REPLICATE + 1)
    values = [evaluator.evaluate(jobs([1], replicate=r)).values[0, 0] for r in replicates]
    assert len(set(values)) == len(values)
    assert max(values) < 1.5 * min(values)
    again = evaluator.evaluate(jobs([1], replicate=0)).values[0, 0]
    assert again == values[0]


def test_splits_have_their_own_prompts_and_noise():
    texts = [f"prompt {i}" for i in range(10)]
    samples = SampleSet(texts, {}, n_noise=2, seed=3)
    device = torch.device("cpu")
    found = {s: samples.rows(s, 0, device=device) for s in ("search", "selection", "report")}
    prompts = {split: set(p) for split, (_, p) in found.items()}
    assert len(prompts["search"]) == 6
    assert not prompts["search"] & prompts["selection"]
    assert not prompts["report"] & (prompts["search"] | prompts["selection"])
    seeds = [s for rows, _ in found.values() for s in rows.seeds]
    assert len(set(seeds)) == len(seeds) == 20
    assert samples.counts() == [3, 12]
    # A few prompts are shared by all splits; the noise never is.
    few = SampleSet(texts[:2], {}, n_noise=2, seed=3)
    parts = [few.rows(s, 0, device=device) for s in ("search", "report")]
    assert parts[0][1] == parts[1][1] == ["prompt 0", "prompt 1"] * 2
    assert not set(parts[0][0].seeds) & set(parts[1][0].seeds)
    with pytest.raises(ConfigError, match=r"\[1, 2\] rows"):
        SampleSet(texts[:2], {"x": torch.zeros(1, 3)}, n_noise=1, seed=0)


def test_schedules_that_cannot_run_fail_alone(pipelines):
    evaluator = evaluator_of(pipelines, "ddpm")
    good = candidates(evaluator.noise)[1]
    other = ddim([1.0, 0.5, 0.0], Flow())
    with_plans(evaluator, [good, replace(good, first_evaluation="zero"), other])
    answer = evaluator.evaluate(jobs([0, 1, 2]))
    assert answer.state.tolist() == [0, 1, 1]
    assert "does not scale its noise" in answer.reason[1]
    assert answer.reason[2] == "noise schedule flow is not the pipeline's"
    scaled = evaluator_of(pipelines, "sd")
    good = candidates(scaled.noise)[1]
    with_plans(scaled, [good, replace(good, first_evaluation="zero")])
    assert scaled.evaluate(jobs([0, 1])).reason == ["", ""]


def test_pipeline_is_restored_when_its_network_fails(pipelines):
    pipeline = pipelines["sd"]
    own = pipeline.scheduler
    evaluator = evaluator_of(pipelines, "sd", path="pipeline")
    with_plans(evaluator, candidates(evaluator.noise))
    evaluator.setup()
    said = ["device 0 is gone\nand more", "out of memory on device 0"]

    def fail(*_):
        raise RuntimeError(said[0])

    handle = pipeline.unet.register_forward_pre_hook(fail)
    try:
        answer = evaluator.evaluate(jobs([0, 1]))
        # Whoever asked makes rows of this, or asks for fewer at once.
        said.pop(0)
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluator.evaluate(jobs([0, 1]))
    finally:
        handle.remove()
    assert answer.state.tolist() == [1, 1]
    assert answer.reason[0] == "StableDiffusionPipeline failed: RuntimeError: device 0 is gone"
    assert pipeline.scheduler is own
    assert "encode_prompt" not in vars(pipeline)
    assert evaluator.evaluate(jobs([0])).reason == [""]


def test_network_calls_equal_the_model_calls_of_the_schedule(pipelines):
    evaluator = evaluator_of(pipelines, "sd", path="pipeline")
    schedules = candidates(evaluator.noise)
    steps = list(schedules[1].steps)
    steps[2] = replace(steps[2], corrector="implicit")
    schedules.append(replace(schedules[1], steps=tuple(steps)))
    with_plans(evaluator, schedules)
    evaluator.setup()
    count = []
    handle = pipelines["sd"].unet.register_forward_pre_hook(lambda *_: count.append(1))
    for i, schedule in enumerate(schedules):
        count.clear()
        evaluator.evaluate(jobs([i]))
        assert len(count) == schedule.nfe
    handle.remove()
    assert [s.nfe for s in schedules] == [4, 6, 8, 7]


def test_schedules_share_network_calls_on_the_fast_path(pipelines):
    evaluator = evaluator_of(pipelines, "ddpm", n_noise=4)
    with_plans(evaluator, candidates(evaluator.noise))
    evaluator.setup()
    assert evaluator.path == "rows"
    count = []
    handle = pipelines["ddpm"].unet.register_forward_pre_hook(
        lambda m, a, k: count.append(len(k["sample"])), with_kwargs=True
    )
    evaluator.evaluate(jobs([0, 1, 2]))
    handle.remove()
    # 4 + 6 + 8 evaluations of 4 samples fit in one call of 16 rows per step; the first of them is
    # remembered from the reference.
    assert len(count) == 7
    assert set(count) == {16}


def test_text_is_encoded_once(pipelines):
    evaluator = evaluator_of(pipelines, "sd", path="pipeline")
    with_plans(evaluator, candidates(evaluator.noise))
    evaluator.setup()
    count = []
    handle = pipelines["sd"].text_encoder.register_forward_pre_hook(lambda *_: count.append(1))
    evaluator.evaluate(jobs([0, 1, 2]))
    handle.remove()
    assert not count


def test_reference_error_is_of_the_right_size(pipelines):
    evaluator = evaluator_of(pipelines, "sd3", reference_steps=20)
    evaluator.setup()
    true = reference_schedule(evaluator.noise, 200, scheduler=pipelines["sd3"].scheduler)
    with_plans(evaluator, [true])
    actual = evaluator.evaluate(jobs([0])).values[0, 0]
    assert 0.1 * actual < evaluator.reference_error < 10 * actual
    assert any("own error about" in remark for remark in evaluator.remarks)


def brightness(images, prompts):
    assert images.dtype == np.uint8
    assert len(prompts) == len(images)
    return images.reshape(len(images), -1).mean(axis=1)


def test_metric_is_a_signal_of_the_shortlist(pipelines):
    evaluator = evaluator_of(pipelines, "sd", metric=brightness, metric_direction="max")
    assert [(s.name, s.direction) for s in evaluator.signals] == [("metric", "max")]
    with_plans(evaluator, candidates(evaluator.noise))
    evaluator.setup()
    assert np.isnan(evaluator.evaluate(jobs([0, 1])).signals).all()
    shortlist = evaluator.evaluate(jobs([0, 1], replicate=SELECTION_REPLICATE)).signals
    assert np.isfinite(shortlist).all()
    assert (shortlist > 0).all()
    assert (shortlist < 255).all()


def test_metric_that_fails_on_the_shortlist_fails_that_row(pipelines):
    calls = []

    def moody(images, prompts):
        calls.append(1)
        return [float("nan") if len(calls) == 2 else 1.0] * len(images)

    evaluator = evaluator_of(pipelines, "ddpm", metric=moody)
    with_plans(evaluator, candidates(evaluator.noise))
    answer = evaluator.evaluate(jobs([0, 1], replicate=REPORT_REPLICATE))
    assert answer.state.tolist() == [1, 0]
    assert "the metric returned nan for image 0" in answer.reason[0]
    assert answer.signals[1, 0] == 1.0


def boom(images, prompts):
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda i, p: np.zeros((2, 1)), r"shape \(2, 1\) for images .*; allowed: \(2,\)"),
        (lambda i, p: 1.0, r"shape \(\) for images"),
        (lambda i, p: [1.0, float("nan")], "returned nan for image 1"),
        (lambda i, p: None, r"shape \(\) for images"),
        (lambda i, p: ["a", "b"], "returned list; allowed: 2 numbers"),
        (boom, "raised KeyError"),
    ],
)
def test_bad_metrics_are_caught_before_the_search(pipelines, metric, message):
    evaluator = evaluator_of(pipelines, "ddpm", metric=metric)
    with pytest.raises(EvaluationError, match=message):
        evaluator.prepare()


def test_metric_of_a_video_is_refused(pipelines):
    evaluator = evaluator_of(pipelines, "wan", metric=brightness)
    with pytest.raises(EvaluationError, match="a metric needs images"):
        evaluator.prepare()


def test_saved_directory_with_prompts(saved, prompts_file):
    options = PipelineOptions(
        str(saved), prompts_file, size="16", reference_steps=8, n_noise=2, guidance_scale=4.0
    )
    evaluator, noise, validity = build_pipeline_evaluator(options)
    assert noise.to_json()["beta_schedule"] == "scaled_linear"
    assert evaluator.samples.prompts == ("a red cat", "dog", "red dog")
    assert evaluator.path == "rows"
    assert validity == {
        "model": str(saved),
        "model_class": "UNet2DConditionModel",
        "prediction_type": "epsilon",
        "noise": noise.to_json(),
        "shift": None,
        "mu": None,
        "width": 16,
        "height": 16,
        "guidance_scale": 4.0,
    }
    json.dumps(validity)
    with_plans(evaluator, candidates(noise))
    evaluator.setup()
    values = evaluator.evaluate(jobs([0, 1, 2])).values
    assert np.isfinite(values).all()

    # Prompts matter: other texts with the same noise give other errors.
    changed = prompts_file.with_name("changed.txt")
    changed.write_text("cat\ndog dog dog\nred\n")
    other, _, _ = build_pipeline_evaluator(replace(options, prompts=changed))
    with_plans(other, candidates(noise))
    assert not np.allclose(other.evaluate(jobs([0, 1, 2])).values, values, rtol=1e-6)
    assert identity_digest(other) != identity_digest(evaluator)


def test_a_worker_loads_its_own_pipeline(saved, prompts_file):
    options = PipelineOptions(str(saved), prompts_file, size="16x16", reference_steps=6)
    evaluator, noise, validity = build_pipeline_evaluator(options)
    assert validity["guidance_scale"] == 7.5
    evaluator.setup()
    text = pickle.dumps(evaluator)
    assert len(text) < 20_000
    copy = pickle.loads(text)
    copy.setup()
    expected = with_plans(evaluator, candidates(noise)).evaluate(jobs([0, 1])).values
    with_plans(copy, candidates(noise))
    assert np.array_equal(copy.evaluate(jobs([0, 1])).values, expected)
    assert identity_digest(copy) == identity_digest(evaluator)


def test_size_is_read_off_where_it_is_not_set(pipelines):
    evaluator = PipelineEvaluator(pipelines["ddpm"], settings=PipelineSettings(n_noise=2))
    assert evaluator.size == (8, 8)
    evaluator = PipelineEvaluator(pipelines["sd"], PROMPTS)
    assert evaluator.size == (16, 16)


def test_prompts_must_fit_the_pipeline(pipelines):
    with pytest.raises(ConfigError, match="StableDiffusionPipeline needs prompts, got none"):
        PipelineEvaluator(pipelines["sd"]).prepare()
    with pytest.raises(ConfigError, match="DDPMPipeline takes no prompts"):
        PipelineEvaluator(pipelines["ddpm"], PROMPTS).prepare()
    with pytest.raises(EvaluationError, match="StableDiffusionPipeline failed: ValueError"):
        PipelineEvaluator(
            pipelines["sd"], PROMPTS, settings=PipelineSettings(width=33, height=33)
        ).prepare()


def test_batching_falls_back_where_it_does_not_reproduce_the_pipeline():
    pipeline = tiny_ddpm()
    inner = pipeline.unet.forward
    calls = []

    def forward(sample, timestep, class_labels=None, return_dict=True):
        # A network with a memory of how often it was called, as caching wrappers have.
        calls.append(1)
        return inner(sample * (1 + 0.05 * (len(calls) % 3)), timestep, class_labels, return_dict)

    pipeline.unet.forward = forward
    evaluator = PipelineEvaluator(pipeline, settings=PipelineSettings(n_noise=3, reference_steps=6))
    evaluator.prepare()
    assert evaluator.path == "pipeline"
    assert "batching fails: results differ" in evaluator.remarks[0]
    strict = PipelineEvaluator(pipeline, settings=PipelineSettings(n_noise=3, path="rows"))
    with pytest.raises(EvaluationError, match="path 'rows' does not work"):
        strict.prepare()
