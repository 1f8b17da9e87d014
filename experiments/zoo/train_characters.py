"""Trains the character model with specialised experts and writes it with its tasks and card.

    python -m searchlab.experiments.zoo.train_characters --out runs/characters

One thread, about a quarter of an hour. Stopped by `--minutes`, the same command goes on from where
it was; the pieces give the weights that one piece gives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from searchlab.errors import ConfigError
from searchlab.experiments.zoo.characters_data import (
    ALPHABET,
    KINDS,
    Question,
    questions,
    text,
    window,
    write_task,
)

__all__ = ["CharacterSettings", "accuracy", "main", "make_model", "specialisation", "train"]

PAD, BOS, UNKNOWN = 0, 1, 2
FIRST = 3
# In the order in which they are drawn; selection items were added behind the first three.
TASK_COUNTS = (("search", 128), ("selection", 128), ("report", 400), ("selection", 256))
_LENGTH = 96
_TASK_SEED = 5


@dataclass(frozen=True)
class CharacterSettings:
    """Every value that shapes the weights.

    Attributes:
        steps: optimiser steps.
        seed: of weights and rows.
        rows: of one step, the same number of every kind.
        hidden, layers, heads, experts, active, width: of the network.
        learning_rate: peak; linear warm-up, then cosine to 2 %.
        warm_up: steps.
        balance: weight of the load-balance loss of all kinds together.
        specialise: weight of the mutual information between kinds and experts (to be large).
        unknowable: weight of characters that nothing before them tells (operands, words).
        ema_decay: of the averaged weights, the only ones stored.
    """

    steps: int = 4500
    seed: int = 0
    rows: int = 32
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    experts: int = 8
    active: int = 2
    width: int = 96
    learning_rate: float = 4e-3
    warm_up: int = 100
    balance: float = 0.01
    specialise: float = 0.02
    unknowable: float = 0.05
    ema_decay: float = 0.995

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < len(KINDS) or self.rows % len(KINDS):
            raise ConfigError(f"{self.steps} steps of {self.rows} rows; rows: a multiple of 4")


def make_model(settings: CharacterSettings) -> Any:
    """The untrained network, a Mixtral."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=FIRST + len(ALPHABET),
        hidden_size=settings.hidden,
        intermediate_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        num_local_experts=settings.experts,
        num_experts_per_tok=settings.active,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        sliding_window=None,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        experts_implementation="eager",
        initializer_range=0.06,
    )
    torch.manual_seed(settings.seed)
    return MixtralForCausalLM(config)


def _rows(settings: CharacterSettings, step: int) -> tuple[Tensor, Tensor]:
    """Tokens (rows, length) and weights of the losses (rows, length - 1); kinds in turn."""
    ids = torch.empty(settings.rows, _LENGTH, dtype=torch.int64)
    weights = torch.empty(settings.rows, _LENGTH - 1)
    random_ = random.Random(f"{settings.seed} {step}")
    for row in range(settings.rows):
        characters, known = window(KINDS[row % len(KINDS)], _LENGTH - 1, random_)
        ids[row] = torch.tensor([BOS, *(FIRST + ALPHABET.index(c) for c in characters)])
        weights[row] = torch.tensor(known).float().clamp(min=settings.unknowable)
    return ids, weights


def _routing_losses(router: tuple[Tensor, ...], active: int) -> tuple[Tensor, Tensor]:
    """Load balance over all tokens, and the information that kinds and experts share, in nats.

    Source: arXiv 2101.03961, eq. 4-6, and arXiv 2212.08066, eq. 4 (both per layer).
    """
    balance, shared = torch.zeros(()), torch.zeros(())
    for logits in router:
        probabilities = logits.softmax(dim=-1)
        experts = probabilities.shape[-1]
        chosen = probabilities.topk(active, dim=-1).indices
        load = functional.one_hot(chosen, experts).float().sum(dim=1).mean(dim=0) / active
        mean = probabilities.mean(dim=0)
        balance = balance + experts * (load * mean).sum()
        by_row = probabilities.reshape(-1, _LENGTH, experts).mean(dim=1)
        by_kind = by_row.reshape(-1, len(KINDS), experts).mean(dim=0)
        shared = shared + _entropy(mean) - _entropy(by_kind).mean()
    return balance / len(router), shared / len(router)


