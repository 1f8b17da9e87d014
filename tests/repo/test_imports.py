"""What the repository promises about itself: who imports whom, what is loaded, what is shipped."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = "searchlab"
FOLDERS = ("spaces", "evaluators", "predictors", "cuda_ext", "experiments")
ALLOWED = {
    ENGINE: {ENGINE},
    "spaces": {"spaces", ENGINE, "cuda_ext"},
    "evaluators": {"evaluators", ENGINE, "spaces", "cuda_ext"},
    "predictors": {"predictors", ENGINE},
    "cuda_ext": {"cuda_ext"},
    "experiments": {"experiments", ENGINE, "spaces", "evaluators", "predictors", "cuda_ext"},
}
HEAVY = (
    "torch",
    "scipy",
    "sqlalchemy",
    "pandas",
    "optuna",
    "pymoo",
    "ray",
    "sklearn",
    "matplotlib",
    "diffusers",
    "transformers",
)
IMPORT_SECONDS = 0.3
MAX_LINES = 600


def modules_of(folder: str) -> list[Path]:
    """The Python files of one folder; links inside it belong to other folders."""
    found = []
    for directory, subfolders, files in os.walk(ROOT / folder, followlinks=False):
        subfolders[:] = sorted(name for name in subfolders if name != "__pycache__")
        found += [Path(directory) / name for name in sorted(files) if name.endswith(".py")]
    return found


MODULES = [path for folder in (ENGINE, *FOLDERS) for path in modules_of(folder)]
TESTS = modules_of("tests")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """The dotted name under which a file is installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in FOLDERS:
        parts.insert(0, ENGINE)
    return ".".join(parts)


def imported(tree: ast.AST, name: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module, at any depth."""
    package = name.split(".")[:-1]  # of `a.b` and of `a.__init__` alike
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*stem, alias.name])


def group_of(dotted: str) -> str | None:
    """Which folder an imported name belongs to; None outside this project."""
    parts = dotted.split(".")
    if parts[0] in FOLDERS:
        return parts[0]
    if parts[0] != ENGINE:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else ENGINE


def wrong_edges(source: str, name: str, folder: str) -> list[str]:
    """Imports of one module that its folder may not have."""
    out = []
    for line, dotted in imported(ast.parse(source), name):
        group = group_of(dotted)
        top = dotted.split(".")[0]
        if group is not None and group not in ALLOWED[folder]:
            out.append(f"line {line}: {dotted}")
        elif folder == "cuda_ext" and group is None:
            if top not in sys.stdlib_module_names and top not in ("torch", "numpy"):
                out.append(f"line {line}: {dotted}")
        elif top in FOLDERS:
            out.append(f"line {line}: {dotted} (installed as searchlab.{top})")
    return out


@pytest.mark.parametrize("folder", [ENGINE, *FOLDERS])
def test_imports_only_point_down(folder: str) -> None:
    wrong = {
        relative(path): edges
        for path in modules_of(folder)
        if (edges := wrong_edges(path.read_text("utf-8"), module_name(path), folder))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "name", "source"),
    [
        (ENGINE, "searchlab.loop", "import searchlab.spaces.toy"),
        (ENGINE, "searchlab.loop", "from searchlab import evaluators"),
        (ENGINE, "searchlab.loop", "def f():\n    from .spaces import toy"),
        (ENGINE, "searchlab.algorithms.guided", "from ..predictors import base"),
        ("spaces", "searchlab.spaces.toy", "from searchlab.evaluators import x"),
        ("predictors", "searchlab.predictors.base", "from ..spaces.toy import x"),
        ("evaluators", "searchlab.evaluators.base", "import searchlab.predictors"),
        ("cuda_ext", "searchlab.cuda_ext.ops", "from searchlab.errors import DataError"),
        ("cuda_ext", "searchlab.cuda_ext.ops", "import scipy.special"),
        ("experiments", "searchlab.experiments.solver", "import spaces"),
    ],
)
def test_a_forbidden_import_is_found(folder: str, name: str, source: str) -> None:
    assert wrong_edges(source, name, folder)


@pytest.mark.parametrize(
    ("folder", "name", "source"),
    [
        (ENGINE, "searchlab.registry", 'SPACES = {"toy": "searchlab.spaces.toy:Toy"}'),
        (ENGINE, "searchlab.algorithms.__init__", "from .evolution import Evolution"),
        ("spaces", "searchlab.spaces.toy", "from searchlab.cuda_ext import ops"),
        ("cuda_ext", "searchlab.cuda_ext.ops", "from . import build\nimport torch, ctypes"),
        ("experiments", "searchlab.experiments.solver", "from searchlab.predictors import base"),
    ],
)
def test_an_allowed_import_passes(folder: str, name: str, source: str) -> None:
    assert not wrong_edges(source, name, folder)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


HELP = "import sys; sys.argv = ['searchlab', '--help']; from searchlab.cli import main; main()"
LOADED = "import atexit, sys; atexit.register(lambda: print(*sorted(sys.modules), file=sys.stderr))"


def loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules when a process that ran the statement ends."""
    done = python("-c", f"{LOADED}; {statement}")
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stderr.split()}


def seconds_above_bare_python(*arguments: str) -> float:
    """Median wall time of five processes, less that of five `python -c pass`, taken in turn."""
    times: dict[tuple[str, ...], list[float]] = {("-c", "pass"): [], arguments: []}
    for command in times:
        assert python(*command).returncode == 0  # fills the byte-code and file caches
    for _ in range(5):
        for command, taken in times.items():
            start = time.perf_counter()
            python(*command)
            taken.append(time.perf_counter() - start)
    bare, full = (statistics.median(taken) for taken in times.values())
    return full - bare


