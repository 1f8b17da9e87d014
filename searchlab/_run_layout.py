"""What is needed to read a run's records without the code that made it: kept in the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from searchlab.errors import SearchlabError, StudyError
from searchlab.evaluator import Objective
from searchlab.space import Space, space_from_json

if TYPE_CHECKING:
    from searchlab.config import SearchConfig

__all__ = ["LAYOUT", "Bound", "Layout", "StageLayout", "layout_from", "layout_of", "read_layout"]

LAYOUT = "layout"


@dataclass(frozen=True)
class Bound:
    """An outcome constraint: its column is at most ("<=") or at least (">=") the bound."""

    name: str
    bound: float
    sense: str

    def violation(self, value: float) -> float:
        """How far a value is on the wrong side; zero or less where it is allowed."""
        return self.bound - value if self.sense == ">=" else value - self.bound


@dataclass(frozen=True)
class StageLayout:
    """One stage: what its rows mean.

    Attributes:
        name: as in tables.
        space: its variables; budgets and a domain's own forms are left out.
        objectives: they name the columns of the values.
        fidelities: names, the truth last.
        fidelity: index of the stage's own.
        signals: names of the columns of the signals.
        bounds: outcome constraints; empty where columns are bare violations.
        digest: equal in stages whose values can be compared.
    """

    name: str
    space: Space
    objectives: tuple[Objective, ...]
    fidelities: tuple[str, ...]
    fidelity: int
    signals: tuple[str, ...]
    bounds: tuple[Bound, ...]
    digest: str


@dataclass(frozen=True)
class Layout:
    """All stages of a run, in order; a final's records have the last one's."""

    stages: tuple[StageLayout, ...]

    def of(self, stage: int) -> StageLayout:
        return self.stages[min(stage, len(self.stages) - 1)]

    @property
    def spaces(self) -> list[Space]:
        return [stage.space for stage in self.stages]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return self.stages[-1].objectives


def layout_of(config: SearchConfig) -> dict[str, Any]:
    """The layout of a configuration as JSON."""
    from searchlab.config import stage_digest

    out = []
    for stage in config.stages:
        evaluator = stage.evaluator
        constraints = getattr(evaluator, "constraints", ())
        out.append(
            {
                "name": stage.name,
                "variables": stage.space.to_json()["variables"],
                "objectives": [[o.name, o.direction, o.unit] for o in evaluator.objectives],
                "fidelities": [fidelity.name for fidelity in evaluator.fidelities],
                "fidelity": stage.fidelity_index,
                "signals": [signal.name for signal in evaluator.signals],
                "constraints": [[c.name, c.bound, c.sense] for c in constraints],
                "digest": stage_digest(stage),
            }
        )
    return {"stages": out}


def read_layout(data: Any, run: str) -> Layout | None:
    """The layout that a run keeps under `LAYOUT`; None for a run that has none.

    Raises:
        StudyError: it cannot be read.
    """
    try:
        return None if data is None else layout_from(data)
    except (SearchlabError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise StudyError(f"the layout of run {run!r} is damaged") from None


def layout_from(data: Mapping[str, Any]) -> Layout:
    """The layout that `layout_of` described."""
    stages = tuple(_stage(part) for part in data["stages"])
    if not stages:
        raise ValueError("a layout without stages")
    return Layout(stages)


def _stage(part: Mapping[str, Any]) -> StageLayout:
    return StageLayout(
        name=str(part["name"]),
        space=space_from_json({"variables": part["variables"]}),
        objectives=tuple(Objective(str(n), d, unit=str(u)) for n, d, u in part["objectives"]),
        fidelities=tuple(map(str, part["fidelities"])),
        fidelity=int(part["fidelity"]),
        signals=tuple(map(str, part["signals"])),
        bounds=tuple(Bound(str(n), float(b), str(s)) for n, b, s in part["constraints"]),
        digest=str(part["digest"]),
    )
