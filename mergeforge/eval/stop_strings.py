"""Text that arrives in pieces: whole characters only, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder writes for an incomplete character
MAX_PENDING_TOKENS = 8  # a character has at most four bytes, so what is still broken after these stays broken


class StopText:
    """The text of an answer as it grows, cut before the first stop string.

    `feed` takes a piece and returns what may be shown. What could still become a stop string is held back until the
    next piece, so a stop string may be split over any number of pieces. Hidden pieces (special tokens) are never shown,
    but a stop string may contain them.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.stopped: str | None = None  # the stop string that was reached
        self._raw = ""
        self._hidden: list[tuple[int, int]] = []
        self._shown = 0

    @property
    def text(self) -> str:
        """Everything that was shown."""
        return self._visible(0, self._shown)

    def feed(self, piece: str, *, hidden: bool = False) -> str:
        """Add a piece; returns what may now be shown."""
        if self.stopped is not None or not piece:
            return ""
        before = len(self._raw)
        self._raw += piece
        if hidden:
            self._hidden.append((before, len(self._raw)))
        matches = [(start, stop) for stop in self.stops if (start := self._raw.find(stop, self._shown)) >= 0]
        if matches:
            start, self.stopped = min(matches)
            return self._show(start)
        return self._show(len(self._raw) - self._pending())

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
        return "" if self.stopped is not None else self._show(len(self._raw))

    def _pending(self) -> int:
        """The length of the longest end of the text that is the start of a stop string."""
        sizes = (size for stop in self.stops for size in range(1, len(stop)) if self._raw.endswith(stop[:size]))
        return max(sizes, default=0)

    def _show(self, stop: int) -> str:
        start, self._shown = self._shown, max(self._shown, stop)
        return self._visible(start, self._shown)

    def _visible(self, start: int, stop: int) -> str:
        hidden = [(max(a, start), min(b, stop)) for a, b in self._hidden if a < stop and b > start]
        edges = [start, *(edge for span in hidden for edge in span), stop]
        return "".join(self._raw[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))


class IncrementalDecoder:
    """The text of tokens that arrive one by one; part of a character waits for the rest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # decoding starts a token or two before the new ones, since spaces depend on them
        self._done = 0  # tokens whose text was returned

    def feed(self, token: int) -> str:
        """Add a token; returns the new, complete text."""
        self._tokens.append(token)
        old, new = self._decode(self._done), self._decode(len(self._tokens))
        if new.endswith(BROKEN) and len(self._tokens) - self._done < MAX_PENDING_TOKENS:
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return new[len(old) :]

    def finish(self) -> str:
        """The rest of the text, complete or not."""
        old, new = self._decode(self._done), self._decode(len(self._tokens))
        self._start = self._done = len(self._tokens)
        return new[len(old) :]

    def _decode(self, stop: int) -> str:
        return decode(self._tokenizer, self._tokens[self._start : stop], special=False)


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, special: bool) -> str:
    """The text of tokens, with or without the names of special ones."""
    text = tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
