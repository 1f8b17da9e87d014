"""Imports every module of an installed searchlab and checks where each one came from."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path


def main(site: str) -> int:
    """Imports all modules below `site`; a module from anywhere else is an error."""
    home = Path(site).resolve()
    package = importlib.import_module("searchlab")
    names = ["searchlab"]
    names += [found.name for found in pkgutil.walk_packages(package.__path__, "searchlab.")]
    for name in names:
        if name.endswith(".__main__"):
            continue
        file = importlib.import_module(name).__file__
        if file is None or not Path(file).resolve().is_relative_to(home):
            print(f"{name} came from {file}, not from {home}", file=sys.stderr)
            return 1
    print(f"{len(names)} modules of the wheel import")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
