"""The command line: run, resume, verify, show, report, list, doctor; others in `command_*`."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from searchlab import __version__, command_external
from searchlab import _predictor_flags as earlier
from searchlab._executor_flags import add_flags, check_pace, executor_options, with_pace
from searchlab._plain import plain
from searchlab.errors import (
    ConfigError,
    DataError,
    EvaluationError,
    RunInUseError,
    SearchlabError,
    SearchlabWarning,
    SpaceError,
    StudyError,
)

if TYPE_CHECKING:
    from searchlab.config import SearchConfig
    from searchlab.recipes import Recipe
    from searchlab.result import Result

__all__ = ["main"]

EXIT_OK, EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 75


class _Started(Exception):
    """Wraps an error of the run itself, as opposed to one of its input."""

    def __init__(self, error: SearchlabError) -> None:
        super().__init__(str(error))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code.

    0 = done, 1 = failed during a run, 2 = bad input (one line on stderr), 75 = interrupted and can
    be resumed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    before, warnings.formatwarning = warnings.formatwarning, _warning_text
    try:
        return _main(arguments)
    finally:
        warnings.formatwarning = before


def _warning_text(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Our warnings in one line like errors, without a place in the source."""
    if issubclass(category, SearchlabWarning):
        return f"searchlab: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _main(arguments: list[str]) -> int:
    parser = _parser()
    try:
        options, rest = parser.parse_known_args(command_external.recipe_of_evaluator(arguments))
        if rest and getattr(options, "command", None) != "run":
            parser.error(f"unknown arguments: {' '.join(rest)}")
        action: Callable[[argparse.Namespace, list[str]], int] = options.action
        return action(options, rest)
    except _Started as error:
        return _say(str(error), EXIT_FAILURE)
    except (ConfigError, SpaceError, DataError, RunInUseError, StudyError) as error:
        return _say(str(error), EXIT_BAD_INPUT)
    except EvaluationError as error:
        return _say(str(error), EXIT_FAILURE)
    except BrokenPipeError:
        return EXIT_OK
    except OSError as error:
        where = f"{str(error.filename)!r}: " if error.filename is not None else ""
        return _say(f"{where}{error.strerror or error}", EXIT_FAILURE)
    except KeyboardInterrupt:
        return _say("interrupted", EXIT_INTERRUPTED)


def _say(text: str, code: int) -> int:
    print(f"searchlab: {' '.join(text.split())}", file=sys.stderr)
    return code


def _parser() -> _Parser:
    parser = _Parser(
        prog="searchlab",
        description="Gradient-free search over what can change in a trained model after training.",
        epilog="RUN is a run's name or its folder. `searchlab run NAME --help` lists the options "
        "of a recipe.",
    )
    parser.add_argument("--version", action="version", version=f"searchlab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, action: Callable[..., int], run: bool = True) -> Any:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(action=action)
        if run:
            sub.add_argument("run", metavar="RUN", help="a run's name or its folder")
        sub.add_argument("--database", help="SQLite path or SQLAlchemy URL of the study")
        return sub

    sub = commands.add_parser(
        "run", help="run a recipe (or go on with it)", add_help=False, allow_abbrev=False
    )
    sub.set_defaults(action=_run)
    sub.add_argument("recipe", nargs="?")
    sub.add_argument("-h", "--help", action="store_true")

    sub = add("resume", "go on with a run", _resume)
    sub.add_argument("--budget", help="a new, larger budget: 400, 90min, 6gpuh, 50usd")
    sub.add_argument("--gpu-price", type=float, help="US dollars per device hour")
    add_flags(sub)
    add_durability(sub)
    earlier.add_data_flag(sub)
    add("verify", "recompute every proposal from the stored values", _verify)
    sub = add("show", "table and verdict of a run", _show)
    sub.add_argument("--json", action="store_true", help="everything, as JSON")
    sub.add_argument("--watch", action="store_true", help="as it goes on, until its driver ends")
    sub.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="of --watch")
    sub = add("report", "write report.html again", _report)
    sub.add_argument("--to", metavar="FILE", help="where; the run's folder by default")
    command_external.add_parsers(add)
    add("list", "all runs of a database", _list, run=False)
    add("doctor", "what this installation can do", _doctor, run=False)
    for module in ("export", "apply", "dashboard", "compare", "check", "salvage", "predictor"):
        importlib.import_module(f"searchlab.command_{module}").add_parser(commands)
    return parser


# -- run and resume -----------------------------------------------------------------------------


