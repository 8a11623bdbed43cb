"""Formats: columns of every common shape give the same conversation; ambiguous ones are refused with a hint."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeforge.data.conversation import Conversation, EmptyRecord, InvalidRecord, TextSample
from mergeforge.data.format_detection import detect
from mergeforge.data.settings import DataSource
from mergeforge.errors import MergeforgeError, RecipeError, SourceError

ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
SYSTEM = {"role": "system", "content": "S"}


def read(*rows: Any, format: str = "auto", system: str | None = None, **columns: str) -> Any:
    return detect(rows, DataSource("x", format, columns), "x.jsonl").read(rows[-1], system)


def messages(*rows: Any, **columns: str) -> list[Any]:
    conversation = read(*rows, **columns)
    assert isinstance(conversation, Conversation)
    return list(conversation.messages)


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
def test_columns_of_every_shape_give_the_same_conversation(row: Any) -> None:
    assert [{key: message[key] for key in ("role", "content")} for message in messages(row)] == [ASKED, ANSWERED]


def test_input_and_context_follow_the_prompt() -> None:
    joined = [{"role": "user", "content": "Q\n\nmore"}, ANSWERED]
    assert messages({"instruction": "Q", "input": "more", "output": "A"}) == joined
    assert messages({"question": "Q", "context": "more", "answer": "A"}) == joined


def test_system_history_and_tools() -> None:
    row = {"system": "S", "instruction": "Q", "output": "A", "history": [["Q", "A"]]}
    assert messages(row) == [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED]
    assert messages({"system": "S", "messages": [ASKED, ANSWERED]}) == [SYSTEM, ASKED, ANSWERED]
    assert read({"messages": [ASKED, ANSWERED], "tools": '[{"name": "f"}]'}).tools == ({"name": "f"},)


def test_default_system_message_applies_to_rows_without_one() -> None:
    assert read({"messages": [ASKED, ANSWERED]}, system="S").messages == (SYSTEM, ASKED, ANSWERED)
    own = {"role": "system", "content": "own"}
    assert read({"messages": [own, ASKED, ANSWERED]}, system="S").messages == (own, ASKED, ANSWERED)
    assert read({"messages": [{"role": "system", "content": ""}, ASKED, ANSWERED]}).messages == (ASKED, ANSWERED)


def test_answers_in_a_prompt_of_messages_are_not_trained_on() -> None:
    conversation = read({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    assert conversation.train_flags == (False, False, False, None)


def test_text_columns() -> None:
    for row in ({"text": "T"}, {"content": "T", "url": "u"}, {"document": "T"}):
        assert read(row) == TextSample("T")
    assert read({"body": "T", "title": "x"}, text="body") == TextSample("T")


def test_numbers_become_text_as_written() -> None:
    assert messages({"prompt": 7, "response": 4.5})[1]["content"] == "4.5"


def test_columns_override_detection() -> None:
    row = {"output": "x", "answer": "A", "question": "Q", "prompt": "y"}
    assert messages(row, prompt="question", response="answer") == [ASKED, ANSWERED]
    assert messages({"q": "Q", "a": "A"}, instruction="q", output="a") == [ASKED, ANSWERED]
    message = {"who": "human", "what": "Q"}, {"who": "gpt", "what": "A"}
    assert messages({"log": list(message)}, messages="log", role="who", content="what") == [ASKED, ANSWERED]
    assert messages({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, messages="chosen") == [ASKED, ANSWERED]


def test_unused_columns_are_listed() -> None:
    format = detect([{"prompt": "Q", "response": "A", "id": 1, "source": "x"}], DataSource("x"), "x.jsonl")
    assert (format.name, format.unused) == ("prompt_response", ("id", "source"))


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        (
            {"output": "x", "answer": "A", "question": "Q"},
            "the response could be 'output' or 'answer'",
            "{response: output}",
        ),
        (
            {"prompt": "x", "question": "A", "answer": "Q"},
            "the prompt could be 'prompt' or 'question'",
            "{prompt: prompt}",
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "is preference data", "{prompt: prompt, response: chosen}"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, "is preference data", "{messages: chosen}"),
        ({"promt": "Q", "answer": "A"}, r"\(it has: promt, answer\)", "{response: answer, prompt: COLUMN}"),
        ({"sentence": "T"}, "it has: sentence", "{text: sentence}"),
        ({"a": 1, "b": 2}, r"has no known columns \(it has: a, b\)", "{prompt: COLUMN, response: COLUMN}"),
        ({"messages": "no list", "id": 1}, "it has: messages, id", "{messages: messages}"),
    ],
)
def test_ambiguous_columns_are_refused_with_a_hint(row: Any, message: str, hint: str) -> None:
    with pytest.raises(SourceError, match=message) as error:
        read(row)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("columns", "message", "hint"),
    [
        ({"promt": "q"}, "there is no role 'promt'", "did you mean 'prompt'?"),
        ({"prompt": "questoin"}, "x.jsonl has no column 'questoin'", "did you mean 'question'?"),
        ({"prompt": "question", "instruction": "answer"}, "'instruction' repeats the role 'prompt'", ""),
    ],
)
def test_wrong_columns_mapping_is_refused(columns: dict[str, str], message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        detect([{"question": "Q", "answer": "A"}], DataSource("x", "auto", columns), "x.jsonl")
    assert hint in error.value.hint


def test_explicit_format() -> None:
    row = {"messages": [ASKED], "text": "T", "instruction": "Q", "output": "A"}
    assert read(row, format="text") == TextSample("T")
    assert read(row, format="alpaca").messages == (ASKED, ANSWERED)
    with pytest.raises(SourceError, match=r"no known columns for the format sharegpt \(it has: text\)"):
        read({"text": "T"}, format="sharegpt")
    with pytest.raises(RecipeError, match="there is no data format 'alpacca'"):
        read(row, format="alpacca")


@pytest.mark.parametrize(
    ("row", "kind", "why"),
    [
        ({"prompt": "Q", "response": ""}, EmptyRecord, "an empty answer"),
        ({"prompt": "Q", "response": None}, EmptyRecord, "an empty answer"),
        ({"prompt": "Q", "response": float("nan")}, EmptyRecord, "an empty answer"),
        ({"prompt": " \n", "response": "A"}, EmptyRecord, "an empty question"),
        ({"messages": []}, EmptyRecord, "no messages"),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, EmptyRecord, "an empty answer"),
        ({"text": "  "}, EmptyRecord, "no text"),
        ({"prompt": "Q", "reply": "A"}, InvalidRecord, r"no column 'response' \(it has: prompt, reply\)"),
        ({"prompt": "Q", "response": {"text": ["A"]}}, InvalidRecord, "'response' must be text, not a mapping"),
        ({"prompt": "Q", "response": b"A"}, InvalidRecord, "'response' must be text, not b'A'"),
        ({"prompt": "Q", "response": "half \ud83d"}, InvalidRecord, "'response' is not UTF-8 text"),
        ({"prompt": [ASKED], "response": "A" * 3, "history": "x"}, None, ""),
        (
            {"messages": [{"role": "usr", "content": "Q"}]},
            InvalidRecord,
            r"unknown role 'usr' \(did you mean 'user'\?\)",
        ),
        ({"messages": [{"content": "Q"}]}, InvalidRecord, r"message 1 has no role \(it has: content\)"),
        ({"messages": [ASKED, {"role": "assistant"}]}, InvalidRecord, r"message 2 has no content \(it has: role\)"),
        ({"messages": [ASKED, "A"]}, InvalidRecord, "message 2 is text, not a mapping"),
        ({"messages": "[no"}, InvalidRecord, "'messages' holds text that is not JSON"),
        ({"messages": {"role": "user"}}, InvalidRecord, "'messages' is not a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, InvalidRecord, "a part of type 'image'"),
        ({"messages": [{**ASKED, "train": True, "weight": 0}, ANSWERED]}, InvalidRecord, "contradict each other"),
        ({"messages": [ASKED, {**ANSWERED, "train": "yes"}]}, InvalidRecord, "train must be true or false, not 'yes'"),
    ],
)
def test_unusable_rows_say_why(row: Any, kind: type[Exception] | None, why: str) -> None:
    good = {"prompt": "Q", "response": "A"}
    good = {"messages": [ASKED, ANSWERED]} if "messages" in row else {"text": "T"} if "text" in row else good
    if kind is None:
        assert isinstance(read(good, row), Conversation)
        return
    with pytest.raises(kind, match=why):
        read(good, row)


def test_key_depends_on_the_content_only() -> None:
    first, second = read({"prompt": "Q", "response": "A", "id": 1}), read({"question": "Q", "answer": "A"})
    assert first.key() == second.key() != first.key(seed=1)
    assert first.key() != read({"prompt": "Q", "response": "A."}).key()


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
def test_any_json_row_is_read_or_refused(rows: list[Any]) -> None:
    """A cell may hold anything: it is read, or a MergeforgeError says why not."""
    try:
        format = detect(rows, DataSource("x"), "x.jsonl")
        for row in rows:
            with contextlib.suppress(InvalidRecord, EmptyRecord):
                format.read(row, "S").key()
    except MergeforgeError:
        pass


@pytest.mark.parametrize(("column", "value"), [("images", ["a.png"]), ("image", {"bytes": "..."}), ("audio", "a.wav")])
def test_rows_with_images_or_sound_are_refused(column: str, value: Any) -> None:
    with pytest.raises(SourceError, match=f"the column '{column}'"):
        read({"prompt": "Q", "response": "A", column: value})
    assert messages({"prompt": "Q", "response": "A", column: []}) == [ASKED, ANSWERED]


def test_messages_with_ranges_to_train_on_are_refused() -> None:
    with pytest.raises(InvalidRecord, match="train_detail"):
        messages(
            {"messages": [ASKED, {**ANSWERED, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}]}
        )
