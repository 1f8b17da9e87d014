"""The checkpoint bank: what it reads, what it refuses, and that mixing is exact where it can be."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from searchlab.errors import ConfigError, DataError, SpaceError
from searchlab.spaces.checkpoint_mix import CheckpointBank, buffers, find_checkpoints, merge, states
from searchlab.spaces.checkpoint_mix.baselines import ema, ema_of_steps, lawa, named, one_hot
from searchlab.spaces.checkpoint_mix.export import mergekit_yaml, write_merged
from searchlab.spaces.checkpoint_mix.lora import product_config, product_state
from searchlab.spaces.checkpoint_mix.merge import convex, move
from searchlab.spaces.checkpoint_mix.subspace import gram_matrix

K = 5


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (0.05 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    embedding = draw(37, 11)
    return {
        "head.weight": embedding,
        "embed.weight": embedding.clone(),
        "blocks.0.w": draw(13, 7),
        "blocks.1.w": draw(301),
        "frequencies": torch.linspace(0, 1, 9).to(dtype),
        "count": torch.tensor([seed, 3]),
    }


def write(folder: Path, *, k: int = K, dtype: torch.dtype = torch.float32) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for step in range(k):
        paths.append(folder / f"step_{step * 10 + 10}.safetensors")
        save_file(weights(step, dtype), paths[-1])
    return paths


def opened(run: Path, **options: Any) -> CheckpointBank:
    return CheckpointBank(find_checkpoints([run]), **options)


def random_rows(p: int, k: int = K, *, size: float = 1.0, seed: int = 0) -> Any:
    rows = size * np.random.default_rng(seed).normal(size=(p, k))
    return rows + (1 - rows.sum(axis=1, keepdims=True)) / k


# -- mixing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_moving_average_is_a_point(tmp_path: Path, rate: float, dtype: torch.dtype) -> None:
    write(tmp_path, k=20, dtype=dtype)
    bank = opened(tmp_path)
    running = bank.row(0).double()
    for k in range(1, 20):
        running = rate * running + (1 - rate) * bank.row(k).double()
    (found,) = merge(bank, ema(20, rate)[None])
    bound = 1e-12 if dtype is torch.float64 else 2e-6
    assert (found[0].double() - running).abs().max() <= bound * running.abs().max()
    assert abs(ema(20, rate).sum() - 1) <= 20e-15


def test_known_averages() -> None:
    assert ema(4, 0.5).tolist() == [0.125, 0.125, 0.25, 0.5]
    np.testing.assert_allclose(ema_of_steps([1, 2, 3, 4], 0.5), ema(4, 0.5), atol=1e-15)
    np.testing.assert_allclose(ema_of_steps([10, 20, 40], 0.9).sum(), 1, atol=1e-15)
    assert lawa(5, 2).tolist() == [0, 0, 0, 0.5, 0.5]
    rows = named(7)
    assert {"last", "uniform", "ema_0.9", "lawa_3", "single_2"} <= set(rows)
    assert len({row.tobytes() for row in rows.values()}) == len(rows)
    for text in (lambda: ema(3, 1.0), lambda: lawa(3, 4), lambda: one_hot(3, 3)):
        with pytest.raises(ConfigError):
            text()


@pytest.mark.parametrize("storage", ["memory", "mapped", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_hot_is_the_checkpoint(tmp_path: Path, dtype: torch.dtype, storage: Any) -> None:
    paths = write(tmp_path / "run", dtype=dtype)
    bank = opened(tmp_path / "run", folder=tmp_path / "bank", storage=storage, tile=64)
    for path, state in zip(paths, states(bank, np.eye(K)), strict=True):
        there = load_file(path)
        assert list(state) == list(there)
        for name, tensor in there.items():
            assert state[name].dtype == tensor.dtype
            assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_are_kept_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, dtype=dtype)
    bank = opened(tmp_path, tile=128)
    rows = random_rows(6, size=15.0)
    exact = torch.from_numpy(rows) @ torch.stack([bank.row(k).double() for k in range(K)])
    (found,) = merge(bank, rows)
    bound = 1e-6 * np.abs(rows).sum(axis=1).max() * 0.25
    assert (found.double() - exact).abs().max() <= bound


def test_where_a_bank_lies_changes_no_bit(tmp_path: Path) -> None:
    write(tmp_path / "run", dtype=torch.bfloat16)
    rows = random_rows(7)
    banks = [
        opened(tmp_path / "run", folder=tmp_path / "bank", storage=kind, tile=64)
        for kind in ("memory", "mapped", "streamed")
    ]
    first, *others = [merge(bank, rows)[0] for bank in banks]
    assert all(torch.equal(first, other) for other in others)
    wider = merge(opened(tmp_path / "run", tile=512), rows)[0]
    assert (wider - first).abs().max() <= 1e-6 * first.abs().max()


def test_a_candidate_does_not_depend_on_the_others(tmp_path: Path) -> None:
    write(tmp_path)
    bank = opened(tmp_path, tile=64)
    rows = random_rows(20)
    (whole,) = merge(bank, rows)
    for count in (1, 2, 3, 5, 16):
        assert torch.equal(merge(bank, rows[:count])[0], whole[:count])
    assert torch.equal(merge(bank, rows[::-1].copy())[0], whole.flip(0))
    (quick,) = merge(bank, rows[:1], alone=True)
    assert (quick - whole[:1]).abs().max() <= 1e-6 * np.abs(rows[0]).sum() * 0.25


def test_a_bank_of_differences(tmp_path: Path) -> None:
    write(tmp_path)
    plain, bank = opened(tmp_path), opened(tmp_path, delta="float16")
    rows = random_rows(4)
    expected, found = merge(plain, rows)[0], merge(bank, rows)[0]
    assert bank.bytes == plain.bytes // 2
    assert 0 < (expected - found).abs().max() < 2e-3 * np.abs(rows).sum()
    for k in range(K):  # the files' own values, not base + difference
        assert torch.equal(merge(bank, np.eye(K)[k : k + 1])[0][0], plain.row(k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("delta", [None, "bfloat16"])
def test_rows_on_a_device_give_the_same_but_for_rounding(
    tmp_path: Path, dtype: torch.dtype, delta: Any
) -> None:
    write(tmp_path, dtype=dtype)
    rows = np.concatenate([random_rows(3), np.eye(K)])
    plain, bank = opened(tmp_path, delta=delta), opened(tmp_path, delta=delta, device="cpu")
    assert bank.plan.storage == "device"
    expected, found = merge(plain, rows)[0], merge(bank, rows)[0]
    assert (found - expected).abs().max() <= 1e-6 * np.abs(rows).sum(axis=1).max()
    assert torch.equal(found[3:], expected[3:])
    groups = {name: int(name.startswith("blocks.1")) for name in bank.layout.mixed}
    both = np.stack([random_rows(2, seed=1), random_rows(2, seed=2)], axis=1)
    segments = bank.layout.segments(groups)
    expected, found = (merge(b, both, segments=segments)[0] for b in (plain, bank))
    assert (found - expected).abs().max() <= 1e-6 * np.abs(both).sum()
    np.testing.assert_allclose(gram_matrix(bank), gram_matrix(plain), rtol=1e-4)


def test_groups_are_mixed_apart(tmp_path: Path) -> None:
    write(tmp_path)
    bank = opened(tmp_path, tile=64)
    names = bank.layout.mixed
    groups = {name: int(name.startswith("blocks.1")) for name in names}
    segments = bank.layout.segments(groups)
    rows = np.stack([random_rows(2, seed=1), random_rows(2, seed=2)], axis=1)
    (found,) = merge(bank, rows, segments=segments)
    apart = [merge(bank, rows[:, g])[0] for g in range(2)]
    for place in bank.layout.blocks[0].places:
        part = slice(place.start, place.start + place.count)
        difference = found[:, part] - apart[groups[place.name]][:, part]
        assert difference.abs().max() <= 1e-6
    with pytest.raises(SpaceError, match="in no group"):
        bank.layout.segments({})


def test_shortcuts_agree_with_a_whole_merge(tmp_path: Path) -> None:
    write(tmp_path)
    bank = opened(tmp_path)
    a, b = random_rows(2)
    pair = merge(bank, np.stack([a, b]))[0]
    mixed = merge(bank, (0.3 * a + 0.7 * b)[None])[0][0]
    bound = 1e-6 * 0.25 * (np.abs(a).sum() + np.abs(b).sum())
    assert (convex(pair[0], pair[1], 0.3) - mixed).abs().max() <= bound
    total = merge(bank, np.ones((1, K)))[0]
    held, row = [pair[0]], a.copy()
    generator = np.random.default_rng(3)
    for _ in range(32):
        change = np.zeros(K)
        change[generator.integers(K)] = 0.1 * generator.normal()
        change -= change.sum() / K
        held, row = move(bank, held, change, total=[total[0]]), row + change
    assert (held[0] - merge(bank, row[None])[0][0]).abs().max() <= bound
    assert gram_matrix(bank).shape == (K, K)
    assert np.linalg.eigvalsh(gram_matrix(bank))[0] > -1e-6


# -- layout ---------------------------------------------------------------------------------------


def test_tied_equal_and_integer_tensors(tmp_path: Path) -> None:
    write(tmp_path)
    bank = opened(tmp_path)
    assert dict(bank.layout.tied) == {"head.weight": "embed.weight"}
    assert bank.layout.constant == ("frequencies",)
    assert bank.layout.counted == ("count",)
    row = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    (state,) = states(bank, row[None])
    assert state["count"].tolist() == [3, 3]
    assert torch.equal(state["frequencies"], weights(0)["frequencies"])
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_the_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    path = tmp_path / "b" / "step_20.safetensors"
    state = load_file(path)
    save_file({name: state[name] for name in reversed(list(state))}, path)
    rows = random_rows(3)
    assert torch.equal(
        merge(opened(tmp_path / "a"), rows)[0], merge(opened(tmp_path / "b"), rows)[0]
    )


def change_third(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "step_30.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("blocks.0.w"), "step_30.*lacks tensor 'blocks.0.w'"),
        (lambda s: s.update(more=torch.ones(1)), "step_30.*one more tensor 'more'"),
        (lambda s: s.update({"blocks.0.w": torch.ones(7, 13)}), "shape .7, 13.*13, 7"),
        (lambda s: s.update({"blocks.1.w": s["blocks.1.w"].half()}), "blocks.1.w' is F16"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    write(tmp_path)
    change_third(tmp_path, change)
    with pytest.raises(DataError, match=text):
        opened(tmp_path)


def test_what_is_not_finite_is_named_and_does_not_leak(tmp_path: Path) -> None:
    write(tmp_path)
    change_third(tmp_path, lambda s: s["blocks.0.w"].view(-1)[5].fill_(float("nan")))
    bank = opened(tmp_path)
    assert list(bank.broken) == [2]
    row = np.array([0.25, 0.25, 0.0, 0.25, 0.25])
    assert torch.isfinite(merge(bank, row[None])[0]).all()
    with pytest.raises(DataError, match=r"step_30.*blocks.0.w"):
        merge(bank, np.full((1, K), 0.2))
    (alone,) = states(bank, one_hot(K, 2)[None])
    assert torch.isnan(alone["blocks.0.w"].view(-1)[5])


@pytest.mark.parametrize(
    "rows", [np.zeros((0, K)), np.ones((1, K + 1)), np.ones(K), [[np.nan] * K]]
)
def test_other_coefficients_are_refused(tmp_path: Path, rows: Any) -> None:
    write(tmp_path)
    with pytest.raises(SpaceError, match="coefficients"):
        merge(opened(tmp_path), np.asarray(rows))


# -- files ----------------------------------------------------------------------------------------


def test_damaged_files_are_named(tmp_path: Path) -> None:
    paths = write(tmp_path)
    raw = paths[1].read_bytes()
    for cut, text in ((len(raw) - 9, "is cut off"), (5, "not a safetensors file"), (0, "not a")):
        paths[1].write_bytes(raw[:cut])
        with pytest.raises(DataError, match=f"step_20.*{text}"):
            opened(tmp_path)
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    head["blocks.0.w"]["shape"] = [13, 8]
    text = json.dumps(head).encode()
    paths[1].write_bytes(len(text).to_bytes(8, "little") + text + raw[-4000:])
    with pytest.raises(DataError, match=r"blocks.0.w.*stands in"):
        opened(tmp_path)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match=r"pickle.*safetensors.torch.save_file"):
        find_checkpoints([tmp_path])
    with pytest.raises(DataError, match="pickle"):
        find_checkpoints([tmp_path / "checkpoint-1" / "pytorch_model.bin"])


def test_too_few_checkpoints(tmp_path: Path) -> None:
    (path,) = write(tmp_path, k=1)
    with pytest.raises(ConfigError, match=r"1 checkpoint at.*two or more"):
        find_checkpoints([path])
    with pytest.raises(ConfigError, match="no checkpoint at"):
        find_checkpoints([tmp_path / "nothing-*"])
    shutil.copy(path, tmp_path / "step_20.safetensors")
    with pytest.raises(DataError, match="are equal"):
        opened(tmp_path)


def test_folders_of_trainers_are_read(tmp_path: Path) -> None:
    for step in (500, 1000, 90):
        folder = tmp_path / "trainer" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        state = weights(step)
        names = list(state)
        shards = {
            "model-00001-of-00002.safetensors": {n: state[n] for n in names[:3]},
            "model-00002-of-00002.safetensors": {n: state[n] for n in names[3:]},
        }
        for name, part in shards.items():
            save_file(part, folder / name)
        index = {n: name for name, part in shards.items() for n in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (folder / "config.json").write_text("{}")
        (folder / "optimizer.pt").write_bytes(b"x")
        unet = tmp_path / "diffusers" / f"checkpoint-{step}" / "unet"
        unet.mkdir(parents=True)
        save_file(state, unet / "diffusion_pytorch_model.safetensors")
    sharded = find_checkpoints([tmp_path / "trainer"])
    assert [source.step for source in sharded] == [90, 500, 1000]
    assert [s.step for s in find_checkpoints([str(tmp_path / "trainer/checkpoint-*")])] == [
        90,
        500,
        1000,
    ]
    plain = find_checkpoints([tmp_path / "diffusers"])
    rows = random_rows(2, 3)
    one, two = CheckpointBank(sharded), CheckpointBank(plain)
    assert torch.equal(merge(one, rows)[0], merge(two, rows)[0])
    out = tmp_path / "out"
    out.mkdir()
    written = {path.name for path in write_merged(one, rows[0], out)}
    assert {"config.json", "model.safetensors.index.json"} <= written
    assert "optimizer.pt" not in written
    (state,) = states(one, rows[:1])
    again = {**load_file(out / "model-00001-of-00002.safetensors")}
    again |= load_file(out / "model-00002-of-00002.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state)
    text = mergekit_yaml(one, rows[0])
    assert text.count("weight:") == 3
    assert "normalize: false" in text
    second = tmp_path / "diffusers" / "checkpoint-90" / "transformer"
    second.mkdir()
    save_file(weights(1), second / "model.safetensors")
    with pytest.raises(ConfigError, match=r"several parts.*transformer, unet"):
        find_checkpoints([tmp_path / "diffusers"])
    assert len(find_checkpoints([tmp_path / "diffusers"], part="unet")) == 3


def test_memory_is_planned_and_refused(tmp_path: Path) -> None:
    write(tmp_path / "run")
    bank = opened(tmp_path / "run")
    assert bank.plan.storage == "memory"
    assert bank.plan.peak >= bank.bytes + bank.output_bytes
    with pytest.raises(ConfigError, match="does not fit into"):
        opened(tmp_path / "run", memory=bank.bytes)
    small = opened(tmp_path / "run", memory=bank.bytes, folder=tmp_path / "bank", tile=64)
    assert small.plan.storage == "streamed"
    assert small.plan.peak <= bank.bytes
    with pytest.raises(ConfigError, match="does not fit into 100 bytes"):
        opened(tmp_path / "run", memory=100, folder=tmp_path / "bank", tile=64)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match="1000 bytes free; the bank takes"):
        opened(tmp_path / "run", folder=tmp_path / "bank", storage="mapped")
    monkeypatch.undo()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="for the bank"):
        opened(tmp_path / "run", folder=tmp_path / "file" / "bank", storage="streamed")


def test_a_bank_is_built_once_and_goes_to_other_processes(tmp_path: Path) -> None:
    write(tmp_path / "run")
    bank = opened(tmp_path / "run", folder=tmp_path / "bank", storage="streamed")
    (file,) = (tmp_path / "bank").glob("*.bin")
    before = file.stat().st_mtime_ns
    again = pickle.loads(pickle.dumps(bank))
    assert file.stat().st_mtime_ns == before
    rows = random_rows(2)
    assert torch.equal(merge(bank, rows)[0], merge(again, rows)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"storage": "disk"},
        {"delta": "int8"},
        {"tile": 100},
        {"storage": "mapped"},
        {"device": "tpu"},
        {"storage": "device"},
    ],
)
def test_settings_of_a_bank(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match="allowed"):
        opened(tmp_path, **options)


# -- adapters -------------------------------------------------------------------------------------


def test_products_of_adapters(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    states_of = []
    for step in range(3):
        state = {
            "base.q.lora_A.weight": torch.randn(2, 6, generator=generator),
            "base.q.lora_B.weight": torch.randn(4, 2, generator=generator),
            "base.bias": torch.randn(4, generator=generator),
        }
        states_of.append(state)
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(state, tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
    bank = opened(tmp_path)
    row = np.array([1.5, 0.0, -0.5])
    exact = sum(
        float(c) * s["base.q.lora_B.weight"] @ s["base.q.lora_A.weight"]
        for c, s in zip(row, states_of, strict=True)
    )
    found = product_state(bank, row)
    assert found["base.q.lora_A.weight"].shape == (4, 6)
    torch.testing.assert_close(found["base.q.lora_B.weight"] @ found["base.q.lora_A.weight"], exact)
    (factors,) = states(bank, row[None])
    mixed = factors["base.q.lora_B.weight"] @ factors["base.q.lora_A.weight"]
    assert (mixed - exact).abs().max() > 0.1  # the trap
    torch.testing.assert_close(found["base.bias"], factors["base.bias"])
    assert product_config({"r": 2, "lora_alpha": 4, "bias": "none"}, 2) == {
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
    }
    write(tmp_path / "plain")
    with pytest.raises(DataError, match="no adapter"):
        product_state(opened(tmp_path / "plain"), np.eye(K)[0])


# -- buffers --------------------------------------------------------------------------------------


def test_buffers_are_used_again_but_never_while_a_view_is_kept() -> None:
    pool, size = buffers.Pool(), 2**19
    first = pool.take((2, size), torch.float32)
    place, kept = first.data_ptr(), first[1, 5:9]
    kept.fill_(7.0)
    del first
    other = pool.take((2, size), torch.float32)
    assert other.data_ptr() != place
    other.zero_()
    assert kept.tolist() == [7.0] * 4
    del kept
    assert pool.take((1, size), torch.float32).data_ptr() == place
    again = pool.take((4, size), torch.float16), pool.take((8, size), torch.float32)
    assert again[0].data_ptr() == place
    assert other.data_ptr() not in (place, again[1].data_ptr())


def test_merges_that_are_kept_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "_LEAST", 64)
    write(tmp_path)
    bank = opened(tmp_path)
    rows = random_rows(8)
    (first,) = merge(bank, rows[:4])
    before = first.clone()
    kept = [state["blocks.1.w"] for state in states(bank, rows)]
    copies = [tensor.clone() for tensor in kept]
    merge(bank, rows[::-1].copy())
    assert torch.equal(first, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
