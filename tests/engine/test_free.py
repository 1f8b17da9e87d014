"""Free runs: timing decides what is proposed, and the records repeat it bit for bit."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from searchlab.callbacks import Progress
from searchlab.config import SearchConfig
from searchlab.errors import ConfigError
from searchlab.records import ROW_COLUMNS
from searchlab.search import verify
from searchlab.study import Database
from tests.engine.loop_tools import Shuffled, make_config, run_in, trace


def _config(quantum: int = 1, budget: int = 80) -> SearchConfig:
    return make_config(budget=budget, lag="free", quantum=quantum, n_random=4)  # type: ignore[arg-type]


class _Stop(Exception):
    pass


class _After:
    """Ends the run roughly after so many evaluations."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, progress: Progress) -> None:
        if progress.finished >= self.n:
            raise _Stop


@pytest.mark.parametrize("quantum", [1, 4])
def test_a_free_run_is_replayed_from_its_records(quantum: int) -> None:
    runs = [run_in(_config(quantum), executor=Shuffled(seed, held=6)) for seed in (1, 1, 2)]
    assert trace(runs[0]) == trace(runs[1])
    assert trace(runs[0]) != trace(runs[2])  # another timing, other proposals
    for store in runs:
        assert verify(_config(quantum), store) == []


def test_what_was_told_is_every_id_before_the_first_open_one() -> None:
    store = run_in(_config(), executor=Shuffled(3, held=6))
    told = store.records().told_at_ask.tolist()
    assert told == sorted(told)
    assert told[0] == 0
    assert all(t <= i for i, t in enumerate(told))
    assert max(told) > 60
    alone = run_in(_config()).records()
    assert alone.told_at_ask.tolist() == alone.ids.tolist()  # one worker is told everything


def test_a_value_that_was_changed_is_found() -> None:
    store = run_in(_config(), executor=Shuffled(4, held=6))
    rows = store._stored
    position = 5
    row = list(rows[position])
    row[ROW_COLUMNS.index("values_blob")] = struct.pack("<d", -1e9)
    rows[position] = tuple(row)
    assert verify(_config(), store) != []


@pytest.mark.parametrize("quantum", [1, 4])
def test_a_free_run_that_was_killed_goes_on_and_still_replays(quantum: int, tmp_path: Any) -> None:
    config = _config(quantum)
    with Database(tmp_path / "study.db") as database:
        for life in range(4):
            store = database.open_run(
                "free",
                config=config.describe(),
                space=config.stages[0].space.fingerprint,
                seed=config.seed,
                out="",
            )
            callbacks = (_After(18 * (life + 1)),) if life < 3 else ()
            try:
                run_in(config, store, executor=Shuffled(life, held=6), callbacks=callbacks)
            except _Stop:
                assert life < 3
        records = database.read("free").records()
        assert verify(config, database.read("free")) == []
    real = [key for key in records.keys if key is not None]
    assert len(real) == len(set(real)) == 80


def test_a_run_keeps_how_it_was_opened() -> None:
    store = run_in(_config(), executor=Shuffled(1))
    assert store.get_meta("pace")["0"]["free"] is True
    assert run_in(make_config()).get_meta("pace")["0"]["free"] is False


def test_other_words_than_free_are_refused() -> None:
    with pytest.raises(ConfigError, match="free"):
        make_config(lag="fast")  # type: ignore[arg-type]
