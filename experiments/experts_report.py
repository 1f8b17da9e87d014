"""What the report of a search for experts adds: the table, the picture, memory, speed, serving."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.config import SearchConfig
from searchlab.errors import SearchlabError
from searchlab.evaluator import REPORT_REPLICATE, SELECTION_REPLICATE
from searchlab.evaluators.language.experts import ExpertsEvaluator, experts_evaluator
from searchlab.evaluators.language.forward import Applied
from searchlab.evaluators.language.intervals import Summary, paired_difference, summarise
from searchlab.evaluators.noise import Split
from searchlab.experiments.experts_export import REASON, source_folder
from searchlab.experiments.experts_figures import figure_kept
from searchlab.experiments.experts_judge import Judgement, judge
from searchlab.experiments.experts_loading import load_model, open_model
from searchlab.experiments.experts_setup import Loaded, loaded_of
from searchlab.experiments.experts_speed import answer_speed, weights_of
from searchlab.population import OK, Jobs, Population
from searchlab.report import Section
from searchlab.result import Result
from searchlab.uniforms import uniforms

__all__ = ["Entry", "compared", "sections"]

SPLITS: tuple[tuple[Split, int], ...] = (
    ("search", 0),
    ("selection", SELECTION_REPLICATE),
    ("report", REPORT_REPLICATE),
)
_RANDOM_SEED = 11
_TIMED_S = 0.5  # seconds of one timing
_MOST_BYTES = 2**31  # checkpoints up to this size are loaded again for a timing

Masks = NDArray[np.bool_]
Scored = tuple[Summary, NDArray[np.float64]]


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        name: what it is.
        splits: split -> figures and per-item scores; a mean over random subsets has none of these.
        means: split -> value, where the line is a mean.
    """

    name: str
    splits: Mapping[str, Scored]
    means: Mapping[str, tuple[float, float]]


def sections(config: SearchConfig, result: Result) -> list[Section]:
    """The table of all contenders, kept experts, memory and speed, and how to serve the result."""
    loaded = loaded_of(config)
    winners = [group.winner for group in result.groups if group.winner is not None]
    if loaded is None or not winners:
        return []
    if result.trade_offs is not None:
        from searchlab.experiments.experts_front_report import front_sections

        out = front_sections(loaded, config, result)
    else:
        entries = compared(loaded, config, result)
        out = [
            Section(
                "Experts: everything on the same items",
                text=_text(loaded, entries),
                table=[_row(entry, entries) for entry in entries],
            )
        ]
    (plan,) = config.stages[-1].space.plans(winners[-1].population)
    reap = loaded.known.get("reap")
    figure = figure_kept(
        plan.mask, loaded.used, plan.blocks, other=None if reap is None else ("REAP", reap)
    )
    merged = " Rows of merged experts count for the one they have most of." if plan.merge else ""
    caption = f"Experts that stay, of {plan.experts} in each layer.{merged}"
    out.append(Section("Kept experts", figure=figure, caption=caption))
    from searchlab.experiments.experts_harness import harness_sections

    out += harness_sections(loaded, config, result)
    folder = None if result.out is None else result.out / "export"
    if folder is not None and (folder / "config.json").is_file():
        out.append(Section("Memory and speed", table=_costs(loaded, folder)))
        out.append(Section("Serving", pre=_serving(folder)))
        out += _judged(loaded, folder)
    elif folder is not None and (folder / REASON).is_file():
        text = (folder / REASON).read_text("utf-8").strip()
        out.append(Section("Serving", text=f"There is no checkpoint: {text}"))
    return out


# -- the table ------------------------------------------------------------------------------------


def compared(loaded: Loaded, config: SearchConfig, result: Result) -> list[Entry]:
    """Full model, random subsets, known rankings, foreign checkpoints, and what was found."""
    options = loaded.prepared.options
    entries = [Entry("full", _masked(loaded, _everything(loaded), own=False), {})]
    space = loaded.space
    if options.random:
        drawn = space.sample(uniforms(_RANDOM_SEED, 0, 0, options.random, space.sample_width))
        entries.append(_random(loaded, space.masks(drawn)))
    entries += [Entry(name, _masked(loaded, mask[None]), {}) for name, mask in loaded.known.items()]
    entries += [
        Entry(name, _foreign(loaded, Path(folder)), {})
        for name, folder in options.foreign().items()
    ]
    first = config.stages[0]
    best = _best_of_first(config, result)
    if len(config.stages) > 1 and best is not None:
        entries.append(Entry("pruned", _scored(first.evaluator, first.space, best), {}))
    winner = [group.winner for group in result.groups if group.winner is not None][-1]
    last = config.stages[-1]
    name = "pruned and merged" if options.merges else "found"
    entries.append(Entry(name, _scored(last.evaluator, last.space, winner.population), {}))
    return entries


