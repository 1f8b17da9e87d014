"""Schedules as files, and what is read off installed diffusers schedulers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from searchlab.errors import ConfigError, DataError, SearchlabWarning, SpaceError
from searchlab.spaces.solver_schedule.grids import time_grid
from searchlab.spaces.solver_schedule.installed import (
    export_sigmas,
    known_solver,
    noise_schedule_of,
    times_of,
)
from searchlab.spaces.solver_schedule.noise_schedule import Edm, Flow, VpDiscrete
from searchlab.spaces.solver_schedule.points import ddim, dpmpp_2m, unipc
from searchlab.spaces.solver_schedule.schedule_file import load_bundle
from searchlab.spaces.solver_schedule.scheduler import SearchedScheduler

pytestmark = pytest.mark.diffusers


def fractional(noise, n):
    """Falling native times that are no whole numbers, down to sigma = 0."""
    return np.append(time_grid(noise, n, noise.start, noise.end + 0.13)[:-1], noise.clean)


def rich(noise, n):
    """Multistep of order 3 with correctors and two prediction types."""
    base = unipc(fractional(noise, n), noise, order=3)
    return replace(
        base, steps=(*base.steps[:2], replace(base.steps[2], prediction="noise"), *base.steps[3:])
    )


def bundle(noise):
    return [ddim(fractional(noise, n), noise) for n in (4, 6)] + [rich(noise, 5)]


def test_edm_equals_the_installed_scheduler():
    from diffusers import EDMEulerScheduler

    own = EDMEulerScheduler()
    noise = noise_schedule_of(own)
    assert noise == Edm(80.0, 0.002)
    mine = SearchedScheduler.from_schedules(ddim(times_of(own, 6), noise), like=own)
    x0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(5))
    results = []
    for scheduler in (own, mine):
        scheduler.set_timesteps(6)
        x = x0 * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            network = torch.tanh(scheduler.scale_model_input(x, t)) * (1 + t)
            x = scheduler.step(network, t, x)[0]
        results.append(x)
        assert torch.allclose(scheduler.timesteps, own.timesteps, rtol=1e-5)
    assert torch.allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_noise_schedules_of_installed_schedulers():
    from diffusers import (
        DDPMScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    own = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    found = noise_schedule_of(own)
    assert found == VpDiscrete("squaredcos_cap_v2", 0.0001, 0.02)
    t = np.arange(1000)
    assert np.allclose(found.alpha(t) ** 2, own.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-9)
    zero = noise_schedule_of(DDPMScheduler(rescale_betas_zero_snr=True))
    assert zero.beta_schedule == "custom"
    assert float(zero.alpha(999.0)) > 0
    continuous = EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
    )
    assert noise_schedule_of(continuous) == Edm(700.0, 0.002)
    assert noise_schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0)) == Flow()
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert noise_schedule_of(flow) == Flow()
    with pytest.raises(ConfigError, match="no scheduler of a pipeline"):
        noise_schedule_of(object())
    with pytest.raises(ConfigError, match="give mu"):
        times_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4)


def test_loading_for_another_model_lists_prediction_type_and_betas(tmp_path):
    from diffusers import DDIMScheduler

    own = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    path = tmp_path / "s.json"
    SearchedScheduler.from_schedules(bundle(noise_schedule_of(own)), like=own).save_json(path)
    other = DDIMScheduler(prediction_type="v_prediction")
    with pytest.warns(SearchlabWarning) as caught:
        SearchedScheduler.load_json(path, like=other)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "prediction_type epsilon -> v_prediction" in text
    assert "scaled_linear" in text
    assert "vp_discrete/linear" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99"),
        ({"format": "other"}, "not a schedule bundle"),
        ({"schedules": {"9": None}}, "not a solver schedule"),
        ({"schedules": {}}, "at least one schedule"),
        ({"prediction_type": 3}, "prediction_type must be a string"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    path = tmp_path / "s.json"
    SearchedScheduler.from_schedules(bundle(VpDiscrete())).save_json(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        SearchedScheduler.load_json(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load_bundle(path)
    with pytest.raises(DataError, match="cannot read"):
        load_bundle(tmp_path / "absent.json")


def test_plain_sigmas_only_where_they_say_everything():
    flow = ddim(fractional(Flow(), 4), Flow())
    assert export_sigmas(flow) == list(flow.times)
    vp = ddim(fractional(VpDiscrete(), 4), VpDiscrete())
    assert np.allclose(export_sigmas(vp), vp.noise.rho(np.array(vp.times)))
    noise_type = replace(flow, steps=tuple(replace(s, prediction="noise") for s in flow.steps))
    assert export_sigmas(noise_type) == list(flow.times)
    assert known_solver(noise_type) == "euler"
    for solver, name in ((dpmpp_2m, "dpmpp_2m"), (unipc, "unipc")):
        schedule = solver(fractional(Flow(), 5), Flow(), lower_order_final=False)
        assert known_solver(schedule) == name
        assert export_sigmas(schedule) == list(schedule.times)
    with pytest.raises(SpaceError, match="step 0 has prediction 'data', order 1, relaxation 'bh2'"):
        export_sigmas(rich(VpDiscrete(), 6))
    with pytest.raises(SpaceError, match="first evaluation is 'zero'"):
        export_sigmas(replace(vp, first_evaluation="zero"))


def test_missing_diffusers_names_the_extra():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import searchlab.spaces.solver_schedule, searchlab.spaces.solver_schedule.installed\n"
        "from searchlab.errors import ConfigError\n"
        "try:\n    import searchlab.spaces.solver_schedule.scheduler\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "searchlab[diffusers]"' in done.stdout
