"""The report of a run: one HTML file that needs nothing else, neither network nor scripts."""

from __future__ import annotations

import base64
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from searchlab._report_front import front_sections
from searchlab._report_page import CSS, POLICY
from searchlab._report_section import Section, media
from searchlab.evaluator import environment
from searchlab.figures import figure_curve, figure_front
from searchlab.final import Interval, paired
from searchlab.population import OK, PRUNED
from searchlab.records import RECORD_STATES, VOID, Records
from searchlab.result import GroupResult, Result

__all__ = ["Section", "figure_curve", "figure_front", "write_report"]

_NOTHING = "–"
_MOST_REASONS = 20


def write_report(result: Result, path: Path, *, sections: Sequence[Section] = ()) -> Path:
    """Writes the report of a result.

    Everything that comes from data is escaped, images are embedded, and the page forbids scripts
    and outside loads by its own policy. The file appears whole or not at all.

    Args:
        result: of a finished or an interrupted run.
        path: the HTML file; its folder is made if needed, an older file is replaced.
        sections: what the recipe adds at the end.

    Returns:
        `path`.
    """
    parts = [
        _verdict(result),
        *(
            (_values(result), _paired(result), _curve(result), _front(result))
            if result.trade_offs is None
            else map(_section, front_sections(result.trade_offs))
        ),
        _settings(result),
        _failures(result.records),
        *(_section(section) for section in sections),
    ]
    objectives = [result.objective] if result.trade_offs is None else result.trade_offs.objectives
    title = escape(f"{result.name} – {', '.join(o.name for o in objectives)}")
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )
    _write(Path(path), page)
    return Path(path)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# -- parts ----------------------------------------------------------------------------------------


def _verdict(result: Result) -> str:
    status = str(result.meta.get("status", ""))
    note = ""
    if status and status != "finished":
        text = f"This run has not finished ({status}): what follows is known so far."
        note = f'<p class="note">{escape(text)}</p>'
    return (
        f'<h1>{escape(result.name)}</h1>\n<p class="verdict">{escape(result.verdict())}</p>\n{note}'
    )


def _values(result: Result) -> str:
    rows = result.rows()
    if not rows:
        return "<h2>Values</h2>\n<p>No candidate was evaluated successfully.</p>"
    grouped = bool(result.group_by)
    better = "lower" if result.objective.direction == "min" else "higher"
    unit = f", in {result.objective.unit}" if result.objective.unit else ""
    level = round(100 * (1 - result.alpha))
    head = [result.group_by] if grouped else []
    head += ["what", "search", "selection", f"report, {level} % interval", "× best baseline", ""]
    sure = {g.group: _sure(result, g) for g in result.groups}
    body, before = [], None
    for row in rows:
        winner = row["kind"] == "searched"
        report = _with_half(row["report"], row["report_half"])
        cells = [_cell(row["group"], "group")] if grouped else []
        name = f'<b>{escape(row["kind"])}</b> <span class="name">{escape(row["name"])}</span>'
        cells += [f'<td class="what">{name}</td>', _cell(row["search"]), _cell(row["selection"])]
        cells += [_cell(report), _cell(_ratio(row["ratio_to_baseline"]))]
        cells.append(sure[row["group"]] if winner else "<td></td>")
        kind = ["winner"] if winner else []
        kind += ["first"] if row["group"] != before else []
        before = row["group"]
        body.append(f'<tr class="{" ".join(kind)}">{"".join(cells)}</tr>')
    text = (
        f"Objective <b>{escape(result.objective.name)}</b>{escape(unit)}, {better} is better. The "
        "search chose by the first column, the winner was taken by the second; both flatter it. The"
        " report column was measured once, on data that took no part in any choice."
    )
    if not any(row["report"] is not None for row in rows):
        text += " This run has no report values: nothing here is free of selection."
    return f"<h2>Values</h2>\n<p>{text}</p>\n{_table(head, body)}"


def _sure(result: Result, group: GroupResult) -> str:
    base = group.best_baseline()
    if group.winner is None or base is None or not (group.winner.report and base.report):
        return "<td></td>"
    word, css = _judgement(paired(group.winner, base, result.alpha, result.sign))
    return f'<td><span class="tag {css}">{word}</span></td>'


def _judgement(gain: Mapping[str, Any]) -> tuple[str, str]:
    interval: Interval = gain["gain"]
    if not np.isfinite(interval.half):
        return "no interval", "open"
    if not gain["distinguishable"]:
        return "not distinguishable", "open"
    return ("better", "good") if interval.mean > 0 else ("worse", "bad")


def _paired(result: Result) -> str:
    rows: list[dict[str, Any]] = []
    for group in result.groups:
        winner = group.winner
        for base in group.baselines:
            if winner is None or not winner.report or len(base.report) != len(winner.report):
                continue
            gain = paired(winner, base, result.alpha, result.sign)
            row: dict[str, Any] = {result.group_by: group.group} if result.group_by else {}
            interval: Interval = gain["gain"]
            row |= {
                "against": base.kind,
                "name": base.name,
                "gain": _with_half(*interval.to_json()),
                "ratio": _ratio(gain["ratio"]),
                "ratio per replicate": "  ".join(_ratio(r) for r in gain["ratios"]),
                "": _judgement(gain)[0],
            }
            rows.append(row)
    if not rows:
        return ""
    level = round(100 * (1 - result.alpha))
    text = (
        "The searched winner against every reported baseline on the same replicates of the report "
        f"split. A positive gain means that the winner is better; intervals cover {level} %."
    )
    return f"<h2>Paired comparison</h2>\n<p>{text}</p>\n{_rows_table(rows)}"


