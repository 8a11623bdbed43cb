"""report.html: a run on one self-contained page: verdict, curves as SVG, row lengths, samples, settings.

It is rewritten while the run goes on, so that a killed run has one too.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from mergeforge.core.sizes import format_size
from mergeforge.io.disk import write_durably
from mergeforge.train.charts import STYLE as CHART_STYLE
from mergeforge.train.charts import Series, bar_chart, line_chart, smooth
from mergeforge.train.objectives import SFT
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.verdict import read_verdict

if TYPE_CHECKING:
    from mergeforge.train.loop.context import MetricCallback

INTERVAL = 60  # seconds between two reports of a running training, besides those at validations
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1,h2{font-weight:600}h2{margin-top:2rem;font-size:1.1rem}table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}pre{white-space:pre-wrap;background:#f5f5f5;
padding:.6rem;border-radius:4px}
@media(prefers-color-scheme:dark){body{background:#16181c;color:#ddd}pre{background:#23262c}}
"""
CURVES = {
    "margin": "Margin (reward of good answers minus reward of bad ones)",
    "accuracy": "Accuracy (share of answers that the rewards order as the data does)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
SAMPLE_COLUMNS = ("prompt", "expected", "before", "after")


def write_report(folder: RunFolder) -> None:
    """Write the report of the run in the folder."""
    manifest = folder.manifest() or {}
    body = "\n".join(_sections(folder.metric_lines(), manifest))
    method = manifest.get("settings", {}).get("method", "qlora")
    title = html.escape(f"{folder.root.name}: {method} of {manifest.get('base')}")
    style = STYLE + CHART_STYLE
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style>"
    write_durably(folder.report, f"{page}<h1>{title}</h1>{body}</html>\n".encode())


def report_writer(folder: RunFolder) -> MetricCallback:
    """A listener that writes the report at each validation, and once a minute between them."""
    written = time.monotonic()

    def listen(line: Mapping[str, Any]) -> None:
        nonlocal written
        if "eval_loss" in line or time.monotonic() - written > INTERVAL:
            write_report(folder)
            written = time.monotonic()

    return listen


def _sections(lines: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> Iterator[str]:
    yield _verdict(manifest)
    yield _table(_summary(lines, manifest))
    losses = _series(lines, "loss")
    loss_series = [
        Series("training, each step", losses, "faint"),
        Series("training, moving average", smooth(losses)),
        Series("validation", _series(lines, "eval_loss"), "b", dots=True),
    ]
    objective = manifest.get("settings", {}).get("objective", SFT)
    unit = "nats per token" if objective == SFT else objective
    yield line_chart(f"Loss ({unit})", loss_series)
    for name, title in CURVES.items():
        yield line_chart(title, [Series("", _series(lines, name))])
    yield line_chart("Memory (GB)", [Series("", [(step, value / 1e9) for step, value in _series(lines, "memory")])])
    yield bar_chart("Lengths of the rows", manifest.get("counts", {}).get("histogram") or [], "tokens, at most")
    yield _samples(manifest.get("samples") or [])
    yield f"<h2>Settings as decided</h2>{_table(_decided(manifest))}"
    settings = yaml.safe_dump(manifest.get("settings", {}), sort_keys=False, allow_unicode=True)
    yield f"<h2>Settings as written</h2><pre>{html.escape(settings)}</pre>"


def _verdict(manifest: Mapping[str, Any]) -> str:
    verdict = read_verdict(manifest.get("verdict"))
    lines = verdict.lines() if verdict else []
    return "".join(f"<p>{html.escape(line[:1].upper() + line[1:])}.</p>" for line in lines)


def _summary(lines: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The table on top. A run that goes on or was killed has its numbers in the metrics only."""
    counts, by_form = manifest.get("counts", {}), manifest.get("followed", {}).get("losses", {})
    objective = manifest.get("settings", {}).get("objective", SFT)
    training, validation = _series(lines, "loss"), _series(lines, "eval_loss")
    loss = manifest.get("loss", training[-1][1] if training else None)
    validation_loss = manifest.get("validation_loss", validation[-1][1] if validation else None)
    return {
        "state": manifest.get("state"),
        "steps": manifest.get("step", training[-1][0] if training else None),
        "trained parameters": _parameters(manifest.get("parameters")),
        "training loss, last steps": _loss(loss, objective),
        "validation loss": _loss(validation_loss, objective),
        "margin, last steps": _number(manifest.get("margin")),
        "accuracy, last steps": _number(manifest.get("accuracy")),
        "validation margin": _number(manifest.get("validation_margin")),
        "validation accuracy": _number(manifest.get("validation_accuracy")),
        "best step": manifest.get("best_step"),
        "validation loss by form": ", ".join(f"{name} {_number(value)}" for name, value in by_form.items()),
        "rows": counts.get("rows"),
        "trained tokens": counts.get("trained"),
        "time": f"{manifest['seconds']:.0f} s" if "seconds" in manifest else "",
        "peak memory": format_size(manifest["peak_memory"]) if manifest.get("peak_memory") else "",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
    }


def _parameters(counts: Mapping[str, int] | None) -> str:
    if not counts:
        return ""
    return f"{counts['trained']:,} of {counts['all']:,} ({counts['trained'] / counts['all']:.2%})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _loss(loss: float | None, objective: str) -> str:
    """A loss, with its perplexity where it is one of tokens."""
    perplexity = "" if loss is None or objective != SFT else f" (perplexity {math.exp(min(loss, 700)):.4g})"
    return _number(loss) + perplexity


def _decided(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the run trains with, where the file leaves them to mergeforge too."""
    choices = manifest.get("choices") or {}
    setup = choices.get("setup") or {}
    lora = dict(setup.get("lora") or {}) if setup.get("method") != "full" else {}
    if lora:
        lora["alpha"] = 2 * lora["r"] if lora.get("alpha") is None else lora["alpha"]
        lora["targets"] = lora.get("targets") or "all-linear"
    own = {"r": "rank", "dora": "DoRA", "rslora": "rsLoRA"}
    facts = {own.get(name, name.replace("_", " ")): value for name, value in lora.items()}
    names = ("method", "seq_len", "micro_batch", "optimizer", "ce_chunk", "checkpointing", "offload", "embed_on_cpu")
    facts |= {name.replace("_", " "): setup.get(name) for name in names}
    facts |= {name: choices.get(name) for name in ("lr", "epochs", "pack", "dtype", "device")}
    return facts | (manifest.get("schedule") or {}) | {"chat template": manifest.get("template")}


def _table(rows: Mapping[str, Any]) -> str:
    shown = {name: value for name, value in rows.items() if value not in (None, "", [], {}, ())}
    cells = (f"<tr><th>{html.escape(name)}<td>{html.escape(_value(value))}" for name, value in shown.items())
    return f"<table>{''.join(cells)}</table>"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    columns = [name for name in SAMPLE_COLUMNS if any(sample.get(name) is not None for sample in samples)]
    if not columns:
        return ""
    rows = "".join("<tr>" + "".join(_cell(sample.get(name)) for name in columns) for sample in samples)
    return f"<h2>Samples</h2><table><tr>{''.join(f'<th>{name}' for name in columns)}{rows}</table>"


def _cell(text: object) -> str:
    return f"<td><pre>{html.escape(str(text or ''))}</pre>"
