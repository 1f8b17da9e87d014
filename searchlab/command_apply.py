"""`searchlab apply`: a plan that was found for one model, applied to another one's files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from searchlab.errors import ConfigError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    text = "apply a plan to a model of the same shape, such as a fine-tuned one"
    parser = commands.add_parser("apply", help=text, description=text, allow_abbrev=False)
    parser.set_defaults(action=_apply)
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or the folder of an export")
    parser.add_argument("directory", metavar="DIR", help="folder for what comes out")
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="the model: its folder or id"
    )
    parser.add_argument("--recipe", default="experts", help="whose plan it is (experts)")
    parser.add_argument("--dequantize", metavar="DTYPE", help="bf16: write plain weights")
    parser.add_argument("--family", metavar="FILE", help="a family's table of one's own")


def _apply(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.recipes import load_recipe
    from searchlab.runs import check_folder

    recipe = load_recipe(options.recipe)
    if recipe.apply is None:
        raise ConfigError(f"plans of {recipe.name!r} are not applied to files; allowed: experts")
    directory = Path(options.directory)
    check_folder(directory)
    written = recipe.apply(
        Path(options.plan),
        options.model,
        directory,
        dequantize=options.dequantize,
        family=options.family,
    )
    for path in written:
        print(path)
    return 0
