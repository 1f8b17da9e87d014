"""Separable programs: exact against brute force, fronts, several budgets, golden tables."""

from __future__ import annotations

import csv
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from searchlab.errors import ConfigError
from searchlab.programs import Limit, SeparableProgram

Array = NDArray[Any]


def brute(program: SeparableProgram) -> float:
    """The least loss of all plans, inf where none is allowed."""
    e = len(program.losses)
    best = np.inf
    for plan in itertools.product(*[np.flatnonzero(program.allowed[i]) for i in range(e)]):
        labels = np.array(plan)
        if not keeps(program, labels):
            continue
        best = min(best, float(program.losses[np.arange(e), labels].sum()))
    return best


def keeps(program: SeparableProgram, labels: Array) -> bool:
    own = np.arange(len(labels))
    for limit in program.budgets:
        spent = limit.costs[own, labels].sum()
        if not limit.lower - limit.slip <= spent <= limit.upper + limit.slip:
            return False
    for tie in program.ties:
        if len(set(labels[list(tie)].tolist())) > 1:
            return False
    if program.max_distinct is None:
        return True
    pairs = {(int(g), int(c)) for g, c in zip(program.groups, labels, strict=True)}
    return max(np.bincount([g for g, _ in pairs])) <= program.max_distinct


def random_program(seed: int, *, budgets: int, limited: bool) -> SeparableProgram:
    rng = np.random.default_rng(seed)
    e, k = int(rng.integers(1, 7)), int(rng.integers(1, 6))
    losses = rng.random((e, k)) if rng.random() < 0.5 else rng.integers(0, 4, (e, k)).astype(float)
    allowed = rng.random((e, k)) < 0.8
    allowed[np.arange(e), rng.integers(0, k, e)] = True
    limits = []
    for number in range(budgets):
        whole = rng.random() < 0.6
        costs = rng.integers(-3, 9, (e, k)).astype(float) if whole else rng.random((e, k))
        low = float(np.where(allowed, costs, np.inf).min(axis=1).sum())
        high = float(np.where(allowed, costs, -np.inf).max(axis=1).sum())
        a, b = sorted(low + (high - low) * rng.uniform(-0.1, 1.1, 2))
        lower = a if rng.random() < 0.4 else -np.inf
        limits.append(Limit(costs, upper=b, lower=lower, name=f"b{number}"))
    ties = (
        [sorted(rng.choice(e, 2, replace=False).tolist())] if e > 2 and rng.random() < 0.3 else []
    )
    groups, most = None, None
    if limited:
        groups, most = rng.integers(0, 2, e), int(rng.integers(1, 3))
        ties = [tie for tie in ties if groups[tie[0]] == groups[tie[1]]]
    return SeparableProgram(losses, limits, allowed, ties, most, groups)


@pytest.mark.parametrize(
    ("budgets", "limited", "cases"),
    [(0, False, 10), (1, False, 300), (2, False, 60), (3, True, 60)],
)
def test_the_optimum_is_that_of_brute_force(budgets: int, limited: bool, cases: int) -> None:
    solved = 0
    for seed in range(cases):
        try:
            program = random_program(seed, budgets=budgets, limited=limited)
            answer = program.solve(gap=0.0)
        except ConfigError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert "allowed" in refused
            assert "tied elements have no label" in refused or brute(program) == np.inf, seed
            continue
        best = brute(program)
        assert keeps(program, answer.labels), seed
        assert answer.loss == pytest.approx(best, rel=1e-9, abs=1e-9), seed
        assert answer.bound <= best + 1e-9, seed
        assert answer.gap <= 1e-6, seed
        solved += 1
    assert solved > cases / 3


def test_the_front_is_feasible_undominated_and_optimal_at_its_own_costs() -> None:
    for seed in range(80):
        rng = np.random.default_rng(seed)
        losses, costs = rng.random((5, 4)), rng.integers(0, 20, (5, 4)).astype(float)
        program = SeparableProgram(losses, [Limit(costs, upper=45.0)])
        try:
            front = program.front()
        except ConfigError:
            assert costs.min(axis=1).sum() > 45
            continue
        plans = front.labels(np.arange(len(front)))
        own = np.arange(5)
        assert np.array([costs[own, p].sum() for p in plans]) == pytest.approx(front.costs)
        assert np.array([losses[own, p].sum() for p in plans]) == pytest.approx(front.losses)
        assert (front.costs <= 45).all()
        assert (np.diff(front.costs) > 0).all()
        assert (np.diff(front.losses) < 0).all()
        for cost, loss in zip(front.costs, front.losses, strict=True):
            assert program.solve(upper=cost).loss == pytest.approx(loss, rel=1e-12)


