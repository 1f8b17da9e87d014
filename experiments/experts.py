"""Recipe: which experts of a mixture-of-experts language model a task needs (EEP, 2407.00945).

1. One pass over the search items tells how experts are used. Frequency, soft activation, REAP and,
   where subsets can be enumerated, NAEE each name the experts to keep: they are the first
   candidates, and what the result is compared with.
2. Evolution goes on from those: in some blocks some experts are exchanged; nothing is scored twice,
   and candidates that cannot enter the pool any more stop early.
3. With `--merge`, a second stage mixes kept experts with dropped ones, from the best subsets.
4. The eight best and all baselines are scored on the selection items: the best of them is the
   result, also where it is a baseline. It and the baselines are looked at on the report items.

Accuracies over some hundred items are coarse, and the best of many candidates is then best by luck.
So values of search and selection items count likelihoods too (`--smooth`); report items never do.

Preset `paper` is the released search: 31 random subsets, 70 children of them, 301 of the merging
phase. Models and evaluators are imported where they are needed, so that listing options is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from searchlab.errors import ConfigError
from searchlab.recipes import Recipe

if TYPE_CHECKING:
    from searchlab.config import Budget, SearchConfig
    from searchlab.report import Section
    from searchlab.result import Result

__all__ = ["RECIPE", "ExpertsOptions", "build"]

SMOOTH = 0.5  # measured: from 0.3 on values of few items order candidates as other items do
PAPER = (31, 70, 301)  # random subsets, children of the pruning phase, of the merging phase


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ExpertsOptions:
    """Options of the recipe, all JSON values."""

    preset: Literal["default", "paper"] = _option(
        "default", "default: from known rankings on; paper: 31 + 70 + 301 as released"
    )
    model: str = _option("zoo", "folder or hub id of the model; zoo: the bundled character model")
    family: str | None = _option(None, "YAML table of a model family that is not known")
    task: str | None = _option(
        None,
        "JSON lines of prompt, options, answer; lm-eval:NAME or lm-eval:FILE.yaml for a task of "
        "lm-evaluation-harness; for zoo also a name: arithmetic, code, ...",
    )
    metric: Literal[
        "options", "options_mean", "first_token", "kl_self", "perplexity", "exact_match"
    ] = _option(
        "options",
        "options: likeliest option; options_mean: per token; first_token: its greedy beginning; "
        "kl_self: divergence from the full model's own answers; perplexity; exact_match: generated",
    )
    keep: str | None = _option(None, "experts per block, as 4 or 50%; half without --memory")
    memory: str | None = _option(None, "weights of the result, as 24GiB; decides --keep")
    active: int | None = _option(None, "experts per token; the model's own without it")
    groups: str = _option("block", "blocks that share their choice: block, or how many groups")
    merge: bool = _option(False, "a second stage mixes kept and dropped experts")
    per_block: bool = _option(False, "blocks may keep different numbers, under one total")
    front: bool = _option(
        False,
        "quality, memory and active operations at once: numbers of kept (up to --keep, --memory) "
        "and of active experts are free",
    )
    router_mode: Literal["slice", "prob", "logit"] | None = _option(
        None, "slice: only kept experts are scored, loads everywhere; prob: all are (paper)"
    )
    flat: bool = _option(False, "routing without groups, for families that have them")
    baseline: tuple[str, ...] = _option(
        (), "NAME=FOLDER of another checkpoint of the model, scored on the same items; repeatable"
    )
    final: str | None = _option(
        None, "'command: ... {export} ... {out}', which judges exported checkpoints at the end"
    )
    timeout: float = _option(3600.0, "seconds that one such command may take")
    chat: Literal["auto", "on", "off"] = _option("auto", "wrap prompts by the chat template")
    new_tokens: int = _option(32, "most tokens of a generated answer, for kl_self and exact_match")
    items: int | None = _option(None, "most items of each split")
    random: int = _option(10, "random subsets that are reported beside the result")
    budget: int | str | None = _option(
        None, "evaluations beyond the baselines (400), or a limit such as 90min, 6gpuh or 50usd"
    )
    gpu_price: float | None = _option(None, "US dollars per device hour, for a budget in dollars")
    target: float | None = _option(None, "a value that is good enough to stop")
    guided: bool = _option(False, "a predictor chooses among the algorithm's proposals")
    smooth: float | None = _option(
        None,
        "what a nat costs on search and selection items, for metrics of options; 0.5; 0 for the "
        "preset paper and for fronts",
    )
    race: bool = _option(True, "candidates that cannot enter the pool stop early; exact")
    together: int = _option(8, "candidates that share a forward pass")
    tokens: int = _option(4096, "tokens of a batch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "of the weights; auto: as stored, float32 on the CPU"
    )
    device: str | None = _option(None, "torch device, or spread: layers on all GPUs")
    threads: int | None = _option(None, "torch threads; 1 for zoo")
    seed: int = _option(0, "the one seed of the search")
    lag: int | Literal["free"] | None = _option(
        None, "jobs open at once, or free; fixed when the run is opened"
    )

    def __post_init__(self) -> None:
        self.limits()
        for name, least, most in (
            ("random", 0, 1000),
            ("together", 1, 4096),
            ("tokens", 16, 2**24),
            ("items", 1, 2**30),
            ("new_tokens", 1, 2**20),
            ("active", 1, 4096),
            ("threads", 1, 1024),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name} {value}; allowed: {least} to {most}")
        if self.keep is not None and self.memory is not None:
            raise ConfigError("keep with memory; allowed: one of them")
        if self.groups != "block" and not (self.groups.isdecimal() and int(self.groups) >= 1):
            raise ConfigError(f"groups {self.groups!r}; allowed: block, or a number from 1")
        if not self.timeout > 0:
            raise ConfigError(f"timeout {self.timeout}; allowed: more than 0 seconds")
        if self.merges and self.per_block:
            raise ConfigError("merge with per_block; allowed: one count for all blocks")
        for what in ("merge", "guided"):
            if self.front and (getattr(self, what) or self.preset == "paper"):
                what = "preset paper" if self.preset == "paper" else what
                raise ConfigError(f"front with {what}; allowed: pruning by the default preset")
        if self.front and self.target is not None:
            raise ConfigError(f"front with target {self.target:g}; allowed: a budget")
        if self.router_mode == "logit" and not self.merges:
            raise ConfigError("router_mode 'logit' is for --merge; allowed: slice, prob")
        if self.preset == "paper" and self.limits().evaluations not in (None, sum(PAPER)):
            raise ConfigError(
                f"budget {self.budget} with preset paper; allowed: none, it makes {sum(PAPER)}"
            )
        if (self.task or "").startswith("lm-eval:") and self.chat == "on":
            raise ConfigError("chat 'on' with a task of lm-eval; allowed: auto, off")
        if self.task is None and self.model != "zoo":
            raise ConfigError(f"no task for {self.model!r}; allowed: --task FILE of JSON lines")
        if self.final is not None:
            self.final_command()
        self.foreign()

    def smoothing(self) -> float:
        """What a nat of the right answer costs while candidates are chosen."""
        from searchlab.evaluators.language.problem import CHOICES

        if self.smooth is not None:
            return self.smooth
        plain = self.preset == "paper" or self.front or self.metric not in CHOICES
        return 0.0 if plain else SMOOTH

    @property
    def merges(self) -> bool:
        """Whether there is a merging stage."""
        return self.merge or self.preset == "paper"

    def limits(self) -> Budget:
        """What ends the search; 400 evaluations where nothing is said."""
        from searchlab.budget_text import parse_budget

        usual = sum(PAPER) if self.preset == "paper" else 400
        budget = usual if self.budget is None else self.budget
        return parse_budget(budget, gpu_price=self.gpu_price, target=self.target)

    def foreign(self) -> dict[str, str]:
        """Name -> folder of the checkpoints to compare with."""
        out: dict[str, str] = {}
        for text in self.baseline:
            name, sign, folder = text.partition("=")
            if not (name and sign and folder):
                raise ConfigError(f"baseline {text!r}; allowed: NAME=FOLDER")
            if name in out:
                raise ConfigError(f"baseline {name!r} is given twice; allowed: once")
            out[name] = folder
        return out

    def final_command(self) -> str | None:
        """The command that judges, without its prefix."""
        if self.final is None:
            return None
        from searchlab.experiments.experts_judge import check_command

        prefix, sign, command = self.final.partition(":")
        if not sign or prefix.strip() != "command" or not command.strip():
            raise ConfigError(f"final {self.final!r}; allowed: 'command: PROGRAM ... {{export}}'")
        check_command(command.strip())
        return command.strip()


# -- the search -----------------------------------------------------------------------------------


def build(options: ExpertsOptions) -> SearchConfig:
    """The configuration of a run; everything that can be wrong is looked at before the weights."""
    from searchlab.config import SearchConfig
    from searchlab.experiments import experts_front as front
    from searchlab.experiments.experts_setup import keep_loaded, prepare
    from searchlab.experiments.experts_stages import final_of, stages_of

    prepared = prepare(options)
    print(prepared, file=sys.stderr)
    loaded = prepared.load()
    config = SearchConfig(
        (front.stage_of(loaded),) if options.front else tuple(stages_of(loaded)),
        name=RECIPE.name,
        seed=options.seed,
        lag=options.lag,
        final=front.final_of() if options.front else final_of(loaded),
        recipe=RECIPE.name,
        options=asdict(options),
    )
    return keep_loaded(config, loaded)


def export(config: SearchConfig, result: Result, directory: Path, form: str) -> list[Path]:
    """Writes the winner, see `experts_export`."""
    from searchlab.experiments.experts_export import export as write

    return write(config, result, directory, form)


def apply(
    plan: Path,
    model: str,
    directory: Path,
    *,
    dequantize: str | None = None,
    family: str | None = None,
) -> list[Path]:
    """Writes the checkpoint that a plan makes of another model, see `experts_apply`."""
    from searchlab.experiments.experts_apply import apply as write

    return write(plan, model, directory, dequantize=dequantize, family=family)


def sections(config: SearchConfig, result: Result) -> Sequence[Section]:
    """Report sections of this room."""
    from searchlab.experiments.experts_report import sections as make

    return make(config, result)


RECIPE = Recipe(
    "experts",
    "which experts of a mixture-of-experts language model a task needs (EEP)",
    ExpertsOptions,
    build,
    sections=sections,
    export=export,
    apply=apply,
)
