"""The page on external evaluators, run as it stands, and the command line around it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from searchlab.cli import main
from searchlab.population import OK
from searchlab.records import Records
from searchlab.study import Database

PAGE = Path(__file__).resolve().parents[2] / "docs" / "external.md"


def blocks(language: str) -> list[str]:
    """The code blocks of the page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def command_of(block: str) -> list[str]:
    """The first command of a block, as this interpreter runs it."""
    words = shlex.split(block.replace("\\\n", " ").split("\n")[0], comments=True)
    return [word.replace("python3 ", f"{sys.executable} -S -I ") for word in words]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the page's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "bench.py").write_text(blocks("python")[0])
    return tmp_path


def out_of(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    return capsys.readouterr().out


def test_the_command_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = command_of(blocks("bash")[0])
    assert program == "searchlab"
    at = arguments.index("--budget") + 1
    arguments[at] = "8"
    Path("known.json").write_text(
        json.dumps({"max_num_seqs": 64, "chunked_tokens": 512, "kv_cache_dtype": "auto"})
    )
    text = out_of(capsys, [*arguments, "--baseline", "known.json", "--quiet"])
    assert "evaluations 8, baseline evaluations 1" in text
    assert "baseline known" in text
    assert "failed 0" in text
    names = {path.name for path in Path("runs/command/candidates/3").iterdir()}
    assert names == {"plan.json", "result.json", "stdout.txt", "stderr.txt"}
    for name in ("space.yaml", "known.json"):
        (folder / name).unlink()  # the run keeps what it was opened with
    assert "verified" in out_of(capsys, ["verify", "command"])
    assert "evaluations 10" in out_of(capsys, ["resume", "command", "--budget", "10"])
    shown = json.loads(out_of(capsys, ["show", "command", "--json"]))
    best = shown["plans"]["0"]
    assert not (best["kv_cache_dtype"] == "fp8" and best["max_num_seqs"] > 200)  # gsm8k
    assert out_of(capsys, ["export", "command", "plans"]).split() == ["plans/plan.json"]
    out_of(capsys, ["report", "command"])
    assert "Trade-offs" in Path("runs/command/report.html").read_text()


def test_ask_and_tell_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = command_of(blocks("bash")[1])
    assert program == "searchlab"
    arguments[arguments.index("--budget") + 1] = "5"
    assert "searchlab ask" in out_of(capsys, arguments)
    asked = 0
    for _ in range(5):
        plans = out_of(capsys, ["ask", "queue", "-n", "3"]).splitlines()
        asked += len(plans)
        if not plans:
            break
        lines = [
            {
                "candidate_id": plan["candidate_id"],
                "objectives": {"tokens_per_s": plan["values"]["max_num_seqs"]},
                "constraints": {"gsm8k": 0.9},
            }
            for plan in map(json.loads, plans)
        ]
        Path("results.jsonl").write_text("\n".join(map(json.dumps, reversed(lines))))
        told = out_of(capsys, ["tell", "queue", "results.jsonl"])
        assert f"{len(plans)} results recorded" in told
    assert asked == 5
    assert "finished" in told
    assert Path("runs/queue/report.html").is_file()
    assert "0 results recorded, 2 known" in out_of(capsys, ["tell", "queue", "results.jsonl"])
    assert "verified" in out_of(capsys, ["verify", "queue"])
    assert "finished" in out_of(capsys, ["list"])
    plan = out_of(capsys, ["ask", "queue", "-n", "1", "--budget", "6"])
    assert json.loads(plan)["candidate_id"] == 5
    Path("results.jsonl").write_text('{"candidate_id": 9, "objectives": {}}\n')
    capsys.readouterr()
    assert main(["tell", "queue", "results.jsonl"]) == 2
    assert "candidate 9 was never handed out" in capsys.readouterr().err


SBATCH = """#!/bin/bash
# sbatch --wait --array=0-N SCRIPT: tasks side by side; those that the file `lost` names never begin
for i in $(seq 0 "${2##*-}"); do
  grep -qx "$i" lost || SLURM_ARRAY_TASK_ID=$i bash "$3" &
done
wait
"""


def test_the_array_of_the_page(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scripts as they stand, with an `sbatch` of this test in place of a cluster."""
    programs = folder / "bin"
    programs.mkdir()
    python = f'#!/bin/bash\nexec "{sys.executable}"'
    texts = {
        "sbatch": SBATCH,
        "searchlab": f'{python} -m searchlab "$@"\n',
        "python3": f'{python} "$@"\n',
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    scripts = {
        name: block.replace("-n 64", "-n 6")
        for block in blocks("bash")
        for name in ("round.sh", "one.sh")
        if f"\n# {name}: " in block
    }
    for name, text in scripts.items():
        (folder / name).write_text(text)
    _, *arguments = command_of(blocks("bash")[1])
    arguments[arguments.index("--budget") + 1] = "8"
    out_of(capsys, arguments)

    def records() -> Records:
        with Database(folder / "runs" / "searchlab.db") as base:
            return base.read("queue").records()

    (folder / "lost").write_text("1\n4\n")
    subprocess.run(["bash", "round.sh"], check=True, timeout=300)
    assert sorted(records().ids.tolist()) == [0, 2, 3, 5]
    (folder / "lost").write_text("")
    (folder / "round.sh").write_text(scripts["round.sh"].replace("-n 6", "-n 6 --again"))
    subprocess.run(["bash", "round.sh"], check=True, timeout=300)
    found = records()
    assert {0, 1, 2, 3, 4, 5} <= set(found.ids.tolist())
    assert (found.state == OK).all()
    assert "verified" in out_of(capsys, ["verify", "queue"])


def test_ask_opens_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", "fresh", "--space", "space.yaml", "--objective", "a:min", "-n", "2"]
    assert len(out_of(capsys, arguments).splitlines()) == 2
    assert "no candidate" in out_of(capsys, ["show", "fresh"])


SPACE = ["run", "--space", "space.yaml"]
COMMAND = [*SPACE, "--evaluator", "command", "--command", "x {plan} {out}", "--objective", "a:min"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SPACE, "--evaluator", "server"], ["'server'", "ask, command"]),
        ([*SPACE, "--evaluator"], ["--evaluator"]),
        (["run", "--evaluator=command"], ["--command"]),
        (["run", "--evaluator=ask"], ["--space"]),
        ([*SPACE, "--evaluator", "ask"], ["--objective"]),
        ([*SPACE, "--evaluator", "ask", "--objective", "a"], ["'a'", "NAME:min"]),
        (["run", "--evaluator=ask", "--space", "none.yaml", "--objective", "a:min"], ["'none"]),
        (["run", "--evaluator=ask", "--space", "bench.py", "--objective", "a:min"], ["YAML"]),
        ([*COMMAND, "--constraint", "b>1"], ["'b>1'"]),
        ([*COMMAND, "--fidelity", "full"], ["'full'", "NAME:COST"]),
        ([*COMMAND, "--fidelity", "a:2", "--fidelity", "b:1"], ["cheapest first"]),
        ([*COMMAND, "--timeout", "soon"], ["'soon'", "30min"]),
        ([*COMMAND, "--baseline", "none.json"], ["'none.json'"]),
        ([*COMMAND, "--baseline", "bench.py"], ["'bench.py'", "JSON"]),
        ([*COMMAND, "--screen", "4"], ["--fidelity"]),
        ([*COMMAND[:5], "--command", "x {plan}", "--objective", "a:min"], ["{out}"]),
        (["ask"], ["RUN", "--space"]),
        (["ask", "none"], ["'none'"]),
        (["ask", "none", "-n", "0"], ["-n 0"]),
        (["ask", "none", "--seed", "1"], ["--seed"]),
        (["ask", "none", "--lease", "x"], ["'x'"]),
        (["tell", "none", "none.jsonl"], ["'none.jsonl'"]),
    ],
)
def test_input_that_is_refused(
    folder: Path, arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("searchlab: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not Path("runs").exists()


def test_commands_of_other_runs_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_of(capsys, ["ask", "q", "--space", "space.yaml", "--objective", "a:min", "--budget", "4"])
    capsys.readouterr()
    assert main(["ask", "q", "--budget", "3"]) == 2
    assert "only grow" in capsys.readouterr().err
    assert main([*COMMAND, "--command", "false {plan} {out}", "--budget", "2", "--quiet"]) == 0
    assert main(["ask", "command"]) == 2
    assert "evaluates by itself" in capsys.readouterr().err
