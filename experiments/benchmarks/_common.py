"""What the benchmarks share: flags, one JSON line per case, aims, clocks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from searchlab.errors import ConfigError
from searchlab.evaluator import environment

__all__ = [
    "Aim",
    "Journal",
    "Time",
    "data_folder",
    "flags",
    "lacking",
    "other_parts",
    "run_parts",
    "spread",
    "timed",
]


@dataclass(frozen=True)
class Aim:
    """A limit that a measured figure has to keep.

    Attributes:
        figure: what was measured, for the message.
        value: what it came to; NaN keeps no limit.
        kind: on which side of the limit the value has to lie.
        limit: the limit, which is allowed itself.
        binding: False = a wish: recorded, but `--check` passes without it.
    """

    figure: str
    value: float
    kind: Literal["at most", "at least"]
    limit: float
    binding: bool = True

    @property
    def met(self) -> bool:
        if self.kind == "at most":
            return self.value <= self.limit
        return self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        out = {
            "figure": self.figure,
            "value": _plain(self.value),
            self.kind: self.limit,
            "met": self.met,
        }
        return out if self.binding else {**out, "wish": True}

    def __str__(self) -> str:
        return f"{self.figure}: {self.value:.4g}, aim {self.kind} {self.limit:.4g}"


def flags(
    description: str | None,
    arguments: Sequence[str] | None,
    *,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The parsed command line: `--quick`, `--check`, `--out FILE`, `--join`, what `add` adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--check", action="store_true", help="exit with 1 if an aim is missed")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all lines as a JSON array")
    parser.add_argument(
        "--join", action="store_true", help="keep what FILE holds of cases that are not run now"
    )
    if add is not None:
        add(parser)
    return parser.parse_args(arguments)


@dataclass
class Journal:
    """Prints a line per case and remembers the aims that were missed.

    Attributes:
        benchmark: name of the benchmark.
        options: what `flags` returned.
        part: which part of a joined benchmark writes the next lines, "" = it has no parts.
    """

    benchmark: str
    options: argparse.Namespace
    part: str = ""
    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def case(
        self,
        name: str,
        figures: Mapping[str, Any],
        *,
        seeds: Sequence[int] = (0,),
        aims: Sequence[Aim] = (),
    ) -> None:
        """One case: what was measured, from which seeds, against which aims."""
        line: dict[str, Any] = {"benchmark": self.benchmark, "case": name}
        if self.part:
            line["part"] = self.part
        line.update(figures)
        line["aims"] = [aim.to_json() for aim in aims]
        line["seeds"] = list(seeds)
        line["quick"] = bool(self.options.quick)
        line["environment"] = _environment()
        text = json.dumps(_clean(line))
        self.lines.append(text)
        print(text, flush=True)
        self.missed += [f"{name}: {aim}" for aim in aims if aim.binding and not aim.met]

    def skip(self, name: str, reason: str) -> None:
        """A case that cannot be measured here: no figures, no aims, but a line that says so."""
        self.case(name, {"skipped": reason})

    def close(self) -> int:
        """Writes the file if one was asked for; the exit status."""
        if self.options.out is not None:
            text = "[\n" + ",\n".join(self._joined(self.options.out)) + "\n]\n"
            self.options.out.write_text(text, "utf-8")
        if not self.options.check:
            return 0
        for text in self.missed:
            print(f"falls short: {text}", file=sys.stderr)
        return 1 if self.missed else 0

    def _joined(self, path: Path) -> list[str]:
        """The lines of this run; with `--join`, in the places that their cases have in a file."""
        if not (self.options.join and path.exists()):
            return self.lines
        by_case = {line["case"]: json.dumps(line) for line in json.loads(path.read_text("utf-8"))}
        by_case |= {json.loads(text)["case"]: text for text in self.lines}
        return [*by_case.values()]


def other_parts(options: argparse.Namespace, *own: str) -> list[str]:
    """The lines that parts other than `own`, or than those of `--part`, left in `--out`."""
    parts = own or options.part
    if parts is None or options.out is None or not options.out.exists():
        return []
    lines: list[dict[str, Any]] = json.loads(options.out.read_text("utf-8"))
    kept = [line for line in lines if line["part"] not in parts]
    if any(line["quick"] is not options.quick for line in kept):
        raise ConfigError(f"{options.out} mixes short and full forms; allowed: one of them")
    return [json.dumps(line) for line in kept]


def run_parts(
    journal: Journal,
    parts: Mapping[str, Callable[[Journal, bool, Path], None]],
    wanted: Sequence[str] | None,
) -> int:
    """Runs the parts that are wanted (None = all), each with an empty folder; the exit status."""
    for part in wanted or parts:
        with tempfile.TemporaryDirectory(prefix=f"searchlab-{journal.benchmark}-") as folder:
            journal.part = part
            parts[part](journal, bool(journal.options.quick), Path(folder))
    return journal.close()


@dataclass(frozen=True)
class Time:
    """Seconds that something took: of the clock, and of all threads of this process."""

    wall: float
    cpu: float


def lacking(*packages: str) -> str | None:
    """Why a case with these peers cannot run here; None = it can."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def data_folder(name: str) -> Path | None:
    """A folder of published tables below $SEARCHLAB_DATA; None = it is not on this machine."""
    base = os.environ.get("SEARCHLAB_DATA")
    folder = Path(base) / name if base else None
    return folder if folder is not None and folder.is_dir() else None


def timed(run: Callable[[], object]) -> Time:
    """How long one call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Time(time.perf_counter() - wall, time.process_time() - cpu)


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median, mean, lowest, highest and the values themselves, to `digits` significant digits."""
    return {
        "median": _significant(statistics.median(values), digits),
        "mean": _significant(statistics.fmean(values), digits),
        "lowest": _significant(min(values), digits),
        "highest": _significant(max(values), digits),
        "values": [_significant(value, digits) for value in values],
    }


def _significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _environment() -> dict[str, Any]:
    out: dict[str, Any] = {**environment(), "system": platform.system(), "cores": os.cpu_count()}
    if "torch" in sys.modules:
        import torch

        out["threads"] = torch.get_num_threads()
    return out


def _plain(value: float) -> float | None:
    return float(value) if abs(value) < float("inf") else None


def _clean(value: Any) -> Any:
    """JSON has no NaN: such values become null."""
    if isinstance(value, Mapping):
        return {str(key): _clean(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(part) for part in value]
    return _plain(value) if isinstance(value, float) else value
