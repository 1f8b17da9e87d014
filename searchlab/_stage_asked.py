"""What the groups of a free-running stage were told when they were asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from searchlab.study import Store

__all__ = ["AskedAt"]

_GROUPS = 64  # of one entry in the run: with many groups open, few are written again


class AskedAt:
    """Keeps it in the run until records say it, so that a killed run asks in the same way.

    Args:
        store: the run.
        index: of the stage.
        quantum: ids per group.
    """

    def __init__(self, store: Store, index: int, quantum: int) -> None:
        self._store = store
        self._name = f"asked:{index}"
        self._span = _GROUPS * quantum
        self._blocks: dict[int, dict[int, int]] = {}
        self._changed: set[int] = set()
        self._last = -1  # the highest block that the run knows of

    def load(self) -> None:
        """Reads what an earlier process has kept."""
        kept = self._store.get_meta(self._name) or [0, 0]
        if isinstance(kept, dict):  # as it was kept in one piece
            for start, told in kept.items():
                self._block(int(start))[int(start)] = told
            return
        for number in range(*kept):
            entries = self._store.get_meta(f"{self._name}:{number}") or {}
            self._blocks[number] = {int(start): told for start, told in entries.items()}
            self._last = number

    def note(self, start: int, told: int) -> None:
        """A group is asked for by a state that was told so many ids."""
        self._block(start)[start] = told
        self._changed.add(start // self._span)

    def get(self, start: int) -> int | None:
        """What the group from `start` on was told, if that is kept."""
        return self._blocks.get(start // self._span, {}).get(start)

    def keep(self, end: int) -> None:
        """Puts what is new into the run's open batch; groups below `end` are recorded."""
        for number in [n for n in self._blocks if (n + 1) * self._span <= end]:
            del self._blocks[number]
        changed, self._changed = sorted(self._changed & self._blocks.keys()), set()
        for number in changed:
            self._store.set_meta(f"{self._name}:{number}", self._blocks[number])
        if changed and changed[-1] > self._last:
            self._last = changed[-1]
            self._store.set_meta(self._name, [min(self._blocks), self._last + 1])

    def _block(self, start: int) -> dict[int, int]:
        return self._blocks.setdefault(start // self._span, {})
