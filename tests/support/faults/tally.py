"""The table of a fault run: case, kind, how often it was tried, how often nothing was lost."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

KEY = "fault runs"
HERE = PurePosixPath("tests/faults")


class Tally:
    """Runs that were begun, and those after which all was as it must be."""

    def __init__(self) -> None:
        self.counts = [0, 0]

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run: survived when the block ends without an error."""
        self.counts[0] += 1
        yield
        self.counts[1] += 1


@dataclass
class Row:
    """A case of the table: all parameters of one test together."""

    case: str
    kind: str
    runs: int = 0
    survived: int = 0
    failed: int = 0
    skipped: str = ""

    @property
    def lost(self) -> int:
        return max(self.runs - self.survived, self.failed)


def kind_of(report: pytest.TestReport) -> str:
    """What a test breaks, by its file's name: `kill` of test_kill_hub.py; empty for tests elsewhere."""
    path = PurePosixPath(report.nodeid.partition("::")[0])
    return path.stem.split("_")[1] if path.parent == HERE else ""


def table(reports: Sequence[pytest.TestReport]) -> str:
    """The rows of all cases, sorted by kind; a total of each kind and of all."""
    rows: dict[tuple[str, str], Row] = {}
    for one in reports:
        case = _case(one)
        _add(rows.setdefault((kind_of(one), case), Row(case, kind_of(one))), one)
    found = sorted(rows.values(), key=lambda row: row.kind)
    kinds = sorted({row.kind for row in found})
    totals = [_sum([row for row in found if row.kind == kind], f"all of {kind}", kind) for kind in kinds]
    width = max(len(row.case) for row in found) if found else 4
    lines = [f"{'case':{width}}  {'kind':10} {'runs':>6} {'survived':>8} {'lost':>5}"]
    lines += [_line(row, width) for row in [*found, *totals, _sum(found, "total", "")]]
    return "\n".join(lines)


def _case(report: pytest.TestReport) -> str:
    name = report.nodeid.rpartition("::")[2].partition("[")[0]
    return re.sub("^test_", "", name).replace("_", " ")


def _add(row: Row, report: pytest.TestReport) -> None:
    """Count a report. A test that counts for itself tells it at its end; any other is one run."""
    counted = dict(report.user_properties).get(KEY)
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        row.skipped = reason.removeprefix("Skipped: ")
    elif report.when == "teardown" and counted is not None:
        row.runs += counted[0]
        row.survived += counted[1]
    elif report.failed:
        row.failed += 1
        row.runs += counted is None
    elif report.when == "call" and counted is None:
        row.runs += 1
        row.survived += 1


def _sum(rows: Sequence[Row], case: str, kind: str) -> Row:
    return Row(case, kind, *(sum(getattr(row, name) for row in rows) for name in ("runs", "survived", "failed")))


def _line(row: Row, width: int) -> str:
    numbers = f"{row.runs:>6} {row.survived:>8} {row.lost:>5}"
    return f"{row.case:{width}}  {row.kind:10} {numbers if row.runs or not row.skipped else f'skipped ({row.skipped})'}"
