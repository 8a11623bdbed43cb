"""report.html: a run on one page that needs nothing from elsewhere: curves as SVG, lengths, samples, settings."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from mergeforge.core.sizes import format_size
from mergeforge.io.disk import write_durably
from mergeforge.train.run_folder import RunFolder

WIDTH, HEIGHT, EDGE = 640, 200, 44
SMOOTH = 0.9  # of the moving average that is drawn over the loss
Points = Sequence[tuple[float, float]]
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1,h2{font-weight:600}h2{margin-top:2rem;font-size:1.1rem}table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}pre{white-space:pre-wrap;background:#f5f5f5;
padding:.6rem;border-radius:4px}svg{width:100%;height:auto}.grid{stroke:#ddd}.axis{fill:#666;font-size:11px}
.a{stroke:#2563eb;fill:none;stroke-width:1.6}.faint{stroke:#93b4f5;fill:none}.b{stroke:#dc2626;fill:none;stroke-width:1.6}
.bar{fill:#2563eb}
@media(prefers-color-scheme:dark){body{background:#16181c;color:#ddd}pre{background:#23262c}.grid{stroke:#333}}
"""


def write_report(folder: RunFolder) -> None:
    """Write the report of what lies in the folder."""
    facts = folder.manifest() or {}
    body = "\n".join(_memory_parts(folder, facts))
    title = html.escape(
        f"{folder.root.name}: {facts.get('settings', {}).get('method', 'qlora')} of {facts.get('base')}"
    )
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    write_durably(folder.report, f"{page}<h1>{title}</h1>{body}</html>\n".encode())


def _memory_parts(folder: RunFolder, facts: Mapping[str, Any]) -> Iterator[str]:
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    yield _facts(facts)
    yield _curve(
        "Loss (nats a token)", _smooth(_series(lines, "loss")), _series(lines, "eval_loss"), _series(lines, "loss")
    )
    for name, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_second", "Tokens a second"),
    ):
        yield _curve(title, _series(lines, name))
    yield _curve("Memory (GB)", [(step, value / 1e9) for step, value in _series(lines, "memory")])
    yield _lengths(facts.get("counts", {}).get("histogram") or [])
    yield _samples(facts.get("samples") or [])
    settings = yaml.safe_dump(facts.get("settings", {}), sort_keys=False, allow_unicode=True)
    yield f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>"


def _facts(facts: Mapping[str, Any]) -> str:
    counts, losses = facts.get("counts", {}), facts.get("followed", {}).get("losses", {})
    rows = {
        "state": facts.get("state"),
        "steps": facts.get("step"),
        "training loss, last steps": _number(facts.get("loss")),
        "validation loss": _number(facts.get("validation_loss")),
        "best step": facts.get("best_step"),
        "validation loss by form": ", ".join(f"{name} {_number(loss)}" for name, loss in losses.items()),
        "rows": counts.get("rows"),
        "trained tokens": counts.get("trained"),
        "time": f"{facts.get('seconds', 0):.0f} s",
        "peak memory": format_size(facts.get("peak_memory") or 0),
        "versions": ", ".join(f"{name} {one}" for name, one in facts.get("versions", {}).items()),
    }
    cells = (f"<tr><th>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in rows.items() if value)
    return f"<table>{''.join(cells)}</table>"


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _smooth(points: Points) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start."""
    found, mean, weight = [], 0.0, 0.0
    for step, value in points:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + 1 - SMOOTH
        found.append((step, mean / weight))
    return found


def _curve(title: str, main: Points, other: Points = (), faint: Points = ()) -> str:
    """One line, or a line with validation dots beside it, as SVG."""
    everything = [*main, *other, *faint]
    if not everything:
        return ""
    left, right = min(step for step, _ in everything), max(step for step, _ in everything)
    low, high = min(value for _, value in everything), max(value for _, value in everything)

    def place(step: float, value: float) -> tuple[float, float]:
        x = EDGE + (step - left) / ((right - left) or 1) * (WIDTH - EDGE - 10)
        return x, HEIGHT - 20 - (value - low) / ((high - low) or 1) * (HEIGHT - 35)

    def line(points: Points, kind: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        return f'<polyline class="{kind}" points="{path}"/>' if points else ""

    dots = "".join(f'<circle class="b" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in (place(*one) for one in other))
    ticks = "".join(
        f'<line class="grid" x1="{EDGE}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="2" y="{y + 4:.1f}">{value:.3g}</text>'
        for value in (low, (low + high) / 2, high)
        for _, y in (place(left, value),)
    )
    ends = f'<text class="axis" x="{EDGE}" y="{HEIGHT - 4}">{left:g}</text>'
    ends += f'<text class="axis" x="{WIDTH - 10}" y="{HEIGHT - 4}" text-anchor="end">step {right:g}</text>'
    drawn = ticks + line(faint, "faint") + line(main, "a") + line(other, "b") + dots + ends
    return f'<h2>{html.escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{drawn}</svg>'


def _lengths(histogram: Sequence[Sequence[int]]) -> str:
    """[(tokens up to and with, rows)] as bars."""
    if not histogram:
        return ""
    most = max(rows for _, rows in histogram) or 1
    wide = (WIDTH - EDGE - 10) / len(histogram)
    bars = "".join(
        _bar(EDGE + at * wide, wide, rows / most, f"up to {upto}: {rows}") for at, (upto, rows) in enumerate(histogram)
    )
    ends = f'<text class="axis" x="{EDGE}" y="{HEIGHT - 4}">0</text>'
    ends += f'<text class="axis" x="{WIDTH - 10}" y="{HEIGHT - 4}" text-anchor="end">{histogram[-1][0]} tokens</text>'
    return f'<h2>Lengths of the rows</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{bars}{ends}</svg>'


def _bar(x: float, wide: float, share: float, title: str) -> str:
    high = share * (HEIGHT - 35)
    place = f'x="{x:.1f}" y="{HEIGHT - 20 - high:.1f}" width="{wide * 0.9:.1f}" height="{high:.1f}"'
    return f'<rect class="bar" {place}><title>{title}</title></rect>'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    rows = "".join("<tr>" + "".join(_cell(one.get(name)) for name in ("prompt", "before", "after")) for one in samples)
    return f"<h2>Samples</h2><table><tr><th>prompt<th>before<th>after{rows}</table>"


def _cell(text: object) -> str:
    return f"<td><pre>{html.escape(str(text or ''))}</pre>"
