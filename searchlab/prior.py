"""Predictors between runs: what a finished run leaves, and how another one begins with it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from searchlab._tau import Tau, tau_of
from searchlab.auto import AUTO
from searchlab.config import (
    PREDICTORS,
    AlgorithmSpec,
    SearchConfig,
    Stage,
    resolve,
    stage_digest,
)
from searchlab.errors import ConfigError, DataError, SearchlabError
from searchlab.predictor_folder import (
    PredictorTask,
    SignalSchema,
    copy_folder,
    describe_task,
    folder_digest,
    put_in_place,
    space_kind,
)

if TYPE_CHECKING:
    from searchlab.algorithms._learner import Final
    from searchlab.loop import StageRun
    from searchlab.predictor import Predictor
    from searchlab.study import Store

__all__ = [
    "LEFT",
    "PriorRequest",
    "keep_prior",
    "kept_prior",
    "leave_all",
    "leave_predictor",
    "with_prior",
]

LEFT = "predictor"  # folder of a run's own predictor, below the run's
BEGUN = "prior"  # folder of the one that it began with
KNOTS = 65  # of a signal's distribution
FALLBACK = ("ridge", "rf", "gbdt")  # members of a stack that are not their data
_META = "prior"
_GUARD = ("guard", "held_out", "online")  # of what an algorithm reports
_SHOWN = 3  # settings that differ, in the line, and values of each
_HASH, _WORD = 16, 32  # letters from which hexadecimals are a hash, and that are shown at most


@dataclass(frozen=True)
class PriorRequest:
    """An earlier predictor that a run is to begin with.

    Attributes:
        folder: of the predictor.
        refit: "never" = it stays as it is, "warm" = fits begin at it, "scratch" = it chooses until
            the first fit, which forgets it.
    """

    folder: Path
    refit: str = "warm"


def with_prior(config: SearchConfig, request: PriorRequest | None) -> SearchConfig:
    """The configuration with guided search that begins with an earlier predictor.

    The last stage gets it: `auto` becomes `guided`, other algorithms are wrapped by it.

    Raises:
        ConfigError: an unknown refit, or a stage that guided search cannot serve.
        DataError: a folder that is none, is damaged, or is of a foreign space.
    """
    if request is None:
        return config
    from searchlab.algorithms._prior import REFITS

    if request.refit not in REFITS:
        raise ConfigError(f"refit {request.refit!r}; allowed: {', '.join(REFITS)}")
    stage = config.stages[-1]
    if stage.trades:
        raise ConfigError("a predictor for several objectives; allowed: with one that steers")
    options = _options(stage, request)
    spec = stage.algorithm
    if spec.name == AUTO:
        spec = AlgorithmSpec("guided", {"prior": options})
    elif spec.name == "guided":
        spec = AlgorithmSpec("guided", {**spec.options, "prior": options})
    else:
        wrapped = {"wraps": spec.name, "options": dict(spec.options)}
        spec = AlgorithmSpec("guided", {**wrapped, "prior": options})
    return replace(config, stages=(*config.stages[:-1], replace(stage, algorithm=spec)))


def _options(stage: Stage, request: PriorRequest) -> dict[str, Any]:
    """The option `prior` of guided search: how the earlier predictor fits this stage."""
    read: Any = resolve({"read": "searchlab.predictors.artifact:read_artifact"}, "read", "reader")
    artifact = read(request.folder)
    space, task = stage.space, artifact.task
    if artifact.fingerprint != space.fingerprint and artifact.kind != space_kind(space):
        raise DataError(
            f"predictor in {str(request.folder)!r} is of space {artifact.kind}; allowed: "
            f"{space_kind(space)}"
        )
    sizes = "same space" if artifact.fingerprint == space.fingerprint else "other sizes"
    what, adapted = "unknown task", True
    if task is not None:
        same = task.evaluator == stage_digest(stage) and (
            task.objective == stage.evaluator.objectives[stage.main].name
        )
        adapted = not same
        other = _differs(task, stage)
        what = f"other task ({other})" if other else "same task"
    use = "adapted" if adapted else "direct"
    known = Tau() if task is None else task.held_out
    return {
        "folder": str(request.folder),
        "digest": folder_digest(request.folder),
        "refit": request.refit,
        "adapted": adapted,
        "trusted": not adapted and known.low > 0,
        "line": f"predictor {artifact.predictor}: {sizes}, {what}: {use}, refit {request.refit}",
    }


def _differs(task: PredictorTask, stage: Stage) -> str:
    """Which settings of the evaluator are others, a few of them; empty = none is."""
    mine = {**stage.evaluator.identity(), "objective": stage.evaluator.objectives[stage.main].name}
    theirs = {**task.identity, "objective": task.objective}
    keys = [key for key in mine if key not in theirs or theirs[key] != _plain(mine[key])]
    shown = [f"{key} {_change(theirs.get(key), _plain(mine[key]))}" for key in keys[:_SHOWN]]
    more = [f"{len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else []
    return ", ".join(shown + more)


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))


def _change(old: Any, new: Any) -> str:
    """What differs between two settings, without what both have, in words."""
    before, after = _leaves(old), _leaves(new)
    if len(before) == len(after):
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        before, after = [a for a, _ in pairs], [b for _, b in pairs]
    else:
        known = set(before) & set(after)
        before = [a for a in before if a not in known]
        after = [b for b in after if b not in known]
    return f"{_words(before)} -> {_words(after)}"


def _leaves(value: Any) -> list[str]:
    """The numbers and words within lists and mappings, in their order."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in _leaves(value[key])]
    if isinstance(value, list):
        return [leaf for part in value for leaf in _leaves(part)]
    text = "none" if value is None else str(value)
    hashed = len(text) >= _HASH and not set(text) - set("0123456789abcdef")
    return [text[:8] if hashed else text if len(text) <= _WORD else f"{text[: _WORD - 3]}..."]


