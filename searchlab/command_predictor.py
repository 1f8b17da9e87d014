"""`searchlab predictor`: what a predictor's folder holds, and how it orders a run's records."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from searchlab.errors import ConfigError, DataError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    text = "look at a predictor that a search left"
    parser = commands.add_parser("predictor", help=text, description=text, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action_of_predictor", required=True, metavar="ACTION")
    text = "what it learnt, from how many labels, and how well"
    sub = actions.add_parser("show", help=text, description=text, allow_abbrev=False)
    sub.set_defaults(action=_show)
    sub.add_argument("folder", metavar="DIR", help="the folder with predictor.json")
    sub.add_argument("--json", action="store_true", help="everything but the weights, as JSON")
    text = "how it orders the candidates that a run has measured in full"
    sub = actions.add_parser("evaluate", help=text, description=text, allow_abbrev=False)
    sub.set_defaults(action=_evaluate)
    sub.add_argument("folder", metavar="DIR", help="the folder with predictor.json")
    sub.add_argument("--run", required=True, metavar="RUN", help="a run's name or its folder")
    sub.add_argument("--database", help="SQLite path or SQLAlchemy URL of the study")
    sub.add_argument("--json", action="store_true", help="as JSON")


def _reader() -> Any:
    from searchlab.config import resolve

    return resolve({"read": "searchlab.predictors.artifact:read_artifact"}, "read", "reader")


def _show(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.predictor_folder import SETTINGS, folder_digest

    folder = Path(options.folder)
    artifact = _reader()(folder)
    if options.json:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        print(json.dumps({key: part for key, part in settings.items() if key != "state"}, indent=1))
        return 0
    lines = {
        "predictor": artifact.predictor,
        "space": f"{artifact.space_name}, {artifact.kind} ({artifact.fingerprint[:8]})",
        "data": "with its data" if artifact.with_data else "without its data",
    }
    if artifact.left_out:
        lines["data"] += f", hence without {', '.join(artifact.left_out)}"
    task = artifact.task
    if task is None:
        lines["task"] = "not known: no search left it"
    else:
        figures = task.labels
        lines |= {
            "run": f"{task.run}, seed {task.seed}",
            "objective": f"{task.objective} ({task.direction}), fidelity {task.fidelity}",
            "labels": f"{figures['n']:.0f}, best {figures['best']:.6g}, "
            f"median {figures['median']:.6g}, worst {figures['worst']:.6g}",
            "held out": str(task.held_out),
            "guard": str(task.guard.get("guard", "none")),
            "signals": ", ".join(signal.name for signal in task.signals) or "none",
        }
    lines["hash"] = folder_digest(folder)
    for name, text in lines.items():
        print(f"{name:10} {text}")
    return 0


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab._stage_records import Known
    from searchlab._tau import tau_of
    from searchlab.final import FINAL_STAGE
    from searchlab.population import OK
    from searchlab.prior import PriorRequest, with_prior
    from searchlab.runs import find_run, open_config
    from searchlab.study import Database

    _reader()(Path(options.folder))
    opened = open_config(find_run(options.run, options.database, writes=False))
    stage = with_prior(opened.config, PriorRequest(Path(options.folder), "never")).stages[-1]
    base = Database(opened.address.database)
    try:
        records = base.read(opened.address.name).records()
    finally:
        base.close()
    index = len(opened.config.stages) - 1
    mine = (records.stage == index) & (records.stage < FINAL_STAGE) & (records.state == OK)
    mine &= records.fidelity == stage.fidelity_index
    if not mine.any():
        raise ConfigError(f"run {options.run!r} has no full measurements to compare with")
    known = Known(records.take(mine.nonzero()[0]), stage)
    algorithm: Any = stage.build_algorithm(seed=opened.config.seed, first_id=0, seeds=None)
    population = known.jobs.population
    if algorithm.prior is None:
        raise DataError(f"no predictor in {options.folder!r}")
    start = algorithm.prior.start()
    table = algorithm.table_of(population)
    mean, sd = start.predict(table)
    losses = known.losses[:, stage.main]
    found = tau_of(start.rank(table), losses)
    inside = float((abs(mean - losses) <= 1.645 * sd).mean())
    line = algorithm.prior.line
    if options.json:
        said = {"line": line, **found.to_json(), "inside_90": round(inside, 4)}
        print(json.dumps(said, indent=1))
        return 0
    print(f"{line}")
    print(f"{found}; {100 * inside:.0f} % of the values lie in its 90 % intervals")
    return 0
