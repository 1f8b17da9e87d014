"""What a run keeps of evaluations that ran out of memory: with which micro-batch they were made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from searchlab.config import Stage, stage_digest
from searchlab.evaluator import environment

if TYPE_CHECKING:
    from searchlab.executors.base import Done
    from searchlab.loop import StageRun
    from searchlab.study import Store

__all__ = [
    "MICRO_BATCHES",
    "evaluator_environment",
    "memory_notes",
    "micro_batch_of",
    "note_memory",
]

MICRO_BATCHES = "micro_batches"
"""Meta of a run: digest of the evaluator -> {"claim": of the trace, "sizes": {size: rows}}."""


def micro_batch_of(done: Done) -> int:
    """The micro-batch that a chunk was evaluated with after out-of-memory; 0 = as configured."""
    return int(done.evaluations.notes.get("micro_batch", 0))


def note_memory(leg: StageRun, done: Done, rows: int) -> str:
    """Notes how rows were evaluated; returns the worker that their records name."""
    size = micro_batch_of(done)
    if not size:
        return done.worker
    digest, stage, store = leg.digest, leg.stage, leg.store
    found: dict[str, Any] = store.get_meta(MICRO_BATCHES) or {}
    own = found.get(digest) or {"claims": stage.evaluator.reproducibility, "sizes": {}}
    known = str(size) in own["sizes"]
    sizes = {**own["sizes"], str(size): own["sizes"].get(str(size), 0) + rows}
    store.set_meta(MICRO_BATCHES, {**found, digest: {**own, "sizes": sizes}})
    if not known:
        identity = {**stage.evaluator.identity(), "space": stage.space.fingerprint}
        store.register_evaluator(digest, identity, evaluator_environment(stage, store))
    return f"{done.worker}, micro-batch {size}"


def evaluator_environment(stage: Stage, store: Store) -> dict[str, Any]:
    """What is true around the values of a stage, smaller micro-batches included."""
    found: dict[str, Any] = store.get_meta(MICRO_BATCHES) or {}
    sizes = found.get(stage_digest(stage), {}).get("sizes")
    return {**environment(), **({MICRO_BATCHES: sorted(map(int, sizes))} if sizes else {})}


def memory_notes(store: Store) -> list[str]:
    """Sentences on what out-of-memory did to a run's values."""
    out = []
    found: dict[str, Any] = store.get_meta(MICRO_BATCHES) or {}
    for own in found.values():
        counts = sorted((int(size), int(rows)) for size, rows in own["sizes"].items())
        shown = ", ".join(f"{rows} with {size}" for size, rows in counts)
        text = f"out of memory: values came from smaller micro-batches ({shown})"
        if own["claims"] == "batch":
            text += "; they depend on it, so no trace is claimed for this run"
        out.append(text)
    return out
