"""What keeps worker processes alive, fed and within their deadlines: the driver and a thread."""

from __future__ import annotations

import json
import math
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchlab.evaluator import Evaluator
from searchlab.executors._channel import TICKET, DriverEnd, unpacked
from searchlab.executors._ring import NOTHING, Waiting
from searchlab.executors._tasks import Broken, Retries, Task
from searchlab.executors._watch import log_name, open_log, own_bytes, shorten_log
from searchlab.executors._worker import worker_name
from searchlab.executors.base import Chunk, Done, failed_chunk

__all__ = ["Supervisor"]

LOG_TICK = 10.0  # seconds between looks at how large the logs are
TICK = 0.25  # seconds between looks at workers whose death their children hide
RELIEF = 0.01  # seconds between looks of the thread at whether the driver is away
AWAY = 0.003  # seconds after which the thread feeds the workers in the driver's place
STARTS = 5  # when every worker failed to start so often in a row, the run ends
FIRST_STARTS = 3  # the same when the run begins
PAUSE = 0.1  # seconds before a worker is started again after it failed to, doubled each time
GRACE = 1.0  # seconds that idle workers have to end by themselves
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from searchlab.executors._worker import main; main()"
)


@dataclass(eq=False)
class _Worker:
    """One place for a worker process; the process in it may change."""

    number: int
    process: subprocess.Popen[bytes] | None = None
    end: DriverEnd | None = None
    pipe: int = -1
    ready: bool = False
    task: Task | None = None
    until: float = math.inf
    late: bool = False
    used: int = 0  # bytes when they were too many
    broken: Broken | None = None
    starts: int = 0  # in a row that came to nothing
    resume_at: float = 0.0

    @property
    def name(self) -> str:
        return worker_name(self.number)


