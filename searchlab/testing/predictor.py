"""The conformance suite of predictors: inherit it, supply the fixture `build`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Signal
from searchlab.predictor import DRAW_WIDTH, HoldsOut, Predictor, Table, table_of
from searchlab.space import Space
from searchlab.testing.algorithm import SPACES
from searchlab.uniforms import uniforms
from searchlab.variables import Choice, Integer

__all__ = ["PredictorSuite", "labelled"]

Build = Callable[[], Predictor]
"""() -> a new predictor, quick to fit."""

Floats = NDArray[np.float64]

_LOAD = """
import sys, json, numpy as np
from pathlib import Path
from searchlab.predictors.artifact import load_predictor
from searchlab.testing.predictor import labelled, plain_space
space = plain_space()
table, _ = labelled(space, 30, first=500, signals=3)
predictor = load_predictor(Path(sys.argv[1]), space)
mean, sd = predictor.predict(table)
draws = predictor.draw(table, np.array([[0.3, 0.7], [0.1, 0.2]]))
print(json.dumps([mean.tolist(), sd.tolist(), draws.tolist(), predictor.rank(table).tolist()]))
"""


def plain_space() -> Space:
    """Choices and a number."""
    return Space(kind=Choice(tuple("abcd"), shape=(6,)), flag=Choice((0, 1)), n=Integer(0, 9))


def labelled(
    space: Space, n: int, *, first: int = 0, signals: int = 0, noise: float = 0.05
) -> tuple[Table, Floats]:
    """Random candidates with signals, and losses that follow from both.

    The first signal is the loss with noise; the others say less and less.
    """
    population = space.sample(uniforms(11, 0, first, n, space.sample_width))
    codes = space.encode(population).astype(np.float64)
    weights = np.random.default_rng(5).normal(size=(codes.shape[1],))
    losses = codes @ weights + 0.5 * (codes @ weights[::-1]) ** 2 / np.sqrt(len(weights))
    generator = np.random.default_rng([7, first, n])
    blur = 0.5 + np.arange(signals)
    columns = losses[:, None] + blur * losses.std() * generator.normal(size=(n, signals))
    losses = losses + noise * generator.normal(size=n)
    of = [Signal(f"s{i}", "min") for i in range(signals)]
    return table_of(space, population, signals=columns, of=of), losses


def tau(one: Floats, other: Floats) -> float:
    """Kendall's tau without ties."""
    n = len(one)
    signs = np.sign(np.subtract.outer(one, one)) * np.sign(np.subtract.outer(other, other))
    return float(signs.sum() / (n * (n - 1)))


