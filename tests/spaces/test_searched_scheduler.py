"""Searched schedules inside unmodified diffusers pipelines of the real classes."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from searchlab.errors import ConfigError, SearchlabWarning, SpaceError
from searchlab.spaces.solver_schedule.execute import run_table
from searchlab.spaces.solver_schedule.incremental import TableRun, evaluation_points, suffix
from searchlab.spaces.solver_schedule.installed import (
    describe,
    noise_schedule_of,
    times_of,
)
from searchlab.spaces.solver_schedule.noise_schedule import Edm, Flow, VpDiscrete
from searchlab.spaces.solver_schedule.points import ddim, dpmpp_2m, unipc
from searchlab.spaces.solver_schedule.schedule import Schedule, Step
from searchlab.spaces.solver_schedule.schedule_file import validity_differences
from searchlab.spaces.solver_schedule.scheduler import SearchedScheduler
from searchlab.spaces.solver_schedule.table import compile_schedule
from searchlab.testing.tiny_pipelines import TINY_PIPELINES, embeddings, tiny_stable_diffusion

pytestmark = pytest.mark.diffusers

NAMES = ("ddpm", "sd", "sdxl", "sd3", "flux", "wan")
ROWS = 2


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


@pytest.fixture
def pipeline_of(pipelines):
    """A pipeline whose own scheduler is put back after the test."""
    used = []

    def take(name):
        pipeline = pipelines[name]
        used.append((pipeline, pipeline.scheduler))
        return pipeline

    yield take
    for pipeline, scheduler in used:
        pipeline.scheduler = scheduler


class Calls:
    """What a denoiser is called with, in order."""

    def __init__(self, pipeline):
        self.timesteps: list[float] = []
        self.denoiser = getattr(pipeline, "unet", None) or pipeline.transformer

    def __enter__(self):
        def hook(module, args, kwargs):
            t = kwargs["timestep"] if "timestep" in kwargs else args[1]
            self.timesteps.append(float(torch.as_tensor(t).flatten()[0]))

        self.handle = self.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()


def generators():
    return [torch.Generator().manual_seed(i) for i in range(ROWS)]


def settings(name):
    if name == "ddpm":
        return {"batch_size": ROWS, "output_type": "pt"}
    shared = {"output_type": "latent", "height": 32, "width": 32, **embeddings(name, ROWS)}
    if name == "sd":
        shared.update(prompt=["a red cat", "dog"], guidance_scale=5.0)
    if name == "wan":
        shared.update(num_frames=5)
    return shared


def sample(pipeline, name, n):
    return pipeline(**settings(name), generator=generators(), num_inference_steps=n)[0]


def put(pipeline, schedule, **options):
    own = pipeline.scheduler
    pipeline.scheduler = SearchedScheduler.from_schedules(schedule, like=own, **options)
    return pipeline.scheduler


def fractional(noise, n):
    """Falling native times that are no whole numbers."""
    if isinstance(noise, Flow):
        return np.append(np.linspace(1.0, 0.13, n) ** 1.1, 0.0)
    return np.append(np.linspace(990.3, 30.7, n), noise.clean)


def rich(noise, n):
    """Multistep of order 3 with pseudo correctors, mixed prediction types."""
    base = unipc(fractional(noise, n), noise, order=3)
    steps = list(base.steps)
    steps[2] = replace(steps[2], prediction="noise", relaxation="linear", coefficient=0.1)
    return replace(base, steps=tuple(steps))


@pytest.mark.parametrize("name", NAMES)
def test_runs_unmodified_with_one_call_per_evaluation(pipeline_of, name):
    pipeline = pipeline_of(name)
    noise = noise_schedule_of(pipeline.scheduler)
    schedule = rich(noise, 5)
    scheduler = put(pipeline, schedule)
    with Calls(pipeline) as calls:
        result = sample(pipeline, name, 5)
    assert torch.isfinite(result).all()
    assert result.std() > 0.01
    per_evaluation = 2 if name == "wan" else 1  # its guidance is a call of its own
    assert len(calls.timesteps) == per_evaluation * schedule.nfe
    assert scheduler.step_index == schedule.nfe


@pytest.mark.parametrize("name", NAMES)
def test_fractional_timesteps_reach_the_denoiser(pipeline_of, name):
    pipeline = pipeline_of(name)
    noise = noise_schedule_of(pipeline.scheduler)
    times = fractional(noise, 4)
    put(pipeline, ddim(times, noise))
    with Calls(pipeline) as calls:
        sample(pipeline, name, 4)
    seen = calls.timesteps[:: 2 if name == "wan" else 1]
    scale = {"sd3": 1000.0, "wan": 1000.0}.get(name, 1.0)
    assert np.allclose(seen, times[:-1] * scale, rtol=1e-6)
    assert any(abs(t - round(t)) > 0.05 for t in seen)


@pytest.mark.parametrize("name", NAMES)
def test_order_one_equals_the_installed_scheduler(pipeline_of, name):
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = pipeline_of(name)
    if name == "wan":  # its default rounds time steps to whole numbers
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own = pipeline.scheduler
    expected = sample(pipeline, name, 6)
    # 16 image tokens give Flux this dynamic shift
    mu = 0.5 + (64 - 256) * (1.15 - 0.5) / (4096 - 256) if name == "flux" else None
    schedule = ddim(times_of(own, 6, mu=mu), noise_schedule_of(own))
    put(pipeline, schedule)
    got = sample(pipeline, name, 6)
    scale = float(expected.abs().max())
    assert float((got - expected).abs().max()) < (3e-5 if name != "sdxl" else 3e-4) * scale


def test_second_order_equals_the_installed_solver(pipeline_of):
    from diffusers import DPMSolverMultistepScheduler

    pipeline = pipeline_of("sd")
    own = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace", final_sigmas_type="zero"
    )
    pipeline.scheduler = own
    expected = sample(pipeline, "sd", 8)
    put(pipeline, dpmpp_2m(times_of(own, 8), noise_schedule_of(own)))
    got = sample(pipeline, "sd", 8)
    assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_implicit_corrector_publishes_its_time_twice(pipeline_of):
    pipeline = pipeline_of("ddpm")
    noise = noise_schedule_of(pipeline.scheduler)
    base = dpmpp_2m(fractional(noise, 4), noise)
    steps = list(base.steps)
    steps[1] = replace(steps[1], corrector="implicit")
    schedule = replace(base, steps=tuple(steps))
    assert schedule.nfe == 5
    scheduler = put(pipeline, schedule)
    with Calls(pipeline) as calls:
        result = sample(pipeline, "ddpm", 5)
    assert len(calls.timesteps) == 5
    assert calls.timesteps[2] == calls.timesteps[3]
    assert len(scheduler.sigmas) == 6
    assert torch.isfinite(result).all()


def closed_form(noise):
    """Denoiser of data N(0, 0.25), as the network's epsilon prediction."""

    def epsilon(x, t):
        alpha, sigma = float(noise.alpha(t)), float(noise.sigma(t))
        return sigma * x / (alpha**2 * 0.25 + sigma**2)

    def data(x, t):
        at = float(t.flatten()[0])
        alpha, sigma = float(noise.alpha(at)), float(noise.sigma(at))
        return (x - sigma * epsilon(x, at)) / alpha

    return epsilon, data


