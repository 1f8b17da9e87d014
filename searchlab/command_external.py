"""The command line for values from elsewhere: `run --evaluator`, `ask` and `tell`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from searchlab.errors import ConfigError, RunInUseError, unknown_name

if TYPE_CHECKING:
    from searchlab.config import SearchConfig
    from searchlab.recipes import Recipe
    from searchlab.runs import Opened
    from searchlab.study import Store

__all__ = ["add_parsers", "open_only", "recipe_of_evaluator"]

EVALUATORS = ("ask", "command")
PATIENCE_S = 30.0  # with another ask or tell of the same run
_RUN_OPTIONS = ("objective", "constraint", "fidelity", "baseline", "budget", "seed")


def recipe_of_evaluator(arguments: Sequence[str]) -> list[str]:
    """`run --space FILE --evaluator NAME ...` in the form `run RECIPE --space FILE ...`.

    Raises:
        ConfigError: an unknown evaluator.
    """
    out = list(arguments)
    if not out or out[0] != "run" or (len(out) > 1 and not out[1].startswith("-")):
        return out
    for at, word in enumerate(out):
        name, mark, value = word.partition("=")
        if name != "--evaluator":
            continue
        end = at + 1
        if not mark:
            if end == len(out):
                raise ConfigError(f"--evaluator without a name; allowed: {', '.join(EVALUATORS)}")
            value, end = out[end], end + 1
        if value not in EVALUATORS:
            raise unknown_name("evaluator", value, EVALUATORS)
        return ["run", value, *out[1:at], *out[end:]]
    return out


def add_parsers(add: Callable[..., Any]) -> None:
    """Adds `ask` and `tell`."""
    sub = add("ask", "hand out candidates, one JSON plan per line", _ask, run=False)
    sub.add_argument("run", metavar="RUN", nargs="?", help="a run's name or its folder")
    sub.add_argument("-n", type=int, default=1, metavar="N", help="how many (1)")
    sub.add_argument("--lag", type=int, help="open at once; fixed at the first ask, N by default")
    sub.add_argument(
        "--lease", default="24h", metavar="TIME", help="then a candidate is handed out again (24h)"
    )
    sub.add_argument(
        "--again", action="store_true", help="hand out again at once what has no result"
    )
    opening = sub.add_argument_group("opening a run")
    opening.add_argument("--space", metavar="FILE", help="space file (YAML)")
    opening.add_argument("--objective", action="append", metavar="NAME:min|max")
    opening.add_argument("--constraint", action="append", metavar="NAME>=BOUND")
    opening.add_argument("--fidelity", action="append", metavar="NAME:COST")
    opening.add_argument("--baseline", action="append", metavar="FILE")
    opening.add_argument("--budget", type=int, metavar="N", help="may grow later")
    opening.add_argument("--seed", type=int, metavar="N")
    opening.add_argument("--name", help="of the run; RUN, else the folder's")
    opening.add_argument("--out", metavar="DIR", help="the run's folder; runs/NAME by default")
    sub = add("tell", "take results in, one JSON object per line", _tell)
    sub.add_argument("file", metavar="FILE", help="JSON lines; - for standard input")


def open_only(recipe: Recipe, chosen: Any, name: str, out: Path, database: str) -> int:
    """Opens a run whose values will be told, or gives it a larger budget."""
    with _opened(recipe, chosen, recipe.build(chosen), name, out, database):
        pass
    print(f"run {name!r} is open; next: searchlab ask {out} -n N, then searchlab tell {out} FILE")
    return 0


# -- ask and tell -------------------------------------------------------------------------------


def _ask(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.external import parse_seconds
    from searchlab.leases import ask

    lease_s = parse_seconds(options.lease)
    if options.n < 1:
        raise ConfigError(f"-n {options.n}; allowed: 1 or more")
    with _run_to_ask(options) as (config, store):
        asked = ask(config, store, options.n, lag=options.lag, lease_s=lease_s, again=options.again)
        if asked.finished:
            store.close("finished")
    for plan in asked.plans:
        print(json.dumps(plan))
    sys.stdout.flush()
    if asked.reason:
        print(
            f"searchlab: {len(asked.plans)} of {options.n} candidates: {asked.reason}",
            file=sys.stderr,
        )
    return 0


@contextmanager
def _run_to_ask(options: argparse.Namespace) -> Iterator[tuple[SearchConfig, Store]]:
    """The run that is named, or a new one where a space is given."""
    from searchlab.recipes import load_recipe, options_from
    from searchlab.runs import DEFAULT_DATABASE, find_run, open_config

    given = {
        name: getattr(options, name) for name in _RUN_OPTIONS if getattr(options, name) is not None
    }
    if options.space is None:
        if options.run is None:
            raise ConfigError("no run; allowed: searchlab ask RUN, or --space FILE to open one")
        other = sorted({*given, *(k for k in ("name", "out") if getattr(options, k))} - {"budget"})
        if other:
            raise ConfigError(f"--{other[0]} opens a run; allowed: with --space FILE")
        changes = {"budget": given["budget"]} if "budget" in given else {}
        opened = open_config(find_run(options.run, options.database), changes=changes)
        with _reopened(opened) as store:
            yield opened.config, store
        return
    recipe = load_recipe("ask")
    chosen = options_from(recipe, {"space": options.space, **given})
    out = Path(options.out) if options.out else None
    name = options.name or (Path(options.run).name if options.run else None)
    name = name or (out.resolve().name if out else recipe.name)
    if not name or "/" in name:
        raise ConfigError(f"name {name!r}; allowed: a word without slashes")
    config = recipe.build(chosen)
    database = options.database or DEFAULT_DATABASE
    folder = out or Path("runs") / name
    with _opened(recipe, chosen, config, name, folder, database) as store:
        yield config, store


def _tell(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.leases import tell
    from searchlab.runs import find_run, open_config, write_artefacts
    from searchlab.search import stored_result

    raw = sys.stdin.buffer.read() if options.file == "-" else _content(options.file)
    opened = open_config(find_run(options.run, options.database))
    written: list[Path] = []
    with _reopened(opened) as store:
        told = tell(opened.config, store, raw.split(b"\n"))
        if told.finished:
            store.set_meta("status", "finished")
            store.commit()
            result = stored_result(opened.config, store)
            result.out = opened.address.out
            written = write_artefacts(opened.recipe, opened.config, result, opened.address.out)
            store.close("finished")
    failed = f" ({told.failed} of them failed)" if told.failed else ""
    print(
        f"{told.recorded} results recorded{failed}, {told.duplicates} known already, "
        f"{len(told.refused)} refused; {told.open} candidates wait for results"
    )
    if written:
        print("finished; written: " + ", ".join(map(str, written)))
    for text in told.refused[:20]:
        print(f"searchlab: refused: {text}", file=sys.stderr)
    if len(told.refused) > 20:
        print(f"searchlab: refused: {len(told.refused) - 20} more", file=sys.stderr)
    if told.error:
        print(f"searchlab: {told.error}", file=sys.stderr)
    return 2 if told.refused else 1 if told.error else 0


def _content(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"results file {name!r}: {error.strerror or error}") from None


# -- opening ------------------------------------------------------------------------------------


@contextmanager
def _reopened(opened: Opened) -> Iterator[Store]:
    from searchlab.errors import StudyError

    address = opened.address
    if not opened.recipe.opens_only:
        raise StudyError(
            f"run {address.name!r} evaluates by itself; allowed: searchlab resume (ask and tell "
            "are for runs opened with --evaluator ask)"
        )
    with _opened(
        opened.recipe, opened.options, opened.config, address.name, address.out, address.database
    ) as store:
        yield store


@contextmanager
def _opened(
    recipe: Recipe, chosen: Any, config: SearchConfig, name: str, out: Path, database: str
) -> Iterator[Store]:
    """The run, open for writing, as soon as no other ask or tell has it."""
    from dataclasses import asdict

    from searchlab.leases import prepare

    with ExitStack() as stack:
        store = _entered(stack, config, name, out, database)
        try:
            _check_budget(store, config)
            store.set_meta("recipe", recipe.name)
            store.set_meta("options", asdict(chosen))
            prepare(config, store)
            yield store
        finally:
            store.close("waiting")  # does nothing where it was closed as finished


def _entered(stack: ExitStack, config: SearchConfig, name: str, out: Path, database: str) -> Store:
    from searchlab.runs import _open_run

    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return stack.enter_context(_open_run(config, name, out, database))
        except RunInUseError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def _check_budget(store: Store, config: SearchConfig) -> None:
    """Raises ConfigError where candidates that are handed out would fall out of the budget."""
    before = store.get_meta("options")
    wanted = config.stages[-1].budget.evaluations
    if before is None or wanted is None:
        return
    given = before.get("budget")
    if given is None or given > wanted:
        had = "without a limit" if given is None else f"of {given}"
        raise ConfigError(f"budget {wanted}; run {store.name!r} has one {had} (it can only grow)")