class Supervisor:
    """Owns the workers.

    While the driver waits for results it hears and feeds the workers itself: no other thread has to
    be woken between an answer and the worker's next task. A thread does the same while the driver
    is away for longer (it learns, writes, or runs callbacks), and alone looks after processes.
    Who holds `_turn` may touch the workers.

    Attributes:
        done: finished chunks, or the exception that ended the thread.
        opened: one item when the workers are ready: None, or why they are not.
        busy_s, deaths, timeouts, repeats, overruns: see `Usage`.
        open: chunks that have not come back.
        last: when the last result came (monotonic seconds).
    """

    def __init__(
        self,
        evaluators: tuple[Evaluator, ...],
        opening: bytes,
        *,
        workers: int,
        deadline: float | None,
        retries: Retries,
        environment: Mapping[str, str],
        memory: int = 0,
        logs: Path | None = None,
    ) -> None:
        self.done: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()
        self.opened: queue.SimpleQueue[Broken | None] = queue.SimpleQueue()
        self.busy_s = 0.0
        self.deaths = self.timeouts = self.repeats = self.overruns = self.open = 0
        self.last = 0.0
        self._evaluators = evaluators
        self._opening = opening
        self._deadline = math.inf if deadline is None else deadline
        self._allowed = {
            "death": retries.death,
            "timeout": retries.timeout,
            "error": retries.error,
            "memory": retries.memory,
        }
        self._memory = memory
        self._logs = logs
        self._shorten_at = 0.0
        self._environment = dict(environment)
        self._workers = [_Worker(number) for number in range(workers)]
        self._tasks = Waiting(2 * workers)
        self._lock = threading.Lock()
        self._look_at = 0.0
        self._ended = False  # a worker has closed its end
        self._turn = threading.Lock()
        self._waiting = False  # the driver wants the turn or has it
        self._left_at = -math.inf
        self._look_wanted = False
        self._call, self._looked = threading.Event(), threading.Event()
        self._stopping = False
        self._announced = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_out.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._wake_in.fileno(), select.POLLIN)
        self._by_number: dict[int, _Worker] = {}
        self._thread = threading.Thread(target=self._main, name="searchlab-supervisor", daemon=True)
        self._thread.start()

    # -- called by the driver ---------------------------------------------------------------

    def submit(self, task: Task) -> None:
        """Queues a task, or gives it to a worker that has none; never blocks."""
        with self._lock:
            self.open += 1
        self._tasks.add(task)
        if self._turn.acquire(blocking=False):
            try:
                self._assign()
            finally:
                self._turn.release()
        else:
            self._wake()

    def attend(self, timeout: float | None) -> None:
        """Serves the workers until something is `done`, at most so many seconds."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        self._waiting = True
        try:
            while not self._stopping:
                if self._turn.locked():
                    self._wake()  # the thread stands in, and makes room now
                with self._turn:
                    if self._attend(until):
                        return
                self._have_looked()
        finally:
            self._left_at = time.monotonic()
            self._waiting = False

    def _attend(self, until: float) -> bool:
        """False as soon as somebody should look after the processes."""
        while True:
            self._assign()
            empty = self.done.empty()
            self._listen(until if empty else 0.0)
            if not self.done.empty() or time.monotonic() >= until or self._stopping:
                return True
            if self._look_is_due():
                return False

    def _have_looked(self) -> None:
        """Lets the thread look after the processes: a signal must not break that off."""
        self._looked.clear()
        self._look_wanted = True
        self._call.set()
        while self._look_wanted and self._thread.is_alive():
            self._looked.wait(TICK)

    def withdraw(self) -> list[Chunk]:
        """Takes back the tasks that no worker has."""
        chunks = [task.chunk for task in self._tasks.withdraw()]
        with self._lock:
            self.open -= len(chunks)
        return chunks

    def stop(self) -> None:
        """Ends all workers, whatever they are doing; returns when they are gone."""
        self._stopping = True
        self._call.set()
        if self._thread.is_alive():
            self._wake()
            self._thread.join()

    def activity(self) -> dict[str, Any]:
        """How many chunks wait, and what each worker does; may be a moment old."""
        rows: list[dict[str, Any]] = []
        for worker in self._workers:
            task = worker.task
            rows.append(
                {
                    "worker": worker.name,
                    "state": "evaluates" if task else "idle" if worker.ready else "starts",
                    "job": None if task is None else int(task.chunk.jobs.ids[0]),
                    "since": None if task is None else task.begun,
                }
            )
        return {"queued": len(self._tasks), "workers": rows}

    def pids(self) -> list[int]:
        """Process numbers of the workers that run now."""
        processes = [worker.process for worker in self._workers]  # they change meanwhile
        return [process.pid for process in processes if process is not None]

    def _wake(self) -> None:
        with suppress(OSError):  # full = awake anyway
            self._wake_out.send(b"x")

    # -- the thread -------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            with self._turn:
                for worker in self._workers:
                    self._start(worker)
            while not self._stopping:
                self._call.clear()
                away = not self._waiting and time.monotonic() - self._left_at >= AWAY
                if self._look_wanted or away:
                    with self._turn:
                        self._stand_in()
                else:
                    self._call.wait(RELIEF)
        except BaseException as error:
            self.opened.put(Broken("boot", type(error).__name__, str(error)))
            self.done.put(error)
            self._stopping = True
        finally:
            self._look_wanted = False
            self._looked.set()
            self._end_all()
            self._tasks.close()
            self._wake_in.close()
            self._wake_out.close()

    def _stand_in(self) -> None:
        """Serves the workers until the driver comes back."""
        if self._look_wanted or self._look_is_due():
            self._look_after()
            self._look_wanted = False
            self._looked.set()
        while not (self._stopping or self._waiting):
            self._assign()
            self._listen(math.inf)
            if self._look_is_due():
                self._look_after()

    def _look_is_due(self) -> bool:
        """Whether a process has ended, took too long, is to be started, or was not seen lately."""
        now = time.monotonic()
        return (
            self._ended
            or now >= self._look_at
            or (self._deadline < math.inf and any(now >= worker.until for worker in self._workers))
        )

    def _assign(self) -> None:
        """Gives the oldest tasks to workers that wait for one."""
        if not self._tasks:
            return
        for worker in self._workers:
            if worker.ready and worker.task is None and not self._feed(worker):
                return
        self._tasks.offer()

    def _feed(self, worker: _Worker) -> bool:
        """Gives the oldest task to a worker; False when there is none."""
        task = self._tasks.take()
        if task is None:
            return False
        self._begin(worker, task)
        assert worker.end is not None
        worker.end.send(task.message)
        if worker.end.unsent:
            self._watch(worker)
        return True

    def _begin(self, worker: _Worker, task: Task) -> None:
        task.attempts += 1
        task.begun = time.time()
        worker.task = task
        worker.until = time.monotonic() + self._deadline

    def _watch(self, worker: _Worker) -> None:
        """Listens to a worker from now on, and for room to send it the rest of what it gets."""
        assert worker.end is not None
        wanted = select.POLLIN | (select.POLLOUT if worker.end.unsent else 0)
        self._poll.register(worker.end.fileno(), wanted)
        self._by_number[worker.end.fileno()] = worker

    def _listen(self, until: float) -> None:
        """Waits until something happens, and hears what the workers say."""
        until = min(until, self._look_at)
        if self._deadline < math.inf:
            until = min(until, *(worker.until for worker in self._workers))
        wait = max(0.0, min(TICK, until - time.monotonic()))
        for number, event in self._poll.poll(math.ceil(wait * 1e3)):
            if number == self._wake_in.fileno():
                self._wake_in.recv(4096)
                continue
            worker = self._by_number[number]
            assert worker.end is not None
            if event & select.POLLOUT:
                worker.end.flush()
                self._watch(worker)
            if event & ~select.POLLOUT:
                messages = worker.end.read()
                self._ended |= worker.end.closed
                for message in messages:
                    self._hear(worker, message, ended=worker.end.closed)

    def _hear(self, worker: _Worker, message: bytes, *, ended: bool) -> None:
        task = worker.task
        if task is not None:  # an answer: the worker goes on before anybody reads it
            worker.task, worker.until = None, math.inf
            (ticket,) = TICKET.unpack_from(message)
            if ticket != NOTHING:
                self._begin(worker, self._tasks.taken(ticket))
            elif not ended:
                self._feed(worker)
            self._take(worker, task, message[TICKET.size :])
            return
        try:
            kind, *parts = unpacked(message)
        except Exception as error:
            kind, parts = "broken", ["boot", type(error).__name__, " ".join(str(error).split())]
        if kind == "ready":
            worker.ready, worker.starts = True, 0
            self._announce()
        elif kind == "broken":
            worker.broken = Broken(*parts)

    def _take(self, worker: _Worker, task: Task, message: bytes) -> None:
        """Hands on what a worker answered."""
        try:
            _, evaluations, started, finished, raised = unpacked(message)
        except Exception as error:  # something that only the worker could import
            reason = f"the answer cannot be read: {type(error).__name__}: {error}"
            self._fail(task, worker, " ".join(reason.split()))
            return
        self.busy_s += finished - started
        if raised and self._again(task, "error"):
            return
        self._deliver(
            Done(task.chunk, evaluations, started, finished, worker.name, task.attempts, raised)
        )

    def _deliver(self, done: Done) -> None:
        with self._lock:
            self.open -= 1
            self.last = time.monotonic()
        self.done.put(done)

    def _fail(self, task: Task, worker: _Worker, reason: str) -> None:
        self._deliver(
            failed_chunk(
                task.chunk,
                self._evaluators[task.chunk.evaluator],
                reason,
                worker=worker.name,
                started=task.begun,
                finished=time.time(),
                attempts=task.attempts,
            )
        )

    def _again(self, task: Task, cause: str) -> bool:
        """Queues a task once more, before younger ones, if it has retries for this cause left."""
        task.failures[cause] = task.failures.get(cause, 0) + 1
        if task.failures[cause] > self._allowed[cause]:
            return False
        self.repeats += 1
        self._tasks.add_again(task)
        return True

    # -- deaths and deadlines ---------------------------------------------------------------

    def _look_after(self) -> None:
        now = time.monotonic()
        self._ended = False
        look = now >= self._look_at  # asking after each process costs as much as feeding one
        if look:
            self._look_at = now + TICK
        if self._logs is not None and now >= self._shorten_at:
            self._shorten_at = now + LOG_TICK
            for worker in self._workers:
                shorten_log(self._logs / log_name(worker.name))
        for worker in self._workers:
            if worker.process is None:
                if now >= worker.resume_at:
                    self._start(worker)
                continue
            if worker.task is not None and now >= worker.until:
                worker.late = True
                self._bury(worker)
            elif look and self._overruns(worker):
                self._bury(worker)
            elif worker.end is None or worker.end.closed or (look and _has_ended(worker.process)):
                if worker.end is not None and not worker.end.closed:
                    for message in worker.end.read():  # what it said before it ended
                        self._hear(worker, message, ended=True)
                self._bury(worker)

    def _overruns(self, worker: _Worker) -> bool:
        """Whether a worker that is ready uses more memory than it may."""
        if not self._memory or not worker.ready or worker.process is None:
            return False
        used = own_bytes(worker.process.pid)
        worker.used = used if used > self._memory else 0
        return worker.used > 0

    def _bury(self, worker: _Worker) -> None:
        """Clears up after a worker, decides about its task and starts another in its place."""
        code = self._end(worker)
        task, late, used, was_ready = worker.task, worker.late, worker.used, worker.ready
        worker.task, worker.until, worker.late, worker.ready = None, math.inf, False, False
        worker.used = 0
        for unheard in self._tasks.taken_unheard(worker.number):
            self._tasks.add_again(unheard)  # it was not begun
        self.overruns += used > 0
        if task is not None:
            self.deaths += not (late or used)
            self.timeouts += late
            cause = "timeout" if late else "memory" if used else "death"
            if not self._again(task, cause):
                self._fail(task, worker, self._reason(task, late, used, code))
        if not was_ready:
            worker.starts += 1
            broken = worker.broken or Broken("boot", "", f"the worker {_ending(code)}")
            # What a worker says of itself would be the same again; a death may be an accident.
            if not self._announced and (broken.step != "boot" or worker.starts >= FIRST_STARTS):
                self._announced = True
                self.opened.put(broken)
                return
            if all(other.starts >= STARTS for other in self._workers):
                raise RuntimeError(f"none can be started any more: {broken.error} {broken.text}")
            worker.resume_at = time.monotonic() + PAUSE * 2 ** min(worker.starts, 7)
            self._look_at = min(self._look_at, worker.resume_at)
            return
        self._start(worker)

    def _reason(self, task: Task, late: bool, used: int, code: int) -> str:
        attempts = f"{task.attempts} attempt{'s' if task.attempts > 1 else ''}"
        if late:
            return f"timeout: not done within {self._deadline:g} s, {attempts}"
        if used:
            limit = self._memory / 1e6
            return f"memory: the worker used {used / 1e6:.0f} of {limit:.0f} MB, {attempts}"
        return f"lost: the worker {_ending(code)}, {attempts}"

    # -- processes --------------------------------------------------------------------------

    def _start(self, worker: _Worker) -> None:
        """A new process in a session of its own: a Ctrl-C goes to the driver alone."""
        log = None
        if self._logs is not None:
            with suppress(OSError):  # a full disk must not end the run
                log = open_log(self._logs / log_name(worker.name))
        ours, theirs = socket.socketpair()
        life_in, life_out = os.pipe()
        paths = [path or os.getcwd() for path in sys.path]
        shared = (theirs.fileno(), life_in, self._tasks.fileno())
        try:
            worker.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _BOOT, json.dumps(paths)),
                    *(str(number) for number in shared),
                    *(str(worker.number), "log" if log is not None else ""),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=shared,
                env=self._environment,
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(life_in)
            if log is not None:
                log.close()
        worker.end, worker.pipe, worker.broken = DriverEnd(ours), life_out, None
        worker.end.send(self._opening)
        self._watch(worker)

    def _announce(self) -> None:
        if not self._announced and all(worker.ready for worker in self._workers):
            self._announced = True
            self.opened.put(None)

    def _end(self, worker: _Worker) -> int:
        """Kills a worker with everything it started; returns its exit status as `Popen` has it."""
        assert worker.process is not None
        process, worker.process = worker.process, None
        # The number belongs to the group as long as its leader was not waited for.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        code = process.wait()
        os.close(worker.pipe)
        if worker.end is not None:
            number = worker.end.fileno()
            if self._by_number.pop(number, None) is not None:
                self._poll.unregister(number)
            worker.end.close()
            worker.end = None
        return code

    def _end_all(self) -> None:
        idle = [w for w in self._workers if w.process is not None and w.ready and w.task is None]
        for worker in idle:
            assert worker.end is not None
            worker.end.send(b"")
        until = time.monotonic() + GRACE
        while time.monotonic() < until and not all(
            w.process is None or _has_ended(w.process) for w in idle
        ):
            time.sleep(0.005)
        for worker in self._workers:
            if worker.process is not None:
                self._end(worker)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended; it stays to be waited for."""
    try:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, process.pid, flags) is not None
    except ChildProcessError:
        return True


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (out of memory, or killed by hand)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