def drive(scheduler, epsilon, x, n):
    """A pipeline's loop without a pipeline, in float64."""
    scheduler.set_timesteps(n)
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        native = scheduler._run.times[i]
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(epsilon(model_input, native), t, x).prev_sample
    return x


@pytest.mark.parametrize("first", ["model", "zero", "mean"])
@pytest.mark.parametrize("corrector", ["none", "pseudo", "implicit"])
def test_scheduler_computes_what_the_table_does(first, corrector):
    noise = VpDiscrete()
    base = rich(noise, 6)
    steps = tuple(replace(s, corrector=corrector) for s in base.steps[:-1]) + base.steps[-1:]
    schedule = replace(base, steps=steps, first_evaluation=first)
    epsilon, data = closed_form(noise)
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = torch.tensor([[0.3], [-0.2]])
    scheduler = SearchedScheduler.from_schedules(schedule, mean=mean.tolist())
    got = drive(scheduler, epsilon, x, schedule.nfe)
    want = run_table(compile_schedule(schedule), data, x, mean=mean.double())
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)
    assert len(scheduler.timesteps) == schedule.nfe


def test_analytic_first_evaluation_in_a_pipeline_with_hooks(pipeline_of):
    pipeline = pipeline_of("sd")
    noise = noise_schedule_of(pipeline.scheduler)
    schedule = replace(ddim(fractional(noise, 5), noise), first_evaluation="zero")
    put(pipeline, schedule)
    with Calls(pipeline) as calls:
        result = sample(pipeline, "sd", 4)
    assert len(calls.timesteps) == schedule.nfe == 4
    assert torch.isfinite(result).all()
    put(pipeline, replace(schedule, first_evaluation="mean"), mean=[[[0.5]]] * 4)
    assert float((sample(pipeline, "sd", 4) - result).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["ddpm", "flux", "sd3"])
