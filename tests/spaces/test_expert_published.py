"""The 22 published coefficient files, read without unpickling."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from searchlab.errors import DataError
from searchlab.spaces.experts.model import one_hot
from searchlab.spaces.experts.published import read_published

FOLDER = Path(os.environ.get("SEARCHLAB_DATA", "/nowhere")) / "eep" / "coefficients"
needs_data = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs SEARCHLAB_DATA with eep/")


@needs_data
def test_all_22_files_are_plans() -> None:
    paths = sorted(FOLDER.glob("*.pth"))
    assert len(paths) == 22
    groups = {}
    for path in paths:
        plan = read_published(path)
        left = int(path.stem.rsplit("_", 1)[1])
        assert plan.blocks == tuple(range(32))
        assert plan.counts == [left] * 32
        assert (plan.experts, plan.router_mode) == (8, "prob")
        groups[path.stem] = dict(plan.about)["groups"]
        for name in ("merge", "route") if plan.merge else ():
            values = np.concatenate(plan.matrices(name))
            assert values.min() > -0.3
            assert values.max() < 1.3
    assert set(groups.values()) == {4, 32}
    assert groups["boolq_budget_4"] == 4
    assert groups["rte_budget_4"] == 32
    assert all(count == 32 for name, count in groups.items() if name.endswith("_6"))


@needs_data
def test_nothing_was_merged_for_arc_easy() -> None:
    plan = read_published(FOLDER / "arc-e_budget_6.pth")
    assert plan.kept[0] == (0, 1, 2, 3, 4, 7)
    tables = plan.matrices("merge")
    assert all(np.array_equal(table, one_hot(table)) for table in tables)
    merged = read_published(FOLDER / "rte_budget_4.pth").matrices("merge")
    pure = [np.array_equal(table, one_hot(table)) for table in merged]
    assert abs(np.mean(pure) - 0.06) < 0.01


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch evil",))


def test_other_files_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        ([1, 2], "cannot be read: holds the instruction EMPTY_LIST"),
        ({"a": torch.ones(2, 8)}, "no dictionary with 'others'"),
        ({"others": torch.ones(2, 8).double()}, "holds the instruction GLOBAL"),
        ({"others": torch.ones(8, 2).T}, "with strides"),
        ({"others": torch.ones(2, 8), "others_transfer": torch.ones(3, 8)}, "no matrix of"),
        ({"others": torch.ones(2, 8), "others_transfer": torch.ones(2, 8)}, "equal size"),
        (
            {
                "others": torch.ones(2, 8),
                "others_transfer": torch.ones(2, 8),
                "x": torch.ones(2, 8),
            },
            "have 'x'; allowed: layers",
        ),
        (
            {"others": torch.ones(2, 8) / 0, "others_transfer": torch.ones(2, 8)},
            "'others' is not finite",
        ),
    ]
    for data, message in cases:
        torch.save(data, tmp_path / "a.pth")
        with pytest.raises(DataError, match=message):
            read_published(tmp_path / "a.pth")
    with pytest.raises(DataError, match="cannot be read"):
        read_published(tmp_path / "missing.pth")


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"others": Evil()}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(DataError, match="cannot be read"):
            read_published(tmp_path / name)
    assert not (tmp_path / "evil").exists()
