"""What this installation can do: versions, devices, extras, the database."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path

from searchlab import __version__

__all__ = ["report_lines"]

PACKAGES = (
    "numpy",
    "scipy",
    "torch",
    "optuna",
    "pymoo",
    "scikit-learn",
    "ray",
    "pandas",
    "SQLAlchemy",
    "safetensors",
    "matplotlib",
    "diffusers",
    "transformers",
)


def report_lines(database: str | None = None) -> list[str]:
    """One line per finding; never raises."""
    lines = [
        f"searchlab {__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores"
    ]
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    lines.append("packages: " + ", ".join(found))
    if missing:
        lines.append(
            "not installed: "
            + ", ".join(missing)
            + ' (diffusers and transformers come with "searchlab[diffusers]")'
        )
    lines.append(_devices())
    lines.append(importlib.import_module("searchlab.cuda_ext.library").report_line())
    lines.append(_zoo())
    lines.append(_database(database))
    return lines


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"devices: cpu, torch uses {torch.get_num_threads()} threads"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "devices: " + ", ".join(names)


def _zoo() -> str:
    if importlib.util.find_spec("searchlab.experiments.zoo.digits") is None:
        return "bundled models: none"
    try:
        module = importlib.import_module("searchlab.experiments.zoo.digits")
        module.load_digits_denoiser()
        module.load_digits_classifier()
    except Exception as error:  # a report names what is wrong instead of stopping at it
        return f"bundled models: {error}"
    return "bundled models: digits denoiser and classifier, hashes hold"


def _database(database: str | None) -> str:
    from searchlab.errors import SearchlabError
    from searchlab.runs import DEFAULT_DATABASE
    from searchlab.study import Database

    where = database or DEFAULT_DATABASE
    if "://" not in where and not Path(where).is_file():
        return f"database: none at {where} yet"
    try:
        start = time.perf_counter()
        base = Database(where)
        runs = base.runs()
        base.close()
    except SearchlabError as error:
        return f"database: {error}"
    return (
        f"database: {where}, {len(runs)} runs, opened in "
        f"{(time.perf_counter() - start) * 1e3:.0f} ms"
    )
