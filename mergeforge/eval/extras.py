"""Optional packages: imported when they are needed, or the pip line; transformers kept from talking."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mergeforge.errors import MissingExtraError


def extra(name: str, bundle: str) -> Any:
    """The module `name`. Raises MissingExtraError that names the bundle that it comes with."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        text = f"this needs {name.partition('.')[0]}: {error}"
        raise MissingExtraError(text, hint=f"pip install 'mergeforge[{bundle}]'") from None


@contextmanager
def quiet() -> Iterator[None]:
    """No remarks of transformers about what is done on purpose."""
    said = extra("transformers", "train").utils.logging
    before = said.get_verbosity()
    said.set_verbosity_error()
    try:
        yield
    finally:
        said.set_verbosity(before)