def _entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-9).log()).sum(dim=-1)


def _rate(step: int, settings: CharacterSettings) -> float:
    warm = min(1.0, (step + 1) / settings.warm_up)
    return (
        settings.learning_rate
        * warm
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
    )


class _Training:
    """Network, averages and Adam's moments; all of it lies in one file between pieces."""

    def __init__(self, settings: CharacterSettings) -> None:
        self.settings = settings
        self.model = make_model(settings).train()
        self.step, self.seconds = 0, 0.0
        self.named = dict(self.model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self.named.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.named.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.named.items()}

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        weights = {name: value.detach() for name, value in self.named.items()}
        return {"w": weights, "a": self.average, "m": self.first, "v": self.second}

    def save(self, path: Path) -> None:
        tensors = {
            f"{k} {name}": t for k, part in self._parts().items() for name, t in part.items()
        }
        card = {"step": str(self.step), "seconds": str(self.seconds)}
        card["settings"] = json.dumps(asdict(self.settings))
        save_file(tensors, path.with_suffix(".new"), metadata=card)
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as opened:
            card = opened.metadata()
        if json.loads(card["settings"]) != asdict(self.settings):
            raise ConfigError(f"{path} is of other settings; allowed: the same, or another --out")
        tensors = load_file(path)
        with torch.no_grad():
            for k, part in self._parts().items():
                for name, tensor in part.items():
                    tensor.copy_(tensors[f"{k} {name}"])
        self.step, self.seconds = int(card["step"]), float(card["seconds"])

    def advance(self) -> dict[str, float]:
        """One step; returns the losses."""
        settings = self.settings
        ids, weights = _rows(settings, self.step)
        out = self.model.model(input_ids=ids, use_cache=False, output_router_logits=True)
        logits = self.model.lm_head(out.last_hidden_state[:, :-1])
        each = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        by_row = (each * weights).sum(dim=1) / weights.sum(dim=1)
        balance, shared = _routing_losses(out.router_logits, settings.active)
        loss = by_row.mean() + settings.balance * balance - settings.specialise * shared
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam()
        by_kind = by_row.detach().reshape(-1, len(KINDS)).mean(dim=0)
        losses = dict(zip(KINDS, by_kind.tolist(), strict=True))
        return {**losses, "balance": float(balance.detach()), "shared": float(shared.detach())}

    @torch.no_grad()
    def _adam(self, beta: float = 0.9, gamma: float = 0.98, decay: float = 0.05) -> None:
        """AdamW with a clipped gradient, and the running average of the weights."""
        names = list(self.named)
        weights = [self.named[name] for name in names]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        torch._foreach_mul_(gradients, float(min(1.0, 1.0 / (float(norm) + 1e-6))))
        first, second = [self.first[n] for n in names], [self.second[n] for n in names]
        torch._foreach_lerp_(first, gradients, 1 - beta)
        torch._foreach_mul_(second, gamma)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - gamma)
        rate, t = _rate(self.step, self.settings), self.step + 1
        roots = torch._foreach_sqrt(torch._foreach_div(second, 1 - gamma**t))
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_mul_(weights, 1 - rate * decay)
        torch._foreach_addcdiv_(weights, first, roots, -rate / (1 - beta**t))
        average = [self.average[name] for name in names]
        torch._foreach_lerp_(average, weights, 1 - min(self.settings.ema_decay, t / (t + 10)))
        for weight in weights:
            weight.grad = None
        self.step = t

    def run(self, minutes: float) -> None:
        """Steps until the end or until the time is up."""
        started = time.perf_counter()
        sums: dict[str, float] = {}
        for _ in range(self.step, self.settings.steps):
            if time.perf_counter() - started > 60 * minutes:
                break
            for name, value in self.advance().items():
                sums[name] = sums.get(name, 0.0) + value / 100
            if self.step % 100 == 0:
                told = " ".join(f"{name} {value:.3f}" for name, value in sums.items())
                seconds = self.seconds + time.perf_counter() - started
                print(f"step {self.step} {told} {seconds:.0f} s", flush=True)
                sums = {}
        self.seconds += time.perf_counter() - started

    def averaged(self) -> Any:
        """A network with the averaged weights, as they will be stored."""
        model = make_model(self.settings).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(self.average[name].half().float())
        return model


