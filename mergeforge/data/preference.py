"""Preference data: two answers to a prompt, of which one is preferred, or one answer that is good or bad.

The columns are TRL's, each as text or as a list of messages: prompt, chosen and rejected, where the prompt may instead
be the common start of both; or prompt, completion and label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from mergeforge.data.conversation import (
    ROLES,
    Conversation,
    EmptyRecord,
    InvalidRecord,
    as_messages,
    cell_text,
    is_message_list,
    parse_conversation,
    parse_json_cell,
)

LABELS = {"true": True, "false": False}  # as CSV files write them


@dataclass(frozen=True)
class RatedAnswer:
    """A prompt with an answer; only the answer is trained on. `preferred`: whether it is the better, or a good, one."""

    conversation: Conversation
    preferred: bool


@dataclass(frozen=True)
class PreferenceSample:
    """The chosen and the rejected answer to a prompt, in this order, or a single answer."""

    answers: tuple[RatedAnswer, ...]

    def key(self, seed: int = 0) -> int:
        """A 64-bit hash of the content."""
        key = seed
        for answer in self.answers:
            key = answer.conversation.key(key + answer.preferred)
        return key


def parse_pair(
    prompt: Any, chosen: Any, rejected: Any, *, system: str | None = None, tools: Any = None
) -> PreferenceSample:
    """The sample of a row with `chosen` and `rejected`. `prompt` None: the common start of both.

    Raises InvalidRecord and EmptyRecord.
    """
    chosen, rejected = _cell_value(chosen), _cell_value(rejected)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not is_message_list(value) and not cell_text(value, f"'{name}'").strip():
            raise EmptyRecord(f"no {name} answer")
    if chosen == rejected:
        raise InvalidRecord("the chosen and the rejected answer are equal (remove the row)")
    if _starts_with_question(chosen) and _starts_with_question(rejected):
        prompt, chosen, rejected = _split_messages(chosen, rejected)
    elif prompt is None:
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    answers = [
        RatedAnswer(_conversation(prompt, answer, name, system, tools), name == "chosen")
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    ]
    return PreferenceSample(tuple(answers))


def parse_labeled(
    prompt: Any, completion: Any, label: Any, *, system: str | None = None, tools: Any = None
) -> PreferenceSample:
    """The sample of a row with `completion` and `label`. Raises InvalidRecord and EmptyRecord."""
    preferred = LABELS.get(label.strip().lower()) if isinstance(label, str) else label
    if not isinstance(preferred, bool):
        raise InvalidRecord(f"label must be true (a good answer) or false (a bad one), not {label!r}")
    conversation = _conversation(prompt, _cell_value(completion), "completion", system, tools)
    return PreferenceSample((RatedAnswer(conversation, preferred),))


def _cell_value(value: Any) -> Any:
    """A list of messages, which a text cell may hold as JSON, or the cell as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            messages = parse_json_cell(value, "")
        except InvalidRecord:
            return value
        return messages if is_message_list(messages) else value
    return value


def _starts_with_question(value: Any) -> bool:
    """Whether a list of messages holds the prompt, too."""
    if not is_message_list(value):
        return False
    role = value[0].get("role", value[0].get("from"))
    return str(role).strip().lower() not in ROLES["assistant"]


def _split_messages(chosen: Sequence[Any], rejected: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The messages that both begin with, and the rest of each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise InvalidRecord("chosen and rejected begin with different messages: they do not answer the same prompt")
    return list(chosen[:shared]), list(chosen[shared:]), list(rejected[shared:])


def _split_texts(chosen: Any, rejected: Any) -> tuple[str, str, str]:
    """The words that both texts begin with, and the rest of each."""
    if is_message_list(chosen) or is_message_list(rejected):
        raise InvalidRecord("no prompt (add a column 'prompt', or begin chosen and rejected with the user's message)")
    chosen, rejected = cell_text(chosen, "'chosen'"), cell_text(rejected, "'rejected'")
    start = "".join(
        first for first, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    )
    end = max((index + 1 for index, character in enumerate(start) if character.isspace()), default=0)
    if not start[:end].strip():
        raise InvalidRecord("chosen and rejected have no common start to take as the prompt (add a column 'prompt')")
    return start[:end], chosen[end:], rejected[end:]


def _conversation(prompt: Any, answer: Any, name: str, system: str | None, tools: Any) -> Conversation:
    """The prompt, not trained on, and the answer."""
    prompt = _cell_value(prompt)
    if not is_message_list(prompt) and not cell_text(prompt, "'prompt'").strip():
        raise EmptyRecord("no prompt")
    context: list[Mapping[str, Any]] = [{**message, "train": False} for message in as_messages(prompt, "user")]
    messages = as_messages(answer, "assistant")
    try:
        conversation = parse_conversation([*context, *messages], system=system, tools=tools)
    except (EmptyRecord, InvalidRecord) as error:
        raise type(error)(f"{name}: {error}") from None
    if conversation.messages[-1]["role"] != "assistant":
        raise InvalidRecord(f"{name}: the last message is not the assistant's")
    return conversation
