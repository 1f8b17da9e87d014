"""Fitted regression trees as node arrays, walked for all candidates and trees at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchlab.errors import DataError

__all__ = ["Trees"]

Floats = NDArray[np.float64]

_BLOCK = 1 << 21  # candidates x trees that are walked at once


@dataclass(frozen=True)
class Trees:
    """Binary trees whose nodes stand one after another.

    Attributes:
        roots: int32 (t,), the node where each tree begins.
        feature: int32 (m,), which column a node asks; -1 = a leaf.
        threshold: float64 (m,); a row goes left if its value is at most this.
        left, right: int32 (m,), the next node; of a leaf the leaf itself.
        value: float64 (m,), what a leaf says.

    Raises:
        DataError: arrays of different lengths, or nodes that do not exist.
    """

    roots: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: Floats
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: Floats

    def __post_init__(self) -> None:
        m = len(self.feature)
        parts = (self.threshold, self.left, self.right, self.value)
        if any(part.shape != (m,) for part in parts):
            raise DataError("arrays of trees differ in length")
        nodes = np.concatenate([self.roots, self.left, self.right])
        if len(nodes) and not (nodes.min() >= 0 and nodes.max() < m):
            raise DataError(f"trees name nodes {nodes.min()} to {nodes.max()}; allowed: below {m}")
        # Children stand behind their parents, so that every walk comes to an end.
        own = np.arange(m)
        inner = self.feature >= 0
        if not ((self.left[inner] > own[inner]) & (self.right[inner] > own[inner])).all():
            raise DataError("trees with a node that leads back; allowed: children after parents")

    @staticmethod
    def of(fitted: Sequence[Any]) -> Trees:
        """Of fitted `sklearn.tree` regressors, in order."""
        roots, parts, start = [], [], 0
        for tree in (one.tree_ for one in fitted):
            leaf = tree.children_left < 0
            own = np.arange(tree.node_count)
            roots.append(start)
            parts.append(
                (
                    np.where(leaf, -1, tree.feature),
                    np.where(leaf, 0.0, tree.threshold),
                    np.where(leaf, own, tree.children_left) + start,
                    np.where(leaf, own, tree.children_right) + start,
                    tree.value[:, 0, 0],
                )
            )
            start += tree.node_count
        feature, threshold, left, right, value = (
            np.concatenate(columns) for columns in zip(*parts, strict=True)
        )
        return Trees(
            np.array(roots, np.int32),
            feature.astype(np.int32),
            threshold.astype(np.float64),
            left.astype(np.int32),
            right.astype(np.int32),
            value.astype(np.float64),
        )

    def __call__(self, x: NDArray[Any]) -> Floats:
        """What every tree says of every row of x (n, p): float64 (n, t).

        Columns are compared as float32, as scikit-learn does.
        """
        x = np.ascontiguousarray(x, dtype=np.float32)
        out = np.empty((len(x), len(self.roots)))
        step = max(1, _BLOCK // max(1, len(self.roots)))
        for start in range(0, len(x), step):
            out[start : start + step] = self._walk(x[start : start + step])
        return out

    def _walk(self, x: NDArray[np.float32]) -> Floats:
        n, p = x.shape
        node = np.repeat(self.roots[None], n, axis=0).reshape(-1)
        offsets = np.repeat(np.arange(n) * p, len(self.roots))
        flat = x.reshape(-1)
        open_ = np.flatnonzero(self.feature[node] >= 0)
        while len(open_):
            at = node[open_]
            goes_left = flat[offsets[open_] + self.feature[at]] <= self.threshold[at]
            at = np.where(goes_left, self.left[at], self.right[at])
            node[open_] = at
            open_ = open_[self.feature[at] >= 0]
        return self.value[node].reshape(n, len(self.roots))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns by name."""
        names = ("roots", "feature", "threshold", "left", "right", "value")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]], columns: int) -> Trees:
        """The inverse of `arrays`; `columns` is how many the features have."""
        trees = Trees(
            *(arrays[name] for name in ("roots", "feature", "threshold", "left", "right", "value"))
        )
        if len(trees.feature) and trees.feature.max() >= columns:
            raise DataError(f"trees ask column {trees.feature.max()}; allowed: below {columns}")
        return trees
