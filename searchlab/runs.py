"""Run folders: where a run's artefacts lie, and how a name or a folder leads back to the run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab._live import LiveStatus
from searchlab._looking import looking
from searchlab._study_lease import keep_alive
from searchlab._study_schema import without_password
from searchlab.errors import ConfigError, DataError, StudyError
from searchlab.recipes import Recipe, load_recipe, options_from

if TYPE_CHECKING:
    from searchlab._study_schema import Durability
    from searchlab.config import SearchConfig
    from searchlab.executors import Executor
    from searchlab.loop import Callback
    from searchlab.result import Result
    from searchlab.study import Store

__all__ = [
    "DEFAULT_DATABASE",
    "Opened",
    "RunAddress",
    "check_folder",
    "find_run",
    "open_config",
    "run_in_database",
    "run_recipe",
    "write_artefacts",
    "write_text",
]

DEFAULT_DATABASE = "runs/searchlab.db"
RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunAddress:
    """Where a run is: its name, its database and its folder."""

    name: str
    database: str
    out: Path


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing. Raises StudyError naming the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            mask = os.umask(0)  # there is no other way to read it
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StudyError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def find_run(name: str, database: str | None = None, *, writes: bool = True) -> RunAddress:
    """The run of a name or of a folder.

    Args:
        name: of a run, or a run's folder.
        database: where to look; the folder's, else the default one.
        writes: something is to be put into the run's folder, which then has to be its own.

    Raises:
        ConfigError: neither a run folder nor a run of the database; lists the known ones.
        DataError: the run names a folder that is not its own, and something is to be put there.
    """
    folder = Path(name)
    if (folder / RUN_FILE).is_file():
        return _read_address(folder, database)
    under = Path("runs") / name
    if database is None and (under / RUN_FILE).is_file():
        return _read_address(under, None)
    where = database or DEFAULT_DATABASE
    if "://" not in where and not Path(where).is_file():
        raise ConfigError(f"no run {name!r}: no such folder, and no database at {where!r}")
    from searchlab.study import Database

    base = Database(where)
    try:
        for info in base.runs():
            if info.name == name:
                out = Path(info.out)
                return RunAddress(name, where, _own_folder(out, name) if writes else out)
        known = ", ".join(info.name for info in base.runs()) or "none"
    finally:
        base.close()
    raise ConfigError(f"no run {name!r} in {where!r}; known: {known}")


def _own_folder(out: Path, name: str) -> Path:
    """The folder that a database names for a run, where it is that run's or a new one below here.

    Raises:
        DataError: a folder elsewhere, which a database from a stranger could name to have files
            written into it.
    """
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if json.loads((out / RUN_FILE).read_text("utf-8"))["name"] == name:
            return out
    here = Path.cwd().resolve()
    resolved = out.resolve()
    new = not resolved.exists() or (resolved.is_dir() and not any(resolved.iterdir()))
    if not (new and resolved != here and resolved.is_relative_to(here)):
        raise DataError(
            f"run {name!r} names the folder {str(out)!r}, which is not its own; give the run's "
            "folder instead of its name"
        )
    return out


def _read_address(folder: Path, given: str | None) -> RunAddress:
    path = folder / RUN_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        name, database = data["name"], data["database"]
        if not isinstance(name, str) or not isinstance(database, str):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{str(path)!r} is not a run file; allowed: name and database") from None
    if "://" in database and not database.startswith("sqlite:"):
        # Whoever made the folder must not choose the server to which a password is sent.
        if given is None:
            raise ConfigError(
                f"run {name!r} is kept on the server {without_password(database)!r}; to go there, "
                "say so: --database URL"
            )
        return RunAddress(name, given, folder)
    if "://" not in database and not Path(database).is_absolute():
        database = str((folder / database).resolve())
    return RunAddress(name, database, folder)


@dataclass
class Opened:
    """A run's configuration as its database tells it."""

    address: RunAddress
    recipe: Recipe
    options: Any
    config: SearchConfig
    pace: Mapping[str, Any] | None = None


