"""The pip commands in hints name the same minimum versions as pyproject.toml."""

from __future__ import annotations

from support.paths import ROOT

from mergeforge.eval.backend import REQUIREMENTS


def test_minimum_versions_equal_those_in_pyproject() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert [requirement for requirement in REQUIREMENTS.values() if f'"{requirement}' not in project] == []
