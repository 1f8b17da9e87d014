"""The evaluator of kept experts against the straightforward way, on two models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from searchlab.evaluators.language.prompts import Prompts
from searchlab.evaluators.language.tasks import Item, read_task
from searchlab.experiments.benchmarks._common import Aim, Journal
from searchlab.experiments.benchmarks._eep_speed import few_shot_items, measure
from searchlab.experiments.zoo.characters import load_characters, task_path
from searchlab.spaces.experts import ResidentExperts, kept, pruning_space
from searchlab.testing.tiny_moe import tiny_moe
from searchlab.uniforms import uniforms

__all__ = ["speed"]

SHOTS = 8  # worked examples before every item
TIMES = 10.0
DIGITS = tuple("0123456789")


def speed(journal: Journal, quick: bool, folder: Path) -> None:
    """Process time per candidate of both ways, half of the experts kept, last digits of sums."""
    characters, tokenizer = load_characters()
    wide = tiny_moe(
        "mixtral",
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        vocab_size=max(64, len(tokenizer)),
    )
    wide.set_attn_implementation("sdpa")
    items, header = _last_digits(16 if quick else 128)
    for name, model, count, n in (
        ("the character model", characters, 32, len(items)),
        ("four layers of Mixtral's shape, random weights", wide, 32, len(items) // 2),
    ):
        _measured(journal, name, model, Prompts(tokenizer), items[:n], header, count)


def _last_digits(n: int) -> tuple[list[Item], str]:
    """Sums without their last digit, to be chosen among all, and worked examples."""
    task = read_task(task_path("arithmetic"))
    right = [(item, item.answer) for item in task.of("report")]
    texts = [f"{item.prompt}{item.options[n]}" for item, n in right if n is not None]
    items = [Item(text[:-1], DIGITS, int(text[-1])) for text in texts[SHOTS : SHOTS + n]]
    return items, "".join(f"{text}\n" for text in texts[:SHOTS])


def _measured(
    journal: Journal,
    name: str,
    model: Any,
    prompts: Prompts,
    items: list[Item],
    header: str,
    count: int,
) -> None:
    resident = ResidentExperts(model)
    space = pruning_space(resident.layout, keep=resident.layout.experts // 2, groups="block")
    masks = kept(space, space.sample(uniforms(0, 0, 0, count, space.sample_width)))
    found = measure(resident, prompts, few_shot_items(items, header), masks, plain_candidates=2)
    journal.case(
        f"speed, {name}",
        {
            "items": found.items,
            "tokens": found.tokens,
            "candidates": found.candidates,
            "cpu_s_per_candidate": round(found.ours, 5),
            "straightforward_cpu_s_per_candidate": round(found.plain, 5),
            "timed_straightforwardly": found.plain_candidates,
            "ratio": round(found.ratio, 2),
            "same_predictions": found.same,
        },
        aims=[
            Aim("times faster", found.ratio, "at least", TIMES, not journal.options.quick),
            Aim("same predictions", found.same, "at least", 1.0),
        ],
    )