def test_import_searchlab_loads_nothing_heavy() -> None:
    assert not loaded_by("import searchlab") & set(HEAVY)


def test_help_loads_nothing_heavy() -> None:
    assert not loaded_by(HELP) & set(HEAVY)


def test_import_searchlab_is_quick() -> None:
    assert seconds_above_bare_python("-c", "import searchlab") < IMPORT_SECONDS


def test_help_is_quick() -> None:
    assert seconds_above_bare_python("-c", HELP) < IMPORT_SECONDS


def test_python_m_searchlab_prints_the_help() -> None:
    done = python("-m", "searchlab", "--help")
    assert done.returncode == 0, done.stderr
    assert "run" in done.stdout


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def setuptools_table() -> dict[str, object]:
    tool = project()["tool"]
    assert isinstance(tool, dict)
    table = tool["setuptools"]
    assert isinstance(table, dict)
    return table


def test_packages_in_pyproject_are_those_of_the_tree() -> None:
    packages = {module_name(path)[: -len(".__init__")] for path in MODULES if is_package(path)}
    listed = setuptools_table()["packages"]
    assert isinstance(listed, list)
    assert sorted(listed) == sorted(packages)


def is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def test_every_module_lies_in_a_package() -> None:
    orphans = [relative(p) for p in MODULES if not (p.parent / "__init__.py").is_file()]
    assert not orphans


def test_package_dir_maps_every_folder() -> None:
    mapping = {ENGINE: ENGINE, **{f"{ENGINE}.{folder}": folder for folder in FOLDERS}}
    assert setuptools_table()["package-dir"] == mapping


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_are_relative(folder: str) -> None:
    link = ROOT / ENGINE / folder
    assert link.is_symlink()
    assert link.readlink().as_posix() == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()


FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.load",
    "numpy.load",
    "np.load",
    "os.system",
    "os.popen",
}
# The one form of numpy.load that cannot run code.
SAFE_WITH = {"np.load": "allow_pickle", "numpy.load": "allow_pickle"}


def dotted_name(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return ""


def unsafe(source: str) -> list[str]:
    """Code in a module that could run what a file from outside says."""
    out = []
    tree = ast.parse(source)
    for line, name in imported(tree, "searchlab.x"):
        if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS:
            out.append(f"line {line}: {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted_name(node.func)
        if name in FORBIDDEN_CALLS:
            safe = SAFE_WITH.get(name)
            off = any(k.arg == safe and is_constant(k.value, False) for k in node.keywords)
            if not (safe and off):
                out.append(f"line {node.lineno}: {name}(...)")
        for keyword in node.keywords:
            if keyword.arg == "shell" and not is_constant(keyword.value, False):
                out.append(f"line {node.lineno}: {name}(shell=...)")
            if keyword.arg in ("allow_pickle", "trust_remote_code") and not is_constant(
                keyword.value, False
            ):
                out.append(f"line {node.lineno}: {name}({keyword.arg}=...)")
    return out


def is_constant(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_runs_what_a_file_says() -> None:
    found = {relative(p): bad for p in MODULES if (bad := unsafe(p.read_text("utf-8")))}
    # Messages between a run's own processes are no files; they are made and read in one module.
    messages = found.pop("searchlab/executors/_channel.py")
    assert {text.split(": ")[1] for text in messages} <= {"pickle", "pickle.loads(...)"}
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import dump",
        "def f(x):\n    return eval(x)",
        "exec(code)",
        "yaml.load(text)",
        "torch.load(path)",
        "from torch import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "import os; os.system('ls')",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=flag)",
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "yaml.safe_load(text)",
        "np.load(p, allow_pickle=False)",
        "run(c, shell=False)",
    ],
)
def test_safe_code_passes(source: str) -> None:
    assert not unsafe(source)


TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".json", ".cu", ".cuh", ".h", ""}
# Written in pieces, so that this file does not hold what it looks for.
PATTERNS = {
    "a machine's path": "/" + r"(?:work|root)" + "/",
    "a home folder": "/" + r"(?:home|Users)" + r"/[A-Za-z]\w*/",
    "a package host": r"https?://\S*" + r"(?:py" + r"pi|python" + r"hosted|anaconda\.org)",
    "a package host's name": r"\b(?:files\.python" + r"hosted|download\.py" + r"torch)\.org",
    "a package index option": r"--(?:extra-)?index" + r"-url",
}


def tracked_files() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    files = [ROOT / name for name in names if name]
    return [path for path in files if path.is_file() and not path.is_symlink()]


def test_no_file_names_a_machine_or_a_package_host() -> None:
    found = []
    for path in tracked_files():
        if path.suffix not in TEXT:
            continue
        text = path.read_text("utf-8")
        found += [
            f"{relative(path)}: {what}: {match.group()}"
            for what, pattern in PATTERNS.items()
            if (match := re.search(pattern, text))
        ]
    assert not found


def test_the_patterns_find_what_they_name() -> None:
    samples = {
        "a machine's path": "open('/" + "work/main')",
        "a home folder": "/" + "home/ann/models",
        "a package host": "https://" + "pypi" + ".org/simple",
        "a package host's name": "files.python" + "hosted.org",
        "a package index option": "pip install --extra-index" + "-url",
    }
    assert {k for k, text in samples.items() if re.search(PATTERNS[k], text)} == set(PATTERNS)


def test_every_module_has_a_docstring() -> None:
    bare = [relative(p) for p in MODULES if not ast.get_docstring(ast.parse(p.read_text("utf-8")))]
    assert not bare


def test_no_module_is_longer_than_the_limit() -> None:
    lengths = {relative(p): len(p.read_text("utf-8").splitlines()) for p in (*MODULES, *TESTS)}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}
