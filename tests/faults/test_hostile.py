"""A run folder or a database from a stranger is only data, and passwords stay where they are."""

from __future__ import annotations

import json
import pickle
import re
import sqlite3
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_tools import ROOT

from searchlab._looking import looking
from searchlab._study_schema import other_engine, without_password
from searchlab.cli import main
from searchlab.errors import ConfigError, DataError, StudyError
from searchlab.evaluators.pipeline_metric import load_metric
from searchlab.runs import _write_address, find_run
from searchlab.study import Database

SCRIPT = "<script>window.hit=1</script>"
PICTURE = '"><img src=x onerror="hit()">'
SPACE = "variables:\n  a: {integer: [0, 99]}\n  b: {choice: [x, y]}\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a command, as its maker leaves it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "job.sh").write_text(
        'test $2 = 3 && exit 3\nprintf \'{"objectives": {"y": %s}}\' "$2" > "$1"\n'
    )
    command = "sh job.sh {out} {id} {plan}"
    assert main(["run", "--space", "space.yaml", "--evaluator", "command", "--objective", "y:min",
                 "--command", command, "--name", "t", "--budget", "6", "--quiet"]) == 0  # fmt: skip
    return tmp_path / "runs" / "t"


def change(statement: str, *values: Any) -> None:
    with sqlite3.connect("runs/searchlab.db") as connection:
        connection.execute(statement, values)
    connection.close()


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_texts_of_a_stranger_are_escaped_in_the_report(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = f"{SCRIPT}{PICTURE}\x1b]0;title\x07"
    change("UPDATE records SET reason = ? WHERE state = 1", evil)
    change("UPDATE records SET origin = ? WHERE id = 1", f"baseline:{evil}")
    change("UPDATE records SET worker = ?", evil)
    change("UPDATE run_meta SET value = ? WHERE key = 'stop_reason'", json.dumps(evil))
    change("UPDATE run_meta SET value = ? WHERE key = 'status'", json.dumps(evil))
    capsys.readouterr()
    assert main(["report", "t"]) == 0
    page = Page((run / "report.html").read_text())
    assert "script" not in page.tags
    assert page.handlers == []
    assert all(link.startswith(("data:", "#")) for link in page.links)
    capsys.readouterr()
    for command in (["show", "t"], ["list"], ["show", "t", "--watch"]):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\x07" not in out


def test_a_candidate_of_a_stranger_is_escaped(run: Path) -> None:
    """Labels of choices are the stranger's own."""
    (run.parent.parent / "space.yaml").write_text(
        SPACE.replace("[x, y]", json.dumps([SCRIPT, PICTURE]))
    )
    command = "sh job.sh {out} {id} {plan}"
    assert main(["run", "--space", "space.yaml", "--evaluator", "command", "--objective", "y:min",
                 "--command", command, "--name", "u", "--budget", "6", "--quiet"]) == 0  # fmt: skip
    page = Page((run.parent / "u" / "report.html").read_text())
    assert "script" not in page.tags
    assert page.handlers == []


def test_looking_at_a_run_executes_nothing_of_it(run: Path, tmp_path: Path) -> None:
    """Neither its command, nor a module or a pickle that lies about or is named."""
    (tmp_path / "evil.py").write_text("open('hit', 'w').close()\ndef f(images, prompts): ...\n")
    (tmp_path / "job.sh").write_text("touch hit\n")
    stored = sqlite3.connect("runs/searchlab.db")
    (text,) = stored.execute("SELECT value FROM run_meta WHERE key = 'options'").fetchone()
    stored.close()
    options = {**json.loads(text), "command": "touch hit # {plan} {out}"}
    change("UPDATE run_meta SET value = ? WHERE key = 'options'", json.dumps(options))
    for name in ("result.json", "evil.pkl"):
        (run / name).write_bytes(pickle.dumps(Evil()))
    for command in (["show", "t"], ["report", "t"], ["verify", "t"], ["show", "t", "--watch"],
                    ["export", "t", "--csv", "t.csv"], ["compare", "t", "t"], ["list"],
                    ["check", "t", "--expect", "failed >= 0"]):  # fmt: skip
        main(command)
    for recipe in ("evil:f", "../evil", "os:system"):
        change("UPDATE run_meta SET value = ? WHERE key = 'recipe'", json.dumps(recipe))
        assert main(["show", "t"]) == 2
    assert not (tmp_path / "hit").exists()
    with looking():
        metric = load_metric("evil:f")
    assert (metric.__module__, metric.__qualname__) == ("evil", "f")
    with pytest.raises(ConfigError, match="not loaded while a run is looked at"):
        metric(None, [])  # type: ignore[arg-type]
    assert not (tmp_path / "hit").exists()


class Evil:
    def __reduce__(self) -> Any:
        return open, ("hit", "w")


def test_a_folder_does_not_lead_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "notes").write_text("mine")
    # A database that names a folder of its reader's.
    change("UPDATE runs SET out = ?", str(outside))
    for command in ("report", "resume", "show"):
        assert main([command, "t", "--database", "runs/searchlab.db"]) == 2
    change("UPDATE runs SET out = '../../elsewhere'")
    with pytest.raises(DataError, match="not its own"):
        find_run("t", "runs/searchlab.db")
    change("UPDATE runs SET out = 'runs/t'")
    assert find_run("t", "runs/searchlab.db").out == Path("runs/t")
    # Links within the folder.
    for name in ("export", "logs"):
        folder = run / name
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        folder.symlink_to(outside)
        assert main(["resume", "t", "--budget", "8"]) != 0
        assert "is a link" in capsys.readouterr().err
        folder.unlink()
    for name in ("report.html", "result.json"):
        (run / name).unlink()
        (run / name).symlink_to(outside / "notes")
    assert main(["resume", "t", "--budget", "9"]) == 0
    assert main(["report", "t"]) == 0
    assert sorted(path.name for path in outside.iterdir()) == ["notes"]
    assert (outside / "notes").read_text() == "mine"