def _everything(loaded: Loaded) -> Masks:
    layout = loaded.prepared.layout
    return np.ones((1, len(layout.blocks), layout.experts), dtype=bool)


def _evaluator(loaded: Loaded, *, own: bool) -> ExpertsEvaluator:
    """An evaluator of any masks; with the active experts of the space, or the model's own."""
    prepared = loaded.prepared
    return experts_evaluator(
        loaded.resident,
        loaded.space if own else None,
        prepared.task,
        prepared.settings,
        prompts=prepared.prompts,
        masks=lambda population: np.asarray(population["mask"]) > 0,
        at_once=prepared.options.together,
    )


def _masked(loaded: Loaded, masks: Masks, *, own: bool = True) -> dict[str, Scored]:
    population = Population({"mask": masks.astype(np.uint8)})
    evaluator = _evaluator(loaded, own=own)
    return {split: _on(evaluator, population, split, at)[0] for split, at in SPLITS}


def _scored(evaluator: Any, space: Any, population: Population) -> dict[str, Scored]:
    return {split: _on(evaluator, population, split, at)[0] for split, at in SPLITS}


def _on(evaluator: Any, population: Population, split: Split, replicate: int) -> list[Scored]:
    n = len(population)
    jobs = Jobs(
        np.arange(n),
        population,
        (b"",) * n,
        fidelity=len(evaluator.fidelities) - 1,
        replicate=replicate,
    )
    done = evaluator.plain().evaluate(jobs)
    assert done.items is not None
    assert done.signals is not None
    out = []
    for value, items, signal in zip(done.values[:, 0], done.items, done.signals, strict=True):
        scores = np.asarray(items, dtype=np.float64)
        figures = summarise(
            evaluator.problem.task, split, float(value), scores, failures=float(signal[1])
        )
        out.append((figures, scores))
    return out


def _random(loaded: Loaded, masks: Masks) -> Entry:
    population = Population({"mask": masks.astype(np.uint8)})
    evaluator = _evaluator(loaded, own=True)
    values = np.array([f.value for f, _ in _on(evaluator, population, *SPLITS[2])])
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    name = f"random, mean of {len(values)}"
    return Entry(name, {}, {"report": (float(values.mean()), spread)})


def _foreign(loaded: Loaded, folder: Path) -> dict[str, Scored]:
    """Another checkpoint on the same items; the base's own answers stay those of the base."""
    options = loaded.prepared.options
    model = load_model(open_model(str(folder)), dtype=options.dtype, device=options.device)
    evaluator = ExpertsEvaluator(
        loaded.evaluator.problem,
        Applied(model, lambda candidate: nullcontext()),
        candidates=lambda population: np.full(len(population), None, dtype=object),
        base=np.array([None]),
        identity={},
        at_once=1,
        within=lambda given, rows: nullcontext(),
    )
    if options.metric == "kl_self":  # its answers and distributions are asked of the base first
        for split, at in SPLITS:
            _on(loaded.evaluator, loaded.space.of_masks(_first(loaded)), split, at)
    one = Population({"mask": np.zeros((1, 1), dtype=np.uint8)})
    return {split: _on(evaluator, one, split, at)[0] for split, at in SPLITS}


def _first(loaded: Loaded) -> Masks:
    drawn = loaded.space.sample(uniforms(_RANDOM_SEED, 0, 0, 1, loaded.space.sample_width))
    return loaded.space.masks(drawn)


def _best_of_first(config: SearchConfig, result: Result) -> Population | None:
    """The best pruned candidate of the stage before merging, by its search value."""
    records = result.records
    if records is None:
        return None
    rows = np.flatnonzero((records.stage == 0) & (records.state == OK))
    if not len(rows):
        return None
    sign = config.stages[0].sign
    best = rows[int(np.argmin(sign * records.values[rows, 0]))]
    return config.stages[0].space.unpack([records.genotypes[best]])


