"""What differs between families of mixture-of-experts models: one YAML table for each.

A table says where router and experts are, how the router chooses, and which keys of config.json
count the experts. A model of another family needs a table of its own and no code, as long as its
router scores by softmax or sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from searchlab.errors import ConfigError, DataError, SpaceError

__all__ = ["ExpertLayout", "Family", "Groups", "families", "family_of", "layout_of", "read_family"]

Score = Literal["softmax", "sigmoid", "chosen_softmax"]
_SCORES = ("softmax", "sigmoid", "chosen_softmax")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Groups:
    """Routing by groups: experts are chosen from the best groups only.

    Attributes:
        count: key of the number of groups.
        kept: key of the number of groups that are chosen.
        best: a group's score is the sum of its `best` greatest scores.
        only_if: keys and values that switch groups on; empty = always.
    """

    count: str
    kept: str
    best: int = 1
    only_if: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One table.

    Attributes:
        name: of the family.
        model_types: values of `model_type` in config.json.
        count_keys: keys that count the experts; all are set in an export.
        top_k_key: how many experts a token gets.
        width_key: inner width of an expert.
        layers: path of the decoder layers in the model.
        block: name of the mixture in a decoder layer.
        router, experts: names in the mixture.
        router_tensors: those with an entry per expert.
        expert_biases: experts have biases.
        score: "softmax" and "sigmoid" score all experts and choose, "chosen_softmax" chooses by
            logits and scores the chosen ones.
        renormalise: the weights are divided by their sum: always, never, or as a key says.
        wide: router logits are computed in float32.
        cast: weights are rounded to the router's dtype.
        scale: key of a factor of the weights.
        groups: routing by groups.
        dense: which layers have no experts: `first` (key of how many at the start), `only` (key of
            a list), `step` (key of a period).
        file_blocks: names of the mixture in the files, where they differ from `block`.
        extra_layers_key: how many layers stand after the last in the files, for other uses.
        padding: the router's tensor that can switch experts off for good.
    """

    name: str
    model_types: tuple[str, ...]
    count_keys: tuple[str, ...]
    top_k_key: str
    width_key: str
    router: str
    router_tensors: tuple[str, ...]
    score: Score
    renormalise: bool | str
    layers: str = "model.layers"
    block: str = "mlp"
    experts: str = "experts"
    expert_biases: bool = False
    wide: bool = False
    cast: bool = True
    scale: str | None = None
    groups: Groups | None = None
    dense: Mapping[str, str] = field(default_factory=dict)
    file_blocks: tuple[str, ...] = ()
    extra_layers_key: str | None = None
    padding: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("model_types", "count_keys", "router_tensors", "file_blocks"):
            value: Any = getattr(self, key)
            texts = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
            if not texts or (not value and key != "file_blocks"):
                raise ConfigError(
                    f"family {self.name!r}: {key} {value!r}; allowed: a list of texts"
                )
            object.__setattr__(self, key, tuple(value))
        if self.score not in _SCORES:
            raise ConfigError(
                f"family {self.name!r}: score {self.score!r}; allowed: {', '.join(_SCORES)}"
            )
        if not set(self.dense) <= {"first", "only", "step"}:
            raise ConfigError(
                f"family {self.name!r}: dense {dict(self.dense)}; allowed: first, only, step"
            )
        if self.padding and set(self.padding) != {"tensor"}:
            raise ConfigError(
                f"family {self.name!r}: padding {dict(self.padding)}; allowed: tensor"
            )
        if not self.file_blocks:
            object.__setattr__(self, "file_blocks", (self.block,))


def read_family(path: str | Path) -> Family:
    """A family from a YAML file.

    Raises:
        ConfigError: a key that is missing, unknown or of the wrong kind.
    """
    import yaml

    try:
        table = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"family table {str(path)!r} cannot be read: {reason}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"family table {str(path)!r} holds {table!r}; allowed: keys and values")
    known = {part.name for part in fields(Family)}
    needed = {"name", "model_types", "count_keys", "top_k_key", "width_key", "router"}
    needed |= {"router_tensors", "score", "renormalise"}
    if unknown := sorted(map(str, set(table) - known)):
        raise ConfigError(
            f"family table {str(path)!r} has {', '.join(unknown)}; "
            f"known: {', '.join(sorted(known))}"
        )
    if missing := sorted(needed - set(table)):
        raise ConfigError(f"family table {str(path)!r} lacks {', '.join(missing)}")
    if table.get("groups") is not None:
        try:
            table["groups"] = Groups(**table["groups"])
        except TypeError:
            raise ConfigError(
                f"family table {str(path)!r}: groups {table['groups']!r}; "
                "allowed: count, kept, best, only_if"
            ) from None
    return Family(**table)


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """Name -> family, of the tables that come with searchlab."""
    folder = Path(__file__).parent / "families"
    read = [read_family(path) for path in sorted(folder.glob("*.yaml"))]
    return {family.name: family for family in read}


def family_of(config: Any, extra: Path | None = None) -> Family:
    """The family of a model.

    Args:
        config: a transformers configuration, or config.json as a dict.
        extra: a table of the user's own; used as it is.

    Raises:
        ConfigError: a dense model, or a family without a table; lists the known ones.
    """
    own = read_family(extra) if extra is not None else None
    if own is not None:
        return own
    kind = _get(config, "model_type")
    for family in families().values():
        if kind in family.model_types:
            return family
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    known = ", ".join(families())
    if not any(_get(config, key) for key in counts):
        raise ConfigError(
            f"model type {kind!r} is dense: its configuration counts no experts; known: {known}"
        )
    raise ConfigError(
        f"no table for model type {kind!r}; known: {known}; another family needs a YAML table "
        "with name, model_types, count_keys, top_k_key, width_key, router, router_tensors, score "
        "(softmax, sigmoid, chosen_softmax) and renormalise"
    )


