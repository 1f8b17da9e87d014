"""`show RUN --watch`: a run as it goes on, from any other shell; reads only."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from searchlab._live import LIVE
from searchlab._plain import plain
from searchlab._run_layout import LAYOUT, read_layout
from searchlab.errors import ConfigError, SearchlabError
from searchlab.utilisation import lag_for, share_at

if TYPE_CHECKING:
    from searchlab._study_run import Run
    from searchlab.runs import RunAddress
    from searchlab.study import Database, RunInfo

__all__ = ["view", "watch"]

MEASURED = 2000  # newest evaluations that utilisation is computed from
_SHARE = 0.95


def watch(address: RunAddress, interval: float) -> int:
    """Prints a run's state again and again until its driver ends; the exit code."""
    from searchlab.study import Database

    if not 0.1 <= interval <= 3600:
        raise ConfigError(f"--interval {interval:g}; allowed: 0.1 to 3600 seconds")
    terminal = sys.stdout.isatty()
    with Database(address.database) as base:
        while True:
            info = next((i for i in base.runs() if i.name == address.name), None)
            if info is None:
                raise ConfigError(f"no run {address.name!r} in the database")
            text = plain(view(base, info))
            print(f"\x1b[H\x1b[2J{text}" if terminal else f"{text}\n", flush=True)
            if not info.live:
                return 0
            try:
                time.sleep(interval)
            except KeyboardInterrupt:
                return 0


@dataclass(frozen=True)
class _Spent:
    """What the recorded evaluations cost and brought, in the user's sign."""

    first: float | None
    best: float | None
    compared: str


def view(base: Database, info: RunInfo) -> str:
    """One picture of a run, some lines of text."""
    store = base.read(info.name)
    try:
        live: dict[str, Any] = store.get_meta(LIVE) or {}
        pace: dict[str, Any] = store.get_meta("pace") or {}
        lines = [_head(info, live, time.time())]
        lines += _work(info, live, time.time())
        lines += _busy(store, live, pace)
        lines += _price(store, live)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"the state of run {info.name!r} is damaged ({error})") from None
    finally:
        store.close("")
    return "\n".join(lines)


def _head(info: RunInfo, live: Mapping[str, Any], now: float) -> str:
    state = f"driven by {info.driver}" if info.live else info.status
    age = now - float(live.get("time") or info.updated)
    late = f", last heard of {age:.0f} s ago" if info.live and age > 10 else ""
    return f"{info.name}: {state}{late}; {info.records} records"


def _work(info: RunInfo, live: Mapping[str, Any], now: float) -> list[str]:
    lines = []
    if "stage" in live:
        budget = f" of {live['budget']}" if live.get("budget") else ""
        queue = int(live["issued"]) - int(live["finished"])
        lines.append(
            f"{live['stage']}: {live['finished']} evaluated ({float(live['paid']):.6g}{budget} "
            f"paid), {queue} open, {live['hits']} from cache, {live['failed']} failed"
        )
    usage = live.get("usage")
    if usage:
        lost = (
            f"{usage.get('deaths', 0)} died, {usage.get('timeouts', 0)} too slow, "
            f"{usage.get('overruns', 0)} too large, {usage.get('repeats', 0)} repeats"
        )
        lines.append(f"workers: {usage['workers']:.0f}; {lost}")
    activity = live.get("activity") if info.live else None
    if activity:
        lines.append(f"queue: {activity['queued']} chunks wait for a worker")
        for row in activity["workers"]:
            at = f"{max(0.0, now - float(row['since'])):.0f} s" if row["since"] else ""
            doing = f"job {row['job']} for {at}" if row["job"] is not None else row["state"]
            lines.append(f"  {row['worker']}: {doing}")
    return lines


def _busy(store: Run, live: Mapping[str, Any], pace: Mapping[str, Any]) -> list[str]:
    """Utilisation, and what another lag would give."""
    usage = live.get("usage") or {}
    workers = int(usage.get("workers", 1))
    lines = []
    if "utilisation" in usage:
        lines.append(f"busy: {100 * float(usage['utilisation']):.0f} % of the workers' time")
    seconds = store.chunk_seconds(MEASURED)
    last = pace.get(max(pace, key=int)) if pace else None
    if workers < 2 or len(seconds) < 2 * workers or last is None:
        return lines
    chunk, lag = max(1, int(last["chunk"])), int(last["lag"])
    units = None if last.get("free") else max(1, lag // chunk)
    possible = share_at(seconds * max(1, -(-40 * workers // len(seconds))), workers, units)
    how = "free running" if units is None else f"lag {lag}"
    text = f"lag: {how} allows {100 * possible:.0f} %"
    if possible < _SHARE:
        wanted = lag_for(seconds, workers, _SHARE)
        text += f"; 95 % needs lag {wanted * chunk}" if wanted else "; no lag gives 95 % with these"
    return [*lines, text]


def _price(store: Run, live: Mapping[str, Any]) -> list[str]:
    hours, price = live.get("device_hours"), live.get("gpu_price")
    if hours is None:
        return []
    text = f"spent: {float(hours):.4g} device hours"
    dollars = float(hours) * float(price) if price else None
    if dollars is not None:
        text += f", {dollars:.4g} US dollars"
    spent = _spent(store)
    if spent is None or spent.first is None or spent.best is None:
        return [text]
    gain = abs(spent.best - spent.first)
    lines = [text, f"best: {spent.best:.6g}, {gain:.4g} better than {spent.compared}"]
    if gain > 0 and spent.first != 0:
        percent = 100 * gain / abs(spent.first)
        unit = f"{dollars / percent:.4g} dollars" if dollars is not None else (
            f"{float(hours) / percent:.4g} device hours"
        )  # fmt: skip
        lines[-1] += f" ({percent:.3g} %): {unit} per percent"
    return lines


def _spent(store: Run) -> _Spent | None:
    """The best value, and what it is compared with; None for several objectives."""
    try:
        layout = read_layout(store.get_meta(LAYOUT), store.name)
    except SearchlabError:
        return None
    if layout is None or len(layout.objectives) != 1:
        return None
    better = max if layout.objectives[0].direction == "max" else min
    top = len(layout.stages[-1].fidelities) - 1
    rows = store.first_values(top)
    searched = [value for value, origin in rows if not origin.startswith("baseline")]
    known = [value for value, origin in rows if origin.startswith("baseline")]
    if not searched:
        return None
    if known:
        return _Spent(better(known), better([*searched, *known]), "the best known candidate")
    return _Spent(searched[0], better(searched), "the first candidate")
