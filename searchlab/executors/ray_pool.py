"""The workers of a Ray cluster: placed, fed without a barrier, buried and replaced."""

from __future__ import annotations

import itertools
import math
import os
import queue
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from searchlab.errors import ConfigError
from searchlab.evaluator import Evaluator
from searchlab.executors._channel import packed, unpacked
from searchlab.executors._tasks import Broken, Retries
from searchlab.executors._watch import log_name
from searchlab.executors.base import Chunk, Done, failed_chunk
from searchlab.executors.ray_cluster import Cluster, Need
from searchlab.executors.ray_worker import Answer, actor_class

__all__ = ["Member", "Pool", "Setting", "Task"]

TICK = 1.0  # seconds between looks at the cluster
SLOW = 0.25  # seconds; workers get nothing in advance while any evaluation takes longer
AHEAD = 0.1  # seconds of work that lie ready with a worker otherwise
MOST = 512  # chunks that lie ready with a worker, at most
RECENT = 64  # evaluations that say how long one takes
NODE_LOSSES = 100  # further attempts at a chunk whose node was lost: that is not its fault
STARTS = 5  # when every worker failed to start so often in a row, the run ends
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PAUSE = 1.0  # seconds before a worker is started again after it failed to, doubled each time


_SHOWN = {"pausing": "starts", "placing": "waits for a node", "setting up": "starts"}


@dataclass(frozen=True)
class Setting:
    """How workers are made.

    Attributes:
        need: what each takes from its node.
        at_once: chunks that each evaluates at once.
        threads: of torch and BLAS, per worker.
        deadline: seconds for one attempt at a chunk.
        retries: further attempts per cause.
        environment: Ray's runtime environment.
        logs: folder for a file per worker; None = nothing is kept.
    """

    need: Need
    at_once: int = 1
    threads: int = 1
    deadline: float = math.inf
    retries: Retries = field(default_factory=Retries)
    environment: Mapping[str, Any] = field(default_factory=dict)
    logs: Path | None = None


@dataclass(eq=False)
class Task:
    """A chunk that has not come back."""

    chunk: Chunk
    attempts: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    begun: float = 0.0  # seconds since the epoch; 0 = it waits at its worker
    until: float = math.inf
    alone: bool = False  # it was lost in company: the next time it has a worker of its own


@dataclass(eq=False)
class Member:
    """One place for a worker; the actor in it may change.

    Attributes:
        life: counts the actors; what an earlier one says late is dropped.
        state: "pausing", "placing", "setting up" or "ready".
        queue: token -> chunk, oldest first; the first `at_once` are at work.
        unsent: those of them that have not been sent.
        asked: a call for answers is open.
    """

    number: int
    life: int = 0
    state: str = "pausing"
    actor: Any = None
    where: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    queue: dict[int, Task] = field(default_factory=dict)
    unsent: list[tuple[int, Chunk]] = field(default_factory=list)
    asked: bool = False
    last_words: str = ""
    broken: Broken | None = None
    failed_starts: int = 0
    resume_at: float = 0.0

    @property
    def name(self) -> str:
        return f"worker {self.number} on {self.where.get('host', '?')}"


