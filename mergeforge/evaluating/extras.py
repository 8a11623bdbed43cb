"""Optional packages: imported when they are needed, or the pip line."""

from __future__ import annotations

import importlib
from typing import Any

from mergeforge.errors import MissingExtraError


def extra(name: str, bundle: str) -> Any:
    """The module `name`. Raises MissingExtraError that names the bundle that it comes with."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = f"this needs {name.partition('.')[0]}: {error}"
        raise MissingExtraError(text, hint=f"pip install 'mergeforge[{bundle}]'") from None
