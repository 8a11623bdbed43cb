"""report.html: what it shows after a run, and after a run that was killed; its charts' ticks and moving average."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
from support.training_runs import run

from mergeforge.train.charts import Series, bar_chart, line_chart, round_ticks, smooth
from mergeforge.train.html_report import write_report

Settings = dict[str, Any]


def test_the_report_shows_what_was_decided_and_learned(settings: Settings) -> None:
    trained = run(settings, val=8)
    page = trained.folder.report.read_text()
    manifest = json.loads((trained.folder.root / "run.json").read_text())
    assert manifest["parameters"]["trained"] == 4 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 176))
    for text in (
        "Better than the base",
        "perplexity",
        "moving average",
        f"{manifest['parameters']['trained']:,} of",
        "<th>alpha<td>8",
        "<th>seq len<td>",
        "<th>optimizer<td>adamw",
        "<th>expected<th>before<th>after",
        "Settings as decided",
    ):
        assert text in page, text
    assert any(sample["expected"] and sample["expected"] in page for sample in manifest["samples"])


class Killed(Exception):
    """Ends a training without any cleanup of its own."""


def test_a_killed_run_has_a_report(settings: Settings) -> None:
    def kill(line: dict[str, Any]) -> None:
        if line.get("step") == 6 and "loss" in line:
            raise Killed

    with pytest.raises(Killed):
        run(settings, listeners=[kill], val=8, eval={"every": 2, "max_tokens": 4})
    page = Path("run/report.html").read_text()
    assert "<th>state<td>running" in page and "<th>steps<td>4" in page and "validation loss" in page


def test_a_cut_line_of_metrics_is_left_out(settings: Settings) -> None:
    trained = run(settings)
    with open(trained.folder.metrics, "a") as file:
        file.write('{"step": 11, "lo')
    write_report(trained.folder)
    assert len(trained.folder.metric_lines()) == 10


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.13, 0.94, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (3, 3, [3, 4]), (0, 4032, [0, 1000, 2000, 3000, 4000, 5000])],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_the_moving_average_of_a_line_is_the_line() -> None:
    line = [(step, 5.0 - 0.03 * step) for step in range(100)]
    assert [value for _, value in smooth(line)] == pytest.approx([value for _, value in line])
    noisy = [(step, float(step % 2)) for step in range(100)]
    middle = [value for _, value in smooth(noisy)][10:-10]
    assert max(middle) - min(middle) < 0.2


def test_charts_are_valid_xml_with_a_legend() -> None:
    series = [Series("training <1>", [(1, 2.0), (2, 1.5)]), Series("validation", [(2, 1.7)], "b", dots=True)]
    chart = line_chart("Loss", series)
    xml.etree.ElementTree.fromstring(f"<p>{chart}{bar_chart('Rows', [(64, 3), (128, 9)], 'tokens')}</p>")
    assert "training &lt;1&gt;" in chart and "validation" in chart
    assert line_chart("Loss", [Series("", [])]) == "" and bar_chart("Rows", [], "tokens") == ""
