"""A part of a report: heading, text, table, figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from searchlab.errors import ConfigError

__all__ = ["Section", "media"]

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Section:
    """A part of a report that a recipe adds.

    Attributes:
        title: heading.
        text: one or more paragraphs, divided by empty lines.
        table: rows; columns are the keys in order of first appearance.
        figure: a PNG or an SVG without outside references.
        caption: below the figure.
        pre: text shown as it is, in fixed width.

    Raises:
        ConfigError: a figure that is neither PNG nor SVG, or a section without title.
    """

    title: str
    text: str = ""
    table: Sequence[Mapping[str, Any]] | None = None
    figure: bytes | None = None
    caption: str = ""
    pre: str = ""

    def __post_init__(self) -> None:
        if not self.title:
            raise ConfigError("a section without title; allowed: any text but the empty one")
        if self.figure is not None:
            media(self.figure)


def media(figure: bytes) -> str:
    """The media type of a figure. Raises ConfigError where it is neither PNG nor SVG."""
    if figure.startswith(_PNG):
        return "image/png"
    if figure.lstrip()[:5] in (b"<?xml", b"<svg ", b"<svg>") and b"<svg" in figure:
        return "image/svg+xml"
    raise ConfigError(f"a figure that begins with {figure[:8]!r}; allowed: PNG or SVG")
