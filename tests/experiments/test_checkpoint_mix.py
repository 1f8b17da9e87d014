"""The recipe of checkpoint mixing, by the command line and from Python."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from searchlab.cli import main
from searchlab.errors import ConfigError, DataError, SearchlabError
from searchlab.experiments.checkpoint_mix import CheckpointMixOptions, build, parse_bytes
from searchlab.experiments.checkpoint_mix_problems import DIGITS_CHECKPOINTS
from searchlab.experiments.zoo.digits_networks import DigitsDenoiserNet
from searchlab.search import run

TINY = {"budget": 16, "samples": 32, "held_out": 64, "report_banks": 2, "calls": 3}
USER = """
def distance(state, seed):
    return float((state["w"].double() - 3.5).abs().mean()) + 1e-9 * (seed % 97)
"""


def write_user(folder: Path, k: int = 5) -> None:
    (folder / "user_score.py").write_text(USER)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, k + 1):
        (folder / "out").mkdir(exist_ok=True)
        weights = {
            "blocks.0.w": torch.randn(3, generator=generator),
            "w": step / k * torch.ones(80) + 0.01 * torch.randn(80, generator=generator),
        }
        save_file(weights, folder / "out" / f"step_{step}.safetensors")


def test_the_bundled_checkpoints_are_those_of_their_card() -> None:
    card = json.loads((DIGITS_CHECKPOINTS / "card.json").read_text())
    files = sorted(DIGITS_CHECKPOINTS.glob("*.safetensors"))
    assert [path.name for path in files] == sorted(card["checkpoints"])
    assert len(files) >= 12
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert card["parameters"] <= 150_000
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert card["checkpoints"][path.name]["sha256"] == digest


def test_a_users_own_checkpoints_by_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_user(tmp_path)
    paths = [f"out/step_{step}.safetensors" for step in (1, 2, 3, 4, 5)]  # as by an open pattern
    given = ["run", "lcsc", "--checkpoints", *paths, "--evaluator", "user_score:distance"]
    assert main([*given, "--budget", "150", "--name", "one", "--quiet"]) == 0
    assert "5 checkpoints, oldest first; bank memory" in capsys.readouterr().err
    out = tmp_path / "runs" / "one" / "export"
    text = json.loads((out / "coefficients.json").read_text())
    row = np.array([entry["coefficients"][0] for entry in text["checkpoints"]])
    assert abs(row.sum() - 1) < 1e-12
    assert row.min() < 0  # beyond the newest, which is at 1
    own = hashlib.sha256((tmp_path / "out" / "step_1.safetensors").read_bytes()).hexdigest()
    assert text["checkpoints"][0]["sha256"] == {"step_1.safetensors": own}
    merged = load_file(out / "merged.safetensors")
    value = float((merged["w"].double() - 3.5).abs().mean())
    assert value == pytest.approx(text["search"], abs=1e-6)
    assert value < 2.5  # the newest alone: 2.5
    assert "merge_method: linear" in (out / "mergekit.yaml").read_text()
    page = (tmp_path / "runs" / "one" / "report.html").read_text()
    assert "Coefficients over training" in page
    assert main(["verify", "one"]) == 0


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"preset": "paper"},
        {"subspace": 3},
        {"group_depth": 1},
        {"evaluator": "loss"},
        {"guided": True, "budget": 24},
    ],
)
def test_bundled_checkpoints_in_every_way(more: dict[str, Any]) -> None:
    config = build(CheckpointMixOptions(**{**TINY, **more}))
    result = run(config)
    (group,) = result.groups
    assert group.winner is not None
    assert group.winner.report
    assert {"last", "uniform"} <= {c.name for c in group.baselines}


def test_exported_weights_load_strictly_and_score_the_same(tmp_path: Path) -> None:
    from searchlab.experiments.checkpoint_mix_export import export
    from searchlab.experiments.checkpoint_mix_report import sections

    config = build(CheckpointMixOptions(**TINY))
    result = run(config)
    export(config, result, tmp_path, "")
    state = load_file(tmp_path / "merged.safetensors")
    net = DigitsDenoiserNet(width=96)
    net.load_state_dict(state, strict=True)
    winner = result.groups[-1].winner
    assert winner is not None
    score: Any = config.stages[-1].evaluator
    assert score.score.score(state, 0, 0)[0][0] == winner.search
    titles = [section.title for section in sections(config, result)]
    assert titles == ["Coefficients over training", "Checkpoints", "Samples"]
    with pytest.raises(ConfigError, match="gguf"):
        export(config, result, tmp_path, "gguf")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"evaluator": "what"}, "module:function"),
        ({"evaluator": "samples", "checkpoints": (str(DIGITS_CHECKPOINTS),)}, "bundled"),
        ({"evaluator": "command"}, "go together"),
        ({"evaluator": "command", "command": "x {model} {out}"}, "no objective"),
        ({"model": "a:b"}, "model is for"),
        ({"objective": ("x:min",)}, "not for evaluator"),
        ({"memory": "much"}, "memory"),
        ({"budget": -1}, "budget"),
        ({"subspace": 3, "group_depth": 1}, "one of them"),
        ({"report_banks": 1}, "report_banks"),
        ({"samples": 2}, "samples"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_that_cannot_be_are_named(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CheckpointMixOptions(**values)


def test_sizes_as_text() -> None:
    assert parse_bytes("16GiB") == 16 * 2**30
    assert parse_bytes("500MB") == 500_000_000
    assert parse_bytes("4096") == 4096
    assert parse_bytes(None) is None


def test_a_checkpoint_that_is_not_finite_is_named(tmp_path: Path) -> None:
    write_user(tmp_path)
    path = tmp_path / "out" / "step_2.safetensors"
    state = load_file(path)
    state["w"][7] = float("inf")
    save_file(state, path)
    options = CheckpointMixOptions(checkpoints=(str(tmp_path / "out"),), evaluator="math:fsum")
    with pytest.raises(DataError, match=r"step_2.*'w'.*leave this checkpoint out"):
        build(options)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((), "no checkpoint at 'nothing/\\*'"),
        (("--evaluator", "user_score:distance"), "no checkpoint at 'nothing/\\*'"),
        (("--evaluator", "command", "--command", "x", "--objective", "a:min"), "no checkpoint"),
    ],
)
def test_a_path_that_leads_nowhere_is_named_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "lcsc", "--checkpoints", "nothing/*", *given]) == 2
    assert re.search(text, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def wrong() -> None:
    raise RuntimeError("no weights here")


def small() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"evaluator": "no_such_module:f"}, "evaluator 'no_such_module:f'.*cannot import"),
        ({"evaluator": "math:no_such"}, "no function 'no_such'"),
        ({"evaluator": "math:fsum", "model": "math:nothing"}, "model 'math:nothing'"),
        ({"evaluator": "math:fsum", "model": f"{__name__}:wrong"}, "cannot be made.*no weights"),
        ({"evaluator": "math:fsum", "model": f"{__name__}:small"}, "not of the model"),
        ({"evaluator": "command", "command": "true {out}"}, r"does not use \{model\}"),
        ({"evaluator": "command", "command": "true {model} {out} {x}"}, r"placeholder \{x\}"),
        ({"evaluator": "command", "command": "/no/such {model} {out}"}, "'/no/such' is not found"),
        ({"evaluator": "math:fsum", "part": "unet"}, "part 'unet' is in none"),
        ({"evaluator": "math:fsum", "subspace": 5}, "subspace 5; allowed: 0 to 4"),
        ({"evaluator": "math:fsum", "steer": "x"}, "steer 'x'; allowed: value"),
    ],
)
def test_what_is_wrong_is_found_before_the_bank_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], text: str
) -> None:
    from searchlab.spaces.checkpoint_mix.bank import CheckpointBank

    def read(self: object) -> None:
        raise AssertionError("the bank was read")

    monkeypatch.setattr(CheckpointBank, "_load", read)
    monkeypatch.chdir(tmp_path)
    write_user(tmp_path)
    given = {"checkpoints": ("out",), **values}
    if "command" in values:
        given["objective"] = ("loss:min",)
    with pytest.raises(SearchlabError, match=text):
        build(CheckpointMixOptions(**given))


def test_two_checkpoints_are_one_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_user(tmp_path, k=2)
    options = CheckpointMixOptions(
        checkpoints=("out",), evaluator="user_score:distance", budget=30, report_banks=2
    )
    winner = run(build(options)).groups[-1].winner
    assert winner is not None
    assert winner.search < 0.5  # at 3.5 times the newest, which alone is at 2.5
