"""What the character model learns and is asked: prose and code of Python itself, sums, reversals.

Prose is the language reference that Python carries for its own help and the standard library's
docstrings, code that library's, all of the Python that runs this. The rest is drawn. A part of
every kind is held out of training, and the task files are made of that part only.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from searchlab.errors import ConfigError

__all__ = ["ALPHABET", "KINDS", "Question", "questions", "text", "window", "write_task"]

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
"""Every character that the model knows."""

KINDS = ("prose", "arithmetic", "reversal", "code")

_MODULES = """
abc argparse ast asyncio.base_events base64 bdb bisect calendar cgitb cmd codecs collections
compileall configparser contextlib copy csv dataclasses datetime decimal difflib dis doctest
email.message enum filecmp fileinput fractions ftplib functools getopt gettext glob gzip heapq
html.parser http.client http.cookiejar http.server imaplib inspect ipaddress json json.decoder
linecache locale logging logging.handlers lzma mailbox mimetypes multiprocessing.pool nntplib
optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile
pstats pydoc queue random re reprlib sched selectors shelve shlex shutil smtplib socket
socketserver ssl statistics string subprocess symtable tarfile telnetlib tempfile textwrap
threading timeit tokenize trace traceback turtle types typing unittest.case unittest.mock
urllib.parse urllib.request uuid warnings weakref webbrowser xml.dom.minidom
xml.etree.ElementTree zipfile
"""

_OPTIONS = 4
_CONTEXT, _CONTINUED = 64, 14  # characters of a question about prose or code


@dataclass(frozen=True)
class Question:
    """A prompt, what may follow it, and the index of what does."""

    prompt: str
    options: tuple[str, ...]
    answer: int


def _held_out(name: str) -> bool:
    return blake2b(name.encode(), digest_size=4).digest()[0] < 32  # one in eight


@cache
def text(kind: str, held_out: bool) -> str:
    """All prose or code, of the part for training or of the part for questions."""
    parts: list[str] = []
    if kind == "prose":
        from pydoc_data.topics import topics

        for name in sorted(topics):
            if _held_out(name) == held_out:
                parts += [_prose(p) for p in topics[name].split("\n\n") if _is_prose(p)]
    for name in _MODULES.split():
        if _held_out(name) == held_out:
            parts += _docs(_tree(name)) if kind == "prose" else [_code(_tree(name))]
    return (" " if kind == "prose" else "\n").join(parts)


def _tree(name: str) -> ast.Module:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return ast.Module([], [])
    return ast.parse(Path(found.origin).read_text("utf-8"))


def _docs(tree: ast.Module) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return [_prose(p) for doc in docs for p in doc.split("\n\n") if _is_prose(p)]


def _is_prose(paragraph: str) -> bool:
    lines = paragraph.strip().splitlines()
    told = len(lines) > 1 and not any(mark in paragraph for mark in (">>>", "::=", "***", "---"))
    return told and not lines[0].startswith("    ") and paragraph.isascii()


def _prose(paragraph: str) -> str:
    return re.sub(r"[`*\"]+", "", " ".join(paragraph.split()))


def _code(tree: ast.Module) -> str:
    """The module without comments and docstrings, in one layout; one space a level."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [
                part
                for part in body
                if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    lines = [line for line in ast.unparse(tree).splitlines() if line.strip() and line.isascii()]
    return "\n".join(
        " " * ((len(line) - len(line.lstrip())) // 4) + line.lstrip() for line in lines
    )


# -- what is learnt -------------------------------------------------------------------------------


def window(kind: str, length: int, random_: random.Random) -> tuple[str, list[bool]]:
    """Characters of one training row, and which of them can be known from those before.

    Args:
        kind: one of `KINDS`.
        length: characters.
        random_: where the row is drawn from.
    """
    if kind in ("prose", "code"):
        whole = text(kind, False)
        at = random_.randrange(len(whole) - 2 * length - 200)
        at = whole.index(" " if kind == "prose" else "\n", at) + 1
        return whole[at : at + length], [True] * length
    characters: list[str] = []
    known: list[bool] = []
    while len(characters) < length:
        asked, answer = _LINES[kind](random_, False)
        characters += asked + answer + "\n"
        known += [False] * len(asked) + [True] * (len(answer) + 1)
    return "".join(characters[:length]), known[:length]


def _sum(random_: random.Random, held_out: bool) -> tuple[str, str]:
    while True:
        a, b = random_.randrange(10, 100), random_.randrange(10, 100)
        if _held_out(f"{a}+{b}") == held_out:
            return f"{a}+{b}=", str(a + b)


def _reversed(random_: random.Random, held_out: bool) -> tuple[str, str]:
    while True:
        letters = (chr(97 + random_.randrange(26)) for _ in range(random_.randrange(4, 7)))
        word = "".join(letters)
        if _held_out(word) == held_out:
            return f"{word}>", word[::-1]


_LINES: dict[str, Callable[[random.Random, bool], tuple[str, str]]] = {
    "arithmetic": _sum,
    "reversal": _reversed,
}


# -- what is asked --------------------------------------------------------------------------------


def questions(kind: str, count: int, seed: int) -> list[Question]:
    """Distinct questions of held-out text, pairs and words, four options each.

    The same seed gives the same questions under the same Python.

    Args:
        kind: one of `KINDS`.
        count: how many; the held-out sums end near 1,000.
        seed: of the draw.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r}; allowed: {', '.join(KINDS)}")
    random_ = random.Random(f"{kind} {seed}")
    made: dict[str, Question] = {}
    while len(made) < count:
        prompt, options = _DRAWN[kind](random_)
        if len(set(options)) == _OPTIONS and prompt not in made:
            order = random_.sample(range(_OPTIONS), _OPTIONS)
            shuffled = tuple(options[at] for at in order)
            made[prompt] = Question(prompt, shuffled, order.index(0))
    return list(made.values())


def _ask_sum(random_: random.Random) -> tuple[str, list[str]]:
    prompt, answer = _sum(random_, True)
    wrong = random_.sample((-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20), _OPTIONS - 1)
    return prompt, [answer, *(str(int(answer) + by) for by in wrong)]


def _ask_reversed(random_: random.Random) -> tuple[str, list[str]]:
    prompt, answer = _reversed(random_, True)
    options = [answer]
    while len(options) < _OPTIONS:
        letters = list(answer)
        i, j = random_.sample(range(len(letters)), 2)
        letters[i], letters[j] = letters[j], letters[i]
        options.append("".join(letters))
    return prompt, options


def _ask_text(kind: str, random_: random.Random) -> tuple[str, list[str]]:
    """What comes next, and the same with two neighbouring characters exchanged."""
    whole = text(kind, True)
    while True:
        cut = whole.index(" ", random_.randrange(2 * _CONTEXT, len(whole) - 200)) + 1
        if " " not in whole[cut - 2] + whole[cut] and "\n" not in whole[cut - 2 : cut]:
            break
    begin = whole.find(" " if kind == "prose" else "\n", cut - _CONTEXT - 1, cut) + 1
    begin = max(begin, cut - _CONTEXT)
    answer = whole[cut : cut + _CONTINUED]
    swaps = [at for at in range(1, _CONTINUED - 1) if answer[at] != answer[at + 1]]
    chosen = random_.sample(swaps, min(len(swaps), _OPTIONS - 1))
    wrong = [answer[:at] + answer[at + 1] + answer[at] + answer[at + 2 :] for at in chosen]
    return whole[begin:cut], [answer, *wrong]


_DRAWN: dict[str, Callable[[random.Random], tuple[str, list[str]]]] = {
    "prose": lambda random_: _ask_text("prose", random_),
    "arithmetic": _ask_sum,
    "reversal": _ask_reversed,
    "code": lambda random_: _ask_text("code", random_),
}


def write_task(path: Path, kind: str, *, counts: Sequence[tuple[str, int]], seed: int) -> None:
    """A task file: one JSON object a line with prompt, options, answer (a number) and split.

    Args:
        path: of the file.
        kind: one of `KINDS`.
        counts: splits and how many questions of each, in the order in which they are drawn; no
            question is in two of them.
        seed: of the draw.
    """
    asked = questions(kind, sum(count for _, count in counts), seed)
    splits = [split for split, count in counts for _ in range(count)]
    lines = (
        json.dumps({"prompt": q.prompt, "options": q.options, "answer": q.answer, "split": split})
        for q, split in zip(asked, splits, strict=True)
    )
    path.write_text("\n".join(lines) + "\n", "utf-8")
