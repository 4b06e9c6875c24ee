"""What comes of a load test: the table, one HTML file that needs nothing else, and the figures as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

from loadtest.client import Answer
from loadtest.figures import fairness, mean, quantile
from loadtest.plots import plots, span
from loadtest.rows import Row
from loadtest.run import Result, closing_rows

# a chart is drawn for a light page: turned round, and its hues back again, it is one for a dark page
_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --strong: #888; --weak: #666;
--no: #b00020 }
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 1560px; padding: 0 1em; color: var(--text);
background: var(--page) }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .3em .8em; border-bottom: 1px solid var(--line);
text-align: left; vertical-align: top } th { border-bottom: 2px solid var(--strong) }
.no { color: var(--no); font-weight: bold; white-space: nowrap } .wide { overflow-x: auto }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(560px, 100%), 1fr)); gap: 1em }
svg { width: 100% } td.n { text-align: right; font-variant-numeric: tabular-nums } small { color: var(--weak) }
@media (prefers-color-scheme: dark) {
:root { --text: #ddd; --page: #000; --line: #333; --strong: #777; --weak: #999; --no: #ff6b81 }
svg { filter: invert(1) hue-rotate(180deg) } }
"""


def all_rows(results: Sequence[Result]) -> list[Row]:
    """The rows of all scenarios, then those that hold over all of them."""
    return [row for result in results for row in result.rows] + closing_rows(list(results))


def conditions(scale: float) -> str:
    """Where and how it was measured."""
    return (
        f"scale {scale:g}, {date.today()}, {_processor()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, load average {os.getloadavg()[0]:.1f} at the end"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def write(out: Path, results: Sequence[Result], scale: float) -> None:
    """``report.html`` and ``figures.json``, each at once, so that an interrupted run leaves whole files."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "conditions": conditions(scale),
        "rows": [asdict(row) for row in all_rows(results)],
        "scenarios": {result.name: _figures(result) for result in results},
    }
    for name, text in (
        ("report.html", _page(results, scale)),
        ("figures.json", json.dumps(_finite(figures), indent=2) + "\n"),
    ):
        temporary = out / (name + ".tmp")
        temporary.write_text(text, "utf-8")
        os.replace(temporary, out / name)


def _figures(result: Result) -> dict[str, Any]:
    return {
        "groups": _groups(result.answers),
        "agreement": [asdict(a) | {"difference": a.difference} for a in result.agreements],
        "client_lag": _lag(result),
        "fairness": _jain(result.answers),
        "seconds": result.seconds,
        "phases": [{"name": p.name, "seconds": p.seconds} for p in result.phases],
    }


def _groups(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """What the client saw, by group and kind of request. Times in ms, from when a request was due."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(f"{answer.group} {answer.kind}".strip(), []).append(answer)
    told = {}
    for name, members in groups.items():
        good = [a for a in members if a.good]
        statuses: dict[str, int] = {}
        for a in members:
            word = "hung up" if a.hung_up else f"{a.status or 'none'} {a.code}".strip()
            statuses[word] = statuses.get(word, 0) + 1
        first = [1e3 * (a.first - a.due) for a in good if a.kind == "generate"]
        whole = [1e3 * (a.end - a.due) for a in good]
        token = [1e3 * a.per_token for a in good if a.per_token]
        told[name] = {
            "requests": len(members),
            "statuses": statuses,
            "tokens": sum(a.tokens for a in members),
            "first token p50": quantile(first, 0.5),
            "first token p99": quantile(first, 0.99),
            "per token p50": quantile(token, 0.5),
            "per token p99": quantile(token, 0.99),
            "whole p50": quantile(whole, 0.5),
            "whole p99": quantile(whole, 0.99),
        }
    return told


def _lag(result: Result) -> dict[str, float]:
    """How late the client itself was, in ms."""
    return {
        f"{name} {word}": 1e3 * value
        for name, values in (("requests", result.lag.requests), ("loop", result.lag.loop))
        for word, value in (
            ("mean", mean(values)),
            ("p99", quantile(values, 0.99)),
            ("most", quantile(values, 1.0)),
        )
    }


def _jain(answers: Sequence[Answer]) -> float:
    asked: dict[str, float] = {}
    got: dict[str, float] = {}
    for a in answers:
        # who hangs up has had what he wanted
        if a.kind == "generate" and not a.hung_up and a.group not in ("setup", "capacity"):
            asked[a.tenant] = asked.get(a.tenant, 0.0) + a.asked
            got[a.tenant] = got.get(a.tenant, 0.0) + (a.tokens if a.good else 0)
    return fairness(asked, got) if asked else math.nan


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------ HTML


def _page(results: Sequence[Result], scale: float) -> str:
    sections = "\n".join(_section(result) for result in results)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><title>Load test</title>"
        f"<style>{_STYLE}</style></head>\n<body><h1>Load test</h1><p>{escape(conditions(scale))}</p>\n"
        f"{_rows(all_rows(results))}\n{sections}</body></html>\n"
    )


def _rows(rows: Iterable[Row]) -> str:
    lines = [
        [r.what, r.at_least, r.aim, r.reached, "" if r.good else "<span class='no'>falls short</span>"]
        for r in rows
    ]
    head = ["what", "at least", "aim", "reached", ""]
    return _table(head, [[*map(_marked, line[:4]), line[4]] for line in lines])


def _marked(text: str) -> str:
    """Rows are Markdown: what stands between backticks is code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], numbers: bool = False) -> str:
    cell = "<td class='n'>" if numbers else "<td>"
    body = "".join(
        "<tr>"
        + "".join(f"{cell if number else '<td>'}{word}</td>" for number, word in enumerate(line))
        + "</tr>\n"
        for line in lines
    )
    names = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f"<div class='wide'><table><tr>{names}</tr>\n{body}</table></div>"


def _section(result: Result) -> str:
    groups = _groups(result.answers)
    keys = ["requests", "statuses", "tokens", *[key for g in groups.values() for key in g if " p" in key][:6]]
    seen = _table(
        ["", *keys],
        [[escape(name), *(_shown(group[key]) for key in keys)] for name, group in groups.items()],
        numbers=True,
    )
    agreed = _table(
        ["", "client", "server", "differ by", ""],
        [
            [
                escape(a.what),
                _shown(a.client),
                _shown(a.server),
                f"{100 * a.difference:+.1f} %" if math.isfinite(a.difference) else "all",
                "" if a.good else "<span class='no'>disagree</span>",
            ]
            for a in result.agreements
        ],
        numbers=True,
    )
    lag = ", ".join(f"{name} {_shown(value)}" for name, value in _lag(result).items())
    charts = "\n".join(f"<div>{chart}</div>" for chart in plots(result))
    began, _ = span(result)
    phases = ", ".join(f"{phase.name} at {phase.began - began:,.0f}" for phase in result.phases)
    parts = [
        f"<h2>{escape(result.name)}</h2><p><small>{result.seconds:,.0f} s in all</small></p>",
        _rows(result.rows) if result.rows else "",
        f"<h3>What the client saw</h3><p><small>times in ms, from when a request was due</small></p>{seen}",
        f"<p>The client itself was late by, in ms: {escape(lag)}. "
        f"Jain's index of all tenants' fair shares: {_shown(_jain(result.answers))}.</p>",
        f"<h3>Client and server</h3>{agreed}" if result.agreements else "",
        f"<p><small>Dotted lines are where phases begin, in seconds: {escape(phases)}</small></p>"
        if phases
        else "",
        f"<div class='plots'>{charts}</div>",
    ]
    return "\n".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return escape(", ".join(f"{count:,} × {word}" for word, count in value.items()))
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
