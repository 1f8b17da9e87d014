"""The executor of worker processes on this machine."""

from __future__ import annotations

import atexit
import os
import queue
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from searchlab import errors
from searchlab.errors import ConfigError, EvaluationError, SearchlabError
from searchlab.evaluator import Evaluator
from searchlab.executors import _worker
from searchlab.executors._channel import packed
from searchlab.executors._given import check_count, evaluator_name
from searchlab.executors._supervisor import Supervisor
from searchlab.executors._tasks import Broken, Retries, Task
from searchlab.executors.base import Chunk, Done, Usage

__all__ = ["ProcessExecutor", "Retries"]

SWITCH = 5e-4  # seconds that the thread of the workers waits for the driver's at most
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_WAYS_OUT = (
    "allowed: a function at the top level of a module that can be imported, such a function "
    "decorated with searchlab.evaluator, or executor 'local'"
)


class ProcessExecutor:
    """Evaluates in worker processes that hold the evaluators.

    A worker that dies (by a signal, by an exit), that takes longer than the deadline or that raises
    gives a result with its reason; the run goes on with a new worker. Workers end with the driver,
    however that ends, and take what they have started with them.

    Args:
        workers: processes; one chunk is evaluated in each at a time.
        deadline: seconds for one attempt at a chunk; None = no limit.
        retries: further attempts per cause; a number stands for deaths and timeouts.
        threads: torch and BLAS threads per worker.
        memory: bytes that a worker with all it has started may use for itself, looked at four times
            a second; beyond them it is replaced, and its chunk begins again. 0 = no limit.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        deadline: float | None = None,
        retries: Retries | int | None = None,
        threads: int = 1,
        memory: int = 0,
    ) -> None:
        if retries is None:
            retries = Retries()
        elif isinstance(retries, int):
            retries = Retries(death=retries, timeout=retries, memory=retries)
        check_count("workers", workers, 1, 1024)
        check_count("threads", threads, 1, 1024)
        check_count("memory", memory, 0, 2**62)
        for cause in ("death", "timeout", "error", "memory"):
            check_count(f"retries ({cause})", getattr(retries, cause), 0, 1000)
        if deadline is not None and not 0 < deadline < float("inf"):
            raise ConfigError(f"deadline {deadline!r}; allowed: seconds above 0")
        self.workers = workers
        self._deadline, self._retries, self._threads = deadline, retries, threads
        self._memory = memory
        self._logs: Path | None = None
        self._supervisor: Supervisor | None = None
        self._open = 0  # submitted and not returned by `wait`
        self._began: float | None = None
        self._closed_usage: Usage | None = None
        self._interval = sys.getswitchinterval()

    def check(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Raises ConfigError naming an evaluator that cannot be sent to a worker."""
        for evaluator in evaluators:
            try:
                packed(evaluator)
            except Exception as error:
                raise ConfigError(
                    f"{evaluator_name(evaluator)} cannot be sent to worker processes "
                    f"({' '.join(str(error).split())}); {_WAYS_OUT}"
                ) from None

    def log_to(self, folder: Path) -> None:
        """Keeps what each worker prints in a file of this folder, from the next `start` on."""
        self._logs = folder

    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Starts the workers and waits until each has set the evaluators up.

        Raises:
            ConfigError: an evaluator that cannot be sent, or a script without a main guard.
            EvaluationError: workers that die at once, or a `setup` that raises something else than
                an error of searchlab.
        """
        if _worker.preparing():
            raise ConfigError(
                "this script starts worker processes whenever it is imported; allowed: start the "
                "search under `if __name__ == '__main__':`"
            )
        self.close()
        self.check(evaluators)
        opening = _worker.Opening(_main_module(), packed(evaluators), self._threads)
        self._began, self._closed_usage, self._open = None, None, 0
        self._supervisor = Supervisor(
            evaluators,
            packed(opening),
            workers=self.workers,
            deadline=self._deadline,
            retries=self._retries,
            environment={**os.environ, **dict.fromkeys(_THREAD_SETTINGS, str(self._threads))},
            memory=self._memory,
            logs=self._logs,
        )
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, SWITCH))  # workers wait for the other thread
        atexit.register(self.close)
        try:
            broken = self._supervisor.opened.get()
            if broken is not None:
                _refuse(broken, evaluators)
        except BaseException:
            self.close()
            raise

    def has_room(self) -> bool:
        """Whether fewer chunks are open than two per worker: one at work, one to go on with."""
        return self._running().open < 2 * self.workers

    def submit(self, chunk: Chunk) -> None:
        """Queues a chunk for the next worker."""
        if self._began is None:
            self._began = time.monotonic()
        self._running().submit(Task(chunk, packed(chunk)))
        self._open += 1

    def wait(self, timeout: float | None = None) -> list[Done]:
        """All chunks finished by now; waits for one if any is open, at most `timeout` seconds."""
        supervisor = self._running()
        out: list[Done] = []
        if self._open:
            supervisor.attend(timeout)
        while self._open:
            try:
                item = supervisor.done.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, BaseException):
                supervisor.done.put(item)  # for every later call
                if out:
                    break
                raise EvaluationError(f"worker processes: {item}") from item
            self._open -= 1
            out.append(item)
        return out

    def withdraw(self) -> list[Chunk]:
        """Takes back what was submitted and no worker has begun, or has to begin again."""
        chunks = [] if self._supervisor is None else self._supervisor.withdraw()
        self._open -= len(chunks)
        return chunks

    def usage(self) -> Usage:
        """How busy the workers were so far."""
        supervisor = self._supervisor
        if supervisor is None:
            return self._closed_usage or Usage(self.workers, 0.0, 0.0)
        now = time.monotonic() if supervisor.open else supervisor.last
        return Usage(
            self.workers,
            supervisor.busy_s,
            0.0 if self._began is None else max(0.0, now - self._began),
            supervisor.deaths,
            supervisor.timeouts,
            supervisor.repeats,
            supervisor.overruns,
        )

    def activity(self) -> dict[str, Any]:
        """What the workers do now, for `show --watch`."""
        return {} if self._supervisor is None else self._supervisor.activity()

    def pids(self) -> list[int]:
        """Process numbers of the workers that run now."""
        return [] if self._supervisor is None else self._supervisor.pids()

    def close(self) -> None:
        """Ends the workers at once; open chunks are dropped."""
        if self._supervisor is None:
            return
        self._supervisor.stop()
        self._closed_usage = self.usage()
        self._supervisor = None
        sys.setswitchinterval(self._interval)
        atexit.unregister(self.close)

    def _running(self) -> Supervisor:
        if self._supervisor is None:
            raise EvaluationError("the executor is not started; allowed: start it first")
        return self._supervisor


def _main_module() -> dict[str, object]:
    """What a worker needs to find the same modules as this process."""
    data: dict[str, object] = {
        "sys_path": [path or os.getcwd() for path in sys.path],
        "sys_argv": sys.argv,
        "dir": os.getcwd(),
    }
    main = sys.modules["__main__"]
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        data["init_main_from_name"] = spec.name
    elif path is not None:
        data["init_main_from_path"] = os.path.abspath(path)
    return data


def _refuse(broken: Broken, evaluators: tuple[Evaluator, ...]) -> NoReturn:
    """Raises what a worker that could not start means."""
    what = f"{broken.error}: {broken.text}" if broken.error else broken.text
    names = ", ".join(evaluator_name(evaluator) for evaluator in evaluators)
    if broken.step == "main":
        raise ConfigError(
            f"worker processes import the main module, which failed ({what}); allowed: a script "
            "that starts its search under `if __name__ == '__main__':`, or executor 'local'"
        )
    if broken.step == "load":
        raise ConfigError(f"{names} cannot be loaded by worker processes ({what}); {_WAYS_OUT}")
    known: object = getattr(errors, broken.error, None)
    if isinstance(known, type) and issubclass(known, SearchlabError):
        raise known(broken.text)
    where = "setup of an evaluator" if broken.step == "setup" else "starting worker processes"
    raise EvaluationError(f"{where} failed: {what}")
