"""Commands that misbehave in every known way, and what running a command costs.

    python -m searchlab.experiments.benchmarks.command [--quick] [--check] [--out FILE]

Every run of a misbehaving command must end in a state with a reason, and no process of it may be
left. The overhead is the time of an evaluation beyond starting the same command directly.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from searchlab.evaluator import Objective
from searchlab.evaluators.command import CommandEvaluator
from searchlab.experiments.benchmarks._common import Aim, Journal, flags, spread
from searchlab.population import FAILED, OK, Jobs
from searchlab.space import Space
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer

__all__ = ["MISBEHAVIOURS", "Misbehaviour", "candidate", "evaluator_of", "main", "processes_with"]

MARK = "SEARCHLAB_BENCHMARK_RUN"
OVERHEAD_S = 0.05
OUTPUT_LIMIT = 2**16
RESULT = '{"objectives": {"speed": 1.5}}'


@dataclass(frozen=True)
class Misbehaviour:
    """A shell script that goes wrong, and what must be said about it.

    Attributes:
        script: run by /bin/sh, with `$PLAN` and `$OUT`.
        reason: part of the reason; empty = the candidate is fine, what is left over must not be.
    """

    script: str
    reason: str


# A line of $OUT stands for {out}. Scripts that hang are ended at the deadline.
MISBEHAVIOURS: Mapping[str, Misbehaviour] = {
    "crashes": Misbehaviour("echo 'out of memory' >&2; exit 3", "exit code 3: out of memory"),
    "is killed": Misbehaviour("kill -KILL $$", "signal 9"),
    "aborts": Misbehaviour("kill -ABRT $$", "signal 6"),
    "writes nothing": Misbehaviour("exit 0", "no result file"),
    "hangs": Misbehaviour("sleep 600", "deadline"),
    "ignores SIGTERM": Misbehaviour("trap '' TERM; while :; do sleep 600; done", "deadline"),
    "hangs after its result": Misbehaviour(f"echo '{RESULT}' > $OUT; sleep 600", "deadline"),
    "stops itself": Misbehaviour("kill -STOP $$", "deadline"),
    "leaves a child": Misbehaviour(f"sleep 600 & echo '{RESULT}' > $OUT", ""),
    "leaves a deaf child": Misbehaviour(
        f"(trap '' TERM; while :; do sleep 600; done) & echo '{RESULT}' > $OUT", ""
    ),
    "leaves a child in its own session": Misbehaviour(
        f"setsid sh -c \"trap '' TERM HUP; while :; do sleep 600; done\" & echo '{RESULT}' > $OUT",
        "",
    ),
    "forks twice and crashes": Misbehaviour("(setsid sleep 600 &) & exit 4", "exit code 4"),
    "forks many and hangs": Misbehaviour(
        "for i in 1 2 3 4 5 6 7 8; do (trap '' TERM; sleep 600) & done; wait", "deadline"
    ),
    "prints a lot": Misbehaviour("yes x | head -c $BYTES; exit 5", "exit code 5"),
    "prints for ever": Misbehaviour("yes x", "deadline"),
    "prints a lot without a line's end": Misbehaviour(
        "head -c $BYTES /dev/zero >&2; exit 6", "exit code 6"
    ),
    "writes half a file": Misbehaviour(
        """printf '{"objectives": {"speed": 1.' > $OUT""", "not whole JSON"
    ),
    "writes an empty file": Misbehaviour(": > $OUT", "is empty"),
    "writes no JSON": Misbehaviour("echo speed=1.5 > $OUT", "not whole JSON"),
    "writes other bytes": Misbehaviour(r"printf '\377\376\000' > $OUT", "not UTF-8"),
    "writes a list": Misbehaviour("echo '[1.5]' > $OUT", "is a list"),
    "writes NaN": Misbehaviour("""echo '{"objectives": {"speed": NaN}}' > $OUT""", "NaN"),
    "writes a text": Misbehaviour("""echo '{"objectives": {"speed": "1"}}' > $OUT""", "a number"),
    "forgets the objective": Misbehaviour("""echo '{"objectives": {}}' > $OUT""", "missing"),
    "writes unknown keys": Misbehaviour(f"echo '{RESULT[:-1]}, \"sped\": 2}}' > $OUT", "'sped'"),
    "says it failed": Misbehaviour(
        """echo '{"state": "failed", "reason": "no device"}' > $OUT""", "no device"
    ),
    "makes a folder of the result": Misbehaviour("mkdir $OUT", "not an ordinary file"),
    "makes a pipe of the result": Misbehaviour("mkfifo $OUT", "not an ordinary file"),
    "never stops trying": Misbehaviour("exit 75", "each of 3 attempts"),
    "fails beside a result": Misbehaviour(f"echo '{RESULT}' > $OUT; exit 7", "exit code 7"),
    "kills its supervisor": Misbehaviour("kill -KILL $PPID; sleep 600", "supervisor was killed"),
    "closes its output and hangs": Misbehaviour("exec >&- 2>&-; sleep 600", "deadline"),
}


def evaluator_of(
    script: str, *, folder: Path | None, timeout_s: float = 0.5, grace_s: float = 0.1
) -> tuple[Space, CommandEvaluator]:
    """A space of 4 candidates and the evaluator that runs a script."""
    space = Space(a=Choice(("x", "y")), b=Integer(0, 1))
    return space, CommandEvaluator(
        space,
        f"PLAN={{plan}}; OUT={{out}}; {script}",
        (Objective("speed", "max"),),
        by_shell=True,
        timeout_s=timeout_s,
        grace_s=grace_s,
        output_limit=OUTPUT_LIMIT,
        folder=folder,
    )


def candidate(space: Space, index: int) -> Jobs:
    """One job."""
    population = space.sample(uniforms(0, 0, index, 1, space.sample_width))
    return Jobs(np.array([index]), population, space.keys(population), fidelity=0)


def processes_with(mark: str) -> list[int]:
    """Processes other than this one that have a text in their environment (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _misbehave(journal: Journal, runs: int, size: int) -> None:
    mark = secrets.token_hex(8)
    os.environ[MARK], os.environ["BYTES"] = mark, str(size)
    wrong, states, left = [], Counter[str](), set[int]()
    largest, index, seconds = 0, 0, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        names = list(MISBEHAVIOURS)
        for index in range(runs):
            name = names[index % len(names)]
            case = MISBEHAVIOURS[name]
            slow = 120.0 if "$BYTES" in case.script else 0.5
            space, evaluator = evaluator_of(case.script, folder=Path(temporary), timeout_s=slow)
            started = time.perf_counter()
            got = evaluator.evaluate(candidate(space, index))
            seconds = max(seconds, time.perf_counter() - started) if slow < 1 else seconds
            evaluator.close()
            left |= set(processes_with(mark))
            assert got.state is not None
            assert got.reason is not None
            state, reason = int(got.state[0]), got.reason[0]
            states["ok" if state == OK else "failed"] += 1
            expected = OK if not case.reason else FAILED
            if state != expected or case.reason not in reason or bool(reason) != bool(case.reason):
                wrong.append(f"{name}: {state} {reason!r}")
            folder = Path(temporary) / "candidates" / str(index)
            largest = max(
                largest,
                *((folder / f).stat().st_size for f in ("stdout.txt", "stderr.txt")),
            )
    for text in wrong:
        print(f"wrong: {text}", file=sys.stderr)
    journal.case(
        "misbehaving commands",
        {
            "runs": runs,
            "kinds": len(MISBEHAVIOURS),
            "states": dict(states),
            "printed_bytes": size,
            "largest_output_file": largest,
            "longest_s": round(seconds, 2),
        },
        aims=[
            Aim("runs without the right state and reason", len(wrong), "at most", 0),
            Aim("processes left", len(left), "at most", 0),
            Aim("largest output file, bytes", largest, "at most", OUTPUT_LIMIT + 64),
        ],
    )


def _overhead(journal: Journal, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        space, evaluator = evaluator_of(
            f"echo '{RESULT}' > $OUT", folder=Path(temporary), timeout_s=60.0
        )
        direct = ["/bin/sh", "-c", f"PLAN=x; OUT={temporary}/direct; echo '{RESULT}' > $OUT"]
        evaluator.evaluate(candidate(space, 0))  # starts the supervisor
        alone, whole = [], []
        for index in range(1, repeats + 1):
            started = time.perf_counter()
            subprocess.run(direct, check=True)
            between = time.perf_counter()
            got = evaluator.evaluate(candidate(space, index))
            whole.append(time.perf_counter() - between)
            alone.append(between - started)
            assert got.state is not None
            if got.state[0] != OK:
                raise RuntimeError(f"the command failed: {got.reason}")
        evaluator.close()
    more = [b - a for a, b in zip(alone, whole, strict=True)]
    figures = spread(more)
    journal.case(
        "overhead beyond the process start, seconds",
        {"repeats": repeats, "process_s": float(np.median(alone)), **figures},
        aims=[Aim("median overhead, s", figures["median"], "at most", OVERHEAD_S)],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements; returns the exit status."""
    options = flags(__doc__, arguments)
    journal = Journal("command", options)
    quick = options.quick
    _overhead(journal, 10 if quick else 50)
    _misbehave(journal, len(MISBEHAVIOURS) if quick else 200, 10**7 if quick else 10**9)
    return journal.close()


if __name__ == "__main__":
    sys.exit(main())
