"""FlashEval's score tables: text-to-image settings, whose quality is a mean over prompts.

Every image of every setting is scored, so the number of prompts is the fidelity and the noise is
that of prompts. All settings are scored on the same prompts, so that their differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import ConfigError, DataError
from searchlab.evaluator import Signal
from searchlab.evaluators._table_file import file_digest, published_folder, read_table
from searchlab.evaluators.table import TableEvaluator
from searchlab.uniforms import uniforms

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DATASETS", "METRICS", "PROMPTS", "FlashEval", "flasheval_folder"]

Dataset = Literal["diffusiondb", "coco"]
Metric = Literal["ImageReward", "HPS", "Aesthetic", "CLIP"]
DATASETS = ("diffusiondb", "coco")
METRICS = ("ImageReward", "HPS", "Aesthetic", "CLIP")
PROMPTS = (10, 30, 100, 300, 1000, 0)  # 0 = all of them
CONFIGS = "configs.csv"
VARIABLES = ("model", "solver", "steps", "weight_bits")
OVERHEAD = 2  # model calls that text encoder and decoder are worth
SPEED = {32: 1.0, 8: 0.6, 6: 0.5}  # of a call by bits of its weights: an assumption
_ORDER = 1  # purpose of the uniforms that order prompts
_KEPT = 64  # blocks of prompts whose means are remembered


def flasheval_folder(folder: str | Path | None = None, *, dataset: str = "diffusiondb") -> Path:
    """The folder with the tables: the given one, or flasheval in $SEARCHLAB_DATA.

    Raises:
        ConfigError: neither is set, or a file of the dataset is not there.
    """
    files = [CONFIGS, f"{dataset}.npz"]
    return published_folder(folder, "flasheval", "FlashEval", files)


class FlashEval(TableEvaluator):
    """model x solver x steps x weight bits -> mean score of its images, higher is better.

    Replicate r at n prompts is the r-th block of n in a random order of the prompts, equal for all
    settings; where the order is used up a new one follows. The blocks of replicate 0 lie in one
    another, so a setting that goes on to more prompts is compared on those it was scored on
    before. Blocks of one size do not overlap until all prompts were used.

    The standard error is that of a mean over prompts like these: sd / sqrt(n).

    Signals: `cost`, with `pilot` the means of the other metrics on that many prompts, and with
    `elsewhere` the metric's mean on the other dataset, missing for the settings that lack there.

    Attributes:
        prompts: of each fidelity.
        config_ids: int64 (settings,), in the order of the rows.
        prompt_ids: int64, of all prompts.

    Args:
        folder: holds configs.csv and DATASET.npz; None = see `flasheval_folder`.
        dataset: "diffusiondb" (78 settings, 4,000 prompts) or "coco" (57 settings, 20,000).
        metric: "ImageReward", "HPS", "Aesthetic" or "CLIP".
        prompts: of each fidelity, ascending; 0 = all.
        trade: also minimise `cost`: model calls of an image, two for what surrounds them, times
            1, 0.6 or 0.5 for weights of 32, 8 or 6 bits (assumed, not measured).
        pilot: prompts that all settings are scored on beforehand; 0 = none.
        elsewhere: the other dataset was scored before.
        seed: of the order of prompts.

    Source: arXiv 2403.16379, data of its release. The shared tables are a sample of its prompts.

    Raises:
        ConfigError: an unknown dataset or metric, no such folder, or numbers of prompts that are
            not ascending or more than there are.
        DataError: files that are not the benchmark's.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        dataset: Dataset = "diffusiondb",
        metric: Metric = "ImageReward",
        prompts: Sequence[int] = PROMPTS,
        trade: bool = False,
        pilot: int = 0,
        elsewhere: bool = False,
        seed: int = 0,
    ) -> None:
        if dataset not in DATASETS:
            raise ConfigError(f"dataset {dataset!r}; allowed: {', '.join(DATASETS)}")
        if metric not in METRICS:
            raise ConfigError(f"metric {metric!r}; allowed: {', '.join(METRICS)}")
        place = flasheval_folder(folder, dataset=dataset)
        self.dataset, self.metric, self.seed, self.pilot = dataset, metric, seed, pilot
        self._trade = trade
        self._scores_file = place / f"{dataset}.npz"
        every, self.config_ids, self.prompt_ids = _read_scores(self._scores_file)
        total = len(self.prompt_ids)
        counts = [number or total for number in prompts]
        if not counts or counts != sorted(set(counts)) or not 0 < counts[0] <= counts[-1] <= total:
            raise ConfigError(
                f"prompts {list(prompts)}; allowed: ascending, 1 to {total}, 0 for all"
            )
        if not 0 <= pilot <= total:
            raise ConfigError(f"pilot of {pilot} prompts; allowed: 0 to {total}")
        self.prompts = tuple(counts)
        self._scores = every[METRICS.index(metric)]
        self._means: dict[tuple[int, int], NDArray[np.float64]] = {}
        first = self.block(pilot, 0) if pilot else np.empty(0, np.int64)
        self._others = {
            _of(name, pilot): every[at][:, first].astype(np.float64).mean(axis=1)
            for at, name in enumerate(METRICS)
            if name != metric and pilot
        }
        self._beside = place / f"{_other(dataset)}.npz" if elsewhere else None
        if self._beside is not None:
            flasheval_folder(place, dataset=_other(dataset))
            self._others[f"{metric} on {_other(dataset)}"] = self._elsewhere(self._beside)
        names = [_of(metric, number) for number in counts]
        cost = ("cost",) if trade else ()
        super().__init__(
            place / CONFIGS,
            dict.fromkeys(VARIABLES, "choice"),
            objectives={metric: "max", "cost": "min"} if trade else {metric: "max"},
            fidelities={
                f"{number} prompts": ((name, *cost), number / counts[-1])
                for number, name in zip(counts, names, strict=True)
            },
            signals=(
                Signal("cost", "min", "model calls", when="static"),
                *(Signal(name, "max", when="static") for name in self._others),
            ),
        )

    # -- the table ----------------------------------------------------------------------------

    def _digests(self) -> tuple[str, str]:
        """See `TableEvaluator`; which settings there are does not depend on dataset and metric."""
        digest = blake2b(digest_size=16)
        beside = () if self._beside is None else (self._beside,)
        for path in (self.path, self._scores_file, *beside):
            digest.update(bytes.fromhex(file_digest(path)))
        rows = self._configs()[list(VARIABLES)].astype(str).agg(" ".join, axis=1)
        settings = blake2b("\n".join(sorted(rows)).encode(), digest_size=16)
        return digest.hexdigest(), settings.hexdigest()

    def _configs(self) -> pd.DataFrame:
        """The settings in the order of the scores."""
        frame = read_table(self.path, (), ("config_id", *VARIABLES)).set_index("config_id")
        missing = [int(i) for i in self.config_ids if i not in frame.index]
        if missing:
            raise DataError(f"{str(self.path)!r} has no config_id {missing[0]}")
        return frame.loc[self.config_ids].reset_index()

    def _read(self, texts: Sequence[str], used: Sequence[str]) -> pd.DataFrame:
        frame = self._configs()
        frame["cost"] = [
            (int(steps) + OVERHEAD) * SPEED.get(int(bits), 1.0)
            for steps, bits in zip(frame["steps"], frame["weight_bits"], strict=True)
        ]
        for number in self.prompts:
            frame[_of(self.metric, number)] = self._block_means(number, 0)[0]
        return frame.assign(**self._others)

    def _measured(self, level: int, replicate: int) -> tuple[NDArray[np.float64], Any]:
        mean, error = self._block_means(self.prompts[level], replicate)
        if not self._trade:
            return mean[:, None], error[:, None]
        cost = self._levels[level][:, 1]
        return np.column_stack([mean, cost]), np.column_stack([error, np.zeros(len(error))])

    def identity(self) -> Mapping[str, Any]:
        """See `Evaluator.identity`."""
        own: dict[str, object] = {
            "dataset": self.dataset,
            "metric": self.metric,
            "pilot": self.pilot,
        }
        if self._beside is not None:
            own["elsewhere"] = _other(self.dataset)
        return {**super().identity(), **own, "prompts": list(self.prompts), "seed": self.seed}

    # -- scores -------------------------------------------------------------------------------

    def block(self, number: int, replicate: int) -> NDArray[np.int64]:
        """Which prompts a replicate is scored on, columns of the table in increasing order."""
        total = len(self.prompt_ids)
        order, at = divmod(replicate, total // number)
        u = uniforms(self.seed, _ORDER, order, 1, total)[0]
        columns = np.argsort(u, kind="stable")[at * number : (at + 1) * number]
        return np.sort(columns)

    def _block_means(self, number: int, replicate: int) -> NDArray[np.float64]:
        """Means and standard errors of all settings on a block, (2, settings)."""
        if number == len(self.prompt_ids):
            replicate = 0  # in whatever order, all are all
        known = self._means.get((number, replicate))
        if known is None:
            part = self._scores[:, self.block(number, replicate)].astype(np.float64)
            spread = part.std(axis=1, ddof=1) if number > 1 else np.full(len(part), math.nan)
            known = np.stack([part.mean(axis=1), spread / math.sqrt(number)])
            if len(self._means) >= _KEPT:
                self._means.clear()
            self._means[number, replicate] = known
        return known

    def _elsewhere(self, path: Path) -> NDArray[np.float64]:
        """The metric's means in another file for these settings; NaN where it lacks one."""
        every, ids, _ = _read_scores(path)
        means = every[METRICS.index(self.metric)].astype(np.float64).mean(axis=1)
        known = dict(zip(ids.tolist(), means.tolist(), strict=True))
        return np.array([known.get(config, math.nan) for config in self.config_ids.tolist()])

    def truth(self) -> NDArray[np.float64]:
        """Means over all prompts, float64 (settings,), in the order of the table's rows."""
        mean: NDArray[np.float64] = self._block_means(len(self.prompt_ids), 0)[0].copy()
        return mean


def _other(dataset: str) -> str:
    return DATASETS[1 - DATASETS.index(dataset)]


def _of(metric: str, number: int) -> str:
    return f"{metric} on {number}"


def _read_scores(
    path: Path,
) -> tuple[NDArray[np.float16], NDArray[np.int64], NDArray[np.int64]]:
    """Scores (metrics, settings, prompts) in the order of `METRICS`, and what the axes are."""
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in ("scores", "config_id", "prompt_id", "metrics")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        line = " ".join(str(error).split())[:200]
        raise DataError(f"{str(path)!r} is no table of FlashEval: {line}") from None
    scores, names = parts["scores"], [str(name) for name in parts["metrics"]]
    shape = (len(names), len(parts["config_id"]), len(parts["prompt_id"]))
    if scores.shape != shape or sorted(names) != sorted(METRICS) or not np.isfinite(scores).all():
        raise DataError(
            f"{str(path)!r} is no table of FlashEval: scores {scores.shape} of {', '.join(names)}"
        )
    order = [names.index(name) for name in METRICS]
    ids = (parts["config_id"].astype(np.int64), parts["prompt_id"].astype(np.int64))
    return scores[order].astype(np.float16), *ids
