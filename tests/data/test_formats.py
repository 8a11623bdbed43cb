"""Formats: columns of every shape become the same conversation; what is unclear is refused with the way out."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeforge.data.conversation import BadRow, Conversation, EmptyRow, Passage
from mergeforge.data.format_detection import detect
from mergeforge.data.settings import DataSource
from mergeforge.errors import MergeforgeError, RecipeError, SourceError

ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def read(*rows: Any, format: str = "auto", system: str | None = None, **columns: str) -> Any:
    return detect(rows, DataSource("x", format, columns), "x.jsonl").read(rows[-1], system)


def messages(*rows: Any, **columns: str) -> list[Any]:
    found = read(*rows, **columns)
    assert isinstance(found, Conversation)
    return list(found.messages)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED], "id": 3},
        {"Messages ": [ASKED, ANSWERED]},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"messages": [{**ASKED, "name": None, "tool_calls": None}, ANSWERED]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWERED]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "source": "web"},
        {"conversation": [{"role": "User", "value": "Q"}, {"role": "model", "content": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"Instruction": "Q", "Response": "A"},
        {"instruction": "Q", "input": None, "output": "A", "text": "Below is an instruction ..."},
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q", "response": "A", "input": float("nan")},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"question": "Q", "answer": "A", "category": "x"},
        {"input": "Q", "target": "A"},
    ],
)
def test_columns_of_every_shape_are_one_conversation(row: Any) -> None:
    assert [{key: one[key] for key in ("role", "content")} for one in messages(row)] == [ASKED, ANSWERED]


def test_input_and_context_follow_the_prompt() -> None:
    joined = [{"role": "user", "content": "Q\n\nmore"}, ANSWERED]
    assert messages({"instruction": "Q", "input": "more", "output": "A"}) == joined
    assert messages({"question": "Q", "context": "more", "answer": "A"}) == joined


def test_system_history_and_tools() -> None:
    row = {"system": "S", "instruction": "Q", "output": "A", "history": [["Q", "A"]]}
    assert messages(row) == [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED]
    assert messages({"system": "S", "messages": [ASKED, ANSWERED]}) == [SYSTEM, ASKED, ANSWERED]
    assert read({"messages": [ASKED, ANSWERED], "tools": '[{"name": "f"}]'}).tools == ({"name": "f"},)


def test_a_default_system_message_is_for_rows_without_one() -> None:
    assert read({"messages": [ASKED, ANSWERED]}, system="S").messages == (SYSTEM, ASKED, ANSWERED)
    own = {"role": "system", "content": "own"}
    assert read({"messages": [own, ASKED, ANSWERED]}, system="S").messages == (own, ASKED, ANSWERED)
    assert read({"messages": [{"role": "system", "content": ""}, ASKED, ANSWERED]}).messages == (ASKED, ANSWERED)


def test_answers_in_a_prompt_of_messages_are_not_trained_on() -> None:
    found = read({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    assert found.trained == (False, False, False, None)


def test_text() -> None:
    for row in ({"text": "T"}, {"content": "T", "url": "u"}, {"document": "T"}):
        assert read(row) == Passage("T")
    assert read({"body": "T", "title": "x"}, text="body") == Passage("T")


def test_numbers_are_text_as_they_are_written() -> None:
    assert messages({"prompt": 7, "response": 4.5})[1]["content"] == "4.5"


def test_columns_override_what_would_be_detected() -> None:
    row = {"output": "x", "answer": "A", "question": "Q", "prompt": "y"}
    assert messages(row, prompt="question", response="answer") == [ASKED, ANSWERED]
    assert messages({"q": "Q", "a": "A"}, instruction="q", output="a") == [ASKED, ANSWERED]
    said = {"who": "human", "what": "Q"}, {"who": "gpt", "what": "A"}
    assert messages({"log": list(said)}, messages="log", role="who", content="what") == [ASKED, ANSWERED]
    assert messages({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, messages="chosen") == [ASKED, ANSWERED]


def test_what_is_not_trained_on_is_listed() -> None:
    found = detect([{"prompt": "Q", "response": "A", "id": 1, "source": "x"}], DataSource("x"), "x.jsonl")
    assert (found.name, found.unused) == ("prompt_response", ("id", "source"))


@pytest.mark.parametrize(
    ("row", "said", "hint"),
    [
        ({"output": "x", "answer": "A", "question": "Q"}, "'output' and 'answer' could each be", "{response: output}"),
        ({"prompt": "x", "question": "A", "answer": "Q"}, "'prompt' and 'question' could each be", "{prompt: prompt}"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "is preference data", "{prompt: prompt, response: chosen}"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, "is preference data", "{messages: chosen}"),
        ({"promt": "Q", "answer": "A"}, "it has promt, answer", "{response: answer, prompt: COLUMN}"),
        ({"sentence": "T"}, "it has sentence", "{text: sentence}"),
        ({"a": 1, "b": 2}, "no columns that are known: it has a, b", "{prompt: COLUMN, response: COLUMN}"),
        ({"messages": "no list", "id": 1}, "it has messages, id", "{messages: messages}"),
    ],
)
def test_unclear_columns_are_refused_with_the_way_out(row: Any, said: str, hint: str) -> None:
    with pytest.raises(SourceError, match=said) as error:
        read(row)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("columns", "said", "hint"),
    [
        ({"promt": "q"}, "'promt' is no role of a column", "did you mean 'prompt'?"),
        ({"prompt": "questoin"}, "x.jsonl has no column 'questoin'", "did you mean 'question'?"),
        ({"prompt": "question", "instruction": "answer"}, "name the same thing", ""),
    ],
)
def test_a_wrong_mapping_is_refused(columns: dict[str, str], said: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=said) as error:
        detect([{"question": "Q", "answer": "A"}], DataSource("x", "auto", columns), "x.jsonl")
    assert hint in error.value.hint


def test_a_format_that_is_asked_for() -> None:
    row = {"messages": [ASKED], "text": "T", "instruction": "Q", "output": "A"}
    assert read(row, format="text") == Passage("T")
    assert read(row, format="alpaca").messages == (ASKED, ANSWERED)
    with pytest.raises(SourceError, match="known for the format sharegpt: it has text"):
        read({"text": "T"}, format="sharegpt")
    with pytest.raises(RecipeError, match="there is no data format 'alpacca'"):
        read(row, format="alpacca")


@pytest.mark.parametrize(
    ("row", "kind", "why"),
    [
        ({"prompt": "Q", "response": ""}, EmptyRow, "an empty answer"),
        ({"prompt": "Q", "response": None}, EmptyRow, "an empty answer"),
        ({"prompt": "Q", "response": float("nan")}, EmptyRow, "an empty answer"),
        ({"prompt": " \n", "response": "A"}, EmptyRow, "an empty question"),
        ({"messages": []}, EmptyRow, "no messages"),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, EmptyRow, "an empty answer"),
        ({"text": "  "}, EmptyRow, "no text"),
        ({"prompt": "Q", "reply": "A"}, BadRow, r"no column 'response' \(it has: prompt, reply\)"),
        ({"prompt": "Q", "response": {"text": ["A"]}}, BadRow, "'response' holds a mapping, not text"),
        ({"prompt": "Q", "response": b"A"}, BadRow, "'response' holds b'A', not text"),
        ({"prompt": "Q", "response": "half \ud83d"}, BadRow, "'response' is not UTF-8 text"),
        ({"prompt": [ASKED], "response": "A" * 3, "history": "x"}, None, ""),
        ({"messages": [{"role": "usr", "content": "Q"}]}, BadRow, r"unknown role 'usr' \(did you mean 'user'\?\)"),
        ({"messages": [{"content": "Q"}]}, BadRow, r"message 1 has no role \(it has: content\)"),
        ({"messages": [ASKED, {"role": "assistant"}]}, BadRow, r"message 2 has no content \(it has: role\)"),
        ({"messages": [ASKED, "A"]}, BadRow, "message 2 is text, not a mapping"),
        ({"messages": "[no"}, BadRow, "'messages' holds text that is not JSON"),
        ({"messages": {"role": "user"}}, BadRow, "'messages' is no list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, BadRow, "a part of the type 'image'"),
        ({"messages": [{**ASKED, "train": True, "weight": 0}, ANSWERED]}, BadRow, "say different things"),
        ({"messages": [ASKED, {**ANSWERED, "train": "yes"}]}, BadRow, "train must be true or false, not 'yes'"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: Any, kind: type[Exception] | None, why: str) -> None:
    good = {"prompt": "Q", "response": "A"}
    good = {"messages": [ASKED, ANSWERED]} if "messages" in row else {"text": "T"} if "text" in row else good
    if kind is None:
        assert isinstance(read(good, row), Conversation)
        return
    with pytest.raises(kind, match=why):
        read(good, row)


def test_a_key_is_of_the_content_alone() -> None:
    one, other = read({"prompt": "Q", "response": "A", "id": 1}), read({"question": "Q", "answer": "A"})
    assert one.key() == other.key() != one.key(seed=1)
    assert one.key() != read({"prompt": "Q", "response": "A."}).key()


PLAIN = st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3)
WORDS = ("role", "from", "content", "value", "train", "weight", "user", "gpt", "tool_calls", "function", "arguments")
CELLS = st.recursive(
    PLAIN | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=2), inner),
    max_leaves=12,
)
COLUMNS = ("messages", "prompt", "response", "input", "system", "history", "tools", "text", "id")


@settings(deadline=None, max_examples=120)
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), CELLS), min_size=1, max_size=3))
def test_no_row_of_json_ends_in_a_traceback(rows: list[Any]) -> None:
    """Every cell may hold anything: it is read, or one of our errors says why not."""
    try:
        found = detect(rows, DataSource("x"), "x.jsonl")
        for row in rows:
            with contextlib.suppress(BadRow, EmptyRow):
                found.read(row, "S").key()
    except MergeforgeError:
        pass
