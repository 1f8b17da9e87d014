"""The conformance suite of spaces: inherit it, supply the fixture `space`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab._adopt import Adopts, adopted
from searchlab.population import Population
from searchlab.space import KEY_BYTES, Space
from searchlab.uniforms import uniforms

__all__ = ["SpaceSuite", "random_population"]


def random_population(space: Space, n: int, *, seed: int = 0, first_id: int = 0) -> Population:
    """The candidates that ids `first_id .. first_id + n - 1` sample."""
    return space.sample(uniforms(seed, 0, first_id, n, space.sample_width))


def _repair_uniforms(space: Space, n: int) -> NDArray[np.float64]:
    return uniforms(1, 1, 0, n, space.repair_width)


class SpaceSuite:
    """What every space promises; each test states one promise.

    A subclass overrides the fixture `space`. `rows` is how many random candidates a test looks at.
    """

    rows = 64

    @pytest.fixture
    def space(self) -> Space:
        """The space under test."""
        raise NotImplementedError("override the fixture `space`")

    @pytest.fixture
    def candidates(self, space: Space) -> Population:
        """Random candidates."""
        return random_population(space, self.rows)

    def test_samples_have_the_declared_shapes(self, space: Space, candidates: Population) -> None:
        assert list(candidates.columns) == list(space.variables)
        for key, variable in space.variables.items():
            assert candidates[key].shape == (self.rows, *variable.shape)
            assert candidates[key].dtype == variable.dtype

    def test_samples_are_feasible(self, space: Space, candidates: Population) -> None:
        assert space.is_feasible(candidates).all()

    def test_samples_are_canonical(self, space: Space, candidates: Population) -> None:
        assert space.canonicalise(candidates).equals(candidates)

    def test_inactive_elements_are_neutral(self, space: Space, candidates: Population) -> None:
        for key, active in space.active(candidates).items():
            assert (candidates[key][~active] == space.variables[key].neutral).all()

    def test_a_sample_does_not_depend_on_its_batch(self, space: Space) -> None:
        whole = random_population(space, 16, first_id=5)
        for row in (0, 7, 15):
            alone = random_population(space, 1, first_id=5 + row)
            assert alone.equals(whole.take([row]))

    def test_extreme_uniforms_give_feasible_candidates(self, space: Space) -> None:
        below_one = np.nextafter(1.0, 0.0)
        u = np.stack([np.zeros(space.sample_width), np.full(space.sample_width, below_one)])
        assert space.is_feasible(space.sample(u)).all()

    def test_repair_leaves_feasible_candidates_alone(
        self, space: Space, candidates: Population
    ) -> None:
        repaired = space.repair(candidates, _repair_uniforms(space, self.rows))
        assert repaired.equals(candidates)

    def test_repair_makes_mutants_feasible(self, space: Space, candidates: Population) -> None:
        repaired = space.repair(self.mutants(space, candidates), _repair_uniforms(space, self.rows))
        assert space.is_feasible(repaired).all()
        assert space.canonicalise(repaired).equals(repaired)

    def test_repair_makes_crossed_rows_feasible(self, space: Space, candidates: Population) -> None:
        columns = {}
        for index, (key, column) in enumerate(candidates.columns.items()):
            other = np.roll(column, 1, axis=0)
            pick = uniforms(3, index, 0, self.rows, max(1, space.variables[key].size))
            columns[key] = np.where(pick.reshape(column.shape) < 0.5, column, other)
        repaired = space.repair(Population(columns), _repair_uniforms(space, self.rows))
        assert space.is_feasible(repaired).all()

    def test_a_repair_does_not_depend_on_its_batch(
        self, space: Space, candidates: Population
    ) -> None:
        mutants, u = self.mutants(space, candidates), _repair_uniforms(space, self.rows)
        whole = space.repair(mutants, u)
        for row in (0, self.rows // 2, self.rows - 1):
            alone = space.repair(mutants.take([row]), u[row : row + 1])
            assert alone.equals(whole.take([row]))

    def test_a_mutation_of_nothing_changes_nothing(
        self, space: Space, candidates: Population
    ) -> None:
        active = space.active(candidates)
        for key, variable in space.variables.items():
            still = np.zeros(candidates[key].shape, dtype=bool)
            u = uniforms(4, 0, 0, self.rows, variable.width)
            moved = variable.mutate(
                candidates[key], still, u, active[key] if variable.when else None
            )
            np.testing.assert_allclose(moved, candidates[key], rtol=0, atol=1e-12)

    def mutants(self, space: Space, candidates: Population) -> Population:
        """Each variable changed in about half of its elements; not repaired."""
        active = space.active(candidates)
        columns = {}
        for index, (key, variable) in enumerate(space.variables.items()):
            u = uniforms(2, index, 0, len(candidates), 2 * variable.width)
            mask = (u[:, variable.width :] < 0.5)[:, : variable.size]
            columns[key] = variable.mutate(
                candidates[key],
                mask.reshape(candidates[key].shape),
                u[:, : variable.width],
                active[key] if variable.when else None,
            )
        return Population(columns)

    def test_keys_are_equal_where_rows_are_equal(
        self, space: Space, candidates: Population
    ) -> None:
        keys = space.keys(candidates)
        assert all(len(key) == KEY_BYTES for key in keys)
        for i in range(self.rows):
            for j in range(i):
                same = candidates.take([i]).equals(candidates.take([j]))
                assert (keys[i] == keys[j]) == same

    def test_keys_do_not_see_inactive_elements(self, space: Space, candidates: Population) -> None:
        active = space.active(candidates)
        other = random_population(space, self.rows, first_id=self.rows)
        columns = {k: np.where(active[k], c, other[k]) for k, c in candidates.columns.items()}
        assert space.keys(space.canonicalise(Population(columns))) == space.keys(candidates)

    def test_pack_and_unpack_are_inverse(self, space: Space, candidates: Population) -> None:
        assert space.unpack(space.pack(candidates)).equals(candidates)

    def test_decode_and_population_are_inverse(self, space: Space, candidates: Population) -> None:
        plain = Space(space.variables, constraints=space.constraints)
        values = plain.decode(candidates)
        assert plain.population(values).equals(candidates)
        assert plain.population(json.loads(json.dumps(values))).equals(candidates)

    def test_an_equal_space_adopts_candidates(self, space: Space, candidates: Population) -> None:
        """Two searches of one space may differ in what is not in its variables."""
        if isinstance(space, Adopts):
            found = space.adopted(space, candidates, 2)
        else:
            found = adopted(space, space, candidates)
            assert found.population.equals(candidates)
        assert space.is_feasible(found.population).all()
        keys, own = space.keys(found.population), space.keys(candidates)
        assert any(key == own[row] for key, row in zip(keys, found.rows, strict=True))

    def test_codes_are_finite_float32(self, space: Space, candidates: Population) -> None:
        code = space.encode(candidates)
        assert code.shape[0] == self.rows
        assert code.dtype == np.float32
        assert np.isfinite(code).all()

    def test_codes_of_inactive_elements_are_zero(
        self, space: Space, candidates: Population
    ) -> None:
        for key, active in space.active(candidates).items():
            variable = space.variables[key]
            code = variable.encode(candidates[key], active)
            assert code.shape == (self.rows, variable.code_width)
            by_element = code.reshape(self.rows, variable.size, -1)
            assert (by_element[~active.reshape(self.rows, -1)] == 0).all()

    def test_different_candidates_have_different_codes(
        self, space: Space, candidates: Population
    ) -> None:
        codes = {row.tobytes() for row in space.encode(candidates)}
        assert len(codes) == len(set(space.keys(candidates)))

    def test_neighbours_are_feasible_new_and_distinct(
        self, space: Space, candidates: Population
    ) -> None:
        start = candidates.take([0])
        around = space.neighbours(start)
        keys = space.keys(around)
        assert space.is_feasible(around).all()
        assert space.canonicalise(around).equals(around)
        assert len({*keys, *space.keys(start)}) == len(keys) + 1

    def test_empty_populations_pass_through(self, space: Space) -> None:
        empty = space.empty()
        u = np.empty((0, space.sample_width))
        assert len(space.sample(u)) == 0
        assert len(space.repair(empty, u)) == 0
        assert space.keys(empty) == ()
        assert space.pack(empty) == []
        assert space.unpack([]).equals(empty)
        assert space.encode(empty).shape == (0, space.code_width)
        assert space.is_feasible(empty).shape == (0,)

    def test_costs_have_one_number_per_candidate(
        self, space: Space, candidates: Population
    ) -> None:
        for figures in space.cost(candidates).values():
            assert figures.shape == (self.rows,)
            assert np.isfinite(figures).all()

    def test_the_fingerprint_is_a_function_of_the_description(self, space: Space) -> None:
        text = json.dumps(space.to_json())
        assert json.loads(text) == json.loads(json.dumps(space.to_json()))
        assert len(space.fingerprint) == 2 * KEY_BYTES