def _curve(result: Result) -> str:
    svg = figure_curve(result)
    if svg is None:
        return ""
    caption = (
        "Best value so far at full fidelity, known points that the stage began with included. "
        "Dashed: the search value of the best baseline."
    )
    return f"<h2>Search</h2>\n{_figure(svg, caption)}"


def _front(result: Result) -> str:
    svg = figure_front(result)
    if svg is None:
        return ""
    front = ", ".join(f"{group}: {_number(value)}" for group, value in result.front)
    caption = (
        f"Value against {result.group_by}. Filled points of the searched line are on the front "
        f"({front}); hollow ones are no better than a lower {result.group_by}. Bars: intervals."
    )
    return f"<h2>Front</h2>\n{_figure(svg, caption)}"


def _settings(result: Result) -> str:
    meta = dict(result.meta)
    entries: list[tuple[str, Any]] = [("run", result.name)]
    names = {
        "hits": "answered without paying",
        "final": "evaluations of the final",
    }
    entries += [(names.get(name, name), count) for name, count in result.counts.items()]
    seconds = meta.pop("seconds", None)
    if seconds is not None:
        entries.append(("wall time", _seconds(float(seconds))))
    if result.records is not None:
        paid = result.records.cost_s[~result.records.cached]
        total = float(paid[np.isfinite(paid)].sum())
        if total > 0:
            entries.append(("time in the evaluator", _seconds(total)))
    labels = {
        "pace": "pace, by stage",
        "lag": "lag (most open jobs)",
        "chunk": "chunk (jobs per call)",
        "repeat": "same candidate twice, largest difference",
        "stop_reason": "stopped because",
    }
    entries += [(labels.get(name, name), value) for name, value in meta.items()]
    if "environment" not in meta:
        entries.append(("environment of this page", environment()))
    body = "".join(
        f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{_value(value)}</dd>"
        for name, value in entries
    )
    return f"<h2>Cost and settings</h2>\n<dl>{body}</dl>"


def _failures(records: Records | None) -> str:
    if records is None:
        return ""
    bad = np.flatnonzero(~np.isin(records.state, (OK, PRUNED, VOID)))
    if not len(bad):
        return "<h2>Failures</h2>\n<p>None.</p>"
    counter = Counter((RECORD_STATES[records.state[i]], records.reason[i]) for i in bad)
    first: dict[tuple[str, str], int] = {}
    for i in bad:
        first.setdefault((RECORD_STATES[records.state[i]], records.reason[i]), int(records.ids[i]))
    rows = [
        {
            "times": n,
            "state": key[0],
            "reason": key[1] or "(no reason given)",
            "first id": first[key],
        }
        for key, n in counter.most_common(_MOST_REASONS)
    ]
    more = len(counter) - len(rows)
    text = f"{len(bad)} of {len(records)} records" + (f"; {more} rarer reasons" if more else "")
    return f"<h2>Failures</h2>\n<p>{text}.</p>\n{_rows_table(rows)}"


def _section(section: Section) -> str:
    out = [f"<h2>{escape(section.title)}</h2>"]
    paragraphs = section.text.split("\n\n")
    out += [f"<p>{escape(part)}</p>" for part in paragraphs if part.strip()]
    if section.figure is not None:
        out.append(_figure(section.figure, section.caption, alt=section.title))
    if section.table is not None:
        out.append(_rows_table(section.table))
    if section.pre:
        out.append(f'<div class="wide"><pre>{escape(section.pre)}</pre></div>')
    return "\n".join(out)


# -- pieces ---------------------------------------------------------------------------------------


def _figure(figure: bytes, caption: str, *, alt: str = "") -> str:
    # As an image, not inline: what is inside an image cannot run or reach the page.
    data = base64.b64encode(figure).decode("ascii")
    source = f"data:{media(figure)};base64,{data}"
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{escape(alt or caption)}" src="{source}">'
    return f'<figure><div class="wide">{image}</div>{text}</figure>'


def _table(head: Sequence[str], body: Iterable[str]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{chr(10).join(body)}</tbody></table></div>"
    )


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    body = [
        "<tr>" + "".join(_cell(row.get(name), _css(row.get(name))) for name in columns) + "</tr>"
        for row in rows
    ]
    return _table(columns, body)


def _css(value: Any) -> str:
    numeric = isinstance(value, (int, float, np.number))
    words = str(value).replace("±", "").split()
    return "" if numeric or (words and all(_is_number(word) for word in words)) else "text"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word == _NOTHING
    return True


def _cell(value: Any, css: str = "") -> str:
    text = escape(_number(value)) if not isinstance(value, str) else escape(value)
    return f'<td class="{css or "number"}">{text}</td>'


def _number(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}" if math.isfinite(value) else _NOTHING
    return str(value)


def _ratio(value: float | None) -> str:
    return _NOTHING if value is None or not math.isfinite(value) else f"{value:.3f}"


def _with_half(mean: float | None, half: float | None) -> str:
    return _number(mean) + ("" if half is None else f" ± {half:.2g}")


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        if not value:
            return _NOTHING
        flat = "".join(f"<li>{escape(str(k))}: {_value(v)}</li>" for k, v in value.items())
        return f"<ul>{flat}</ul>"
    if isinstance(value, (list, tuple)):
        return f"<code>{escape(json.dumps(value, default=str))}</code>"
    return escape(_number(value)) if value != "" else _NOTHING
