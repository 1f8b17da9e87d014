"""What a run's evaluator makes of its first candidate: alone, once more, and inside a chunk."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from searchlab.algorithms.base import Algorithm
from searchlab.config import Stage
from searchlab.errors import SearchlabWarning
from searchlab.executors import Chunk, Done, Executor
from searchlab.population import OK
from searchlab.study import Store

__all__ = ["measure_repeat"]

PROBE_ID = 2**60  # above all ids of records


def measure_repeat(
    stage: Stage,
    algorithm: Algorithm,
    chunk: int,
    store: Store,
    executor: Executor,
    evaluator: int,
) -> None:
    """Evaluates the first candidate alone and inside a full chunk; stores the difference.

    Done by the workers, several of them where there are, at the cheapest fidelity, with whatever
    the evaluator keeps between calls forgotten, and charged to nobody. A claim of exactness that
    does not hold here becomes a warning.
    """
    if store.get_meta("repeat") is not None or not getattr(stage.evaluator, "probe", True):
        return
    size = max(2, chunk)
    fresh = algorithm.ask(algorithm.first_id, size)
    if not len(fresh):
        return
    rows = [*range(len(fresh)), *[len(fresh) - 1] * (size - len(fresh))]
    taken = fresh.take(rows)
    # An answer that comes late or twice must not be taken for one of the search's.
    jobs = replace(taken, ids=taken.ids + PROBE_ID, fidelity=0, replicate=0, stage=0)
    chunks = [Chunk(part, evaluator, forget=True) for part in (jobs, *[jobs.take([0])] * 2)]
    for part in chunks:
        executor.submit(part)
    done: dict[int, Done] = {}
    while len(done) < len(chunks):
        done.update((id(part.chunk), part) for part in executor.wait())
    if any(not (np.asarray(part.evaluations.state) == OK).any() for part in done.values()):
        return  # the search itself will record this failure with its reason
    answers = {key: part.evaluations.values[0] for key, part in done.items()}
    together, alone, again = (answers[id(part)] for part in chunks)
    alone_again = float(np.nanmax(np.abs(alone - again), initial=0.0))
    in_batch = float(np.nanmax(np.abs(alone - together), initial=0.0))
    store.set_meta("repeat", {"alone_twice": alone_again, "alone_or_in_chunk": in_batch})
    if stage.evaluator.reproducibility == "exact" and max(alone_again, in_batch) > 0:
        warnings.warn(
            f"the evaluator says 'exact', but its first candidate differs by {alone_again:.3g} "
            f"between two calls and by {in_batch:.3g} between alone and in a chunk; "
            "its trace is then only repeatable on the same machine and chunk size",
            SearchlabWarning,
            stacklevel=4,
        )
