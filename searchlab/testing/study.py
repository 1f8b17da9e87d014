"""What every store of records must do: a suite to inherit, with one fixture to supply."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.errors import SearchlabWarning, StudyError
from searchlab.population import FAILED, INFEASIBLE, OK, PRUNED, Evaluations, Jobs, Population
from searchlab.records import ITEMS_LIMIT, VOID
from searchlab.study import Store

__all__ = ["StudySuite", "make_jobs", "write"]

EVALUATOR = "ab" * 16


def make_jobs(ids: Any, **more: Any) -> Jobs:
    """Jobs of a one-byte candidate each; equal ids modulo 256 have equal keys."""
    listed = np.asarray(ids, np.int64)
    values = (listed % 256).astype(np.uint8)
    return Jobs(
        ids=listed,
        population=Population({"x": values}),
        keys=tuple(bytes([v]) * 16 for v in values),
        **{"fidelity": 0, **more},
    )


def write(
    store: Store, jobs: Jobs, evaluations: Evaluations | None = None, **more: Any
) -> Evaluations:
    """Records jobs, whose values are their ids unless others are given."""
    told = evaluations or Evaluations(jobs.ids.astype(np.float64))
    settings = {"evaluator": EVALUATOR, "started": 10.0, "finished": 12.5, **more}
    store.record(jobs, told, packed=[bytes([key[0]]) for key in jobs.keys], **settings)
    return told


class StudySuite:
    """Inherit, and supply a fixture `store` that gives an empty store which is open for writing."""

    @pytest.fixture
    def store(self) -> Store:
        """An empty store."""
        raise NotImplementedError("supply the fixture 'store'")

    def test_a_new_store_is_empty(self, store: Store) -> None:
        records = store.records()
        assert len(records) == 0
        assert records.parents.shape == (0, 2)
        assert all(len(column) == 0 for column in records.trace())
        assert isinstance(store, Store)

    def test_columns_come_back_as_they_went_in(self, store: Store) -> None:
        jobs = make_jobs(
            [3, 4],
            fidelity=2,
            replicate=7,
            stage=1,
            told_at_ask=5,
            origin=("vary", "random"),
            parents=np.array([[0, 1], [-1, -1]]),
        )
        told = Evaluations(
            values=np.array([[1.5, 2.0], [3.0, 4.0]]),
            std_error=np.array([[0.1, 0.2], [0.3, 0.4]]),
            constraints=np.array([[9.0], [8.0]]),
            signals=np.array([[1.0, 2.0, np.nan], [4.0, 5.0, 6.0]]),
            cost_s=np.array([0.25, 0.5]),
        )
        write(
            store,
            jobs,
            told,
            worker="host:3",
            attempts=2,
            cached=np.array([False, True]),
            predicted=(np.array([1.25, np.nan]), np.array([0.5, np.nan])),
        )
        store.commit()
        got = store.records()
        assert got.ids.tolist() == [3, 4]
        assert got.ids.dtype == np.int64
        assert got.stage.tolist() == [1, 1]
        assert got.keys == list(jobs.keys)
        assert got.genotypes == [b"\x03", b"\x04"]
        assert got.fidelity.tolist() == [2, 2]
        assert got.replicate.tolist() == [7, 7]
        assert got.state.tolist() == [OK, OK]
        assert got.told_at_ask.tolist() == [5, 5]
        assert got.origin == ["vary", "random"]
        assert got.parents.tolist() == [[0, 1], [-1, -1]]
        assert got.worker == ["host:3", "host:3"]
        assert got.attempts.tolist() == [2, 2]
        assert got.cached.tolist() == [False, True]
        assert (got.started.tolist(), got.finished.tolist()) == ([10.0] * 2, [12.5] * 2)
        assert store.evaluators()[int(got.evaluator[0])] == EVALUATOR
        np.testing.assert_array_equal(got.values, told.values)
        np.testing.assert_array_equal(got.std_error, told.std_error)
        np.testing.assert_array_equal(got.constraints, told.constraints)
        np.testing.assert_array_equal(got.signals, told.signals)
        np.testing.assert_array_equal(got.cost_s, told.cost_s)
        np.testing.assert_array_equal(got.predicted_mean, [1.25, np.nan])
        np.testing.assert_array_equal(got.predicted_sd, [0.5, np.nan])
        again = got.evaluations()
        np.testing.assert_array_equal(again.values, told.values)
        np.testing.assert_array_equal(again.std_error, told.std_error)

    def test_only_committed_records_are_seen(self, store: Store) -> None:
        write(store, make_jobs([0, 1]))
        assert len(store.records()) == 0
        store.commit()
        write(store, make_jobs([2]))
        assert store.records().ids.tolist() == [0, 1]
        store.commit()
        store.commit()
        assert store.records().ids.tolist() == [0, 1, 2]

    def test_records_are_ordered_by_id(self, store: Store) -> None:
        for ids in ([4, 5], [0, 1], [2, 3]):
            write(store, make_jobs(ids))
            store.commit()
        assert store.records().ids.tolist() == [0, 1, 2, 3, 4, 5]
        assert store.records().values[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]

    def test_floats_keep_every_bit(self, store: Store) -> None:
        odd = np.array([math.inf, -math.inf, -0.0, 5e-324, 1 / 3, 1.7976931348623157e308])
        odd = np.append(odd, np.array([0x7FF8000000000123], np.uint64).view(np.float64))
        n = len(odd)
        told = Evaluations(
            values=np.stack([odd, odd[::-1]], axis=1),
            state=np.full(n, FAILED, np.int8),
            reason=["odd"] * n,
            std_error=np.stack([odd, odd], axis=1),
            constraints=odd[:, None],
            signals=odd[:, None],
        )
        write(store, make_jobs(range(n)), told)
        store.commit()
        got = store.records()
        for name in ("values", "std_error", "constraints", "signals"):
            assert getattr(got, name).tobytes() == getattr(told, name).tobytes(), name

    @pytest.mark.parametrize(
        "reason", ["", "grün 漢字 🜚 \u202e", "two\nlines\tand 'quotes' \"\"", "x" * 100_000]
    )
    def test_reasons_keep_every_character(self, store: Store, reason: str) -> None:
        write(store, make_jobs([0]), Evaluations.failed(1, 1, reason))
        store.commit()
        assert store.records().reason == [reason]

    def test_what_no_database_takes_is_spelt_out(self, store: Store) -> None:
        write(store, make_jobs([0]), Evaluations.failed(1, 1, "bad \udcff and \0"))
        store.commit()
        assert store.records().reason == ["bad \\udcff and \\x00"]

    def test_states(self, store: Store) -> None:
        states = np.array([OK, FAILED, PRUNED, INFEASIBLE], np.int8)
        told = Evaluations(np.array([1.0, np.nan, 3.0, np.nan]), state=states)
        write(store, make_jobs(range(4)), told)
        store.record_void([4, 5], 0, 3)
        store.commit()
        got = store.records()
        assert got.state.tolist() == [OK, FAILED, PRUNED, INFEASIBLE, VOID, VOID]
        assert got.keys[4:] == [None, None]
        assert got.genotypes[4:] == [b"", b""]
        assert got.told_at_ask.tolist() == [0, 0, 0, 0, 3, 3]
        assert np.isnan(got.values[4:]).all()
        assert got.evaluations().state is not None
        assert got.evaluations().state.tolist() == got.state.tolist()  # type: ignore[union-attr]

    def test_a_job_is_recorded_once(self, store: Store) -> None:
        write(store, make_jobs([0, 1]))
        with pytest.raises(StudyError, match=r"job 1 .* recorded already"):
            write(store, make_jobs([1, 2]))
        store.commit()
        with pytest.raises(StudyError, match=r"job 0 .* recorded already"):
            store.record_void([0], 0, 0)
        with pytest.raises(StudyError, match=r"job 7 .* recorded already"):
            write(store, make_jobs([7, 7]))
        write(store, make_jobs([2]))
        store.commit()
        assert store.records().ids.tolist() == [0, 1, 2]

    @pytest.mark.parametrize("index", [-1, 2**62 + 1])
    def test_ids_have_a_range(self, store: Store, index: int) -> None:
        with pytest.raises(StudyError, match=f"id {index}; allowed: 0 to"):
            write(store, make_jobs([index]))

    def test_ids_may_lie_far_apart(self, store: Store) -> None:
        ids = [0, 1, 2**16 - 1, 2**16, 2**31, 2**40, 2**62]
        write(store, make_jobs(ids))
        store.commit()
        assert store.records().ids.tolist() == ids
        for index in ids:
            with pytest.raises(StudyError, match=f"job {index} of run .* recorded already"):
                write(store, make_jobs([index + 7, index] if index < 2**62 else [index]))
        write(store, make_jobs([7, 2**40 + 7]))
        store.commit()
        assert len(store.records()) == len(ids) + 2

    def test_parts_of_different_length_are_refused(self, store: Store) -> None:
        jobs = make_jobs([0, 1])
        with pytest.raises(StudyError, match=r"2 jobs .* 1 evaluations"):
            write(store, jobs, Evaluations(np.zeros(1)))
        with pytest.raises(StudyError, match="predictions of shape"):
            write(store, jobs, predicted=(np.zeros(3), np.zeros(3)))
        with pytest.raises(StudyError, match="cached of shape"):
            write(store, jobs, cached=np.zeros(1, bool))
        write(store, jobs)
        store.commit()
        assert len(store.records()) == 2

    def test_an_empty_chunk_is_fine(self, store: Store) -> None:
        write(store, make_jobs([]), Evaluations(np.empty((0, 1))))
        store.record_void([], 0, 0)
        store.commit()
        assert len(store.records()) == 0

    def test_stages_may_differ_in_width(self, store: Store) -> None:
        write(store, make_jobs([0, 1]), Evaluations(np.array([1.0, 2.0]), signals=np.ones((2, 2))))
        told = Evaluations(np.array([[3.0, 4.0]]), constraints=np.array([[5.0]]))
        write(store, make_jobs([2], stage=1), told)
        store.commit()
        got = store.records()
        np.testing.assert_array_equal(got.values, [[1.0, np.nan], [2.0, np.nan], [3.0, 4.0]])
        np.testing.assert_array_equal(got.constraints, [[np.nan], [np.nan], [5.0]])
        np.testing.assert_array_equal(got.signals, [[1.0, 1.0], [1.0, 1.0], [np.nan, np.nan]])
        assert got.widths.tolist() == [[1, 0, 0, 2], [1, 0, 0, 2], [2, 0, 1, 0]]
        with pytest.raises(StudyError, match=r"\[1, 2\] objectives"):
            got.evaluations()
        first = got.take(got.stage == 0).evaluations()
        assert first.values.tolist() == [[1.0], [2.0]]
        assert first.state is not None
        assert first.state.tolist() == [OK, OK]
        assert first.std_error is None

    def test_traces_tell_equal_from_different(self, store: Store) -> None:
        told = Evaluations(np.array([0.0, np.nan]), state=np.array([OK, FAILED], np.int8))
        write(store, make_jobs([0, 1]), told)
        store.commit()
        before = store.records().trace()
        assert before == store.records().trace()
        assert store.records().take([0]).trace() != before
        changed = store.records()
        changed.values[0, 0] = -0.0
        assert changed.trace() != before
        changed = store.records()
        changed.worker[0] = "elsewhere"
        changed.cost_s[0] = 99.0
        assert changed.trace() == before

    def test_lookup_answers_equal_jobs_only(self, store: Store) -> None:
        told = Evaluations(
            np.array([1.0, 2.0, 3.0, np.nan]),
            state=np.array([OK, OK, PRUNED, FAILED], np.int8),
            std_error=np.full((4, 1), 0.5),
            signals=np.arange(4.0)[:, None],
            cost_s=np.arange(4.0),
        )
        jobs = make_jobs(range(4), fidelity=1, replicate=3, stage=2)
        write(store, jobs, told)
        store.commit()

        def find(**changed: Any) -> list[bytes]:
            settings = {"evaluator": EVALUATOR, "fidelity": 1, "replicate": 3, **changed}
            return list(store.lookup(jobs.keys, other_runs=False, **settings))

        assert find() == [jobs.keys[0], jobs.keys[1]]
        assert find(stage=2) == find()
        assert find(stage=1) == []
        assert find(evaluator="cd" * 16) == []
        assert find(fidelity=0) == []
        assert find(replicate=4) == []
        answer = store.lookup(
            jobs.keys, evaluator=EVALUATOR, fidelity=1, replicate=3, other_runs=True
        )[jobs.keys[1]]
        assert answer.values.tolist() == [2.0]
        assert answer.std_error is not None
        assert answer.std_error.tolist() == [0.5]
        assert answer.constraints.tolist() == []
        assert answer.signals.tolist() == [1.0]
        assert (answer.cost_s, answer.state, answer.reason) == (1.0, OK, "")

    def test_lookup_sees_the_open_batch_and_prefers_the_first_id(self, store: Store) -> None:
        settings: dict[str, Any] = {"evaluator": EVALUATOR, "fidelity": 0, "replicate": 0}
        key = make_jobs([0]).keys[0]
        assert store.lookup([key], other_runs=False, **settings) == {}
        write(store, make_jobs([256]))
        assert store.lookup([key], other_runs=False, **settings)[key].values.tolist() == [256.0]
        store.commit()
        write(store, make_jobs([0]))
        store.commit()
        assert store.lookup([key], other_runs=False, **settings)[key].values.tolist() == [0.0]
        assert store.lookup([], other_runs=False, **settings) == {}

    def test_lookup_of_many_keys(self, store: Store) -> None:
        write(store, make_jobs(range(256)))
        store.commit()
        unknown = [index.to_bytes(16, "big") for index in range(1, 3000)]
        found = store.lookup(
            [*make_jobs(range(256)).keys, *unknown],
            evaluator=EVALUATOR,
            fidelity=0,
            replicate=0,
            other_runs=False,
        )
        expected = {bytes([i]) * 16: float(i) for i in range(256)}
        assert {key: answer.values[0] for key, answer in found.items()} == expected

    def test_item_scores_are_kept_on_request(self, store: Store) -> None:
        scores: list[NDArray[np.floating[Any]] | None] = [
            np.array([0.5, np.nan, 1.0]),
            None,
            np.array([1e6, np.inf]),
        ]
        write(store, make_jobs(range(3)), Evaluations(np.zeros(3), items=scores))
        store.commit()
        assert store.records().items == [None, None, None]
        first, second, third = store.records(items=True).items
        assert first is not None
        assert first.dtype == np.float16
        np.testing.assert_array_equal(first, [0.5, np.nan, 1.0])
        assert second is None
        assert third is not None
        np.testing.assert_array_equal(third, [1e6, np.inf])  # float16 ends at 65504

    def test_too_many_item_scores_warn(self, store: Store) -> None:
        scores: list[NDArray[np.floating[Any]] | None] = [np.zeros(ITEMS_LIMIT + 1, np.float16)]
        with pytest.warns(SearchlabWarning, match="are not kept"):
            write(store, make_jobs([0]), Evaluations(np.zeros(1), items=scores))
        store.commit()
        assert store.records(items=True).items == [None]

    def test_meta_values(self, store: Store) -> None:
        assert store.get_meta("best") is None
        assert store.get_meta("best", 7) == 7
        value = {"id": 3, "values": [1.5, None, "ü"], "deep": {"x": True}}
        store.set_meta("best", value)
        assert store.get_meta("best") == value
        store.commit()
        assert store.get_meta("best") == value
        store.set_meta("best", None)
        store.commit()
        assert store.get_meta("best", 7) is None
        assert store.get_meta("status") == "running"
        with pytest.raises(StudyError, match="'front' is not JSON"):
            store.set_meta("front", {1, 2})

    def test_evaluators_are_numbered(self, store: Store) -> None:
        store.register_evaluator("11" * 16, {"version": 1}, {"device": "cpu"})
        store.register_evaluator("11" * 16, {"version": 1}, {"device": "cpu"})
        write(store, make_jobs([0]), evaluator="11" * 16)
        write(store, make_jobs([1]), evaluator="22" * 16)
        store.commit()
        names = store.evaluators()
        rows = store.records().evaluator.tolist()
        assert [names[row] for row in rows] == ["11" * 16, "22" * 16]

    def test_a_closed_store_takes_nothing(self, store: Store) -> None:
        write(store, make_jobs([0]))
        store.heartbeat()
        store.close("finished")
        store.close("finished")
        with pytest.raises(StudyError, match="is closed"):
            write(store, make_jobs([1]))
        with pytest.raises(StudyError, match="is closed"):
            store.record_void([2], 0, 0)
        with pytest.raises(StudyError, match="is closed"):
            store.set_meta("status", "x")
