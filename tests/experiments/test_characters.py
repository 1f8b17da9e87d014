"""The character model: its data, its training in pieces, and what the bundled weights can do."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from searchlab.errors import ConfigError
from searchlab.experiments.zoo import characters, characters_data, train_characters
from searchlab.experiments.zoo.characters_data import (
    ALPHABET,
    KINDS,
    Question,
    questions,
    window,
    write_task,
)
from searchlab.experiments.zoo.train_characters import CharacterSettings, accuracy, train

pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_distinct_and_repeat_with_their_seed(kind: str) -> None:
    asked = questions(kind, 30, seed=3)
    assert len({q.prompt for q in asked}) == 30
    assert all(len(set(q.options)) == 4 and 0 <= q.answer < 4 for q in asked)
    assert asked == questions(kind, 30, seed=3)
    assert asked != questions(kind, 30, seed=4)
    assert set("".join(q.prompt + "".join(q.options) for q in asked)) <= set(ALPHABET)


def test_answers_are_right_and_were_held_out_of_training() -> None:
    learnt = "".join(window("arithmetic", 95, random.Random(row))[0] for row in range(400))
    for question in questions("arithmetic", 40, seed=1):
        a, b = question.prompt[:-1].split("+")
        assert question.options[question.answer] == str(int(a) + int(b))
        assert question.prompt not in learnt
    for question in questions("reversal", 40, seed=1):
        assert question.options[question.answer] == question.prompt[-2::-1]


def test_only_characters_that_can_be_known_count_in_training() -> None:
    characters_, known = window("arithmetic", 95, random.Random(0))
    line = characters_.index("\n") + 1
    asked = characters_.index("=") + 1
    assert known[:line] == [False] * asked + [True] * (line - asked)


def test_a_task_file_has_its_splits_in_order(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    write_task(path, "arithmetic", counts=(("search", 3), ("report", 2)), seed=0)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["split"] for row in rows] == ["search"] * 3 + ["report"] * 2
    assert len({row["prompt"] for row in rows}) == 5


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'poems'; allowed: prose"):
        questions("poems", 1, seed=0)
    with pytest.raises(ConfigError, match="poems"):
        characters.task_path("poems")


def test_pieces_train_the_weights_of_one_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(kind: str, held_out: bool) -> str:  # to read the standard library takes a while
        return " ".join(f"{kind} number {i} is written\nhere, {held_out}" for i in range(200))

    monkeypatch.setattr(characters_data, "text", short)
    monkeypatch.setattr(train_characters, "text", short)
    small = CharacterSettings(steps=4, rows=4, hidden=16, layers=1, heads=2, experts=4, width=8)
    assert train(small, tmp_path / "whole", asked=2)
    pieces = tmp_path / "pieces"
    assert not train(small, pieces, minutes=1e-9, asked=2)
    training = train_characters._Training(small)
    training.load(pieces / "training.safetensors")
    training.advance()
    training.save(pieces / "training.safetensors")
    assert train(small, pieces, asked=2)
    for name in (
        "characters_model/model.safetensors",
        "characters_model/config.json",
        "characters_model/tokenizer.json",
        "characters_tasks/prose.jsonl",
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (pieces / name).read_bytes()
    training.save(pieces / "training.safetensors")
    with pytest.raises(ConfigError, match="other settings"):
        train(CharacterSettings(steps=5, rows=4), pieces)


def test_the_tokenizer_reads_one_character_a_token() -> None:
    _, tokenizer = characters.load_characters()
    ids = tokenizer.encode("a b\n= é")
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 8
    assert ids[-1] == tokenizer.unk_token_id
    assert tokenizer.decode(ids[1:-1]) == "a b\n= "


def test_the_bundled_model_is_good_at_each_task_by_different_experts() -> None:
    model, _ = characters.load_characters()
    card = characters.character_card()
    assert 2**19 < (characters.CHARACTERS / "model.safetensors").stat().st_size < 1.5 * 2**20
    for kind in characters.TASKS:
        lines = characters.task_path(kind).read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        asked = [Question(r["prompt"], tuple(r["options"]), r["answer"]) for r in rows[:50]]
        assert accuracy(model, asked) >= card["accuracy"][kind] - 0.1
        assert card["accuracy"][kind] >= 0.85
    chosen = torch.tensor(card["chosen"])  # (layer, kind, expert)
    best = chosen.argsort(dim=2, descending=True)[:, :, :2]
    for layer in best:
        assert len({tuple(sorted(row.tolist())) for row in layer}) >= 3