class Pool:
    """Owns the workers of one run. Nothing happens but in its methods; none of them blocks long.

    Attributes:
        members: places for workers.
        open: chunks that have not come back.
        done: those that have, until somebody takes them.
        busy_s, deaths, timeouts, repeats: see `Usage`.
        dropped: answers that came late or twice.
        last: when the last result came (monotonic seconds).
    """

    def __init__(
        self, cluster: Cluster, evaluators: tuple[Evaluator, ...], references: Any, setting: Setting
    ) -> None:
        import ray

        self.cluster, self.setting = cluster, setting
        self.members: list[Member] = []
        self.done: list[Done] = []
        self.open = self.deaths = self.timeouts = self.repeats = self.dropped = 0
        self.busy_s = self.last = 0.0
        self._ray = ray
        self._evaluators, self._references = evaluators, references
        self._tasks: deque[Task] = deque()
        self._events: queue.SimpleQueue[tuple[Member, int, str, Any]] = queue.SimpleQueue()
        self._tokens = itertools.count()
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._look_at = 0.0
        self._due = math.inf  # no deadline passes before
        self._trouble: Broken | None = None  # why the last worker could not start
        self._actor = self._remote_class()

    def _remote_class(self) -> Any:
        ray, need = self._ray, self.setting.need
        cls: Any = actor_class()
        environment = dict(self.setting.environment)
        variables: Mapping[str, str] = environment.get("env_vars", {})
        self._variables = {
            **dict.fromkeys(_THREAD_SETTINGS, str(self.setting.threads)),
            **variables,
        }
        if environment.keys() <= {"env_vars"}:
            environment = {}  # the worker sets them; Ray takes seconds for an environment
        cls.take = ray.method(concurrency_group="take", num_returns=0)(cls.take)
        cls.give = ray.method(concurrency_group="give")(cls.give)
        return ray.remote(
            num_cpus=need.cpus,
            num_gpus=need.gpus,
            memory=need.memory or None,
            resources=dict(need.resources),
            max_restarts=0,
            max_task_retries=0,
            runtime_env=environment or None,
            concurrency_groups={"take": 1, "give": 1},
        )(cls)

    # -- what the executor calls --------------------------------------------------------------

    def grow(self, count: int) -> None:
        """Makes places until there are so many."""
        while len(self.members) < count:
            member = Member(len(self.members))
            self.members.append(member)
            self._place(member)

    def count(self, state: str) -> int:
        """How many members are in a state."""
        return sum(member.state == state for member in self.members)

    @property
    def room(self) -> int:
        """How many chunks keep all workers busy, with one more for each."""
        at_once = self.setting.at_once
        ready = self.count("ready")
        return max(1, ready) * 2 * at_once + ready * self._ahead

    def submit(self, chunk: Chunk) -> None:
        """Puts a chunk in line."""
        self.open += 1
        self._tasks.append(Task(chunk))

    def withdraw(self) -> list[Chunk]:
        """Takes back the chunks that no worker has."""
        chunks = [task.chunk for task in self._tasks]
        self._tasks.clear()
        self.open -= len(chunks)
        return chunks

    def step(self, timeout: float) -> None:
        """Feeds the workers, then hears what they say for at most so many seconds.

        Raises:
            EvaluationError: the head of the cluster is gone, or no worker can be started.
        """
        self._feed()
        self._send(every=True)
        now = time.monotonic()
        if not self.done:
            self._hear(max(0.0, min(timeout, self._look_at - now, self._due - now)))
        while self._hear(0.0):  # all that is there, so that messages carry much
            pass
        self._look_after()
        self._feed()
        self._send(every=False)

    def close(self) -> None:
        """Ends all workers at once."""
        for member in self.members:
            member.life += 1
            self._kill(member)
        self.members.clear()

    def activity(self) -> dict[str, Any]:
        """How many chunks wait, and what each worker does."""
        rows: list[dict[str, Any]] = []
        for member in [*self.members]:
            task = next(iter([*member.queue.values()]), None)
            rows.append(
                {
                    "worker": member.name,
                    "state": _SHOWN.get(member.state, "evaluates" if task else "idle"),
                    "job": None if task is None else int(task.chunk.jobs.ids[0]),
                    "since": None if task is None else task.begun,
                }
            )
        return {"queued": len(self._tasks), "workers": rows}

    def _note(self, member: Member, text: str) -> None:
        """Adds to a worker's log; its prints stay with Ray, on its node."""
        folder = self.setting.logs
        if folder is None:
            return
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            path = folder / log_name(f"worker {member.number}")
            with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
                file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")

    # -- feeding ------------------------------------------------------------------------------

    @property
    def _ahead(self) -> int:
        """Chunks that lie ready with each worker; none where one might wait behind a long one."""
        recent = self._recent
        if not recent or max(recent) > SLOW:
            return 0
        mean = max(1e-6, sum(recent) / len(recent))
        return min(MOST, 1 + math.ceil(AHEAD * self.setting.at_once / mean))

    def _feed(self) -> None:
        """Gives waiting chunks to the workers with the least to do."""
        if self._tasks:
            limit = self.setting.at_once + self._ahead
            able = [m for m in self.members if m.state == "ready" and len(m.queue) < limit]
            able = [m for m in able if not any(task.alone for task in m.queue.values())]
            while self._tasks and able:
                member = min(able, key=lambda m: len(m.queue))
                task = self._tasks[0]
                if task.alone and member.queue:
                    break  # the next worker that has nothing left
                self._tasks.popleft()
                self._give(member, task)
                if task.alone or len(member.queue) >= limit:
                    able.remove(member)

    def _send(self, *, every: bool) -> None:
        """Sends what was given out; a question for answers goes with it where none is open.

        Args:
            every: ask workers for which there is nothing as well. What the driver does next may
                give them something, and a message less costs half.
        """
        for member in self.members:
            if member.state != "ready" or not (member.unsent or (every and not member.asked)):
                continue
            message, member.unsent = packed(member.unsent) if member.unsent else b"", []
            if member.asked:
                member.actor.take.remote(message)
            else:
                member.asked = True
                self._call(member, "give", member.actor.give.remote(message))

    def _give(self, member: Member, task: Task) -> None:
        token = next(self._tokens)
        task.attempts += 1
        task.begun = 0.0
        member.queue[token] = task
        member.unsent.append((token, task.chunk))
        self._begin(member)

    def _begin(self, member: Member) -> None:
        """Notes when chunks came to be at work."""
        for task in itertools.islice(member.queue.values(), self.setting.at_once):
            if not task.begun:
                task.begun = time.time()
                task.until = time.monotonic() + self.setting.deadline
                self._due = min(self._due, task.until)

    # -- hearing ------------------------------------------------------------------------------

    def _call(self, member: Member, kind: str, reference: Any) -> None:
        """Lets the answer to a call come as an event."""
        life = member.life
        future = reference.future()
        future.add_done_callback(lambda f: self._events.put((member, life, kind, f)))

    def _hear(self, timeout: float) -> bool:
        try:
            member, life, kind, future = self._events.get(timeout > 0, timeout or None)
        except queue.Empty:
            return False
        error = future.exception()
        if life != member.life:
            answers = future.result()[0] if kind == "give" and error is None else ()
            self.dropped += len(answers)
        elif error is not None:
            self._lost(member, kind, error)
        elif kind == "hello":
            self._placed(member, future.result())
        elif kind == "open":
            self._opened(member, future.result())
        else:
            answers, member.last_words = future.result()
            member.asked = False
            self.take(member, answers)
        return True

    def take(self, member: Member, answers: list[Answer]) -> None:
        """Hands on what a worker found; answers to chunks that it does not have are dropped."""
        for answer in answers:
            task = member.queue.pop(answer.token, None)
            if task is None:
                self.dropped += 1
                continue
            self._finish(member, task, answer)
        self._begin(member)

    def _finish(self, member: Member, task: Task, answer: Answer) -> None:
        took = answer.finished - answer.started
        self.busy_s += took
        self._recent.append(took)
        try:
            evaluations, raised = unpacked(answer.evaluations)
        except Exception as error:  # something that only the worker could import
            text = f"the answer cannot be read: {type(error).__name__}: {error}"
            self._fail(task, member.name, " ".join(text.split()))
            return
        if raised:
            self._note(member, f"job {task.chunk.jobs.ids[0]}: {raised}")
            if self._again(task, "error"):
                return
        self._deliver(
            Done(
                task.chunk,
                evaluations,
                answer.started,
                answer.finished,
                member.name,
                task.attempts,
                raised,
            )
        )

    def _deliver(self, done: Done) -> None:
        self.open -= 1
        self.last = time.monotonic()
        self.done.append(done)

    def _fail(self, task: Task, worker: str, reason: str) -> None:
        evaluator = self._evaluators[task.chunk.evaluator]
        times = {"started": task.begun, "finished": time.time()}
        self._deliver(
            failed_chunk(
                task.chunk, evaluator, reason, worker=worker, attempts=task.attempts, **times
            )
        )

    def _again(self, task: Task, cause: str) -> bool:
        """Puts a chunk first in line if it has retries for this cause left."""
        task.failures[cause] += 1
        allowed = NODE_LOSSES if cause == "node" else getattr(self.setting.retries, cause)
        if task.failures[cause] > allowed:
            return False
        self.repeats += 1
        self._tasks.appendleft(task)
        return True

    # -- placing and setting up ---------------------------------------------------------------

    def _place(self, member: Member) -> None:
        """Asks Ray for an actor; it waits where no node has room."""
        member.life += 1
        member.state, member.last_words, member.broken = "placing", "", None
        member.asked = False
        paths = [os.path.abspath(path) for path in sys.path]
        member.actor = self._actor.remote(paths, os.getcwd(), self._variables)
        self._call(member, "hello", member.actor.hello.remote())

    def _placed(self, member: Member, where: dict[str, Any]) -> None:
        import searchlab

        member.where = where
        there = where.get("searchlab")
        if where["trouble"] or there != searchlab.__version__:
            text = where["trouble"] or f"searchlab {there}, {searchlab.__version__} here"
            self._break(member, Broken("boot", "", text))
            return
        member.state = "setting up"
        setting = self.setting
        arguments = self._references, setting.threads, setting.at_once, setting.need.memory
        self._call(member, "open", member.actor.open.remote(*arguments))

    def _opened(self, member: Member, answer: tuple[Any, ...]) -> None:
        if answer[0] != "ready":
            self._break(member, Broken(*answer[1:]))
            return
        member.state, member.device, member.failed_starts = "ready", answer[1], 0
        where = member.where
        place = f"{where['host']} ({where['ip']}), process {where['pid']}, {member.device}"
        self._note(member, f"ready on {place}")

    def _break(self, member: Member, broken: Broken) -> None:
        """Notes why an actor is of no use, and tries again later."""
        self._note(member, f"cannot start: {broken.error} {broken.text}\n{broken.traceback}")
        self._kill(member)
        member.life += 1
        member.broken = self._trouble = broken
        member.failed_starts += 1
        member.state = "pausing"
        member.resume_at = time.monotonic() + PAUSE * 2 ** min(member.failed_starts, 6)

    def _kill(self, member: Member) -> None:
        actor, member.actor = member.actor, None
        if actor is not None and not self.cluster.lost:
            self._ray.kill(actor)

    # -- deaths and deadlines -----------------------------------------------------------------

    def _look_after(self) -> None:
        now = time.monotonic()
        if now >= self._due:
            for member in self.members:
                if any(task.begun and now >= task.until for task in member.queue.values()):
                    self._bury(member, "timeout", "")
            every = (task for member in self.members for task in member.queue.values())
            self._due = min((task.until for task in every if task.begun), default=math.inf)
        if now < self._look_at:
            return
        self._look_at = now + TICK
        if not self.cluster.check_alive():
            return
        for member in self.members:
            if member.state == "pausing" and now >= member.resume_at:
                self._place(member)
        failing = [m for m in self.members if m.failed_starts >= STARTS]
        if self.members and len(failing) == len(self.members):
            trouble = self._trouble or Broken("boot", "", "")
            raise ConfigError(
                f"no worker can be started any more: {trouble.error} {trouble.text}".strip()
            )

    def _lost(self, member: Member, kind: str, error: BaseException) -> None:
        """An actor that does not answer any more."""
        if not self.cluster.check_alive():  # the head is what is lost, or will be back
            member.life += 1
            member.state, member.resume_at = "pausing", 0.0
            self._return_all(member)
            return
        if kind != "give":
            text = " ".join(str(error).split())[:500]
            self._break(member, Broken("boot", type(error).__name__, text))
            return
        node = member.where.get("node")
        name = type(error).__name__  # of a crash Ray says ActorDied, of silence Unavailable
        if "NodeDied" in name or "Unavailable" in name or node not in self.cluster.nodes():
            self._bury(member, "node", "its node was lost")
            return
        if "OutOfMemory" in name or "OutOfMemory" in str(error):
            reason = "Ray ended it because its node ran out of memory"
        else:
            reason = member.last_words or "it died (out of memory, killed by hand, or a crash)"
        self._bury(member, "death", reason)

    def _return_all(self, member: Member) -> None:
        """Puts a worker's chunks back in line, as if they had not been given out."""
        tasks, member.queue, member.unsent = [*member.queue.values()], {}, []
        for task in reversed(tasks):
            task.attempts -= 1
            self._tasks.appendleft(task)

    def _bury(self, member: Member, cause: str, reason: str) -> None:
        """Replaces a worker and decides about its chunks."""
        jobs = [int(task.chunk.jobs.ids[0]) for task in member.queue.values()]
        self._note(member, f"gone ({cause}{': ' if reason else ''}{reason}) with jobs {jobs}")
        self._kill(member)
        now = time.monotonic()
        tasks, member.queue, member.unsent = [*member.queue.values()], {}, []
        # Where much lies ready, answers that were not heard of may be among these.
        begun = [task for task in tasks if task.begun or self._ahead]
        suspects = begun
        if cause == "timeout":
            suspects = [task for task in begun if now >= task.until]
            self.timeouts += len(suspects)
        else:
            self.deaths += bool(begun)
        known = cause == "node" or len(suspects) == 1 or (cause == "timeout" and not self._ahead)
        for task in reversed(tasks):
            if task in suspects and known:
                if not self._again(task, cause):
                    self._fail(task, member.name, self._reason(task, cause, reason))
                continue
            task.alone = task in suspects  # nobody knows which of them is to blame
            task.attempts -= not task.begun
            self.repeats += bool(task.begun)
            self._tasks.appendleft(task)
        self._place(member)

    def _reason(self, task: Task, cause: str, reason: str) -> str:
        attempts = f"{task.attempts} attempt{'s' if task.attempts > 1 else ''}"
        if cause == "timeout":
            return f"timeout: not done within {self.setting.deadline:g} s, {attempts}"
        return f"lost: the worker is gone, {reason}, {attempts}"