def test_analytic_first_evaluation_needs_the_hooks(pipeline_of, name):
    pipeline = pipeline_of(name)
    noise = noise_schedule_of(pipeline.scheduler)
    times = fractional(noise, 4)
    if isinstance(noise, Flow):
        times[0] = 0.99
    put(pipeline, replace(ddim(times, noise), first_evaluation="zero"))
    with pytest.raises(ConfigError, match="does not read init_noise_sigma"):
        sample(pipeline, name, 3)


def image_to_image(pipeline):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("first", ["model", "zero"])
def test_image_to_image_at_half_strength(pipeline_of, first):
    pipeline = image_to_image(pipeline_of("sd"))
    noise = noise_schedule_of(pipeline.scheduler)
    schedule = replace(rich(noise, 6 + (first != "model")), first_evaluation=first)
    put(pipeline, schedule)
    image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).repeat(2, 1, 1, 1)
    arguments = {
        "prompt": ["cat", "dog"],
        "image": image,
        "num_inference_steps": 6,
        "output_type": "latent",
    }
    with Calls(pipeline) as calls:
        result = pipeline(**arguments, strength=0.5, generator=generators())[0]
    assert torch.isfinite(result).all()
    late = compile_schedule(schedule).times[-3:]
    assert np.allclose(calls.timesteps, late, rtol=1e-6)
    with Calls(pipeline) as calls:
        pipeline(**arguments, strength=1.0, generator=generators())
    assert len(calls.timesteps) == 6


def test_image_to_image_equals_the_installed_scheduler(pipeline_of):
    pipeline = image_to_image(pipeline_of("sd"))
    own = pipeline.scheduler
    arguments = {
        "prompt": ["cat", "dog"],
        "image": torch.linspace(0, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32),
        "num_inference_steps": 6,
        "strength": 0.5,
        "output_type": "latent",
    }
    expected = pipeline(**arguments, generator=generators())[0]
    put(pipeline, ddim(times_of(own, 6), noise_schedule_of(own)))
    got = pipeline(**arguments, generator=generators())[0]
    assert float((got - expected).abs().max()) < 3e-5 * float(expected.abs().max())


@pytest.mark.parametrize("begin", range(7))
def test_any_later_start_runs_the_suffix(begin):
    noise = VpDiscrete()
    base = rich(noise, 6)
    steps = list(base.steps)
    steps[2] = replace(steps[2], corrector="implicit")
    schedule = replace(base, steps=tuple(steps))
    assert schedule.nfe == 7
    epsilon, data = closed_form(noise)
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scheduler = SearchedScheduler.from_schedules(schedule)
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(begin)
    got = x
    for i, t in enumerate(scheduler.timesteps[begin:], begin):
        got = scheduler.step(epsilon(got, scheduler._run.times[i]), t, got).prev_sample
    rest = suffix(schedule, evaluation_points(schedule)[begin])
    want = run_table(compile_schedule(rest), data, x)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)


