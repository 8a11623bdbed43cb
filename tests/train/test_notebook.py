"""recipes/quickstart.ipynb runs from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "recipes" / "quickstart.ipynb"


@pytest.mark.slow
def test_every_cell_runs(here: Path) -> None:
    namespace: dict[str, Any] = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert namespace["evaluation"].nll < 6 and namespace["result"].ggufs
