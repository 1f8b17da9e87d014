"""Fewer experts, scored by lm-evaluation-harness itself: the full model and the result."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from searchlab.config import SearchConfig
from searchlab.evaluators.language.harness import HarnessTask, harness_model, own_scores
from searchlab.experiments.experts_setup import Loaded
from searchlab.report import Section
from searchlab.result import Result

__all__ = ["applied", "harness_sections"]


def applied(loaded: Loaded, plan: Any) -> AbstractContextManager[Any]:
    """Inside, the resident model is what a plan makes of it."""
    if not plan.merge:
        return loaded.resident.masked(
            plan.mask, top_k=plan.top_k, router_mode=plan.router_mode, flat=plan.flat
        )
    return loaded.resident.merged(
        plan.matrices("merge"),
        route=plan.matrices("route") or None,
        router_mode=plan.router_mode,
        top_k=plan.top_k,
        flat=plan.flat,
    )


def harness_sections(loaded: Loaded, config: SearchConfig, result: Result) -> list[Section]:
    """The harness's own figures on the documents of the report split, for tasks of its."""
    task = loaded.prepared.task
    winners = [group.winner for group in result.groups if group.winner is not None]
    if not isinstance(task, HarnessTask) or not winners:
        return []
    (plan,) = config.stages[-1].space.plans(winners[-1].population)
    documents = [task.documents[number] for number in task.splits["report"]]
    rows = []
    for name, within in (
        ("full", nullcontext),
        ("found", lambda: applied(loaded, plan)),
    ):
        model = harness_model(
            loaded.resident.model,
            loaded.prepared.prompts,
            batch_tokens=loaded.prepared.settings.batch_tokens,
            within=within,
        )
        scores = own_scores(task, documents, model)
        rows.append({"model": name, **{key: f"{value:.5g}" for key, value in scores.items()}})
    text = (
        f"Task {task.name} as lm-evaluation-harness scores it itself, on the {len(documents)} "
        "documents of the report items."
    )
    return [Section("Scored by lm-evaluation-harness", text=text, table=rows)]