@dataclass(frozen=True)
class ExpertLayout:
    """Where a model has how many experts, and what they weigh.

    Attributes:
        family: its name.
        blocks: layer numbers of the mixtures, L of them.
        layers: number of decoder layers.
        experts: E, of each mixture.
        top_k: experts per token.
        n_group: groups of experts that routing looks at; 1 = none.
        topk_group: groups a token may use.
        group_best: how many experts of a group make its score.
        expert_bytes: of one expert in one mixture.
        total_bytes: of the whole model; 0 where only the configuration is known.
        quantised: method of quantisation, as config.json says; empty = none.
        hidden, width: of a token, and inside an expert; 0 = unknown.
    """

    family: str
    blocks: tuple[int, ...]
    layers: int
    experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 1
    expert_bytes: int = 0
    total_bytes: int = 0
    quantised: str = ""
    hidden: int = 0
    width: int = 0

    @property
    def other_bytes(self) -> int:
        """What no pruning removes."""
        return max(0, self.total_bytes - len(self.blocks) * self.experts * self.expert_bytes)

    def check_count(self, keep: int, *, top_k: int | None = None, flat: bool = False) -> None:
        """Raises SpaceError where a mixture cannot keep that many experts.

        Args:
            keep: experts that stay.
            top_k: experts per token, if another number than the model's.
            flat: routing without groups.
        """
        k = self.top_k if top_k is None else top_k
        if not 1 <= k <= self.top_k:
            raise SpaceError(f"{k} active experts; allowed: 1 to {self.top_k}")
        if not k <= keep <= self.experts:
            raise SpaceError(f"keep {keep} experts; allowed: {k} (active ones) to {self.experts}")
        if self.n_group == 1 or flat:
            return
        each = keep // self.n_group
        if keep % self.n_group or each < self.group_best or self.topk_group * each < k:
            fit = [n for n in range(k, self.experts + 1) if self._grouped(n, k)]
            raise SpaceError(
                f"keep {keep} experts in {self.n_group} groups; allowed: "
                f"{', '.join(map(str, fit)) or 'none'}, or routing without groups (flat)"
            )

    def _grouped(self, keep: int, k: int) -> bool:
        each = keep // self.n_group
        fits = not keep % self.n_group and each >= self.group_best
        return fits and self.topk_group * each >= k

    def counts_allowed(self, *, top_k: int | None = None, flat: bool = False) -> list[int]:
        """All numbers of experts that a mixture can keep, increasing."""
        k = self.top_k if top_k is None else top_k
        if self.n_group == 1 or flat:
            return list(range(k, self.experts + 1))
        return [n for n in range(k, self.experts + 1) if self._grouped(n, k)]


def _get(config: Any, key: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(key)
    return getattr(config, key, None)


def _whole(config: Any, key: str, family: Family) -> int:
    value = _get(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(
            f"configuration of family {family.name!r}: {key} is {value!r}; "
            "allowed: a whole number, 0 or more"
        )
    return value


def full_config(config: Any) -> Any:
    """A configuration with every default filled in, from config.json as a dict.

    Raises:
        DataError: transformers cannot read it.
    """
    if not isinstance(config, Mapping):
        return config
    from transformers import AutoConfig

    content = dict(config)
    kind = content.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **content)
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"configuration of model type {kind!r} cannot be read: {reason}") from None


def expert_blocks(config: Any, family: Family) -> tuple[int, ...]:
    """Layer numbers that have experts."""
    layers = _whole(config, "num_hidden_layers", family)
    first = _whole(config, family.dense["first"], family) if "first" in family.dense else 0
    only = (_get(config, family.dense["only"]) or []) if "only" in family.dense else []
    step = _whole(config, family.dense["step"], family) if "step" in family.dense else 1
    return tuple(i for i in range(first, layers) if i not in only and (i + 1) % max(1, step) == 0)


def layout_of(config: Any, family: Family) -> ExpertLayout:
    """The layout from the configuration alone; bytes are those of its dtype.

    Args:
        config: a transformers configuration, or config.json as a dict.
        family: of the model.

    Raises:
        ConfigError: no layer has experts.
        DataError: a key that is missing or no number.
    """
    config = full_config(config)
    blocks = expert_blocks(config, family)
    experts = _whole(config, family.count_keys[0], family)
    if not blocks or not experts:
        raise ConfigError(
            f"model of family {family.name!r} has {experts} experts in {len(blocks)} layers; "
            "allowed: experts in one layer or more"
        )
    groups, best = (1, 1), 1
    limits = family.groups
    if limits and all(_get(config, key) == value for key, value in limits.only_if.items()):
        groups = (_get(config, limits.count) or 1, _get(config, limits.kept) or 1)
        best = limits.best
    hidden, width = _whole(config, "hidden_size", family), _whole(config, family.width_key, family)
    dtype = str(_get(config, "dtype") or "bfloat16").removeprefix("torch.")
    weights = 3 * hidden * width + (2 * width + hidden if family.expert_biases else 0)
    method = _get(config, "quantization_config")
    return ExpertLayout(
        family=family.name,
        blocks=blocks,
        layers=_whole(config, "num_hidden_layers", family),
        experts=experts,
        top_k=_whole(config, family.top_k_key, family),
        n_group=groups[0],
        topk_group=groups[1],
        group_best=best if groups[0] > 1 else 1,
        expert_bytes=weights * _BYTES.get(dtype, 2),
        quantised=str(_get(method, "quant_method") or "") if method else "",
        hidden=hidden,
        width=width,
    )