def _words(leaves: list[str]) -> str:
    shown = leaves[:_SHOWN] + ([f"{len(leaves) - _SHOWN} more"] if len(leaves) > _SHOWN else [])
    return " and ".join(shown) or "nothing"


# -- in a run -----------------------------------------------------------------------------------


def keep_prior(config: SearchConfig, store: Store, folder: Path) -> None:
    """Copies the predictor that a run begins with into its folder, and notes it in the run."""
    options = config.stages[-1].algorithm.options.get("prior")
    if options is None:
        return
    copy_folder(Path(options["folder"]), folder / BEGUN)
    store.set_meta(_META, {"digest": options["digest"], "refit": options["refit"]})


def kept_prior(note: Mapping[str, Any] | None, folder: Path) -> PriorRequest | None:
    """What a run began with; `note` is its meta "prior"."""
    if note is None:
        return None
    return PriorRequest(folder / BEGUN, str(note["refit"]))


def leave_predictor(
    stage: Stage, final: Final, folder: Path, *, guard: Mapping[str, Any], seed: int, run: str,
    with_data: bool = False,
) -> str:  # fmt: skip
    """Saves what a search has learnt as `folder`/predictor; returns a line that says so.

    A predictor that is its data (`gp`) is not saved without it: a stack of the others, fitted to
    the same labels, is left instead.

    Raises:
        DataError: the folder cannot be written to.
    """
    predictor, held, instead = final.predictor, final.held_out, ""
    fresh = folder / f".{LEFT}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        predictor.save(fresh, with_data=with_data)
    except ConfigError:
        predictor, instead = _without_data(predictor)
        predictor.fit(final.table, final.losses, seed=seed % 2**32, pool=final.pool)
        own = getattr(predictor, "held_out", lambda: None)()
        held = np.full(len(final.losses), np.nan) if own is None else own
        predictor.save(fresh, with_data=with_data)
    objective = stage.evaluator.objectives[stage.main]
    task = PredictorTask(
        evaluator=stage_digest(stage),
        identity=stage.evaluator.identity(),
        objective=objective.name,
        direction=objective.direction,
        fidelity=stage.evaluator.fidelities[stage.fidelity_index].name,
        labels=_statistics(stage.sign * final.losses[np.isfinite(final.losses)], stage.sign),
        held_out=tau_of(held, final.losses),
        guard=guard,
        signals=_schema(stage, final),
        seed=seed,
        run=run,
    )
    describe_task(fresh, task)
    try:
        put_in_place(fresh, folder / LEFT)
    except OSError as error:
        raise DataError(f"cannot keep a predictor in {str(folder)!r}: {error}") from None
    return f"predictor {predictor.name} left in {folder / LEFT}{instead}: {task.held_out}"


def _without_data(predictor: Predictor) -> tuple[Predictor, str]:
    """What is fitted in place of a predictor that is its data, and how that is said."""

    def stack() -> Predictor:
        made: Predictor = resolve(PREDICTORS, "stack", "predictor")(members=FALLBACK)
        return made

    storable = getattr(predictor, "storable", None)
    if storable is not None:
        return storable(stack), " with a stack in place of what is its data"
    return stack(), f" in place of {predictor.name}, which is its data"


def _statistics(values: Any, sign: float) -> dict[str, float]:
    best, worst = (values.min(), values.max()) if sign > 0 else (values.max(), values.min())
    return {
        "n": len(values),
        "best": float(best),
        "median": float(np.median(values)),
        "worst": float(worst),
        "mean": float(values.mean()),
        "sd": float(values.std()),
    }


def _schema(stage: Stage, final: Final) -> tuple[SignalSchema, ...]:
    """The signals of the table, as far as their values go among what was learnt from."""
    declared = {signal.name: signal for signal in stage.evaluator.signals}
    out = []
    columns = final.pool.signals
    for at, name in enumerate(final.table.signal_names):
        column = columns[:, at]
        column = column[np.isfinite(column)]
        knots = np.quantile(column, np.linspace(0, 1, KNOTS)) if len(column) else column
        signal = declared.get(name)
        out.append(
            SignalSchema(
                name,
                final.table.directions[at],
                "" if signal is None else signal.unit,
                0.0 if signal is None else signal.cost_s,
                tuple(float(knot) for knot in knots),
            )
        )
    return tuple(out)


def leave_all(legs: Sequence[StageRun], folder: Path, *, with_data: bool) -> list[str]:
    """Leaves what the stages of a finished run have learnt, the last one's in place of the others'.

    A search that has come to its end is not lost over a predictor: why there is none is said.

    Returns:
        A line for each stage that has learnt something.
    """
    lines = []
    for leg in legs:
        final = getattr(leg.algorithm, "final", lambda: None)()
        if final is None:
            continue
        state = leg.algorithm.report()
        guard = {key: part for key, part in state.items() if key in _GUARD}
        try:
            lines.append(
                leave_predictor(
                    leg.stage,
                    final,
                    folder,
                    guard=guard,
                    seed=leg.algorithm.seed,
                    run=leg.store.name,
                    with_data=with_data,
                )
            )
        except (SearchlabError, OSError) as error:
            lines.append(f"no predictor left: {error}")
    return lines
