"""The built wheel holds the whole package and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("spaces", "evaluators", "predictors", "cuda_ext", "experiments")

pytestmark = pytest.mark.slow


def files_of_checkout() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """File names in a wheel built from a copy, so that no older build folder can add to it."""
    copy = tmp_path_factory.mktemp("source")
    for name in files_of_checkout():
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    out = tmp_path_factory.mktemp("dist")
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    # Without PYTHONPATH: a folder of the checkout must not shadow the build tool.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("searchlab-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def installed_name(name: str) -> str:
    return f"searchlab/{name}" if name.split("/")[0] in FOLDERS else name


def expected(endings: tuple[str, ...], folders: tuple[str, ...]) -> set[str]:
    return {
        installed_name(name)
        for name in files_of_checkout()
        if name.startswith(folders) and name.endswith(endings)
    }


def test_the_wheel_holds_exactly_the_modules_of_the_tree(names: set[str]) -> None:
    modules = expected((".py",), ("searchlab/", *(f"{folder}/" for folder in FOLDERS)))
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_wheel_is_typed_and_licensed(names: set[str]) -> None:
    assert "searchlab/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_carries_the_model_zoo(names: set[str]) -> None:
    zoo = expected((".safetensors", ".json"), ("experiments/zoo/",))
    assert {n for n in names if n.startswith("searchlab/experiments/zoo/")} >= zoo


def test_the_wheel_installs_one_top_level_package(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"searchlab"}