def test_suffix_caps_what_reaches_before_its_start():
    noise = VpDiscrete()
    steps = (
        Step(700.0),
        Step(500.0, order=2),
        Step(300.0, order=3, points=(-2, -3)),
        Step(100.0, order=2, start=-2, points=(-1,)),
    )
    schedule = Schedule(noise, 900.0, steps)
    assert [s.order for s in suffix(schedule, 1).steps] == [1, 2, 2]
    assert [s.order for s in suffix(schedule, 2).steps] == [1, 2]
    assert suffix(schedule, 3).steps[0].start == -1
    assert suffix(schedule, 0).steps[2:] == schedule.steps[2:]
    with pytest.raises(SpaceError, match=r"starting points 0\.\.3"):
        suffix(schedule, 4)


def test_incremental_run_is_bit_equal_to_the_table():
    noise = VpDiscrete()
    table = compile_schedule(rich(noise, 6))
    _, data = closed_form(noise)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    run = TableRun(table, x)
    while not run.done:
        run.answer(data(run.called_at, torch.full((5,), run.time)))
    assert torch.equal(run.called_at, run_table(table, data, x))
    with pytest.raises(SpaceError, match="all its 6 evaluations"):
        run.answer(x)


def test_half_precision_is_combined_in_float32():
    noise = VpDiscrete()
    schedule = rich(noise, 6)
    epsilon, _ = closed_form(noise)
    scheduler = SearchedScheduler.from_schedules(schedule)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(4))
    exact = drive(scheduler, epsilon, x, 6)
    half = drive(scheduler, epsilon, x.half(), 6)
    assert half.dtype == torch.float16
    assert float((half.float() - exact).abs().max()) < 0.02


@pytest.mark.parametrize("noise", [VpDiscrete(), Flow(), Edm()])
def test_no_nan_where_sigma_ends_at_zero(noise):
    times = fractional(noise, 5) if not isinstance(noise, Edm) else [80.0, 20, 5, 1, 0.1, 0.0]
    schedule = unipc(times, noise, order=3)
    scheduler = SearchedScheduler.from_schedules(schedule)
    scheduler.set_timesteps(5)
    x = torch.ones(2, 3) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(x, 0.3), t, scheduler.scale_model_input(x, t) * 0 + x)[0]
    assert torch.isfinite(x).all()
    assert float(scheduler.sigmas[-1]) == 0.0


def bundle(noise):
    return [ddim(fractional(noise, n), noise) for n in (4, 6)] + [rich(noise, 5)]


def test_bundle_gives_the_schedule_with_the_asked_calls(pipeline_of):
    pipeline = pipeline_of("ddpm")
    scheduler = put(pipeline, bundle(VpDiscrete()))
    for n in (4, 5, 6):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        assert scheduler.timesteps.dtype == torch.float32
        assert len(scheduler.sigmas) == n + 1
        assert scheduler.step_index is None
    with pytest.raises(ConfigError, match="num_inference_steps = 7; stored: 4, 5, 6"):
        scheduler.set_timesteps(7)
    with pytest.raises(ConfigError, match="holds no schedule"):
        SearchedScheduler().set_timesteps(4)
    with pytest.raises(SpaceError, match="differ in model calls"):
        SearchedScheduler.from_schedules([bundle(VpDiscrete())[0]] * 2)


def test_schedules_of_another_noise_schedule_are_refused(pipeline_of):
    own = pipeline_of("sd").scheduler
    with pytest.raises(SpaceError, match="to be replaced has vp_discrete/scaled_linear"):
        SearchedScheduler.from_schedules(rich(VpDiscrete(), 5), like=own)
    with pytest.raises(ConfigError, match="allowed: flow_prediction, sample"):
        SearchedScheduler.from_schedules(rich(Flow(), 5), prediction_type="epsilon")