def synthetic_twin(seed: int = 0, layers: int = 200) -> tuple[Array, Array]:
    """Losses and parameter bits of a made-up network of the shape of a real table."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([409600, 1310720, 1638400, 2621440, 3276800, 6553600, 13107200], layers)
    bits = np.array([2.0, 4.0, 8.0])
    scale = 10 ** rng.normal(-5, 0.8, layers)
    losses = scale[:, None] * 4 ** (-(bits - 2) * 0.85)
    losses[:, 2] = np.maximum(losses[:, 2], 1e-8)
    return losses, sizes[:, None] * bits


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.8])
def test_the_synthetic_twin_is_solved_as_highs_solves_it(share: float) -> None:
    from searchlab._label_program import LabelProgram

    losses, costs = synthetic_twin()
    low, high = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    upper = low + share * (high - low)
    answer = SeparableProgram(losses, [Limit(costs, upper)]).solve()
    assert answer.gap == 0
    assert answer.costs["budget"] <= upper
    shifted = (losses - losses.min(axis=1, keepdims=True)) * 1e5
    found, proved = LabelProgram(
        shifted, costs[None], np.array([-np.inf]), np.array([upper]), losses > -1
    ).solve(gap=1e-5)
    assert found is not None
    own = np.arange(len(losses))
    ours, theirs = shifted[own, answer.labels].sum(), shifted[own, found].sum()
    assert ours <= theirs * (1 + 1e-9)
    assert ours >= proved * (1 - 1e-6)


def test_a_million_added_to_every_value_changes_no_plan() -> None:
    losses, costs = synthetic_twin()
    limit = Limit(costs, 0.5 * costs.max(axis=1).sum())
    plain = SeparableProgram(losses * 1e3, [limit]).solve()
    moved = SeparableProgram(losses * 1e3 + 1e6, [limit]).solve()
    own = np.arange(len(losses))
    assert losses[own, plain.labels].sum() == pytest.approx(
        losses[own, moved.labels].sum(), rel=1e-7
    )
    assert (plain.labels == moved.labels).all()


def test_a_budget_that_is_too_small_names_the_smallest() -> None:
    program = SeparableProgram([[1.0, 0.0], [2.0, 0.0]], [Limit([[2, 5], [3, 9]], upper=4)])
    for ask in (program.solve, program.front):
        with pytest.raises(ConfigError, match=r"budget' of at most 4 .* allowed: 5 or more"):
            ask()
    with pytest.raises(ConfigError, match=r"at least 20 .* allowed: 14 or less"):
        SeparableProgram(program.losses, [Limit([[2, 5], [3, 9]], lower=20)]).solve()


def test_budgets_that_exclude_each_other_name_the_smallest() -> None:
    one, two = Limit([[0, 1], [0, 1]], upper=1, name="one"), Limit([[1, 0], [1, 0]], 0, name="two")
    with pytest.raises(ConfigError, match=r"'one', 'two' .* 'two' of 1 or more"):
        SeparableProgram(np.zeros((2, 2)), [one, two]).solve()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeparableProgram([[1.0, np.nan]]), "loss of label 1 of element 0 is nan"),
        (lambda: SeparableProgram([[1.0, np.inf]]), "loss of label 1 of element 0 is inf"),
        (lambda: SeparableProgram([1.0, 2.0]), "losses of shape"),
        (lambda: SeparableProgram([[1.0]], [Limit([[np.inf]])]), "cost in budget"),
        (lambda: SeparableProgram([[1.0]], [Limit([[1, 2, 3]])]), "costs of budget"),
        (lambda: SeparableProgram([[1.0]], [Limit(1), Limit(2)]), "different names"),
        (lambda: SeparableProgram([[1.0]], [Limit(1, 1, 2)]), "lower"),
        (lambda: SeparableProgram([[1.0]], (), [[False]]), "has no label"),
        (lambda: SeparableProgram([[1.0]], (), None, [[0, 0]]), "tie"),
        (lambda: SeparableProgram([[1.0]], (), None, (), 2), "both or none"),
        (lambda: SeparableProgram([[1.0]]).front(), "front of 0 budgets"),
        (lambda: SeparableProgram([[1.0]]).solve(gap=-1), "gap"),
        (lambda: SeparableProgram([[1.0]], [Limit(1)]).solve(upper={"x": 1}), "known"),
    ],
)
def test_what_cannot_be_solved_is_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "allowed" in str(caught.value) or "known" in str(caught.value)


def test_too_many_sets_of_labels_are_refused() -> None:
    losses = np.tile(np.arange(60.0), (12, 1))
    with pytest.raises(ConfigError, match="allowed: 20000"):
        SeparableProgram(losses, [Limit(-losses, -90.0)], None, (), 5, [0, 1] * 6).solve()


def test_many_budgets_and_two_labels_per_layer_are_solved_with_a_proof() -> None:
    rng = np.random.default_rng(1)
    scale, power = 10 ** rng.normal(0, 0.5, 96), rng.uniform(0.5, 2, 96)
    width = np.arange(1, 13)
    losses = scale[:, None] * width[None] ** -power[:, None]
    budgets = [
        Limit(width / 12 / 96, upper=0.5, name="a"),
        Limit((width / 12) ** 2 / 96, 0.4, name="b"),
    ]
    layers = np.arange(96) // 8
    answer = SeparableProgram(losses, budgets, None, (), 2, layers).solve()
    assert keeps(SeparableProgram(losses, budgets, None, (), 2, layers), answer.labels)
    free = SeparableProgram(losses, budgets).solve()
    assert free.bound <= free.loss <= answer.loss
    assert answer.gap < 0.05
    assert free.gap < 1e-3


def spans(heads: int, layers: int, seed: int, widths: int = 24) -> SeparableProgram:
    """Made-up sensitivities of heads to their widths, two budgets, two widths per layer."""
    rng = np.random.default_rng(seed)
    scale, power = 10 ** rng.normal(0, 0.6, heads), rng.uniform(0.5, 2, heads)
    width = np.arange(1, widths + 1)
    losses = scale[:, None] * width[None] ** -power[:, None]
    budgets = [
        Limit(width / widths / heads, upper=0.5, name="a"),
        Limit((width / widths) ** 2 / heads, 0.33, name="b"),
    ]
    return SeparableProgram(losses, budgets, None, (), 2, np.arange(heads) * layers // heads)


@pytest.mark.parametrize("seed", range(4))
def test_two_labels_per_layer_are_proved_to_a_thousandth(seed: int) -> None:
    program = spans(256, 16, seed)
    answer = program.solve()
    assert keeps(program, answer.labels)
    assert answer.gap <= 1e-3
    again = program.solve()
    assert (again.labels == answer.labels).all()
    assert again.bound == answer.bound


def test_windows_prove_what_the_whole_program_proves() -> None:
    """The bound of every window is below the optimum, which a wide enough one finds."""
    from searchlab._columns import Generation
    from searchlab._label_program import Many
    from searchlab._set_program import SetProgram

    found_any = 0
    for seed in range(8):
        program = spans(12, 3, seed, widths=6)
        costs = np.stack([b.costs for b in program.budgets])
        losses = program.losses - program.losses.min(axis=1, keepdims=True)
        upper = np.array([b.upper for b in program.budgets])
        problem = Many(losses, costs, np.full(2, -np.inf), upper, program.groups, 2)
        generation = Generation(problem)
        generation.run(1e-6)
        priced, sums = generation.priced_sums()
        optimum = program.solve(gap=1e-7).loss - program.losses.min(axis=1).sum()
        for share in (1e-3, 0.01, 0.1):
            room = share * generation.bound
            assert generation.sets is not None
            window = SetProgram(
                problem, priced, generation.members, generation.sets, sums, generation.bound, room
            )
            labels, proved = window.solve(1e-6, 1000)
            assert generation.bound <= proved <= optimum * (1 + 1e-6)
            inside = optimum <= generation.bound + room
            if labels is not None:
                assert problem.keeps(labels)
                assert problem.loss(labels) >= optimum * (1 - 1e-6)
            if inside:
                assert labels is not None
                assert problem.loss(labels) == pytest.approx(optimum, rel=1e-5)
                found_any += 1
            else:
                assert proved == pytest.approx(generation.bound + room, rel=1e-5)
    assert found_any >= 4


def test_plans_that_every_window_lacks_are_proved_not_to_exist() -> None:
    """Shares of labels keep both budgets, whole labels do not."""
    cost = np.array([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    limit = Limit(cost, upper=3.5, lower=2.5)
    with pytest.raises(ConfigError, match="allowed"):
        SeparableProgram(cost, [limit], None, (), 1, [0, 1, 2]).solve()


# -- a measured table, where it is there ----------------------------------------------------------


def table() -> tuple[list[dict[str, str]], dict[str, Any]]:
    folder = Path(os.environ.get("SEARCHLAB_DATA", "")) / "mixdq"
    if not (folder / "sdxl_turbo_layers.csv").is_file():
        pytest.skip("no folder SEARCHLAB_DATA/mixdq with the measured table")
    with open(folder / "sdxl_turbo_layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((folder / "reference_optima.json").read_text("utf-8"))


def instance(
    rows: list[dict[str, str]], kind: str, group: str | None, bits: tuple[int, ...], of: str = "w"
) -> tuple[Array, Array, Array]:
    """Losses, bits spent and the rows of one group."""
    keep = np.array([group in (None, row["group"]) for row in rows])
    if of == "a":
        keep &= np.array([row["act_fp16"] == "0" for row in rows])
    some = [row for row, k in zip(rows, keep, strict=True) if k]
    column = f"{of}_{'ssim' if kind == 'ssim' else 'sqnr'}"
    values = np.array([[float(row[f"{column}_{b}"]) for b in bits] for row in some])
    losses = 10 ** (-values / 10) if kind == "noise" else values.max(1, keepdims=True) - values
    sizes = np.array([float(row["w_params" if of == "w" else "a_elems"]) for row in some])
    return losses, sizes[:, None] * np.array(bits, dtype=float), keep


@pytest.mark.parametrize("config", ["3.66", "4.00", "4.08", "5.02"])
@pytest.mark.parametrize(
    ("group", "kind", "bits"), [("content", "ssim", (2, 4, 8)), ("quality", "db", (4, 8))]
)
def test_published_weight_configurations_are_found_bit_by_bit(
    config: str, group: str, kind: str, bits: tuple[int, ...]
) -> None:
    rows, reference = table()
    losses, costs, keep = instance(rows, kind, group, bits)
    published = np.array([float(row[f"w{config}"]) for row in rows])[keep]
    wanted = reference[f"w{config}_{group}"]
    answer = SeparableProgram(losses, [Limit(costs, wanted["budget_bits"])]).solve()
    assert (np.array(bits)[answer.labels] == published).all()
    assert answer.loss == pytest.approx(wanted["loss_opt"], rel=1e-9)
    assert answer.gap == 0


def test_reference_optima_are_reached_or_beaten() -> None:
    """Those of the noise are what rounding the relaxation gives, up to 1.1 % above the optimum."""
    rows, reference = table()
    for name, wanted in reference.items():
        if name.startswith("a7"):
            kind = name.split("_")[2]
            losses, costs, _ = instance(rows, kind, "content", (4, 8), "a")
            upper = wanted["budget_bits"]
        elif name.startswith("joint"):
            kind = "noise"
            losses, costs, _ = instance(rows, kind, None, (2, 4, 8))
            upper = wanted["avg_bits"] * costs[:, 0].sum() / 2
        else:
            continue
        answer = SeparableProgram(losses, [Limit(costs, upper)]).solve()
        assert answer.gap == 0
        assert answer.costs["budget"] <= upper
        assert answer.loss <= wanted["loss_opt"] * (1 + 1e-9), name
        if kind == "ssim" or name == "joint_noise_3":
            assert answer.loss == pytest.approx(wanted["loss_opt"], rel=1e-9), name
        assert answer.loss >= wanted["loss_opt"] * 0.985, name


@pytest.mark.parametrize(
    ("kind", "group", "bits", "points", "volume"),
    [
        ("ssim", "content", (2, 4, 8), 832, 0.888673),
        ("db", "quality", (4, 8), 375, 0.724164),
        ("noise", None, (2, 4, 8), 1587, 0.991804),
    ],
)
def test_fronts_of_the_measured_table(
    kind: str, group: str | None, bits: tuple[int, ...], points: int, volume: float
) -> None:
    rows, _ = table()
    losses, costs, _ = instance(rows, kind, group, bits)
    front = SeparableProgram(losses, [Limit(costs)]).front()
    assert len(front) == points
    x = (front.costs - front.costs[0]) / (costs.max(axis=1).sum() - front.costs[0])
    y = (front.losses - front.losses[-1]) / (front.losses[0] - front.losses[-1])
    assert float((np.diff(np.append(x, 1.0)) * (1 - y)).sum()) == pytest.approx(volume, abs=1e-6)


def test_highs_takes_over_where_states_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    import searchlab._exact as exact

    rng = np.random.default_rng(4)
    losses, costs = rng.random((40, 4)), rng.random((40, 4))
    limit = Limit(costs, upper=14.0)
    wanted = SeparableProgram(losses, [limit]).solve()
    assert wanted.gap == 0
    monkeypatch.setattr(exact, "MOST_STATES", 3)
    answer = SeparableProgram(losses, [limit]).solve()
    assert answer.costs["budget"] <= 14 + 1e-9
    assert answer.bound <= wanted.loss + 1e-9
    assert answer.loss == pytest.approx(wanted.loss, rel=1e-6)
