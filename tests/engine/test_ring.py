"""Tasks in shared memory: each is taken once, in order, and none is lost with its taker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from searchlab.executors._ring import NOTHING, Claims, Waiting
from searchlab.executors._tasks import Task
from searchlab.executors.base import Chunk
from searchlab.population import Jobs, Population

TAKER = """
import os, sys, time
from searchlab.executors._ring import NOTHING, Claims
claims, test = Claims(int(sys.argv[1]), int(sys.argv[2])), os.getppid()
while os.getppid() == test:
    ticket, message = claims.take()
    if message == b"end":
        break
    if ticket == NOTHING:
        time.sleep(1e-4)
        continue
    print(ticket, message.decode(), flush=True)
"""


def task(number: int, message: bytes | None = None, attempts: int = 0) -> Task:
    population = Population({"x": np.full((1, 1), float(number))})
    jobs = Jobs(np.array([number]), population, (b"",))
    return Task(Chunk(jobs), str(number).encode() if message is None else message, attempts)


def numbers(tasks: list[Task]) -> list[int]:
    return [int(task.chunk.jobs.ids[0]) for task in tasks]


def test_the_oldest_is_taken_first_by_whoever_comes() -> None:
    waiting = Waiting(4)
    for number in range(6):
        waiting.add(task(number))
    waiting.offer()
    claims = Claims(waiting.fileno(), 0)
    assert [claims.take() for _ in range(2)] == [(0, b"0"), (1, b"1")]
    assert numbers([taken for _ in range(2) if (taken := waiting.take())]) == [2, 3]
    assert numbers([waiting.taken(1), waiting.taken(0)]) == [1, 0]
    assert claims.take() == (NOTHING, b"")  # nobody has offered the rest
    waiting.offer()
    assert claims.take() == (4, b"4")
    assert len(waiting) == 2
    waiting.close()


def test_a_slot_whose_taker_was_not_heard_is_not_used_again() -> None:
    waiting = Waiting(2)
    for number in range(4):
        waiting.add(task(number))
    waiting.offer()
    claims = Claims(waiting.fileno(), 7)
    assert claims.take() == (0, b"0")
    waiting.offer()
    assert claims.take() == (1, b"1")
    assert claims.take() == (NOTHING, b"")
    assert numbers(waiting.taken_unheard(7)) == [0, 1]
    assert waiting.taken_unheard(7) == []
    waiting.offer()
    assert numbers(waiting.withdraw()) == [2, 3]
    assert len(waiting) == 0
    waiting.close()


def test_long_messages_and_repeated_tasks_go_through_the_driver() -> None:
    waiting = Waiting(2)
    waiting.add(task(0, b"x" * 100_000))
    waiting.add(task(1))
    waiting.offer()
    claims = Claims(waiting.fileno(), 0)
    assert claims.take() == (NOTHING, b"")  # in order: the long one comes first
    assert numbers([taken for _ in range(1) if (taken := waiting.take())]) == [0]
    waiting.offer()
    waiting.add_again(task(9, attempts=1))
    assert numbers([taken for _ in range(2) if (taken := waiting.take())]) == [9, 1]
    waiting.close()


@pytest.mark.parametrize("takers", [1, 3])
def test_processes_take_each_task_once(takers: int) -> None:
    waiting = Waiting(8)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(waiting.fileno()), str(who)],
            pass_fds=(waiting.fileno(),),
            stdout=subprocess.PIPE,
        )
        for who in range(takers)
    ]
    total = 400
    for number in range(total):
        waiting.add(task(number))
    for _ in range(takers):
        waiting.add(task(0, b"end"))
    until = time.monotonic() + 60
    while len(waiting) and time.monotonic() < until:
        waiting.offer()
        for ticket in list(waiting._within):
            if waiting._ring.owner(ticket) >= 0:
                waiting.taken(ticket)
        time.sleep(1e-4)
    lines = [process.communicate(timeout=60)[0].decode().split("\n") for process in processes]
    taken = sorted(int(line.split()[1]) for some in lines for line in some if line)
    assert taken == list(range(total))
    for some in lines:  # in order for each of them
        own = [int(line.split()[0]) for line in some if line]
        assert own == sorted(own)
    waiting.close()


def test_a_process_that_stops_with_the_lock_stops_nobody() -> None:
    waiting = Waiting(4)
    waiting.add(task(0))
    waiting.offer()
    code = (
        "import fcntl, sys, time; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX); "
        "print('has it', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(waiting.fileno())],
        pass_fds=(waiting.fileno(),),
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    began = time.monotonic()
    assert waiting.take() is None  # it cannot be reached now, and stays
    assert time.monotonic() - began < 5
    assert len(waiting) == 1
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert numbers(waiting.withdraw()) == [0]
    waiting.close()
