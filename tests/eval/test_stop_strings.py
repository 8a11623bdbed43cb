"""Stop strings split into any pieces, and characters split into any tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeforge.data import load_tokenizer
from mergeforge.eval.stop_strings import IncrementalDecoder, StopText


def shown(pieces: list[str], *stops: str) -> tuple[str, str | None]:
    text = StopText(stops)
    parts = [text.feed(piece) for piece in pieces] + [text.finish()]
    assert "".join(parts) == text.text
    return text.text, text.stopped


@pytest.mark.parametrize(
    "pieces", [["a</output>b"], ["a<", "/out", "put>", "b"], list("a</output>b"), ["a</outpu", "t>b"]]
)
def test_stop_string_may_be_split(pieces: list[str]) -> None:
    assert shown(pieces, "</output>") == ("a", "</output>")


def test_text_that_only_starts_like_a_stop_string_is_shown() -> None:
    assert shown(["a</out", "side> b <", "/outpu"], "</output>") == ("a</outside> b </outpu", None)
    text = StopText(["</output>"])
    assert (text.feed("a <"), text.feed("b"), text.feed("</output"), text.finish()) == ("a ", "<b", "", "</output")


def test_first_of_several_stop_strings_wins() -> None:
    assert shown(["one\nUser: two###"], "###", "\nUser:") == ("one", "\nUser:")
    assert shown(["aab"], "ab", "aab") == ("", "aab")


def test_special_tokens_are_hidden_but_may_stop() -> None:
    text = StopText(["</output>"])
    assert (text.feed("a"), text.feed("<|x|>", hidden=True), text.feed("b")) == ("a", "", "b")
    assert (text.feed("</output>", hidden=True), text.stopped, text.text) == ("", "</output>", "ab")


@given(
    st.text("ab<>x", max_size=30), st.lists(st.integers(1, 5), max_size=30), st.sampled_from(["ab", "<ab>", "aab", "x"])
)
def test_any_split_shows_the_same_text(text: str, sizes: list[int], stop: str) -> None:
    pieces, rest = [], text
    for size in sizes:
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    at = text.find(stop)
    assert shown([*pieces, rest], stop) == ((text, None) if at < 0 else (text[:at], stop))


def test_characters_are_never_split(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    expected = "né 😀 你好 the hen"
    tokens = IncrementalDecoder(tokenizer)
    pieces = [tokens.feed(token) for token in tokenizer.encode(expected)] + [tokens.finish()]
    assert "".join(pieces) == expected and not any("\ufffd" in piece for piece in pieces)
    assert "😀" in pieces


def test_invalid_bytes_are_shown_eventually(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    tokens = IncrementalDecoder(tokenizer)
    byte = tokenizer.convert_tokens_to_ids("ð")  # the first byte of a character of four
    pieces = [tokens.feed(byte) for _ in range(20)]
    assert "".join(pieces).count("\ufffd") == 16 and tokens.feed(104) != ""