class PredictorSuite:
    """What every predictor promises; each test states one promise.

    A subclass overrides the fixture `build`.

    Attributes:
        with_data: it is saved with its data only.
        learns: Kendall's tau that it reaches on 60 easy labels with a signal.
    """

    with_data = False
    learns = 0.5

    @pytest.fixture
    def build(self) -> Build:
        """() -> a new predictor."""
        raise NotImplementedError("override the fixture `build`")

    @pytest.fixture(params=sorted(SPACES))
    def space(self, request: pytest.FixtureRequest) -> Space:
        """Every kind of space in turn."""
        return SPACES[request.param]()

    def check(self, predictor: Predictor, table: Table) -> None:
        """Shapes and finite numbers of everything that a fitted predictor says."""
        mean, sd = predictor.predict(table)
        assert mean.shape == sd.shape == predictor.rank(table).shape == (len(table),)
        assert np.isfinite(mean).all()
        assert np.isfinite(sd).all()
        assert (sd > 0).all()
        draws = predictor.draw(table, uniforms(1, 0, 0, 3, DRAW_WIDTH))
        assert draws.shape == (3, len(table))
        assert np.isfinite(draws).all()

    def fitted(self, build: Build, table: Table, losses: Floats, seed: int = 1) -> Predictor:
        predictor = build()
        predictor.fit(table, losses, seed=seed)
        return predictor

    def test_it_is_a_predictor(self, build: Build) -> None:
        assert isinstance(build(), Predictor)

    def test_before_a_fit_it_says_so(self, build: Build) -> None:
        table, _ = labelled(plain_space(), 4)
        with pytest.raises(ConfigError, match="learnt nothing"):
            build().predict(table)

    def test_shapes_on_every_space(self, build: Build, space: Space) -> None:
        table, losses = labelled(space, 20, signals=1)
        predictor = self.fitted(build, table, losses)
        self.check(predictor, labelled(space, 7, first=90, signals=1)[0])

    def test_it_learns(self, build: Build) -> None:
        space = plain_space()
        table, losses = labelled(space, 60, signals=2)
        fresh, truth = labelled(space, 200, first=1000, signals=2)
        predictor = self.fitted(build, table, losses)
        assert tau(predictor.predict(fresh)[0], truth) > self.learns
        assert tau(predictor.rank(fresh), truth) > self.learns

    def test_the_order_of_ranks_is_that_of_means(self, build: Build) -> None:
        space = plain_space()
        table, losses = labelled(space, 30, signals=1)
        predictor = self.fitted(build, table, losses)
        mean, _ = predictor.predict(table)
        steps = np.diff(mean[np.argsort(predictor.rank(table), kind="stable")])
        assert (steps >= -1e-9 * np.ptp(mean)).all()

    def test_fits_are_functions_of_data_and_seed(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 30, signals=2)
        predictor = self.fitted(build, table, losses)
        other = self.fitted(build, *labelled(plain_space(), 9, first=50, signals=2))
        other.update(table, losses, seed=1)
        u = uniforms(2, 0, 0, 2, DRAW_WIDTH)
        for one, again in zip(predictor.predict(table), other.predict(table), strict=True):
            assert np.array_equal(one, again)
        assert np.array_equal(predictor.draw(table, u), other.draw(table, u))

    def test_predicting_changes_nothing(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 30, signals=1)
        predictor = self.fitted(build, table, losses)
        before = predictor.predict(table)
        predictor.draw(table.take(slice(0, 5)), uniforms(3, 0, 0, 1, DRAW_WIDTH))
        predictor.rank(table.take(slice(3, 9)))
        assert all(map(np.array_equal, before, predictor.predict(table)))

    def test_draws_differ_and_surround_the_mean(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 25, signals=1)
        fresh, _ = labelled(plain_space(), 40, first=300, signals=1)
        predictor = self.fitted(build, table, losses)
        draws = predictor.draw(fresh, uniforms(4, 0, 0, 200, DRAW_WIDTH))
        mean, sd = predictor.predict(fresh)
        assert len(np.unique(draws, axis=0)) == 200
        assert np.median(np.abs(np.median(draws, axis=0) - mean) / sd) < 0.5

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_few_labels(self, build: Build, n: int) -> None:
        table, losses = labelled(plain_space(), n, signals=1)
        self.check(self.fitted(build, table, losses), table)

    def test_equal_labels(self, build: Build) -> None:
        table, _ = labelled(plain_space(), 12, signals=1)
        predictor = self.fitted(build, table, np.full(12, 3.5))
        self.check(predictor, table)
        assert np.allclose(predictor.predict(table)[0], 3.5, atol=0.5)

    @pytest.mark.parametrize("n", [2, 12])
    def test_failed_labels_are_the_worst(self, build: Build, n: int) -> None:
        table, losses = labelled(plain_space(), n, signals=1)
        losses[::2] = np.inf
        self.check(self.fitted(build, table, losses), table)
        self.check(self.fitted(build, table, np.full(n, np.inf)), table)

    def test_labels_that_are_no_losses_are_refused(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 6)
        for wrong in (losses[:5], np.full(6, np.nan), np.full(6, -np.inf)):
            with pytest.raises(ConfigError, match="losses"):
                build().fit(table, wrong, seed=0)

    def test_no_signal(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 15)
        self.check(self.fitted(build, table, losses), table)

    @pytest.mark.parametrize("value", [np.nan, 0.0, np.inf, -np.inf])
    def test_a_signal_that_says_nothing_changes_little(self, build: Build, value: float) -> None:
        table, losses = labelled(plain_space(), 25, signals=2)
        fresh, truth = labelled(plain_space(), 100, first=400, signals=2)
        plain = tau(self.fitted(build, table, losses).rank(fresh), truth)
        predictor = self.fitted(build, _with(table, value), losses)
        self.check(predictor, _with(fresh, value))
        assert tau(predictor.rank(_with(fresh, value)), truth) > plain - 0.1

    def test_a_signal_missing_at_prediction_only(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 25, signals=2)
        fresh, _ = labelled(plain_space(), 20, first=400, signals=2)
        columns = fresh.signals.copy()
        columns[:, 0] = np.nan
        columns[0, 1] = np.inf
        gone = _with(fresh, 0.0)
        gone = Table(
            fresh.space, fresh.x, fresh.tokens, columns, fresh.signal_names, fresh.directions
        )
        self.check(self.fitted(build, table, losses), gone)

    def test_forty_signals(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 14, signals=40)
        self.check(self.fitted(build, table, losses), table)

    def test_one_variable(self, build: Build) -> None:
        space = Space(a=Choice((0, 1)))
        table, losses = labelled(space, 2)
        self.check(self.fitted(build, table, losses), table)

    def test_a_pool_may_be_shown(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 14, signals=2)
        pool, _ = labelled(plain_space(), 60, first=700, signals=2)
        predictor = build()
        predictor.fit(table, losses, seed=2, pool=pool)
        self.check(predictor, pool)

    def test_other_tables_are_refused(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 14, signals=2)
        predictor = self.fitted(build, table, losses)
        with pytest.raises(ConfigError, match="signals"):
            predictor.predict(labelled(plain_space(), 3, signals=1)[0])
        with pytest.raises(ConfigError, match="space"):
            predictor.predict(labelled(SPACES["plain"](), 3, signals=2)[0])

    # -- labels left out --------------------------------------------------------------------

    def held_out(self, predictor: Predictor) -> Floats | None:
        """What it offers after a fit; None = nothing, as it may."""
        return predictor.held_out() if isinstance(predictor, HoldsOut) else None

    def test_labels_left_out_are_foreseen_where_that_is_offered(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 60, signals=2)
        predictor = build()
        assert self.held_out(predictor) is None
        predictor.fit(table, losses, seed=1)
        said = self.held_out(predictor)
        if said is None:
            return
        assert said.shape == (60,)
        assert np.isfinite(said).all()
        assert tau(said, losses) > self.learns - 0.15
        # Better than nothing, but worse than what was fitted: these were not seen.
        assert np.abs(np.corrcoef(said, losses)[0, 1]) < 0.999
        again = self.held_out(self.fitted(build, table, losses))
        assert again is not None
        assert np.array_equal(said, again)

    def test_labels_without_a_pattern_are_not_foreseen(self, build: Build) -> None:
        found = []
        for seed in range(12):
            table, losses = labelled(plain_space(), 24, first=100 * seed, signals=1)
            shuffled = np.random.default_rng(seed).permutation(losses)
            said = self.held_out(self.fitted(build, table, shuffled))
            if said is None:
                return
            found.append(tau(said, shuffled))
        assert abs(np.mean(found)) < 0.17

    def test_few_or_equal_labels_leave_none_out(self, build: Build) -> None:
        table, losses = labelled(plain_space(), 12, signals=1)
        assert self.held_out(self.fitted(build, table.take(slice(0, 3)), losses[:3])) is None
        assert self.held_out(self.fitted(build, table, np.full(12, 2.0))) is None

    # -- files ------------------------------------------------------------------------------

    @pytest.fixture
    def folder(self, build: Build, tmp_path: Path) -> Path:
        """A predictor of `plain_space` with three signals on disk."""
        table, losses = labelled(plain_space(), 40, signals=3)
        predictor = self.fitted(build, table, losses)
        predictor.save(tmp_path / "saved", with_data=self.with_data)
        return tmp_path / "saved"

    def test_another_process_predicts_the_same(self, build: Build, folder: Path) -> None:
        table, losses = labelled(plain_space(), 40, signals=3)
        fresh, _ = labelled(plain_space(), 30, first=500, signals=3)
        predictor = self.fitted(build, table, losses)
        command = [sys.executable, "-c", _LOAD, str(folder)]
        got = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        u = np.array([[0.3, 0.7], [0.1, 0.2]])
        wanted = [*predictor.predict(fresh), predictor.draw(fresh, u), predictor.rank(fresh)]
        for one, other in zip(wanted, got, strict=True):
            assert np.allclose(one, other, rtol=1e-9, atol=1e-12)

    def test_nothing_is_pickled_and_no_label_is_kept(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {"predictor.json", "weights.safetensors"}
        settings = json.loads((folder / "predictor.json").read_text())
        assert settings["with_data"] is self.with_data

    def test_without_data_it_refuses_or_has_none(self, build: Build, tmp_path: Path) -> None:
        table, losses = labelled(plain_space(), 14, signals=1)
        predictor = self.fitted(build, table, losses)
        if not self.with_data:
            predictor.save(tmp_path / "p")
            return
        with pytest.raises(ConfigError, match="with_data"):
            predictor.save(tmp_path / "p")

    def test_unfitted_is_not_saved(self, build: Build, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="learnt nothing"):
            build().save(tmp_path / "p", with_data=True)

    def test_folders_that_cannot_be_used(self, build: Build, folder: Path) -> None:
        kind = type(build())
        with pytest.raises(DataError, match="space"):
            kind.load(folder, SPACES["plain"]())
        settings = folder / "predictor.json"
        text = settings.read_text()
        settings.write_text(text.replace('"format": 1', '"format": 2'))
        with pytest.raises(DataError, match="format 2"):
            kind.load(folder, plain_space())
        settings.write_text(text)
        weights = folder / "weights.safetensors"
        blob = weights.read_bytes()
        weights.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
        with pytest.raises(DataError, match="hash"):
            kind.load(folder, plain_space())
        weights.unlink()
        with pytest.raises(DataError, match="missing"):
            kind.load(folder, plain_space())
        weights.write_bytes(blob)
        settings.unlink()
        with pytest.raises(DataError, match="missing"):
            kind.load(folder, plain_space())


def _with(table: Table, value: float) -> Table:
    """The same table with one more signal of one value."""
    columns = np.concatenate([table.signals, np.full((len(table), 1), value)], axis=1)
    names, directions = (*table.signal_names, "more"), (*table.directions, "min")
    return Table(table.space, table.x, table.tokens, columns, names, directions)
