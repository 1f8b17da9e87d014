"""Texts to tokens: chat templates, continuations, limits of the context, padding tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from searchlab.errors import ConfigError, DataError
from searchlab.evaluators.language.tasks import Item

__all__ = ["Prompts", "Tokenizer"]

Tokens = tuple[int, ...]


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of `transformers` have it.

    Chats need `apply_chat_template(messages, tokenize=False, add_generation_prompt=True)` too.
    """

    pad_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...


@dataclass
class Prompts:
    """How the texts of items become tokens.

    Args:
        tokenizer: see `Tokenizer`.
        limit: most tokens of prompt and continuation together; None = no limit.
        chat: wrap prompts by the tokenizer's chat template; None = where it has one. Messages are
            always wrapped. The template writes all special tokens, none are added.
        delimiter: what stands between a prompt and an option, where the option lacks it.
        pad: number of the padding token; None = the tokenizer's.

    Raises:
        ConfigError: no padding token, or no chat template where one is asked for.
    """

    tokenizer: Tokenizer
    limit: int | None = None
    chat: bool | None = None
    delimiter: str = ""
    pad: int | None = None
    stops: Iterable[int] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if self.pad is None:
            self.pad = self.tokenizer.pad_token_id
        if self.pad is None:
            raise ConfigError(
                f"{type(self.tokenizer).__name__} has no padding token; set tokenizer.pad_token "
                "(often to its eos_token), or give its number as pad"
            )
        has = bool(getattr(self.tokenizer, "chat_template", None))
        if self.chat and not has:
            raise ConfigError(
                f"chat is on, but {type(self.tokenizer).__name__} has no chat template; "
                "allowed: off, or a tokenizer with one"
            )
        self.chat = has if self.chat is None else self.chat
        self._contexts: dict[Any, Tokens] = {}
        self._behind: dict[Any, Tokens] = {}
        own = self.tokenizer.eos_token_id
        self.stops = frozenset(self.stops) | (frozenset() if own is None else {own})

    def context(self, item: Item) -> Tokens:
        """Tokens of an item's prompt.

        Raises:
            ConfigError: messages, and no chat template.
            DataError: a prompt without a token.
        """
        known = self._contexts.get(item.prompt)
        if known is not None:
            return known
        if isinstance(item.prompt, str) and not self.chat:
            ids = list(self.tokenizer.encode(item.prompt, add_special_tokens=True))
            while ids and ids[-1] in self.stops:  # some tokenizers end every text
                ids.pop()
        else:
            ids = self.tokenizer.encode(self._wrapped(item), add_special_tokens=False)
        if not ids:
            raise DataError(f"the prompt {str(item.prompt)[:40]!r} has no tokens")
        self._contexts[item.prompt] = tuple(ids)
        return tuple(ids)

    def _wrapped(self, item: Item) -> str:
        if isinstance(item.prompt, str):
            messages = [{"role": "user", "content": item.prompt}]
        else:
            messages = [{"role": role, "content": text} for role, text in item.prompt]
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                f"a prompt is a list of messages, but {type(self.tokenizer).__name__} has no chat "
                "template; allowed: texts"
            )
        wrap: Any = self.tokenizer.apply_chat_template  # type: ignore[attr-defined]
        return str(wrap(messages, tokenize=False, add_generation_prompt=True))

    def continuation(self, item: Item, text: str) -> Tokens:
        """Tokens of a text behind an item's prompt, as they are when both are encoded together.

        Raises:
            DataError: a text without a token, or more tokens than the context has.
        """
        known = self._behind.get((item.prompt, text))
        if known is not None:
            return known
        before, asked = self.context(item), text
        special = isinstance(item.prompt, str) and not self.chat
        start = str(item.prompt) if special else self._wrapped(item)
        if not (text[:1].isspace() or start[-1:].isspace()):
            text = self.delimiter + text
        whole = list(self.tokenizer.encode(start + text, add_special_tokens=special))
        while special and whole and whole[-1] in self.stops:
            whole.pop()
        if tuple(whole[: len(before)]) == before:
            ids = tuple(whole[len(before) :])
        else:  # a token reaches across the border: the two are read apart
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        if not ids:
            raise DataError(f"the continuation {text!r} has no tokens")
        self._behind[item.prompt, asked] = ids
        return ids

    def starts(self, item: Item, option: str) -> frozenset[int]:
        """First tokens an answer may have that means this option: with and without a space."""
        bare = option.strip() or option
        texts = {option, bare, f" {bare}"}
        return frozenset(self.continuation(item, text)[0] for text in texts)

    def check(self, count: int, what: str) -> None:
        """Refuses more tokens than the context has.

        Raises:
            DataError: names what is too long, and the limit.
        """
        if self.limit is not None and count > self.limit:
            raise DataError(
                f"{what} has {count} tokens; the model's context has {self.limit}: shorten it"
            )

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def identity(self, items: Iterable[Item]) -> Mapping[str, Any]:
        """What determines the tokens: those of the items, and the settings."""
        digest = blake2b(digest_size=16)
        for item in items:
            texts = [*item.options, *item.accepted][:1]
            tokens = [self.context(item), *(self.continuation(item, text) for text in texts)]
            digest.update(repr(tokens).encode())
        return {
            "tokens": digest.hexdigest(),
            "chat": self.chat,
            "delimiter": self.delimiter,
            "stops": sorted(self.stops),
        }
