"""Rows of tokens for a model, with what is asked of them: left padded, or packed as trees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from searchlab.errors import ConfigError

__all__ = ["LANES", "MIN_ROWS", "Batch", "Query", "lay_out", "left_padded"]

MIN_ROWS = 16  # rows of a matrix from which on a CPU's result does not depend on their number
# Numbers that a CPU's functions take at a time: what is left over may get other last bits, so
# that rows and columns of batches are filled up.
LANES = 32

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Query:
    """How likely is `target` after `context`?

    Attributes:
        item: number of the item, in its split.
        context, target: tokens; one or more each.
    """

    item: int
    context: Tokens
    target: Tokens

    @property
    def fed(self) -> Tokens:
        """What a model has to read to answer."""
        return self.context + self.target[:-1]


@dataclass(frozen=True)
class Batch:
    """Rows to feed at once, and where the answers to queries are found.

    Attributes:
        ids: int64 (B, S).
        mask: int64 (B, S), 1 = a token; or bool (B, 1, S, S), whom each token sees, for trees.
        positions: int64 (B, S).
        real: bool (B, S), False = padding, also by copies of the last row.
        wanted: int64 (B, w), columns whose logits matter.
        items: numbers of the items, each whole.
        queries: their queries.
        key: digest of the queries and how they lie, to remember things by.
        row, slot, target, query: int64 (T,): target token t of query `query[t]` is predicted by
            the logits of `wanted[row[t], slot[t]]`.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    real: Tensor
    wanted: Tensor
    items: tuple[int, ...]
    queries: tuple[Query, ...]
    row: Tensor
    slot: Tensor
    target: Tensor
    query: Tensor
    key: bytes

    @property
    def tree(self) -> bool:
        return self.mask.ndim == 4

    @property
    def tail(self) -> int:
        """How many of the last columns hold all that are wanted."""
        return int(self.ids.shape[1] - self.wanted.min())

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)


