"""What runs on the nodes of a Ray cluster: actors that set the evaluators up once and keep them.

Chunks come in by `take` and wait in line; threads evaluate them; one call of `give` at a time takes
finished ones back, as many as there are. So a message may carry many chunks, and nobody waits for a
chunk that is still at work.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.executors._channel import packed, unpacked

if TYPE_CHECKING:
    from searchlab.evaluator import Evaluator
    from searchlab.executors.base import Chunk

__all__ = ["Answer", "Desk", "actor_class"]

GATHER = 0.02  # seconds that finished chunks wait for others while there is enough to do
LONGEST = 0.1  # the same while there is not, at most
SHARE = 0.015  # of how long a chunk takes: a message costs the driver more than a millisecond
MANY = 512  # finished chunks that wait for nobody
LOOK = 0.25  # seconds between looks at the memory


@dataclass(frozen=True)
class Answer:
    """One attempt at a chunk.

    Attributes:
        token: of the attempt.
        evaluations: a pickled pair (evaluations, traceback).
        started, finished: seconds since the epoch.
    """

    token: int
    evaluations: bytes
    started: float
    finished: float


def actor_class() -> type:
    """The class of the actors; its code travels, so that nodes can be told where searchlab is."""

    class SearchlabWorker:
        """Hands everything to a `Desk`, once searchlab could be imported."""

        def __init__(self, paths: list[str], folder: str, variables: dict[str, str]) -> None:
            import os
            import sys

            os.environ.update(variables)  # before libraries that read them are loaded
            self.desk: Any = None
            self.trouble = ""
            sys.path += [p for p in paths if p not in sys.path and os.path.exists(p)]
            if os.path.isdir(folder):
                os.chdir(folder)
            try:
                from searchlab.executors.ray_worker import Desk

                self.desk = Desk()
            except Exception as error:
                self.trouble = f"{type(error).__name__}: {error}"

        def hello(self) -> dict[str, Any]:
            """Where this is."""
            import os
            import socket

            out = {"host": socket.gethostname(), "pid": os.getpid(), "trouble": self.trouble}
            return out if self.desk is None else {**out, **self.desk.describe()}

        def open(self, references: list[Any], threads: int, at_once: int, memory: float) -> Any:
            """Sets the evaluators up."""
            return self.desk.open(references, threads, at_once, memory)

        def take(self, message: bytes) -> None:
            """More chunks."""
            self.desk.take(message)

        def give(self, message: bytes) -> Any:
            """More chunks, then finished ones."""
            if message:
                self.desk.take(message)
            return self.desk.give()

    return SearchlabWorker


class Desk:
    """Chunks that wait, threads that evaluate them, and answers that wait to be taken back."""

    def __init__(self) -> None:
        self._evaluators: tuple[Evaluator, ...] = ()
        self._inbox: deque[tuple[int, Chunk]] = deque()
        self._answers: list[Answer] = []
        self._since = 0.0
        self._mean = 0.0
        self._last_words = ""
        self._change = threading.Condition()

    def describe(self) -> dict[str, Any]:
        """The versions and the node of this process."""
        import ray

        import searchlab

        context = ray.get_runtime_context()
        return {
            "searchlab": searchlab.__version__,
            "node": context.get_node_id(),
            "ip": ray.util.get_node_ip_address(),
        }

    # -- setting up ---------------------------------------------------------------------------

    def open(self, references: list[Any], threads: int, at_once: int, memory: float) -> Any:
        """Sets the evaluators up in the thread that will use them, and starts the others.

        Returns:
            ("ready", device) or ("broken", step, error, text, traceback).
        """
        told: list[Any] = []
        known = threading.Event()

        def first() -> None:
            answer = self._set_up(references, threads)
            told.append(answer)
            known.set()
            if answer[0] == "ready":
                self._work(threads)

        threading.Thread(target=first, name="searchlab-1", daemon=True).start()
        known.wait()
        if told[0][0] == "ready":
            for number in range(1, at_once):
                name = f"searchlab-{number + 1}"
                threading.Thread(target=self._work, args=(threads,), name=name, daemon=True).start()
            if memory:
                threading.Thread(target=self._watch, args=(memory,), daemon=True).start()
        return told[0]

    def _set_up(self, references: list[Any], threads: int) -> tuple[Any, ...]:
        import ray

        step = "load"
        try:
            self._evaluators = ray.get(references[0])
            _set_threads(threads)
            step = "paths"
            for evaluator in self._evaluators:
                _check_paths(evaluator)
            step = "setup"
            for evaluator in self._evaluators:
                evaluator.setup()
            _set_threads(threads)  # torch may have come with it
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            cause = getattr(error, "cause", None)  # Ray wraps what it could not load
            if step == "load" and isinstance(cause, Exception):
                text = " ".join(f"{type(cause).__name__}: {cause}".split())
            return "broken", step, type(error).__name__, text, traceback.format_exc()
        return "ready", _device()

    # -- working ------------------------------------------------------------------------------

    def take(self, message: bytes) -> None:
        """Puts chunks in line."""
        given: Sequence[tuple[int, Chunk]] = unpacked(message)
        with self._change:
            self._inbox.extend(given)
            self._change.notify_all()

    def _work(self, threads: int) -> None:
        _set_threads(threads)
        while True:
            with self._change:
                while not self._inbox:
                    self._change.wait()
                token, chunk = self._inbox.popleft()
            answer = self._evaluate(token, chunk)
            with self._change:
                self._answers.append(answer)
                if len(self._answers) == 1:
                    self._since = time.monotonic()
                took = answer.finished - answer.started
                self._mean += 0.1 * (took - self._mean) if self._mean else took
                self._change.notify_all()

    def _evaluate(self, token: int, chunk: Chunk) -> Answer:
        from searchlab.executors.base import evaluate_chunk, failed_chunk

        evaluator = self._evaluators[chunk.evaluator]
        done = evaluate_chunk(evaluator, chunk)
        try:
            content = packed((done.evaluations, done.traceback))
        except Exception as error:
            reason = f"the answer cannot be sent: {type(error).__name__}: {error}"
            failed = failed_chunk(
                chunk, evaluator, " ".join(reason.split()), worker="", started=0.0, finished=0.0
            )
            content = packed((failed.evaluations, ""))
        return Answer(token, content, done.started, done.finished)

    def give(self) -> tuple[list[Answer], str]:
        """Everything that is finished, at least one chunk, and last words before an end."""
        with self._change:
            while not self._answers and not self._last_words:
                self._change.wait()
            # While there is more to do, nothing is lost by waiting for the next ones too.
            while len(self._answers) < MANY and not self._last_words:
                window = GATHER if self._inbox else min(LONGEST, SHARE * self._mean)
                left = self._since + window - time.monotonic()
                if left <= 0:
                    break
                self._change.wait(left)
            out, self._answers = self._answers, []
            return out, self._last_words

    # -- memory -------------------------------------------------------------------------------

    def _watch(self, limit: float) -> None:
        """Ends this process before its memory becomes the node's trouble."""
        while (used := own_memory()) <= limit:
            time.sleep(LOOK)
        with self._change:
            self._last_words = f"used {used / 1e6:.0f} MB of memory, {limit / 1e6:.0f} MB allowed"
            self._change.notify_all()
        time.sleep(0.5)  # for the last words to arrive
        os._exit(1)


def own_memory() -> int:
    """Bytes of this process that it shares with nobody; 0 where that is not known."""
    with suppress(OSError, ValueError):
        parts = Path("/proc/self/statm").read_text("ascii").split()
        return (int(parts[1]) - int(parts[2])) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _check_paths(evaluator: Evaluator) -> None:
    """Raises FileNotFoundError for a path that the evaluator says it needs."""
    named: Any = getattr(evaluator, "paths", ())
    paths: Sequence[Any] = named() if isinstance(named, Callable) else named  # type: ignore[arg-type]
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"path {str(path)!r} is missing")


def _set_threads(threads: int) -> None:
    with suppress(ImportError):
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)  # of what is loaded already
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _device() -> str:
    """The type of device that this worker computes on."""
    import ray

    if not ray.get_gpu_ids():
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    labels: Any = ray.get_runtime_context().get_node_labels()
    return str(labels.get("ray.io/accelerator-type") or "gpu")
