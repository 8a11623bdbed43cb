"""report.html: a run on one self-contained page: curves as SVG, row lengths, samples, settings."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from mergeforge.core.sizes import format_size
from mergeforge.io.disk import write_durably
from mergeforge.train.objectives import SFT
from mergeforge.train.run_folder import RunFolder

WIDTH, HEIGHT, MARGIN = 640, 200, 44  # of a chart in SVG units; the margin is on the left
SMOOTHING = 0.9  # of the moving average that is drawn over the loss
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
CURVES = {
    "margin": "Margin (reward of good answers minus reward of bad ones)",
    "accuracy": "Accuracy (share of answers that the rewards order as the data does)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}


def write_report(folder: RunFolder) -> None:
    """Write the report of the run in the folder."""
    manifest = folder.manifest() or {}
    body = "\n".join(_sections(folder, manifest))
    method = manifest.get("settings", {}).get("method", "qlora")
    title = html.escape(f"{folder.root.name}: {method} of {manifest.get('base')}")
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    write_durably(folder.report, f"{page}<h1>{title}</h1>{body}</html>\n".encode())


def _sections(folder: RunFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    yield _summary(manifest)
    losses = _series(lines, "loss")
    objective = manifest.get("settings", {}).get("objective", SFT)
    unit = "nats per token" if objective == SFT else objective
    yield _chart(f"Loss ({unit})", _smooth(losses), dots=_series(lines, "eval_loss"), faint=losses)
    for name, title in CURVES.items():
        yield _chart(title, _series(lines, name))
    yield _chart("Memory (GB)", [(step, value / 1e9) for step, value in _series(lines, "memory")])
    yield _lengths(manifest.get("counts", {}).get("histogram") or [])
    yield _samples(manifest.get("samples") or [])
    settings = yaml.safe_dump(manifest.get("settings", {}), sort_keys=False, allow_unicode=True)
    yield f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>"


def _summary(manifest: Mapping[str, Any]) -> str:
    counts, losses = manifest.get("counts", {}), manifest.get("followed", {}).get("losses", {})
    rows = {
        "state": manifest.get("state"),
        "steps": manifest.get("step"),
        "training loss, last steps": _number(manifest.get("loss")),
        "validation loss": _number(manifest.get("validation_loss")),
        "margin, last steps": _number(manifest.get("margin")),
        "accuracy, last steps": _number(manifest.get("accuracy")),
        "validation margin": _number(manifest.get("validation_margin")),
        "validation accuracy": _number(manifest.get("validation_accuracy")),
        "best step": manifest.get("best_step"),
        "validation loss by form": ", ".join(f"{name} {_number(loss)}" for name, loss in losses.items()),
        "rows": counts.get("rows"),
        "trained tokens": counts.get("trained"),
        "time": f"{manifest.get('seconds', 0):.0f} s",
        "peak memory": format_size(manifest.get("peak_memory") or 0),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
    }
    cells = (f"<tr><th>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in rows.items() if value)
    return f"<table>{''.join(cells)}</table>"


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _smooth(points: Points) -> list[tuple[float, float]]:
    """Exponential moving average, corrected for its start."""
    smoothed, mean, weight = [], 0.0, 0.0
    for step, value in points:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        smoothed.append((step, mean / weight))
    return smoothed


def _chart(title: str, main: Points, dots: Points = (), faint: Points = ()) -> str:
    """A line over the steps as SVG, with a faint line behind it and dots (validations) on it."""
    points = [*main, *dots, *faint]
    if not points:
        return ""
    left, right = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)

    def position(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + (step - left) / ((right - left) or 1) * (WIDTH - MARGIN - 10)
        return x, HEIGHT - 20 - (value - low) / ((high - low) or 1) * (HEIGHT - 35)

    def line(points: Points, kind: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (position(*point) for point in points))
        return f'<polyline class="{kind}" points="{path}"/>' if points else ""

    circles = "".join(
        f'<circle class="b" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in (position(*point) for point in dots)
    )
    ticks = "".join(
        f'<line class="grid" x1="{MARGIN}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="2" y="{y + 4:.1f}">{value:.3g}</text>'
        for value in (low, (low + high) / 2, high)
        for _, y in (position(left, value),)
    )
    ends = f'<text class="axis" x="{MARGIN}" y="{HEIGHT - 4}">{left:g}</text>'
    ends += f'<text class="axis" x="{WIDTH - 10}" y="{HEIGHT - 4}" text-anchor="end">step {right:g}</text>'
    return _svg(title, ticks + line(faint, "faint") + line(main, "a") + circles + ends)


def _svg(title: str, body: str) -> str:
    return f'<h2>{html.escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>'


def _lengths(histogram: Sequence[Sequence[int]]) -> str:
    """[(upper bound in tokens, rows)] as bars."""
    if not histogram:
        return ""
    most = max(rows for _, rows in histogram) or 1
    width = (WIDTH - MARGIN - 10) / len(histogram)
    bars = "".join(
        _bar(MARGIN + index * width, width, rows / most, f"up to {bound}: {rows}")
        for index, (bound, rows) in enumerate(histogram)
    )
    ends = f'<text class="axis" x="{MARGIN}" y="{HEIGHT - 4}">0</text>'
    ends += f'<text class="axis" x="{WIDTH - 10}" y="{HEIGHT - 4}" text-anchor="end">{histogram[-1][0]} tokens</text>'
    return _svg("Lengths of the rows", bars + ends)


def _bar(x: float, width: float, fraction: float, title: str) -> str:
    height = fraction * (HEIGHT - 35)
    box = f'x="{x:.1f}" y="{HEIGHT - 20 - height:.1f}" width="{width * 0.9:.1f}" height="{height:.1f}"'
    return f'<rect class="bar" {box}><title>{title}</title></rect>'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    columns = ("prompt", "before", "after")
    rows = "".join("<tr>" + "".join(_cell(sample.get(name)) for name in columns) for sample in samples)
    return f"<h2>Samples</h2><table><tr><th>prompt<th>before<th>after{rows}</table>"


def _cell(text: object) -> str:
    return f"<td><pre>{html.escape(str(text or ''))}</pre>"