def open_config(
    address: RunAddress, *, changes: Mapping[str, Any] | None = None, going_on: bool = False
) -> Opened:
    """Rebuilds the configuration of a stored run.

    Args:
        address: which run.
        changes: options that may grow (the budget).
        going_on: the run is to be resumed, so that code which its options name is imported; else
            it may be anybody's, and is only looked at.

    Raises:
        StudyError: a run that was made from Python; only the code that made it can go on with it.
    """
    from searchlab._kept_seeds import META
    from searchlab.prior import kept_prior, with_prior
    from searchlab.study import Database

    base = Database(address.database)
    try:
        store = base.read(address.name)
        recipe_name, options = store.get_meta("recipe"), store.get_meta("options")
        pace, prior = store.get_meta("pace"), store.get_meta("prior")
        warm_start, kept = store.get_meta("warm_start"), store.get_meta(META)
        store.close("")
    finally:
        base.close()
    if not recipe_name:
        raise StudyError(
            f"run {address.name!r} was made from Python; call searchlab.search again with the same "
            "arguments to go on with it"
        )
    recipe = load_recipe(recipe_name)
    values = options_from(recipe, {**(options or {}), **(changes or {})})
    # What a run keeps of an earlier one stands for it: that one may have gone on, or be gone.
    own = getattr(values, "warm_start", None) if kept is not None else None
    with looking(not going_on):
        config = recipe.build(values if own is None else replace(values, warm_start=None))
    if own is not None:
        config = replace(config, options=asdict(values))
        warm_start = own
    if warm_start is not None:
        from searchlab.warm_start import with_warm_start

        config = with_warm_start(config, warm_start, kept=kept)
    config = with_prior(config, kept_prior(prior, address.out))
    return Opened(address, recipe, values, config, pace)


def run_recipe(
    recipe: Recipe,
    options: Any,
    *,
    name: str,
    out: Path,
    database: str,
    callbacks: Sequence[Callback] = (),
    config: SearchConfig | None = None,
    executor: Executor | None = None,
    opened: Callable[[], None] = lambda: None,
    durability: Durability = "process",
    with_data: bool = False,
    warm_start: str | None = None,
) -> Result:
    """Runs or resumes a recipe under a name; `write_artefacts` writes what belongs to the result.

    Args:
        recipe, options: what to run.
        name, out, database: where it is kept.
        callbacks: see `searchlab.search.run`.
        config: of the recipe and the options, where it was built before.
        executor: where candidates are evaluated; this process by default.
        opened: called when the run is open: errors before it are about the input.
        durability: what a commit waits for; see `Database`.
        with_data: the predictor that is left keeps what it was fitted to.
        warm_start: the run whose best `config` begins with, to be found again by a resume.

    Raises:
        SearchlabError: see `searchlab.search.run`; RunInUseError where another process runs it.
    """
    from searchlab._kept_seeds import keep_seeds, with_kept_seeds
    from searchlab.prior import keep_prior
    from searchlab.search import run

    config = with_kept_seeds(config or recipe.build(options), database, name)
    with _open_run(config, name, out, database, durability) as store:
        store.set_meta("recipe", recipe.name)
        store.set_meta("options", asdict(options))
        for stage in config.stages:
            place = getattr(stage.evaluator, "place", None)
            if place is not None:
                place(out)
        keep_prior(config, store, out)
        keep_seeds(config, store)
        if warm_start is not None:
            store.set_meta("warm_start", warm_start)
        _place_logs(executor, out)
        opened()
        live = LiveStatus(executor)
        with live.kept(store):
            result = run(
                config,
                store=store,
                executor=executor,
                callbacks=(live, *callbacks),
                folder=out,
                with_data=with_data,
            )
    result.out = out
    return result


