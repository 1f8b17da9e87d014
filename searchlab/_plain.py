"""Text from a database on a terminal."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: str) -> str:
    """A text from a database, without what would steer a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