def _recipe_parser(recipe: Recipe) -> _Parser:
    from searchlab.recipes import flags_of, repeatable

    lists = repeatable(recipe)
    parser = _Parser(
        prog=f"searchlab run {recipe.name}", description=recipe.summary, allow_abbrev=False
    )
    general = parser.add_argument_group("the run")
    general.add_argument("--config", metavar="FILE", help="YAML file of options")
    general.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one option; repeatable"
    )
    general.add_argument("--dry-run", action="store_true", help="check, measure, run nothing")
    general.add_argument("--out", metavar="DIR", help="the run's folder; runs/NAME by default")
    general.add_argument("--name", help="name of the run; the recipe's by default")
    general.add_argument("--database", help="SQLite path or URL; runs/searchlab.db by default")
    add_durability(general)
    general.add_argument("--quiet", action="store_true", help="no progress line")
    flags = flags_of(recipe)
    taken = [name for name, *_ in flags]
    add_flags(parser, taken=taken)
    earlier.add_flags(parser, taken=taken)
    own = parser.add_argument_group("the search")
    for name, text, default, flag in flags:
        shown = text.replace("%", "%%") + (f" ({default})" if default not in (None, "", ()) else "")
        option = f"--{name.replace('_', '-')}"
        if flag:
            own.add_argument(
                option, dest=name, default=None, help=shown, action=argparse.BooleanOptionalAction
            )
        elif name in lists:
            # Several at once: what a shell makes of an unquoted pattern.
            more: dict[str, Any] = {"metavar": "VALUE", "nargs": "+", "action": "extend"}
            own.add_argument(option, dest=name, default=None, help=shown, **more)
        else:
            own.add_argument(option, dest=name, default=None, help=shown, metavar="VALUE")
    return parser


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.config import known_names
    from searchlab.recipes import RECIPES, flags_of, load_recipe, options_from, read_config_file

    if options.recipe is None or options.recipe.startswith("-"):
        print("usage: searchlab run RECIPE [options]\n\nrecipes:")
        for name in known_names(RECIPES, "recipe"):
            try:
                summary = load_recipe(name).summary
            except ConfigError as error:  # one broken plugin does not hide the others
                summary = f"({error})"
            print(f"  {name:20} {summary}")
        return EXIT_OK if options.help else EXIT_BAD_INPUT
    recipe = load_recipe(options.recipe)
    parser = _recipe_parser(recipe)
    given = parser.parse_args([*(["--help"] if options.help else []), *rest])
    if recipe.opens_only:
        earlier.refuse(given, recipe.name)
    values: dict[str, Any] = read_config_file(given.config) if given.config else {}
    for pair in given.set:
        key, mark, value = pair.partition("=")
        if not mark:
            raise ConfigError(f"--set {pair!r}; allowed: KEY=VALUE")
        values[key.replace("-", "_")] = value
    for name, _, _, _ in flags_of(recipe):
        if getattr(given, name) is not None:
            values[name] = getattr(given, name)
    chosen = options_from(recipe, values)
    name = given.name or (Path(given.out).resolve().name if given.out else recipe.name)
    if not name or "/" in name:
        raise ConfigError(f"name {name!r}; allowed: a word without slashes")
    out = Path(given.out) if given.out else Path("runs") / name
    from searchlab.runs import DEFAULT_DATABASE, check_folder

    check_folder(out)
    database = given.database or DEFAULT_DATABASE
    if recipe.opens_only and not given.dry_run:
        return command_external.open_only(recipe, chosen, name, out, database)
    taken = [name for name, *_ in flags_of(recipe)]
    config = earlier.with_earlier(recipe.build(chosen), given, taken)
    if given.dry_run:
        return _dry_run(config, name, out, database)
    return _execute(recipe, chosen, config, name, out, database, given, quiet=given.quiet)


def add_durability(parser: Any) -> None:
    """The option that says what a commit waits for."""
    parser.add_argument(
        "--durability",
        choices=("process", "power"),
        default="process",
        help="what committed records survive: the end of the process (default), or a power "
        "failure too (each commit waits for the disk)",
    )


def _execute(
    recipe: Recipe,
    chosen: Any,
    config: SearchConfig,
    name: str,
    out: Path,
    database: str,
    given: argparse.Namespace,
    *,
    quiet: bool = False,
) -> int:
    from searchlab.interruption import Interruption, say_on_stderr
    from searchlab.progress import ProgressLine
    from searchlab.runs import run_recipe, write_artefacts

    if recipe.opens_only:
        return command_external.open_only(recipe, chosen, name, out, database)
    executor = executor_options(given)
    config = with_pace(config, given)
    line = ProgressLine(unit=config.group_by or "")
    opened: list[bool] = []
    stop = Interruption(given.stop_grace, say=None if quiet else say_on_stderr)
    try:
        with stop.listening():
            result = run_recipe(
                recipe,
                chosen,
                name=name,
                out=out,
                database=database,
                callbacks=() if quiet else (line,),
                config=config,
                executor=stop.guard(executor.build()),
                opened=lambda: opened.append(True),
                durability=given.durability,
                with_data=given.with_data,
                warm_start=None if "warm_start" in asdict(chosen) else earlier.warm_start(given),
            )
            line.done()
            print(result.table())
            print(_counts_line(result))
            if result.meta["status"] == "interrupted":
                print(f"interrupted; go on with: {_resume_command(name, out, database)}")
                print(result.verdict())
                return EXIT_INTERRUPTED
            paths = write_artefacts(recipe, config, result, out)
    except KeyboardInterrupt:
        line.done()
        how = f"; go on with: {_resume_command(name, out, database)}" if opened else ""
        return _say(f"interrupted{how}", EXIT_INTERRUPTED)
    except SearchlabError as error:
        line.done()
        if not opened:
            raise
        raise _Started(error) from error
    print("written: " + ", ".join(str(path) for path in paths))
    print(result.verdict())
    return EXIT_OK


