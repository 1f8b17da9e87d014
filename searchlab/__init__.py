"""searchlab: gradient-free search over what can change in a trained model after training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from searchlab.algorithms import (
        Evolution,
        Listed,
        ParentRule,
        Race,
        Random,
        Seeds,
        UniformVariation,
    )
    from searchlab.budget import LinearBudget
    from searchlab.callbacks import Progress
    from searchlab.config import AdoptBest, AlgorithmSpec, Budget, Final, SearchConfig, Stage
    from searchlab.constraints import Predicate, Tie
    from searchlab.errors import SearchlabError, SearchlabWarning
    from searchlab.evaluator import Evaluator, Fidelity, FunctionEvaluator, Objective, evaluator
    from searchlab.item_evaluator import ItemEvaluator
    from searchlab.population import Evaluations, Jobs, Population
    from searchlab.result import Result
    from searchlab.search import run, search, verify
    from searchlab.space import Space, space_from_json
    from searchlab.study import Database, MemoryRun
    from searchlab.variables import (
        ActiveBelow,
        ActiveIf,
        Affine,
        Choice,
        Integer,
        Ordered,
        Real,
        Simplex,
        Subset,
    )

__version__ = "0.1.0"

# Names are imported when they are used: nothing heavy is loaded before.
_MODULES: dict[str, tuple[str, ...]] = {
    "searchlab.algorithms": (
        "Evolution",
        "Listed",
        "ParentRule",
        "Race",
        "Random",
        "Seeds",
        "UniformVariation",
    ),
    "searchlab.budget": ("LinearBudget",),
    "searchlab.callbacks": ("Progress",),
    "searchlab.config": ("AdoptBest", "AlgorithmSpec", "Budget", "Final", "SearchConfig", "Stage"),
    "searchlab.constraints": ("Predicate", "Tie"),
    "searchlab.errors": ("SearchlabError", "SearchlabWarning"),
    "searchlab.evaluator": ("Evaluator", "Fidelity", "FunctionEvaluator", "Objective", "evaluator"),
    "searchlab.item_evaluator": ("ItemEvaluator",),
    "searchlab.population": ("Evaluations", "Jobs", "Population"),
    "searchlab.result": ("Result",),
    "searchlab.search": ("run", "search", "verify"),
    "searchlab.space": ("Space", "space_from_json"),
    "searchlab.study": ("Database", "MemoryRun"),
    "searchlab.variables": (
        "ActiveBelow",
        "ActiveIf",
        "Affine",
        "Choice",
        "Integer",
        "Ordered",
        "Real",
        "Simplex",
        "Subset",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ActiveBelow",
    "ActiveIf",
    "AdoptBest",
    "Affine",
    "AlgorithmSpec",
    "Budget",
    "Choice",
    "Database",
    "Evaluations",
    "Evaluator",
    "Evolution",
    "Fidelity",
    "Final",
    "FunctionEvaluator",
    "Integer",
    "ItemEvaluator",
    "Jobs",
    "LinearBudget",
    "Listed",
    "MemoryRun",
    "Objective",
    "Ordered",
    "ParentRule",
    "Population",
    "Predicate",
    "Progress",
    "Race",
    "Random",
    "Real",
    "Result",
    "SearchConfig",
    "SearchlabError",
    "SearchlabWarning",
    "Seeds",
    "Simplex",
    "Space",
    "Stage",
    "Subset",
    "Tie",
    "UniformVariation",
    "__version__",
    "evaluator",
    "run",
    "search",
    "space_from_json",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'searchlab' has no attribute {name!r}")
    module = importlib.import_module(home)
    # Two functions share their module's name; those modules are callable, so that it does not
    # matter which of the two the package shows.
    value = module if home == f"searchlab.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
