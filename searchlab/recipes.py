"""Recipes: named searches that join a space, an evaluator and an algorithm from plain options."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from searchlab.config import SearchConfig
    from searchlab.report import Section
    from searchlab.result import Result

__all__ = ["ALIASES", "RECIPES", "Recipe", "load_recipe", "options_from", "read_config_file"]

RECIPES: dict[str, str] = {
    "ask": "searchlab.experiments.command:ASK",
    "checkpoint_mix": "searchlab.experiments.checkpoint_mix:RECIPE",
    "command": "searchlab.experiments.command:RECIPE",
    "experts": "searchlab.experiments.experts:RECIPE",
    "flasheval": "searchlab.experiments.flasheval:RECIPE",
    "nasbench201": "searchlab.experiments.table:NASBENCH201",
    "solver_schedule": "searchlab.experiments.solver_schedule:RECIPE",
    "table": "searchlab.experiments.table:RECIPE",
}
ALIASES: dict[str, str] = {
    "eep": "experts",
    "lcsc": "checkpoint_mix",
    "s3": "solver_schedule",
    "usf": "solver_schedule",
}

# Options that may differ between the runs of one name: they do not change the trace's prefix.
GROWABLE = ("budget", "gpu_price", "target")


@dataclass(frozen=True)
class Recipe:
    """A named search.

    Attributes:
        name: after what varies, like the files in `spaces/`.
        summary: one line for the help.
        options: a frozen dataclass of JSON values; its fields are the recipe's flags, each with
            `metadata={"help": ...}`; validates itself.
        build: options -> configuration. May load models, and must do every check that does not
            need an evaluation.
        sections: further report sections.
        export: (result, directory, form) -> files; form is a value of `--to`, "" for the default.
        apply: (plan file, model, folder to write, dequantize=, family=) -> files; None = plans are
            not applied to files.
        opens_only: a run is only opened; values come by `searchlab tell`.
    """

    name: str
    summary: str
    options: type[Any]
    build: Callable[[Any], SearchConfig]
    sections: Callable[[SearchConfig, Result], Sequence[Section]] | None = None
    export: Callable[[SearchConfig, Result, Path, str], list[Path]] | None = None
    opens_only: bool = False
    apply: Callable[..., list[Path]] | None = None


def load_recipe(name: str) -> Recipe:
    """The recipe of a name or an alias; recipes of other packages come by entry point.

    Raises:
        ConfigError: unknown name; lists the known ones.
    """
    from searchlab.config import resolve

    found = resolve({**RECIPES, **_aliased()}, name, "recipe")
    if not isinstance(found, Recipe):
        raise ConfigError(f"recipe {name!r} is {found!r}; allowed: a Recipe")
    return found


def _aliased() -> dict[str, str]:
    return {alias: RECIPES[name] for alias, name in ALIASES.items()}


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file (safe_load; a mapping of option names).

    Raises:
        ConfigError: missing, unreadable or not a mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r}: {error.strerror or error}") from None
    except Exception as error:  # a tag such as !!timestamp raises whatever its text leads to
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"config file {str(path)!r} is not YAML: {line}") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"config file {str(path)!r}; allowed: a mapping of option names")
    return {key.replace("-", "_"): value for key, value in data.items()}


def options_from(recipe: Recipe, values: Mapping[str, Any]) -> Any:
    """The recipe's options from a mapping of names to values or texts.

    Raises:
        ConfigError: an unknown name, or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(recipe.options)}
    hints = typing.get_type_hints(recipe.options)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_name(f"option of {recipe.name}", name, fields)
        converted[name] = convert(name, value, hints[name])
    return recipe.options(**converted)


def convert(name: str, value: Any, hint: Any) -> Any:
    """One option value in its declared type.

    That is bool, int, float, str, or one of these or None, or a tuple of texts.
    """
    if hint == tuple[str, ...]:
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(name, part, str) for part in parts)
    kinds = [hint]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = list(typing.get_args(hint))
        if value is None and type(None) in kinds:
            return None
        kinds = [kind for kind in kinds if kind is not type(None)]
    if len(kinds) > 1:  # the first that reads the value
        for kind in kinds[:-1]:
            with suppress(ConfigError):
                return convert(name, value, kind)
    kind = kinds[-1]
    if typing.get_origin(kind) is typing.Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise ConfigError(f"{name} {value!r}; allowed: {', '.join(map(str, allowed))}")
        return value
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            return words[str(value).lower()]
        if kind is int:
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            return int(value)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        if isinstance(value, bool | list | dict):
            raise ValueError
        return str(value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise ConfigError(f"{name} {value!r}; allowed: {kind.__name__}") from None


def repeatable(recipe: Recipe) -> set[str]:
    """Names of the options that may be given several times."""
    hints = typing.get_type_hints(recipe.options)
    return {name for name, hint in hints.items() if hint == tuple[str, ...]}


def flags_of(recipe: Recipe) -> list[tuple[str, str, Any, bool]]:
    """(field name, help, default, is boolean) for every option of a recipe."""
    hints = typing.get_type_hints(recipe.options)
    out = []
    for field in dataclasses.fields(recipe.options):
        default = None if field.default is dataclasses.MISSING else field.default
        text = field.metadata.get("help", "")
        out.append((field.name, text, default, hints[field.name] is bool))
    return out