# -- how good it is -------------------------------------------------------------------------------


def _encode(characters: str) -> list[int]:
    return [FIRST + ALPHABET.index(c) for c in characters]


@torch.no_grad()
def accuracy(model: Any, asked: list[Question]) -> float:
    """Share of questions whose likeliest option, by the sum over its characters, is the true one.

    Args:
        model: a causal language model with this alphabet.
        asked: see `questions`.
    """
    right = 0
    for question in asked:
        prompt = [BOS, *_encode(question.prompt)]
        rows = [prompt + _encode(option) for option in question.options]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        likely = model(input_ids=ids, use_cache=False).logits.log_softmax(dim=-1)
        each = likely[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        sums = [float(each[i, len(prompt) - 1 : len(row) - 1].sum()) for i, row in enumerate(rows)]
        right += sums.index(max(sums)) == question.answer
    return right / len(asked)


@torch.no_grad()
def specialisation(model: Any, settings: CharacterSettings) -> list[list[list[float]]]:
    """Share of a kind's tokens that choose an expert: (layer, kind, expert), sums to `active`."""
    ids, _ = _rows(settings, -1)
    out = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
    table = []
    for logits in out.router_logits:
        chosen = logits.topk(settings.active, dim=-1).indices
        counts = functional.one_hot(chosen, settings.experts).float().sum(dim=1)
        by_row = counts.reshape(settings.rows, _LENGTH, -1).mean(dim=1)
        by_kind = by_row.reshape(-1, len(KINDS), settings.experts).mean(dim=0)
        table.append([[round(float(v), 3) for v in row] for row in by_kind])
    return table


# -- files ----------------------------------------------------------------------------------------


def _tokenizer() -> Any:
    """One token a character; plain `AutoTokenizer` reads it. Puts the begin token first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": PAD, "<s>": BOS, "<unk>": UNKNOWN}
    vocabulary = {**names, **{c: FIRST + at for at, c in enumerate(ALPHABET)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _write(training: _Training, out: Path, asked: int) -> dict[str, Any]:
    model = training.averaged()
    figures = {kind: accuracy(model, questions(kind, asked, 77)) for kind in KINDS}
    print("accuracy", figures, flush=True)
    folder, tasks = out / "characters_model", out / "characters_tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    weights = (folder / "model.safetensors").read_bytes()
    digest = hashlib.blake2b("".join(text(k, False) for k in ("prose", "code")).encode())
    card: dict[str, Any] = {
        "format": 1,
        "settings": asdict(training.settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "text": digest.hexdigest()[:32],
        "sha256": hashlib.sha256(weights).hexdigest(),
        "bytes": len(weights),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(training.seconds, 1),
        "accuracy": figures,
        "chosen": specialisation(model.float(), training.settings),
    }
    for kind in KINDS:
        write_task(tasks / f"{kind}.jsonl", kind, counts=TASK_COUNTS, seed=_TASK_SEED)
    (out / "characters.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")
    return card


def train(
    settings: CharacterSettings, out: Path, *, minutes: float = math.inf, asked: int = 400
) -> bool:
    """Trains, or goes on, and writes the checkpoint folder once all steps are done.

    Args:
        settings: every value that shapes the weights.
        out: gets `training.safetensors` between pieces; at the end checkpoint, tasks and card.
        minutes: of this piece.
        asked: questions per kind for the accuracies of the card.

    Returns:
        Whether all steps are done.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training, path = _Training(settings), out / "training.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            training.load(path)
        training.run(minutes)
        training.save(path)
        if training.step < settings.steps:
            return False
        _write(training, out, asked)
        path.unlink()
        return True
    finally:
        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    defaults = CharacterSettings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--specialise", type=float, default=defaults.specialise)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of this piece")
    options = parser.parse_args(arguments)
    settings = CharacterSettings(
        steps=options.steps, seed=options.seed, specialise=options.specialise
    )
    done = train(settings, options.out, minutes=options.minutes)
    print("done" if done else "not done: the same command goes on", flush=True)


if __name__ == "__main__":
    main()
