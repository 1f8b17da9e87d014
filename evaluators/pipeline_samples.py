"""Which prompts and which start noise the samples of each split have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from searchlab.errors import ConfigError
from searchlab.evaluators.noise import Split, split_seed
from searchlab.evaluators.pipeline_sampling import Rows

__all__ = ["SampleSet"]

_FEWEST_TO_SPLIT = 8
_FEWEST_SAMPLES = 2


class SampleSet:
    """Conditions (prompts, or rows of conditioning) times start noises.

    From 8 conditions up the search uses half of them, selection and report a quarter each; fewer
    are shared, and only the noise differs. Noise is told apart by condition, so that no two samples
    of a bank begin alike. Conditions vary fastest: the first samples cover all of them.

    Args:
        prompts: texts, or None.
        tensors: conditioning by name of the pipeline's argument, a row per condition.
        n_noise: start noises per condition; None = 1, or 16 where there is no condition.
        seed: of all noise.

    Raises:
        ConfigError: no rows, or different numbers of them.
    """

    def __init__(
        self,
        prompts: Sequence[str] | None,
        tensors: Mapping[str, Tensor],
        *,
        n_noise: int | None,
        seed: int,
    ) -> None:
        self.prompts = None if prompts is None else tuple(prompts)
        self.tensors = dict(tensors)
        counts = {len(v) for v in self.tensors.values()}
        if self.prompts is not None:
            counts.add(len(self.prompts))
        if len(counts) > 1 or 0 in counts:
            raise ConfigError(
                f"prompts and tensors have {sorted(counts)} rows; allowed: one number, not 0"
            )
        self.conditions = counts.pop() if counts else 0
        self.n_noise = n_noise or (1 if self.conditions else 16)
        self._seed = seed

    def chosen(self, split: Split) -> list[int]:
        """Numbers of the conditions a split uses; empty where there are none at all."""
        every = range(self.conditions)
        if self.conditions < _FEWEST_TO_SPLIT:
            return list(every)
        parts = {"search": (0, 1), "selection": (2,), "report": (3,)}[split]
        return [i for i in every if i % 4 in parts]

    def counts(self) -> list[int]:
        """Samples per fidelity of the search, ascending: the first quarter, and all."""
        full = max(1, len(self.chosen("search"))) * self.n_noise
        few = max(_FEWEST_SAMPLES, full // 4)
        return [few, full] if few < full else [full]

    def rows(self, split: Split, index: int, *, device: torch.device) -> tuple[Rows, list[str]]:
        """The samples of one noise bank, and their prompts (empty texts where there are none)."""
        bank = split_seed(self._seed, split, index)
        pairs = [(c, k) for k in range(self.n_noise) for c in (self.chosen(split) or [0])]
        texts = ["" if self.prompts is None else self.prompts[c] for c, _ in pairs]
        picked = torch.tensor([c for c, _ in pairs])
        rows = Rows(
            tuple(_row_seed(bank, c, k) for c, k in pairs),
            None if self.prompts is None else tuple(texts),
            {name: value.cpu()[picked].to(device) for name, value in self.tensors.items()},
        )
        return rows, texts

    def digest(self) -> str:
        """Hex digest of prompts and conditioning."""
        digest = blake2b(repr(self.prompts).encode(), digest_size=16)
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _row_seed(bank: int, condition: int, noise: int) -> int:
    """Seed of one sample's generator, below 2**63."""
    digest = blake2b(f"{bank} {condition} {noise}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
