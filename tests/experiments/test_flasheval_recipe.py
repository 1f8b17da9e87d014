"""The recipe `flasheval`, by the command line, on tables of the release's shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from searchlab.cli import main
from searchlab.errors import ConfigError
from searchlab.experiments.flasheval import FlashEvalOptions
from tests.evaluators.test_flasheval import write_twin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flasheval").mkdir()
    write_twin(tmp_path / "flasheval")
    monkeypatch.setenv("SEARCHLAB_DATA", str(tmp_path))
    return tmp_path


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*arguments, "--quiet"] if arguments[0] == "run" else [*arguments]) == code
    done = capsys.readouterr()
    return done.out + done.err


LEVELS = ["--prompts", "10", "--prompts", "30", "--prompts", "all"]


@pytest.mark.parametrize("algorithm", ["successive_halving", "guided"])
def test_settings_are_searched(
    folder: Path, capsys: pytest.CaptureFixture[str], algorithm: str
) -> None:
    text = out_of(
        capsys, "run", "flasheval", *LEVELS, "--algorithm", algorithm, "--budget", "25",
        "--pilot", "20", "--name", "one",
    )  # fmt: skip
    assert "ImageReward" in text
    page = (folder / "runs/one/report.html").read_text()
    assert "Against the table" in page
    assert "verified" in out_of(capsys, "verify", "one")


def test_all_settings_race_on_blocks_of_prompts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of(capsys, "run", "flasheval", "--prompts", "20", "--algorithm", "paired_race")
    page = (folder / "runs/flasheval/report.html").read_text()
    assert " of 54" in page
    assert "1 of 54" in page
    assert "verified" in out_of(capsys, "verify", "flasheval")


def test_quality_is_traded_off_against_calls(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of(capsys, "run", "flasheval", *LEVELS, "--trade", "--budget", "30")
    assert "cost" in json.dumps(json.loads((folder / "runs/flasheval/result.json").read_text()))
    assert "Against the table" not in (folder / "runs/flasheval/report.html").read_text()


def test_bad_options_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="prompts 'few'; allowed: 1 or more, or all"):
        FlashEvalOptions(prompts=("few",))
    with pytest.raises(ConfigError, match="algorithm 'race'"):
        FlashEvalOptions(algorithm="race")
    with pytest.raises(ConfigError, match="budget -1"):
        FlashEvalOptions(budget=-1)
    text = out_of(capsys, "run", "flasheval", "--data", "none", code=2)
    assert "folder 'none' of FlashEval" in text
    race = ("run", "flasheval", "--algorithm", "paired_race", "--prompts", "60")
    assert "blocks of 60 prompts; allowed: at most 40" in out_of(capsys, *race, code=2)