def _resume_command(name: str, out: Path, database: str) -> str:
    """What to type in this folder to go on with a run."""
    from searchlab._study_schema import without_password

    command = f"searchlab resume {shlex.quote(name if out == Path('runs') / name else str(out))}"
    if "://" in database and not database.startswith("sqlite:"):
        command += f" --database {shlex.quote(without_password(database))}"
    return command


def _counts_line(result: Result) -> str:
    counts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result.counts.items())
    seconds = result.meta.get("seconds")
    stop = result.meta.get("stop_reason")
    tail = f"; {seconds:.0f} s" if seconds else ""
    usage = result.meta.get("usage")
    if usage and usage["workers"] > 1:
        tail += f"; {usage['workers']} workers {100 * usage['utilisation']:.0f} % busy"
        lost = usage["deaths"] + usage["timeouts"]
        tail += f", {lost} lost" if lost else ""
    tail += f"; stopped by {stop}" if stop else ""
    proposed = "".join(f"\n{stage}: {text}" for stage, text in result.meta["algorithm"].items())
    notes = "".join(f"\n{text}" for text in result.meta["notes"])
    return f"\n{counts}; seed {result.meta['seed']}{tail}{proposed}{notes}"


def _dry_run(config: SearchConfig, name: str, out: Path, database: str) -> int:
    from searchlab.dryrun import estimate

    print(f"run {name!r} in {out}, database {database}")
    for line in estimate(config):
        print(line)
    return EXIT_OK


def _resume(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.runs import find_run, open_config

    address = find_run(options.run, options.database)
    given = {"budget": options.budget, "gpu_price": options.gpu_price}
    changes = {name: value for name, value in given.items() if value is not None}
    opened = open_config(address, changes=changes, going_on=True)
    check_pace(options, opened.pace)
    place = address.name, address.out, address.database
    return _execute(opened.recipe, opened.options, opened.config, *place, options)


# -- looking at runs ----------------------------------------------------------------------------


def _stored_result(options: argparse.Namespace) -> tuple[Any, Result]:
    """The run's configuration and its result as the records tell it; evaluates nothing."""
    from searchlab.runs import find_run, open_config
    from searchlab.search import stored_result
    from searchlab.study import Database

    opened = open_config(find_run(options.run, options.database))
    base = Database(opened.address.database)
    try:
        result = stored_result(opened.config, base.read(opened.address.name))
    finally:
        base.close()
    result.out = opened.address.out
    return opened, result


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab._stage_memory import memory_notes
    from searchlab.runs import find_run, open_config
    from searchlab.search import verify
    from searchlab.study import Database

    opened = open_config(find_run(options.run, options.database, writes=False))
    base = Database(opened.address.database)
    try:
        store = base.read(opened.address.name)
        count = len(store.records())
        differences = verify(opened.config, store)
        memory = memory_notes(store)
    finally:
        base.close()
    for line in memory:
        print(line)
    for line in differences[:20]:
        print(line)
    if differences:
        print(f"{len(differences)} proposals of {count} records differ from what is recomputed")
        return EXIT_FAILURE
    print(f"verified: all proposals of {count} records are what the seed and the values give")
    return EXIT_OK


def _show(options: argparse.Namespace, rest: list[str]) -> int:
    if options.watch:
        from searchlab.command_watch import watch
        from searchlab.runs import find_run

        return watch(find_run(options.run, options.database, writes=False), options.interval)
    _, result = _stored_result(options)
    if options.json:
        print(json.dumps(result.to_json(), indent=1))
    else:
        print(plain(f"{result.table()}\n{_counts_line(result)}\n{result.verdict()}"))
    return EXIT_OK


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.report import write_report

    opened, result = _stored_result(options)
    recipe = opened.recipe
    more = recipe.sections(opened.config, result) if recipe.sections is not None else ()
    target = Path(options.to) if options.to else opened.address.out / "report.html"
    print(write_report(result, target, sections=more))
    return EXIT_OK


def _list(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.runs import DEFAULT_DATABASE
    from searchlab.study import Database

    where = options.database or DEFAULT_DATABASE
    if "://" not in where and not Path(where).is_file():
        print(f"no database at {where}")
        return EXIT_OK
    base = Database(where)
    try:
        infos = base.runs()
    finally:
        base.close()
    for info in infos:
        print(plain(f"{info.name:24} {info.status:12} {info.records:8d} records  {info.out}"))
    return EXIT_OK


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.doctor import report_lines

    for line in report_lines(options.database):
        print(line)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