def run_in_database(
    config: SearchConfig,
    *,
    name: str,
    out: Path,
    database: str,
    executor: Executor | None = None,
    callbacks: Sequence[Callback] = (),
    with_data: bool = False,
) -> Result:
    """Runs or resumes a search that was made in Python, and writes its artefacts.

    Raises:
        SearchlabError: see `run_recipe`.
    """
    from searchlab._kept_seeds import keep_seeds, with_kept_seeds
    from searchlab.prior import keep_prior
    from searchlab.search import run

    config = with_kept_seeds(config, database, name)
    with _open_run(config, name, out, database) as store:
        keep_prior(config, store, out)
        keep_seeds(config, store)
        _place_logs(executor, out)
        live = LiveStatus(executor)
        with live.kept(store):
            result = run(
                config,
                store=store,
                executor=executor,
                callbacks=(live, *callbacks),
                folder=out,
                with_data=with_data,
            )
    result.out = out
    _write_result(result, out)
    _check_no_link(out / "export")
    if any(group.winner is not None for group in result.groups):
        result.export(out / "export")
    from searchlab.report import write_report

    write_report(result, out / "report.html")
    return result


def _place_logs(executor: Executor | None, out: Path) -> None:
    _check_no_link(out / "logs")
    log_to: Callable[[Path], None] | None = getattr(executor, "log_to", None)
    if log_to is not None:
        log_to(out / "logs")


def _check_no_link(folder: Path) -> None:
    """Raises DataError for a folder of a run that leads elsewhere."""
    if folder.is_symlink():
        raise DataError(f"{str(folder)!r} is a link; allowed: a folder")


@contextmanager
def _open_run(
    config: SearchConfig,
    name: str,
    out: Path,
    database: str,
    durability: Durability = "process",
) -> Iterator[Store]:
    """An open run with its folder; what cannot be made is said before the run exists."""
    from searchlab.study import Database

    check_folder(out)
    base = Database(database, durability=durability)
    try:
        store = base.open_run(
            name,
            config=config.describe(),
            space=config.stages[-1].space.fingerprint,
            seed=config.seed,
            out=str(out),
        )
        try:
            _write_address(out, name, database)
            with keep_alive(store):
                yield store
        finally:
            store.close("failed")  # does nothing where the run has ended in its own way
    finally:
        base.close()


def check_folder(path: Path) -> None:
    """Raises ConfigError where a folder cannot be made because a file is in the way."""
    for part in (path, *path.parents):
        if part.exists():
            if not part.is_dir():
                raise ConfigError(f"folder {str(path)!r}: {str(part)!r} is a file")
            if not os.access(part, os.W_OK | os.X_OK):
                raise ConfigError(f"folder {str(path)!r}: {str(part)!r} cannot be written to")
            return


def _write_address(out: Path, name: str, database: str) -> None:
    where = without_password(database)  # others may read the folder
    if "://" not in database:
        where = os.path.relpath(Path(database).resolve(), out.resolve())
    write_text(out / RUN_FILE, json.dumps({"name": name, "database": where}, indent=1) + "\n")


def write_artefacts(recipe: Recipe, config: SearchConfig, result: Result, out: Path) -> list[Path]:
    """result.json, the winners in the form the space exports, and report.html."""
    from searchlab.report import write_report

    _check_no_link(out / "export")
    paths = [_write_result(result, out)]
    if any(group.winner is not None for group in result.groups):
        paths += export_result(recipe, config, result, out / "export", "")
    more = recipe.sections(config, result) if recipe.sections is not None else ()
    paths.append(write_report(result, out / "report.html", sections=more))
    return paths


def _write_result(result: Result, out: Path) -> Path:
    path = out / "result.json"
    write_text(path, json.dumps(result.to_json(), indent=1) + "\n")
    return path


def export_result(
    recipe: Recipe, config: SearchConfig, result: Result, directory: Path, form: str
) -> list[Path]:
    """Writes the winners; `form` is the recipe's own ("" = default)."""
    check_folder(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"cannot make {str(directory)!r}: {error.strerror or error}") from None
    if recipe.export is not None:
        return recipe.export(config, result, directory, form)
    if form:
        raise ConfigError(f"--to {form!r}; recipe {recipe.name} has only its default form")
    return result.export(directory)