def _row(entry: Entry, entries: list[Entry]) -> dict[str, str]:
    cells = {"what": entry.name}
    for split, _ in SPLITS:
        if split in entry.splits:
            figures, _scores = entry.splits[split]
            cells[split] = f"{figures.value:.4g} [{figures.low:.4g}, {figures.high:.4g}]"
        elif split in entry.means:
            mean, spread = entry.means[split]
            cells[split] = f"{mean:.4g} ± {spread:.2g}"
        else:
            cells[split] = "–"
    last = entries[-1]
    there = "report" in entry.splits and entry is not last
    cells["found, more"] = ""
    if there:
        gain, low, high = paired_difference(last.splits["report"][1], entry.splits["report"][1])
        cells["found, more"] = f"{gain:+.3g} [{low:+.3g}, {high:+.3g}]"
    if "report" in entry.splits:
        failed = entry.splits["report"][0].format_failures
        if not math.isnan(failed):
            cells["format failures"] = f"{failed:.3g}"
    return cells


def _text(loaded: Loaded, entries: list[Entry]) -> str:
    task = loaded.prepared.task
    counts = ", ".join(f"{len(task.splits[split])} {split}" for split, _ in SPLITS)
    text = (
        f"Task {task.name}: {counts} items. Brackets are 95 % intervals over items; differences "
        "are paired, on the report items. Nothing was chosen by the report column."
    )
    majority = entries[0].splits["report"][0].majority
    if not math.isnan(majority):
        text += f" The best constant answer gets {majority:.3g} of the report items."
    return text


# -- costs ----------------------------------------------------------------------------------------


def _costs(loaded: Loaded, folder: Path) -> list[dict[str, str]]:
    rows = []
    source = source_folder(loaded.prepared.options.model)
    for name, where, model in (
        ("before", source, loaded.resident.model),
        ("after", folder, None),
    ):
        size = sum(path.stat().st_size for path in where.glob("*.safetensors"))
        row = {"checkpoint": name, "files": _size(size)}
        if size <= _MOST_BYTES:
            try:
                whole = model or _again(loaded, where)
                row["weights in memory"] = _size(weights_of(whole))
                row["tokens/s, prompts"] = f"{_speed(loaded, whole):.4g}"
                row["tokens/s, answers"] = f"{answer_speed(loaded, whole):.4g}"
            except SearchlabError as error:
                row["tokens/s, prompts"] = str(error)
        rows.append(row)
    return rows


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count / 1024:.4g} KiB"


def _again(loaded: Loaded, folder: Path) -> Any:
    options = loaded.prepared.options
    device = str(next(loaded.resident.model.parameters()).device)
    return load_model(open_model(str(folder)), dtype=options.dtype, device=device)


def _speed(loaded: Loaded, model: Any) -> float:
    """Tokens of search prompts per second through a whole model, best of several passes."""
    import torch

    from searchlab.evaluators.language.batches import left_padded

    prepared = loaded.prepared
    contexts = [prepared.prompts.context(item) for item in prepared.task.of("search")[:16]]
    assert prepared.prompts.pad is not None
    device = next(model.parameters()).device
    ids, mask, positions = (t.to(device) for t in left_padded(contexts, prepared.prompts.pad))
    count, best, begun = sum(map(len, contexts)), math.inf, time.perf_counter()
    passes = 0
    while passes < 3 or (time.perf_counter() - begun < _TIMED_S and passes < 20):
        started = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        passes += 1
    return count / best


def _serving(folder: Path) -> str:
    own = (folder / "searchlab_experts.py").exists()
    trust = " --trust-remote-code" if own else ""
    return f"vllm serve {folder}{trust}"


def _judged(loaded: Loaded, folder: Path) -> list[Section]:
    """What the user's command says of the exported checkpoint, the base and foreign ones."""
    options = loaded.prepared.options
    command = options.final_command()
    if command is None:
        return []
    named = {
        "found": folder,
        "full": source_folder(options.model),
        **{name: Path(where) for name, where in options.foreign().items()},
    }
    said = [judge(command, name, where, timeout_s=options.timeout) for name, where in named.items()]
    return [
        Section(
            "Judged by the command",
            text="Whole checkpoints, by the command that was given.",
            table=[_judgement(one) for one in said],
            pre=command,
        )
    ]


def _judgement(one: Judgement) -> dict[str, str]:
    if one.reason:
        return {"checkpoint": one.name, "failed": one.reason}
    return {"checkpoint": one.name, **{key: f"{value:.5g}" for key, value in one.values.items()}}
