"""Loading pipelines, prompts and metrics: what is refused, and how it is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from searchlab.errors import ConfigError, DataError
from searchlab.evaluators.pipeline_loading import denoisers_of, load_pipeline, pipeline_digest
from searchlab.evaluators.pipeline_metric import checked_metric, load_metric
from searchlab.evaluators.pipeline_options import (
    PipelineOptions,
    build_pipeline_evaluator,
    parse_size,
    read_prompts,
)
from searchlab.spaces.solver_schedule.grids import time_grid
from searchlab.spaces.solver_schedule.installed import noise_schedule_of
from searchlab.spaces.solver_schedule.points import dpmpp_2m
from searchlab.spaces.solver_schedule.scheduler import SearchedScheduler
from searchlab.testing.tiny_pipelines import tiny_ddpm

pytestmark = pytest.mark.diffusers


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\n\n  dog  \nred dog\n", encoding="utf-8")
    return path


def test_metrics_by_name(tmp_path, monkeypatch):
    (tmp_path / "mine_metric.py").write_text("def size(images, prompts):\n    return [1.0, 2.0]\n")
    monkeypatch.chdir(tmp_path)
    metric = load_metric("mine_metric:size")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert checked_metric(metric, images, ["", ""]).tolist() == [1.0, 2.0]
    assert str(tmp_path) not in sys.path
    for name, message in (
        ("mine_metric", "allowed: module:function"),
        ("mine_metric:other", "has no function 'other'; it has: size"),
        ("no_such_module_here:f", "cannot import 'no_such_module_here'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_metric(name)


@pytest.mark.parametrize(
    ("size", "expected"), [("512", (512, 512)), ("1024x768", (1024, 768)), (None, (None, None))]
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


def test_bad_options_are_named_before_anything_is_loaded(tmp_path, prompts_file):
    absent = str(tmp_path / "nowhere")
    for options, error, message in (
        ({"size": "0x4"}, ConfigError, "size '0x4'"),
        ({"dtype": "int4"}, ConfigError, "unknown dtype 'int4'; allowed: fp32, bf16, fp16"),
        ({"prompts": tmp_path / "none.txt"}, DataError, "cannot read prompts"),
        ({"metric": "x"}, ConfigError, "metric 'x'"),
        ({"reference_steps": 1}, ConfigError, "reference_steps is 1; allowed: 4 or more"),
        ({"path": "fast"}, ConfigError, "path 'fast'"),
        ({"device": "toaster"}, ConfigError, "unknown device 'toaster'"),
        ({}, DataError, "no such directory"),
    ):
        with pytest.raises(error, match=message):
            build_pipeline_evaluator(
                PipelineOptions(absent, **{"prompts": prompts_file, **options})
            )
    with pytest.raises(ConfigError, match="metric_direction 'up'"):
        PipelineOptions(absent, metric_direction="up")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="has no prompt"):
        read_prompts(empty)


def test_directories_that_are_no_pipeline(tmp_path):
    with pytest.raises(DataError, match=r"has no model_index\.json"):
        load_pipeline(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text("[]")
    with pytest.raises(DataError, match="names no _class_name"):
        load_pipeline(tmp_path)
    index.write_text(json.dumps({"_class_name": "NoSuchPipeline"}))
    with pytest.raises(DataError, match="is a 'NoSuchPipeline', which diffusers"):
        load_pipeline(tmp_path)
    tiny_ddpm().save_pretrained(tmp_path / "whole")
    index.write_text((tmp_path / "whole" / "model_index.json").read_text())
    with pytest.raises(DataError, match="cannot load pipeline") as caught:
        load_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tmp_path):
    tiny_ddpm().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(DataError, match="safetensors"):
        load_pipeline(tmp_path)


def test_a_pipeline_saved_with_a_searched_scheduler_loads(tmp_path):
    pipeline = tiny_ddpm()
    noise = noise_schedule_of(pipeline.scheduler)
    schedule = dpmpp_2m(time_grid(noise, 6, 999.0, 0.0), noise)
    pipeline.scheduler = SearchedScheduler.from_schedules(schedule, like=pipeline.scheduler)
    pipeline.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, dtype="bf16")
    assert again.unet.dtype == torch.bfloat16
    assert again.scheduler.schedules == {schedule.nfe: schedule}
    assert noise_schedule_of(again.scheduler) == noise


def test_digest_tells_weights_apart():
    first, second = tiny_ddpm(), tiny_ddpm()
    assert pipeline_digest(first) == pipeline_digest(second)
    with torch.no_grad():
        next(iter(denoisers_of(second)[0].parameters())).view(-1)[0] += 1e-3
    assert pipeline_digest(first) != pipeline_digest(second)


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to a request for the headers of a file."""

    def do_HEAD(self):
        if "slow" in self.path:
            time.sleep(20)
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        if "plain" in self.path:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    def log_message(self, *_):
        pass


_ASK = """
import json, sys, time, torch
from searchlab.errors import DataError
from searchlab.evaluators.pipeline_loading import load_pipeline
out = {}
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        load_pipeline(name)
    except DataError as error:
        out[name] = [str(error), time.monotonic() - began]
print(json.dumps(out))
"""


def _ask(names, tmp_path, **environment):
    done = subprocess.run(
        [sys.executable, "-c", _ASK, *names],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path), **environment},
    )
    return json.loads(done.stdout)


def test_gated_absent_and_silent_repositories_are_named_within_five_seconds(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ["some/gated-model", "some/absent-model", "some/plain-repo", "some/slow-hub"]
    try:
        found = _ask(names, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    expected = ("is gated: accept its licence", "no pipeline", "no model_index.json", "not in the")
    for name, part in zip(names, expected, strict=True):
        message, seconds = found[name]
        assert part in message
        assert repr(name) in message
        assert "\n" not in message
        assert seconds < 5.5
    offline = _ask(names[:1], tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline[names[0]][0]
