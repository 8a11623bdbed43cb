"""Where the tests find the project, its recipes and the environment of the programs that it is compared with."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "mergeforge"
RECIPES = ROOT / "recipes"
PEERS = Path(os.environ.get("MERGEFORGE_PEERS") or ROOT / ".venv-peers")  # mergekit's own environment (tools/peers)
