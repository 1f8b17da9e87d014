"""Fewer experts, scored by lm-evaluation-harness itself: the full model and the result."""

from __future__ import annotations

from contextlib import nullcontext

from searchlab.config import SearchConfig
from searchlab.evaluators.language.harness import HarnessTask, harness_model, own_scores
from searchlab.experiments.experts_setup import Loaded, applied
from searchlab.report import Section
from searchlab.result import Result

__all__ = ["harness_sections"]


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