def test_a_folder_does_not_choose_a_server(run: Path) -> None:
    url = "postgresql+psycopg://me:word@127.0.0.1:1/x?password=word2&connect_timeout=1"
    (run / "run.json").write_text(json.dumps({"name": "t", "database": url}))
    with pytest.raises(ConfigError, match="--database URL") as caught:
        find_run(str(run))
    assert "word" not in str(caught.value)
    assert find_run(str(run), url).database == url
    for bad in ('{"name": 1, "database": "x"}', "[]", "{", '{"name": "t"}', "\x00"):
        (run / "run.json").write_text(bad)
        with pytest.raises(DataError, match="not a run file"):
            find_run(str(run))


def test_a_trigger_of_a_stranger_stays_within_its_file(run: Path, tmp_path: Path) -> None:
    change(
        "CREATE TRIGGER evil AFTER UPDATE ON runs BEGIN SELECT load_extension('/tmp/evil.so'); END"
    )
    assert main(["resume", "t", "--budget", "8"]) == 2  # an error of one line
    assert main(["show", "t"]) == 0


# -- passwords ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:se@cret/x@host:5432/db", "postgresql://me@host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://host/db?password=s&sslmode=require", "postgresql://host/db?sslmode=require"),
        ("postgresql://host/db?passfile=/x", "postgresql://host/db"),
        ("runs/a.db", "runs/a.db"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
    ],
)
def test_a_url_is_shown_without_its_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_errors_and_files_do_not_tell_a_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:tops3cret@127.0.0.1:1/x?connect_timeout=1"
    _write_address(tmp_path / "r", "t", url)
    with Database(url) as base, pytest.raises(StudyError) as caught:
        base.runs()
    assert "tops3cret" not in str(caught.value)
    assert "tops3cret" not in (tmp_path / "r" / "run.json").read_text()
    for bad in ("nonsense+driver://me:tops3cret@host/x", "postgresql://me:tops3cret@host:port/x"):
        with pytest.raises(StudyError) as caught:
            other_engine(bad)
        assert "tops3cret" not in str(caught.value)


def test_no_source_unpickles_files() -> None:
    """Pickle is for messages between processes of one run, nothing that comes from a file."""
    allowed = {"searchlab/executors/_channel.py"}
    found = set()
    for folder in ("searchlab", "spaces", "evaluators", "predictors", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if any(part.is_symlink() for part in path.parents if part != ROOT):
                continue  # a folder that is seen under its own name
            text = path.read_text("utf-8")
            if re.search(r"\b(pickle|cloudpickle|joblib|dill)\.loads?\(|\ballow_pickle=True", text):
                found.add(name)
            if re.search(r"torch\.load\((?![^)]*weights_only=True)", text):
                found.add(name)
    assert found <= allowed
