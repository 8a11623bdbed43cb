"""report.html of a sweep: the trials as a ranked table, and the loss over trials and over each value."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mergeforge.io.disk import write_durably
from mergeforge.train.charts import STYLE as CHART_STYLE
from mergeforge.train.charts import Series, line_chart
from mergeforge.train.html_report import STYLE
from mergeforge.train.sweep_settings import SearchRange, SweepSettings

KINDS = {"complete": "a", "pruned": "b"}  # state of a trial -> CSS class of its dot


class RankedTrial(Protocol):
    """What the report shows of a trial."""

    @property
    def number(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def values(self) -> Mapping[str, Any]: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def why(self) -> str: ...


def write_sweep_report(path: Path, sweep: SweepSettings, trials: Sequence[RankedTrial]) -> None:
    """Write the page. `trials`: the best one first."""
    title = html.escape(f"{sweep.output.name}: {len(trials)} of {sweep.trials} trials")
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}{CHART_STYLE}</style>"
    body = "\n".join(_sections(sweep, trials))
    write_durably(path, f"{page}<h1>{title}</h1>{body}</html>\n".encode())


def _sections(sweep: SweepSettings, trials: Sequence[RankedTrial]) -> Iterator[str]:
    yield _table([search_range.key for search_range in sweep.ranges], trials)
    yield _chart("Validation loss by trial", trials, lambda trial: trial.number, "trial")
    for search_range in sweep.ranges:
        if not search_range.choices:
            name = f"log10({search_range.key})" if search_range.log else search_range.key
            yield _chart(f"Validation loss by {search_range.key}", trials, _value_of(search_range), name)


def _value_of(search_range: SearchRange) -> Any:
    def value(trial: RankedTrial) -> float:
        number = float(trial.values[search_range.key])
        return math.log10(number) if search_range.log else number

    return value


def _chart(title: str, trials: Sequence[RankedTrial], place: Any, x_name: str) -> str:
    series = [Series(state, _points(trials, place, state), kind, dots=True) for state, kind in KINDS.items()]
    return line_chart(title, series, x_name)


def _points(trials: Sequence[RankedTrial], place: Any, state: str) -> list[tuple[float, float]]:
    losses = [(place(trial), trial.loss) for trial in trials if trial.state == state]
    return sorted((x, loss) for x, loss in losses if loss is not None and math.isfinite(loss))


def _table(keys: Sequence[str], trials: Sequence[RankedTrial]) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in ("rank", "trial", "validation loss", *keys, "state"))
    rows = []
    for rank, trial in enumerate(trials, start=1):
        loss = "" if trial.loss is None else f"{trial.loss:.4f}"
        values = [format_value(trial.values.get(key)) for key in keys]
        state = f"{trial.state}: {trial.why}" if trial.why else trial.state
        cells = (str(rank), f"{trial.number}", loss, *values, state)
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells))
    return f"<table><tr>{head}{''.join(rows)}</table>"


def format_value(value: Any) -> str:
    """A value of a key in short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
