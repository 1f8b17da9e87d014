"""Being asked to stop: what is being evaluated may finish, then the run ends and can be resumed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from searchlab.errors import ConfigError

if TYPE_CHECKING:
    from searchlab.evaluator import Evaluator
    from searchlab.executors.base import Chunk, Done, Executor
    from searchlab.study import Store

__all__ = [
    "GRACE_S",
    "INTERRUPTIONS",
    "Guarded",
    "Interruption",
    "note_interruption",
    "say_on_stderr",
]

GRACE_S = 20.0  # SLURM and Kubernetes kill 30 s after they asked
INTERRUPTIONS = "interruptions"  # the key under which a run keeps what was lost
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_LOOK_S = 0.25  # seconds between looks at whether somebody asked to stop
_KEPT = 50  # interruptions that a run remembers


class Interruption:
    """Listens for Ctrl-C, SIGTERM and SIGUSR1.

    The first signal asks: nothing new begins, and what is being evaluated has `grace` seconds to
    finish. The second one, or the end of the grace, stops at once where that does no harm: while
    evaluations are waited for, else as soon as the loop looks up from what it writes. A third one
    stops wherever it strikes.

    Args:
        grace: seconds; 0 = the first signal stops at once.
        say: hears one line when the first signal comes; None = nobody does.

    Attributes:
        requested: name of the first signal, "" as long as there was none.

    Raises:
        ConfigError: a grace that is no number of seconds.
    """

    def __init__(self, grace: float = GRACE_S, *, say: Callable[[str], None] | None = None) -> None:
        if not 0 <= grace < float("inf"):
            raise ConfigError(f"grace {grace!r}; allowed: seconds, 0 or more")
        self.grace = grace
        self.requested = ""
        self._say = say
        self._count = 0
        self._until = float("inf")
        self._may_raise = False
        self._timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[Interruption]:
        """Has the signals for as long as the block takes; in a thread Python leaves them alone."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield self
        finally:
            self.settle()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def urgent(self) -> bool:
        """Whether even what is being evaluated has no time left."""
        return self._count > 1 or time.monotonic() >= self._until

    def guard(self, executor: Executor) -> Guarded:
        """The executor, so that the loop ends when somebody asked to stop."""
        return Guarded(executor, self)

    @contextmanager
    def breakable(self, *, at_once: bool = False) -> Iterator[None]:
        """A stretch that an urgent signal may break off; `at_once`: any signal."""
        self._may_raise = True
        self._at_once = at_once
        try:
            if self.urgent or (at_once and self.requested):
                raise KeyboardInterrupt
            yield
        finally:
            self._may_raise = False

    _at_once = False

    def settle(self) -> None:
        """Ends the grace: nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count == 1:
            self.requested = signal.Signals(number).name
            self._until = time.monotonic() + self.grace
            main = threading.main_thread().ident
            if self.grace > 0 and main is not None:
                # A signal of our own breaks off what this process itself evaluates.
                self._timer = threading.Timer(self.grace, signal.pthread_kill, (main, number))
                self._timer.daemon = True
                self._timer.start()
            if self._say is not None:
                self._say(
                    f"{self.requested}: what is being evaluated has {self.grace:g} s to finish; "
                    "once more stops at once"
                )
        if (self._may_raise and (self.urgent or self._at_once)) or self._count > 2:
            raise KeyboardInterrupt


class Guarded:
    """An executor whose `wait` and `has_room` end the loop when an interruption was asked for.

    Chunks that no worker has begun are withdrawn then, if the executor has a method `withdraw` (it
    returns them); without it, all that was submitted is waited for within the grace.
    """

    def __init__(self, executor: Executor, interruption: Interruption) -> None:
        self.inner = executor
        self.interruption = interruption
        self._open: dict[int, Chunk] = {}
        self._withdrawn = False
        self.lost: list[int] = []

    @property
    def workers(self) -> int:
        """As the executor has it."""
        return self.inner.workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def start(self, evaluators: tuple[Evaluator, ...]) -> None:
        """Starts the executor; nothing is lost when a signal breaks that off."""
        with self.interruption.breakable(at_once=True):
            self.inner.start(evaluators)

    def has_room(self) -> bool:
        """Whether another chunk may begin; raises KeyboardInterrupt when all is wound up."""
        if not self.interruption.requested:
            return self.inner.has_room()
        self._withdraw()
        if not self._open or self.interruption.urgent:
            self._give_up()
        return False

    def submit(self, chunk: Chunk) -> None:
        """Passes a chunk on."""
        self._open[id(chunk)] = chunk
        self.inner.submit(chunk)

    def wait(self, timeout: float | None = None) -> list[Done]:
        """As the executor's; raises KeyboardInterrupt when the grace is over or all is back."""
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while True:
            if self.interruption.requested:
                self._withdraw()
                if not self._open:
                    self._give_up()
            left = until - time.monotonic()
            try:
                with self.interruption.breakable():
                    done = self.inner.wait(max(0.0, min(_LOOK_S, left)))
            except KeyboardInterrupt:
                self._note_lost()
                raise
            for item in done:
                self._open.pop(id(item.chunk), None)
            if done or not self._open or left <= 0:
                return done

    def close(self) -> None:
        """Closes the executor."""
        self.inner.close()

    def _withdraw(self) -> None:
        if self._withdrawn:
            return
        self._withdrawn = True
        withdraw: Callable[[], list[Chunk]] = getattr(self.inner, "withdraw", list)
        for chunk in withdraw():
            self._open.pop(id(chunk), None)

    def _give_up(self) -> None:
        self._note_lost()
        raise KeyboardInterrupt

    def _note_lost(self) -> None:
        self.interruption.settle()
        self.lost = sorted({i for chunk in self._open.values() for i in chunk.jobs.ids.tolist()})


def note_interruption(executor: Executor, store: Store) -> None:
    """Keeps in the run that it was interrupted, and which jobs were lost with their workers.

    They are no records: a resume evaluates them as if they had never begun.
    """
    if not isinstance(executor, Guarded) or not executor.interruption.requested:
        return
    noted = store.get_meta(INTERRUPTIONS) or []
    entry = {
        "signal": executor.interruption.requested,
        "time": time.time(),
        "grace_s": executor.interruption.grace,
        "lost": executor.lost[:1000],
    }
    store.set_meta(INTERRUPTIONS, [*noted[-_KEPT:], entry])


def say_on_stderr(text: str) -> None:
    """For `Interruption`: a print that a signal may break into, unlike Python's own."""
    with suppress(OSError):
        os.write(2, f"\nsearchlab: {text}\n".encode())
