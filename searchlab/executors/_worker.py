"""What a worker process runs: it sets the evaluators up once and then evaluates chunks.

Three messages come in: the opening (`Opening`), chunks, and an empty message that ends the worker.
Every answer is a tuple whose first part names it: "ready", "broken", "done".
"""

from __future__ import annotations

import io
import multiprocessing.spawn
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from searchlab.executors._channel import TICKET, WorkerEnd, packed, unpacked
from searchlab.executors._ring import NOTHING, Claims

if TYPE_CHECKING:
    from searchlab.evaluator import Evaluator
    from searchlab.executors.base import Chunk, Done

__all__ = ["Opening", "main", "preparing", "worker_name"]

_preparing = False


@dataclass(frozen=True)
class Opening:
    """The first message to a worker.

    Attributes:
        main: how the driver's main module is found (`multiprocessing.spawn.prepare`).
        evaluators: a pickled tuple of evaluators.
        threads: of torch.
    """

    main: dict[str, Any]
    evaluators: bytes
    threads: int


def worker_name(number: int) -> str:
    """What results and logs call a worker."""
    return f"worker {number}"


def preparing() -> bool:
    """Whether this process is a worker that imports the driver's main module just now."""
    return _preparing


def main() -> None:
    """Runs a worker; argv is (_, its socket, the pipe that closes when the driver ends, the file of
    the tasks that wait, its own number, "log" where stderr is a log that may have tracebacks)."""
    _outlive_signals()
    end = WorkerEnd(socket.socket(fileno=int(sys.argv[2])))
    _end_with(int(sys.argv[3]))
    waiting, number, logs = int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "log"
    if logs and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a worker that is killed flushes nothing
    try:
        opening: Opening = unpacked(end.receive())
        evaluators = _open(opening, end)
        if evaluators is None:
            return
        claims = Claims(waiting, number)
        end.send(packed(("ready",)))
        message = end.receive()
        while message:
            answer = _answer(evaluators, unpacked(message), worker_name(number), logs=logs)
            ticket, message = claims.take()
            end.send(TICKET.pack(ticket) + answer)
            if ticket == NOTHING:
                message = end.receive()
    except (EOFError, ConnectionError):
        return  # the driver is gone


def _outlive_signals() -> None:
    """Leaves signals that are meant for the whole job to the driver, which ends the workers.

    Schedulers send them to every process of a job. A handler is not inherited by programs that an
    evaluator starts; a fork of this process ends by them as any other.
    """
    own = os.getpid()

    def hear(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hear)


def _end_with(pipe: int) -> None:
    """Ends this process and what it started as soon as the driver's end of a pipe is closed.

    The kernel does it where it can, as a call into compiled code may keep Python from running for
    long; a thread does it elsewhere.
    """
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)

    def watch() -> None:
        with suppress(OSError):
            os.read(pipe, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="searchlab-driver-watch", daemon=True).start()


def _open(opening: Opening, end: WorkerEnd) -> tuple[Evaluator, ...] | None:
    """The evaluators, set up; None after the driver was told why there are none."""
    global _preparing
    step = "main"
    try:
        _preparing = True
        multiprocessing.spawn.prepare(opening.main)
        _preparing = False
        step = "load"
        evaluators: tuple[Evaluator, ...] = unpacked(opening.evaluators)
        _set_threads(opening.threads)
        step = "setup"
        for evaluator in evaluators:
            evaluator.setup()
        _set_threads(opening.threads)  # torch may have come with it
    except (Exception, SystemExit) as error:
        text = traceback.format_exc()
        end.send(packed(("broken", step, type(error).__name__, _line(error), text)))
        return None
    return evaluators


def _set_threads(threads: int) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _answer(evaluators: tuple[Evaluator, ...], chunk: Chunk, name: str, *, logs: bool) -> bytes:
    from searchlab.executors.base import evaluate_chunk, failed_chunk

    evaluator = evaluators[chunk.evaluator]
    done = evaluate_chunk(evaluator, chunk, worker=name)
    if logs and done.traceback:
        print(f"job {int(chunk.jobs.ids[0])}\n{done.traceback}", file=sys.stderr, flush=True)
    try:
        return _message(done)
    except Exception as error:
        reason = f"the answer cannot be sent: {type(error).__name__}: {_line(error)}"
        failed = failed_chunk(
            chunk, evaluator, reason, worker=name, started=done.started, finished=done.finished
        )
        return _message(failed)


def _message(done: Done) -> bytes:
    parts = (done.evaluations, done.started, done.finished, done.traceback)
    return packed(("done", *parts))
