"""`searchlab dashboard`: optuna-dashboard on a run's records."""

from __future__ import annotations

import argparse
import importlib.util
import socket
import tempfile
from pathlib import Path
from typing import Any

from searchlab.errors import ConfigError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Adds the command to the command line."""
    text = "serve optuna-dashboard on a run's records as they are now"
    parser = commands.add_parser("dashboard", help=text, description=text, allow_abbrev=False)
    parser.set_defaults(action=_dashboard)
    parser.add_argument("run", metavar="RUN", help="a run's name or its folder")
    parser.add_argument("--port", type=int, default=8080, help="where it listens (8080)")
    parser.add_argument("--host", default="localhost", help="where it listens (localhost)")
    parser.add_argument("--database", help="SQLite path or SQLAlchemy URL of the study")


def _dashboard(options: argparse.Namespace, rest: list[str]) -> int:
    from searchlab.command_export import layout_of_run
    from searchlab.runs import find_run
    from searchlab.study import Database

    if importlib.util.find_spec("optuna_dashboard") is None:
        raise ConfigError(
            "dashboard needs the package 'optuna-dashboard', which is not installed; "
            'pip install "searchlab[viz]"'
        )
    if not 1 <= options.port <= 65535:
        raise ConfigError(f"port {options.port}; allowed: 1 to 65535")
    address = find_run(options.run, options.database, writes=False)
    _check_free(options.host, options.port)
    with tempfile.TemporaryDirectory(prefix="searchlab-dashboard-") as folder:
        from searchlab.optuna_export import write_optuna

        journal = Path(folder) / "journal.log"
        with Database(address.database) as base:
            store = base.read(address.name)
            records = store.records()
            names = write_optuna(journal, address.name, records, layout_of_run(address, store))
        print(f"{len(records)} records as studies {', '.join(names)}")
        print(f"http://{options.host}:{options.port}/ (Ctrl-C ends it)", flush=True)
        _serve(journal, options.host, options.port)
    return 0


def _check_free(host: str, port: int) -> None:
    """Raises ConfigError where nothing can listen; said before the records are read."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"port {port} of {host!r}: {reason}; choose another --port") from None


def _serve(journal: Path, host: str, port: int) -> None:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna_dashboard import run_server

    try:
        run_server(JournalStorage(JournalFileBackend(str(journal))), host=host, port=port)
    except KeyboardInterrupt:
        print()