def test_config_round_trips(tmp_path, pipeline_of):
    pipeline = pipeline_of("ddpm")
    own = pipeline.scheduler
    scheduler = put(pipeline, bundle(VpDiscrete()), mean=[[[0.1]]] * 3)
    expected = sample(pipeline, "ddpm", 5)
    scheduler.save_pretrained(tmp_path / "scheduler")
    for again in (
        SearchedScheduler.from_pretrained(str(tmp_path / "scheduler")),
        SearchedScheduler.from_config(scheduler.config),
    ):
        assert again.schedules == scheduler.schedules
        assert again.config.mean == scheduler.config.mean
        pipeline.scheduler = again
        assert torch.equal(sample(pipeline, "ddpm", 5), expected)
    assert torch.equal(type(own).from_config(scheduler.config).betas, own.betas)


def test_whole_pipeline_round_trip(tmp_path, pipeline_of):
    from diffusers import DiffusionPipeline

    pipeline = pipeline_of("ddpm")
    put(pipeline, bundle(VpDiscrete()))
    expected = sample(pipeline, "ddpm", 5)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == [
        "searchlab.spaces.solver_schedule.scheduler",
        "SearchedScheduler",
    ]
    again = DiffusionPipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, "ddpm", 5), expected)


def test_json_round_trip_with_validity(tmp_path, pipeline_of):
    pipeline = pipeline_of("sd")
    noise = noise_schedule_of(pipeline.scheduler)
    validity = describe(pipeline.scheduler, guidance_scale=7.5, width=32, height=32)
    scheduler = SearchedScheduler.from_schedules(
        bundle(noise), like=pipeline.scheduler, validity=validity
    )
    path = tmp_path / "s.json"
    scheduler.save_json(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = SearchedScheduler.load_json(path, like=pipeline, width=32, guidance_scale=7.5)
    assert again.schedules == scheduler.schedules
    again.save_json(tmp_path / "t.json")
    assert (tmp_path / "t.json").read_bytes() == path.read_bytes()
    with pytest.warns(SearchlabWarning) as caught:
        SearchedScheduler.load_json(path, like=pipeline, width=64, guidance_scale=5.0)
    assert len(caught) == 1
    assert "width 32 -> 64; guidance_scale 7.5 -> 5.0" in str(caught[0].message)


def test_shift_and_mu_are_part_of_the_validity(pipeline_of):
    from diffusers import FlowMatchEulerDiscreteScheduler

    here = describe(FlowMatchEulerDiscreteScheduler(shift=1.0))
    there = describe(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert validity_differences(there, here) == ["shift 3.0 -> 1.0"]
    pipeline = pipeline_of("flux")
    schedule = ddim(fractional(Flow(), 4), Flow())
    scheduler = put(pipeline, schedule, validity={"mu": 0.9})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sample(pipeline, "flux", 4)
        sample(pipeline, "flux", 4)
    ours = [str(w.message) for w in caught if w.category is SearchlabWarning]
    assert len(ours) == 1
    assert "mu 0.9 -> 0.46" in ours[0]
    assert scheduler.config.use_flow_sigmas


def test_learned_variance_is_left_out():
    noise = VpDiscrete()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(6))
    results = []
    for channels in (3, 6):
        scheduler = SearchedScheduler.from_schedules(ddim(fractional(noise, 4), noise))
        scheduler.set_timesteps(4)
        output = torch.ones(2, channels, 4, 4)
        output[:, 3:] = torch.nan
        results.append(scheduler.step(output, scheduler.timesteps[0], x).prev_sample)
    assert torch.equal(*results)
    with pytest.raises(ConfigError, match=r"shape \(2, 5, 4, 4\); allowed: \(2, 3, 4, 4\)"):
        scheduler.step(torch.ones(2, 5, 4, 4), scheduler.timesteps[1], x)


def test_steps_past_the_end_are_refused():
    scheduler = SearchedScheduler.from_schedules(ddim(fractional(Flow(), 2), Flow()))
    with pytest.raises(ConfigError, match="set_timesteps"):
        scheduler.step(torch.ones(1, 2), 1.0, torch.ones(1, 2))
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        scheduler.step(torch.ones(1, 2), t, torch.ones(1, 2))
    with pytest.raises(ConfigError, match="all 2 steps are done"):
        scheduler.step(torch.ones(1, 2), t, torch.ones(1, 2))