@dataclass(frozen=True)
class _Row:
    """A tree of tokens: parents come before children, sequences that begin alike share them."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    children: dict[tuple[int, int], int]

    @staticmethod
    def empty() -> _Row:
        return _Row([], [], [], {})

    def add(self, sequence: Tokens) -> None:
        parent = -1
        for depth, token in enumerate(sequence):
            node = self.children.get((parent, token))
            if node is None:
                node = len(self.tokens)
                self.children[parent, token] = node
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            parent = node

    def path(self, sequence: Tokens) -> list[int]:
        out, parent = [], -1
        for token in sequence:
            parent = self.children[parent, token]
            out.append(parent)
        return out

    @property
    def chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))


@dataclass(frozen=True)
class _Unit:
    """Rows that stay in one batch, because items lie in them."""

    rows: list[_Row]
    queries: list[tuple[Query, int]]  # with the row that holds it

    @property
    def length(self) -> int:
        return max(len(row.tokens) for row in self.rows)


def lay_out(
    queries: Sequence[Query],
    *,
    pad: int,
    tokens: int = 2048,
    packed: bool = True,
    balance: int = 1024,
) -> list[Batch]:
    """Batches that answer all queries; a function of the queries and settings only.

    Packed, the queries of an item, and items that begin alike for half of their length or more, lie
    in one row as a tree: each token sees what comes before it in its own sequence. What they share
    is then read once. Else every sequence has its own row, padded on the left. Each row of a batch
    has the same length, at least 16; batches are filled with items of similar length.

    Args:
        queries: of all items; those of an item stay in one batch.
        pad: number of the padding token, which nobody sees.
        tokens: about how many tokens a batch has, padding included.
        packed: whether the model takes trees.
        balance: how many tokens a row has when attention costs as much as all else; rows of
            several items grow up to where an item is cheapest.

    Raises:
        ConfigError: no queries, or fewer than one token.
    """
    if not queries or tokens < 1 or balance < 1:
        raise ConfigError(
            f"{len(queries)} queries in batches of {tokens} tokens; allowed: 1 and more"
        )
    by_item: dict[int, list[Query]] = {}
    for query in queries:
        by_item.setdefault(query.item, []).append(query)
    units = _packed(by_item, balance, tokens) if packed else _plain(by_item)
    units.sort(key=lambda unit: unit.length)
    out, open_units = [], list[_Unit]()
    for unit in units:
        count = sum(len(other.rows) for other in open_units) + len(unit.rows)
        if open_units and count * max(unit.length, MIN_ROWS) > tokens:
            out.append(_batch(open_units, pad))
            open_units = []
        open_units.append(unit)
    out.append(_batch(open_units, pad))
    return out


def _plain(by_item: Mapping[int, list[Query]]) -> list[_Unit]:
    units = []
    for own in by_item.values():
        longest: list[Tokens] = []
        for fed in sorted({query.fed for query in own}, key=len, reverse=True):
            if not any(other[: len(fed)] == fed for other in longest):
                longest.append(fed)
        rows = [_Row.empty() for _ in longest]
        for row, fed in zip(rows, longest, strict=True):
            row.add(fed)
        at = [
            next(k for k, other in enumerate(longest) if other[: len(query.fed)] == query.fed)
            for query in own
        ]
        units.append(_Unit(rows, list(zip(own, at, strict=True))))
    return units


def _packed(by_item: Mapping[int, list[Query]], balance: int, most: int) -> list[_Unit]:
    """Items that begin alike in as few rows as are cheapest, filled evenly."""
    units: list[_Unit] = []
    run: list[list[Query]] = []
    shared = 0  # tokens that all items of the run begin with
    for own in sorted(by_item.values(), key=lambda own: own[0].context):
        context = own[0].context
        alike = _alike(run[0][0].context, context) if run else 0
        if run and 2 * min(alike, shared) >= max(len(context), len(run[0][0].context)):
            shared = min(alike, shared)
        else:
            units += _rows_of(run, shared, balance, most)
            run, shared = [], len(context)
        run.append(own)
    return units + _rows_of(run, shared, balance, most)


def _alike(one: Tokens, other: Tokens) -> int:
    """With how many equal tokens two sequences begin."""
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _rows_of(run: Sequence[list[Query]], shared: int, balance: int, most: int) -> list[_Unit]:
    """Rows for items of which all begin with the same `shared` tokens."""
    sizes = []
    for own in run:
        row = _Row.empty()
        for query in own:
            row.add(query.fed)
        sizes.append(max(1, len(row.tokens) - shared))
    # A row of R tokens costs R * balance + R * R and holds a number of items that goes with
    # R - shared: this R is the cheapest per item.
    best = shared + math.sqrt(shared * (shared + balance))
    room = max(1.0, min(best, most) - shared)
    each = sum(sizes) / max(1, math.ceil(sum(sizes) / room))
    units: list[_Unit] = []
    filled = 0.0
    for own, size in zip(run, sizes, strict=True):
        if not units or filled + size / 2 > each * len(units):
            units.append(_Unit([_Row.empty()], []))
        filled += size
        for query in own:
            units[-1].rows[0].add(query.fed)
            units[-1].queries.append((query, 0))
    return units


def _filled(rows: int, size: int) -> tuple[int, int]:
    """Rows and columns, as few numbers as possible, that leave no lanes over."""
    shapes = []
    for count in range(rows, rows + 8):
        step = LANES // math.gcd(count, LANES)
        shapes.append((count, max(-(-size // step) * step, -(-MIN_ROWS // step) * step)))
    return min(shapes, key=lambda shape: shape[0] * shape[1])


def _batch(units: Sequence[_Unit], pad: int) -> Batch:
    rows = [row for unit in units for row in unit.rows]
    count, size = _filled(len(rows), max(len(row.tokens) for row in rows))
    tree = not all(row.chain for row in rows)
    used = len(rows)
    rows = rows + [rows[-1]] * (count - used)
    ids = torch.full((len(rows), size), pad, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    mask = (
        torch.eye(size, dtype=torch.bool).repeat(len(rows), 1, 1)
        if tree
        else ids.new_zeros(ids.shape)
    )
    real = torch.zeros(ids.shape, dtype=torch.bool)
    starts = []
    for number, row in enumerate(rows):
        count = len(row.tokens)
        start = 0 if tree else size - count
        starts.append(start)
        ids[number, start : start + count] = torch.tensor(row.tokens)
        positions[number, start : start + count] = torch.tensor(row.depths)
        real[number, start : start + count] = number < used
        if not tree:
            mask[number, start:] = 1
            continue
        sees = np.eye(size, dtype=bool)
        for node, parent in enumerate(row.parents):
            if parent >= 0:
                sees[node, : parent + 1] |= sees[parent, : parent + 1]
        mask[number] = torch.from_numpy(sees)
    queries: list[Query] = []
    found: list[tuple[int, int, int, int]] = []  # row, column, target token, query
    first = 0
    for unit in units:
        for query, at in unit.queries:
            number = first + at
            path = rows[number].path(query.fed)[len(query.context) - 1 :]
            found.extend(
                (number, starts[number] + node, token, len(queries))
                for node, token in zip(path, query.target, strict=True)
            )
            queries.append(query)
        first += len(unit.rows)
    asked: list[set[int]] = [set() for _ in range(used)]
    for row_number, column, _, _ in found:
        asked[row_number].add(column)
    columns = [sorted(own) for own in asked]
    columns += columns[-1:] * (len(rows) - used)
    width = max(map(len, columns))
    wanted = torch.tensor([[*own, *own[-1:] * (width - len(own))] for own in columns])
    slots = [{column: slot for slot, column in enumerate(own)} for own in columns]
    flat = torch.tensor([(row, slots[row][column], token, q) for row, column, token, q in found])
    return Batch(
        ids=ids,
        mask=mask[:, None] if tree else mask,
        positions=positions,
        real=real,
        wanted=wanted,
        items=tuple(dict.fromkeys(query.item for query in queries)),
        queries=tuple(queries),
        row=flat[:, 0].contiguous(),
        slot=flat[:, 1].contiguous(),
        target=flat[:, 2].contiguous(),
        query=flat[:, 3].contiguous(),
        key=_digest(queries, ids.shape, tree=tree),
    )


def _digest(queries: Sequence[Query], shape: tuple[int, ...], *, tree: bool) -> bytes:
    parts = [(query.item, query.context, query.target) for query in queries]
    return blake2b(repr((parts, tuple(shape), tree)).encode(), digest_size=16).digest()


def left_padded(prompts: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (B, S) int64 of prompts that end in the last column."""
    size = max(MIN_ROWS, max(map(len, prompts)))
    ids = torch.full((len(prompts), size), pad, dtype=torch.int64)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, size - len(prompt) :] = torch.tensor(prompt)
        mask[row, size - len(prompt) :] = 1
        positions[row, size - len(prompt) :] = torch.arange(len(prompt))
    return ids, mask, positions
