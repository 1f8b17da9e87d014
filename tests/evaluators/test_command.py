"""The command evaluator: the contract, every way to go wrong, and nothing that outlives a run."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from searchlab.errors import ConfigError, EvaluationError
from searchlab.evaluator import REPORT_REPLICATE, Evaluator, Fidelity, Objective
from searchlab.evaluators._command_process import Commands
from searchlab.evaluators.command import CommandEvaluator
from searchlab.experiments.benchmarks.command import (
    MISBEHAVIOURS,
    OUTPUT_LIMIT,
    candidate,
    evaluator_of,
    processes_with,
)
from searchlab.outcomes import Constraint
from searchlab.population import FAILED, OK, Evaluations
from searchlab.space import Space
from searchlab.testing.evaluator import EvaluatorSuite
from searchlab.variables import Choice, Integer

MARK = "SEARCHLAB_TEST_RUN"
RESULT = '{"objectives": {"speed": 1.5}}'
ROOT = Path(__file__).resolve().parents[2]


def space_of_two() -> Space:
    return Space(a=Choice(("x", "y")), b=Integer(0, 1))


def make(command: str, *, by_shell: bool = True, **more: Any) -> CommandEvaluator:
    more.setdefault("objectives", (Objective("speed", "max"),))
    more.setdefault("timeout_s", 30.0)
    more.setdefault("grace_s", 0.1)
    return CommandEvaluator(space_of_two(), command, by_shell=by_shell, **more)


SHARED = Commands()  # starting one per test would take longer than the tests


def one(evaluator: CommandEvaluator, index: int = 0) -> Evaluations:
    evaluator.setup()
    evaluator._commands = SHARED
    try:
        return evaluator.evaluate(candidate(evaluator.space, index))
    finally:
        evaluator._commands = None


def commands_with(mark: str) -> list[int]:
    """Processes of a test, the shared helper apart."""
    helper = SHARED._supervisor
    return [pid for pid in processes_with(mark) if helper is None or pid != helper.pid]


def reason(evaluations: Evaluations) -> str:
    assert evaluations.reason is not None
    return evaluations.reason[0]


def writing(text: str) -> str:
    """A shell command that writes a result."""
    return f"printf '%s' '{text}' > {{out}} # {{plan}}"


class TestTheSuite(EvaluatorSuite):
    rows = 3

    @pytest.fixture
    def space(self) -> Space:
        return space_of_two()

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        made = make(
            writing('{"objectives": {"speed": 1, "size": 2}}'),
            objectives=(Objective("speed", "max"), Objective("size")),
            fidelities=(Fidelity("short", 0.1), Fidelity("full")),
        )
        made._commands = SHARED
        return made


# -- the contract -------------------------------------------------------------------------------


def test_the_plan_that_goes_out(tmp_path: Path) -> None:
    evaluator = make(f"cat {{plan}} > {tmp_path}/seen; {writing(RESULT)}", folder=tmp_path)
    got = one(evaluator, 3)
    assert got.values.tolist() == [[1.5]]
    seen = json.loads((tmp_path / "seen").read_text())
    values = evaluator.space.decode(candidate(evaluator.space, 3).population)[0]
    assert seen.pop("seed") in range(2**31)
    assert seen == {
        "schema": 1,
        "candidate_id": 3,
        "fidelity": "full",
        "values": values,
        "plan": values,
    }


def test_everything_that_may_come_back() -> None:
    text = json.dumps(
        {
            "objectives": {"speed": 2, "size": 0.5, "other": "ignored"},
            "constraints": {"quality": 0.8},
            "standard_errors": {"speed": 0.1},
            "items": {"speed": [1, 2, 3], "size": [4]},
            "cost": {"gpu_seconds": 12.5},
            "state": "ok",
        }
    )
    evaluator = make(
        writing(text),
        objectives=(Objective("speed", "max"), Objective("size")),
        constraints=(Constraint("quality", 0.9, ">="), Constraint("size", 1.0)),
    )
    got = one(evaluator)
    assert got.values.tolist() == [[2.0, 0.5]]
    assert got.constraints is not None
    assert got.constraints.tolist() == [[0.8, 0.5]]  # an objective can be bounded too
    assert got.std_error is not None
    np.testing.assert_array_equal(got.std_error, [[0.1, np.nan]])
    assert got.items is not None
    assert got.items[0] is not None
    assert got.items[0].tolist() == [1, 2, 3]
    assert got.cost_s is not None
    assert got.cost_s.tolist() == [12.5]


@pytest.mark.parametrize("shell", [False, True])
def test_placeholders_are_single_arguments(tmp_path: Path, shell: bool) -> None:
    folder = tmp_path / "a folder; with 'words' $HOME"
    folder.mkdir()
    script = tmp_path / "show.py"
    script.write_text(
        "import json, sys\n"
        f"json.dump(sys.argv[1:], open({str(tmp_path / 'seen')!r}, 'w'))\n"
        f"open(sys.argv[2], 'w').write({RESULT!r})\n"
    )
    evaluator = make(
        f"{sys.executable} -S -I {script} {{plan}} {{out}} --at={{fidelity}} {{seed}} {{id}} "
        "'{{plan}}'",
        by_shell=shell,
        folder=folder,
        fidelities=(Fidelity("two words; $X"),),
    )
    assert one(evaluator, 7).values.tolist() == [[1.5]]
    seen = json.loads((tmp_path / "seen").read_text())
    where = folder / "candidates" / "7"
    assert seen[:3] == [
        str(where / "plan.json"),
        str(where / "result.json"),
        "--at=two words; $X",
    ]
    assert seen[4:] == ["7", "{plan}"]


def test_without_shell_nothing_is_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluator = make(f"touch {{plan}} {{out}} ; touch {tmp_path}/made", by_shell=False)
    assert "empty" in reason(one(evaluator))
    # They were arguments of touch, all of them.
    assert {";", "touch", "made"} <= {path.name for path in tmp_path.iterdir()}


def test_seeds_are_common_to_all_candidates_and_differ_by_replicate(tmp_path: Path) -> None:
    evaluator = make(f"echo {{seed}} >> {tmp_path}/seeds; {writing(RESULT)}", seed=4)
    jobs = [candidate(evaluator.space, 0), candidate(evaluator.space, 1)]
    evaluator._commands = SHARED
    for job in (*jobs, replace(jobs[0], replicate=REPORT_REPLICATE)):
        evaluator.evaluate(job)
    first, second, report = (tmp_path / "seeds").read_text().split()
    assert first == second != report


def test_the_environment_is_passed_on_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc-secret-abc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    evaluator = make(
        'test "${#SECRET_TOKEN}" = 14 && echo "on $CUDA_VISIBLE_DEVICES" >&2; exit 3 '
        "# {plan} {out}",
        folder=tmp_path,
        devices="2,3",
    )
    assert reason(one(evaluator)) == "exit code 3: on 2,3"
    evaluator.devices = None
    assert reason(one(evaluator)) == "exit code 3: on 7"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"abc-secret-abc" not in path.read_bytes()
    assert "abc-secret-abc" not in json.dumps(dict(evaluator.identity()))


def test_exit_code_75_asks_again(tmp_path: Path) -> None:
    script = (
        f"echo x >> {tmp_path}/tries; test $(wc -l < {tmp_path}/tries) -ge 3 || exit 75; "
        + writing(RESULT)
    )
    assert one(make(script, retries=2)).state == OK
    (tmp_path / "tries").unlink()
    got = one(make(script, retries=1))
    assert got.state == FAILED
    assert "each of 2 attempts" in reason(got)


def test_a_result_of_an_earlier_attempt_does_not_count(tmp_path: Path) -> None:
    assert one(make(writing(RESULT), folder=tmp_path)).state == OK
    got = one(make("true {plan} {out}", by_shell=False, folder=tmp_path))
    assert "no result file" in reason(got)


def test_output_is_kept_with_the_candidate(tmp_path: Path) -> None:
    evaluator = make(
        f"yes abc | head -c 100000; echo end; echo oops >&2; {writing(RESULT)}",
        folder=tmp_path,
        output_limit=1000,
    )
    assert one(evaluator, 2).state == OK
    kept = (tmp_path / "candidates" / "2" / "stdout.txt").read_bytes()
    assert kept.startswith(b"abc\nabc\n")
    assert kept.endswith(b"abc\nend\n")
    assert b"[99004 bytes left out]" in kept
    assert len(kept) < 1100
    assert (tmp_path / "candidates" / "2" / "stderr.txt").read_text() == "oops\n"


def test_an_evaluator_can_be_pickled_after_use() -> None:
    evaluator = make(writing(RESULT))
    evaluator.evaluate(candidate(evaluator.space, 0))
    copy = pickle.loads(pickle.dumps(evaluator))
    evaluator.close()
    assert one(copy).state == OK


# -- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_every_misbehaviour_has_a_state_and_a_reason_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = MISBEHAVIOURS[name]
    mark = f"{os.getpid()} {name}"
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("BYTES", "1000000")
    timeout = 0.15 if case.reason == "deadline" else 30.0
    _, evaluator = evaluator_of(case.script, folder=tmp_path, timeout_s=timeout, grace_s=0.05)
    got = one(evaluator)
    assert got.state == (FAILED if case.reason else OK)
    assert case.reason in reason(got)
    assert bool(reason(got)) == bool(case.reason)
    assert commands_with(mark) == []
    for output in ("stdout.txt", "stderr.txt"):
        size = (tmp_path / "candidates" / "0" / output).stat().st_size
        assert size <= OUTPUT_LIMIT + 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"objectives": {"speed": 1e999}}', "finite"),
        ('{"objectives": {"speed": Infinity}}', "finite"),
        ('{"objectives": {"speed": true}}', "a number"),
        ('{"objectives": {"speed": null}}', "a number"),
        ('{"objectives": [1]}', "an object"),
        ('{"objectives": {"speed": 1}, "constraints": {}}', "'quality' is missing"),
        ('{"objectives": {"speed": 1}, "constraints": {"quality": NaN}}', "finite"),
        ('{"objectives": {"speed": 1, "quality": 1}, "state": "pruned"}', "ok, failed"),
        ('{"objectives": {"speed": 1, "quality": 1}, "cost": {"gpu_seconds": -1}}', "from 0"),
        ('{"objectives": {"speed": 1, "quality": 1}, "items": {"speed": ["a"]}}', "items"),
        (
            '{"objectives": {"speed": 1, "quality": 1}, "standard_errors": {"speed": -1}}',
            "standard error",
        ),
        ("[" * 100_000, "cannot be read"),
        ('{"objectives": {"speed": 1' + "0" * 400 + "}}", "finite"),
        ('{"state": "failed"}', "no reason"),
    ],
)
def test_results_that_do_not_count(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(text)
    evaluator = make(
        f"cp {file} {{out}} # {{plan}}", constraints=(Constraint("quality", 0.5, ">="),)
    )
    got = one(evaluator)
    assert got.state == FAILED
    assert words in reason(got)
    assert len(reason(got)) < 600


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(EvaluationError, match="'no-such-program' is not found"):
        make("no-such-program {plan} {out}", by_shell=False).setup()
    evaluator = make("no-such-program {plan} {out}", by_shell=False)
    got = evaluator.evaluate(candidate(evaluator.space, 0))
    assert "cannot be started: No such file" in reason(got)
    evaluator.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"command": "x {out}"}, "{plan}"),
        ({"command": "x {plan}"}, "{out}"),
        ({"command": "x {plan} {out} {paln}"}, "{paln}"),
        ({"command": "x {plan} {out} 'open", "by_shell": False}, "split"),
        ({"command": "x {plan} {out} \0"}, "NUL"),
        ({"command": "x {plan} {out}", "objectives": ()}, "objectives"),
        ({"command": "x {plan} {out}", "timeout_s": 0}, "timeout_s 0"),
        ({"command": "x {plan} {out}", "retries": -1}, "retries -1"),
        ({"command": "x {plan} {out}", "fidelities": ()}, "fidelities"),
        (
            {"command": "x {plan} {out}", "objectives": (Objective("a"), Objective("a"))},
            "'a' is given twice",
        ),
    ],
)
def test_settings_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**arguments)
    assert words in str(error.value)


# -- nothing outlives its driver ----------------------------------------------------------------


def test_an_interrupt_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"{os.getpid()} interrupt"
    monkeypatch.setenv(MARK, mark)
    evaluator = make(f"trap '' TERM; touch {tmp_path}/up; sleep 60; sleep 60 # {{plan}} {{out}}")

    def interrupt(*args: object) -> None:
        if (tmp_path / "up").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluator.evaluate(candidate(evaluator.space, 0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert processes_with(mark) == []


def test_a_killed_driver_leaves_nothing(tmp_path: Path) -> None:
    mark = f"{os.getpid()} killed driver"
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from searchlab.experiments.benchmarks.command import candidate, evaluator_of\n"
        "from pathlib import Path\n"
        'script = "setsid sh -c \'trap \\"\\" TERM; sleep 60; sleep 60\' & touch $OUT.up; wait"\n'
        "space, evaluator = evaluator_of(script, folder=Path(sys.argv[1]), timeout_s=60)\n"
        "evaluator.evaluate(candidate(space, 0))\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(ROOT)], env={**os.environ, MARK: mark}
    )
    until = time.monotonic() + 60
    while not (tmp_path / "candidates" / "0" / "result.json.up").exists():
        assert time.monotonic() < until
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    until = time.monotonic() + 20
    while left := processes_with(mark):
        assert time.monotonic() < until, left
        time.sleep(0.01)
