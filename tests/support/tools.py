"""The scripts in tools/, as modules."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from typing import Any

from support.paths import ROOT


def load_tool(name: str) -> Any:
    loader = importlib.machinery.SourceFileLoader(name, str(ROOT / "tools" / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
