"""OnMessage: called with one line of text about the progress of a long operation."""

from collections.abc import Callable

OnMessage = Callable[[str], None]
