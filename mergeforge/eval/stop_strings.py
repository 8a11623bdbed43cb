"""Text that comes in pieces: whole characters only, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what a decoder writes for a character that is not complete
PATIENCE = 8  # tokens; a character has four bytes at most, so what is still broken after these stays so


class StopText:
    """An answer's text as it grows, cut before the first of the stop strings.

    `feed` takes a piece and returns what may be shown: what could still become a stop string is held back until the
    next piece, so that a stop string may be split over any number of pieces. Hidden pieces (special tokens) are never
    shown, but a stop string may lie in them.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self.stopped: str | None = None  # the stop string that was met
        self._raw = ""
        self._hidden: list[tuple[int, int]] = []
        self._shown = 0

    @property
    def text(self) -> str:
        """Everything that has been shown."""
        return self._visible(0, self._shown)

    def feed(self, piece: str, *, hidden: bool = False) -> str:
        """What may be shown now that `piece` has come."""
        if self.stopped is not None or not piece:
            return ""
        before = len(self._raw)
        self._raw += piece
        if hidden:
            self._hidden.append((before, len(self._raw)))
        found = [(at, stop) for stop in self.stops if (at := self._raw.find(stop, self._shown)) >= 0]
        if found:
            at, self.stopped = min(found)
            return self._show(at)
        return self._show(len(self._raw) - self._held())

    def finish(self) -> str:
        """What was held back, when no more comes."""
        return "" if self.stopped is not None else self._show(len(self._raw))

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        ends = (size for stop in self.stops for size in range(1, len(stop)) if self._raw.endswith(stop[:size]))
        return max(ends, default=0)

    def _show(self, until: int) -> str:
        start, self._shown = self._shown, max(self._shown, until)
        return self._visible(start, self._shown)

    def _visible(self, start: int, stop: int) -> str:
        inside = [(max(a, start), min(b, stop)) for a, b in self._hidden if a < stop and b > start]
        edges = [start, *(edge for span in inside for edge in span), stop]
        return "".join(self._raw[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))


class TokenText:
    """The text of tokens that come one by one; half a character waits for its other half."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._from = 0  # decoding starts here: a token or two before what is new, since spaces depend on them
        self._done = 0  # tokens whose text was returned

    def feed(self, token: int) -> str:
        """The text that is new and complete."""
        self._tokens.append(token)
        known, now = self._decode(self._done), self._decode(len(self._tokens))
        if now.endswith(BROKEN) and len(self._tokens) - self._done < PATIENCE:
            return ""
        self._from, self._done = self._done, len(self._tokens)
        return now[len(known) :]

    def finish(self) -> str:
        """What is left, complete or not."""
        known, now = self._decode(self._done), self._decode(len(self._tokens))
        self._from = self._done = len(self._tokens)
        return now[len(known) :]

    def _decode(self, stop: int) -> str:
        return decoded(self._tokenizer, self._tokens[self._from : stop], special=False)


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, special: bool) -> str:
    """The text of tokens, with the special ones' names or without them."""
    found = tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(found, str)
    return found
