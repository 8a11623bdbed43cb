"""Formats: which column of a file holds what, and how a row is read. format_detection.py finds the format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.data.conversation import (
    Conversation,
    EmptyRecord,
    InvalidRecord,
    TextSample,
    as_messages,
    cell_text,
    conversation_from_pair,
    is_message_list,
    parse_conversation,
    parse_json_cell,
)
from mergeforge.data.preference import PreferenceSample, parse_labeled, parse_pair
from mergeforge.errors import format_list

IN_MESSAGES = ("role", "content")
MAX_WEIGHT = 1_000_000  # of a row


@dataclass(frozen=True)
class Format:
    """How rows are read. `columns`: role -> the file's column; `why`: the reason; `unused`: columns not trained on.

    `flags`: columns that say whether a row is trained on. The role `weight`: how much a row counts in the loss.
    """

    name: str
    columns: Mapping[str, str]
    why: str
    unused: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    def read(self, row: Mapping[str, Any], system: str | None = None) -> Conversation | TextSample | PreferenceSample:
        """Parse one row. Raises InvalidRecord and EmptyRecord."""
        for column in self.flags:
            if row_flag(row.get(column)) is False:
                raise EmptyRecord(f"{column}: {row[column]}")
        if self.weight(row) == 0:
            raise EmptyRecord(f"{self.columns['weight']}: 0")
        if "chosen" in self.columns or "label" in self.columns:
            return self._preference(row, system)
        if self.name == "text":
            return self._text_sample(row)
        return self._conversation(row, system) if "messages" in self.columns else self._pair(row, system)

    def weight(self, row: Mapping[str, Any]) -> float:
        """How much a row counts in the loss: 1 where it does not say. Raises InvalidRecord."""
        value = self._cell(row, "weight")
        if value is None or value == "":
            return 1.0
        try:
            weight = float(value)
        except (TypeError, ValueError, OverflowError):
            weight = math.nan
        if not 0 <= weight <= MAX_WEIGHT:
            column = self.columns["weight"]
            raise InvalidRecord(f"'{column}' must be a number from 0 to {MAX_WEIGHT:,}, not {value!r}")
        return weight

    def _text_sample(self, row: Mapping[str, Any]) -> TextSample:
        text = cell_text(self._cell(row, "text", required=True), f"'{self.columns['text']}'")
        if not text.strip():
            raise EmptyRecord("no text")
        return TextSample(text)

    def _conversation(self, row: Mapping[str, Any], system: str | None) -> Conversation:
        column = f"'{self.columns['messages']}'"
        messages = parse_json_cell(self._cell(row, "messages", required=True), column)
        if messages is None or messages == []:
            raise EmptyRecord("no messages")
        if not isinstance(messages, list | tuple):
            raise InvalidRecord(f"{column} is not a list of messages")
        message_keys = {role: name for role, name in self.columns.items() if role in IN_MESSAGES}
        row_system = cell_text(self._cell(row, "system"), "'system'") or system
        return parse_conversation(messages, system=row_system, tools=self._cell(row, "tools"), columns=message_keys)

    def _pair(self, row: Mapping[str, Any], system: str | None) -> Conversation:
        prompt, response = self._cell(row, "prompt", required=True), self._cell(row, "response", required=True)
        if is_message_list(prompt) or is_message_list(response):
            return self._message_pair(prompt, response, row, system)
        question = [cell_text(prompt, f"'{self.columns['prompt']}'"), cell_text(self._cell(row, "input"), "'input'")]
        return conversation_from_pair(
            "\n\n".join(part for part in question if part.strip()),
            cell_text(response, f"'{self.columns['response']}'"),
            system=system,
            row_system=cell_text(self._cell(row, "system"), "'system'"),
            history=self._cell(row, "history"),
        )

    def _message_pair(self, prompt: Any, response: Any, row: Mapping[str, Any], system: str | None) -> Conversation:
        """Prompt and completion as lists of messages (TRL's format): only the completion's answers are trained on."""
        context = [{**message, "train": False} for message in as_messages(prompt, "user")]
        completion = as_messages(response, "assistant")
        return parse_conversation([*context, *completion], system=system, tools=self._cell(row, "tools"))

    def _preference(self, row: Mapping[str, Any], system: str | None) -> PreferenceSample:
        row_system = cell_text(self._cell(row, "system"), "'system'") or system
        prompt, tools = self._cell(row, "prompt"), self._cell(row, "tools")
        if "label" in self.columns:
            answer, label = self._cell(row, "response", required=True), self._cell(row, "label", required=True)
            return parse_labeled(prompt, answer, label, system=row_system, tools=tools)
        chosen, rejected = self._cell(row, "chosen", required=True), self._cell(row, "rejected", required=True)
        return parse_pair(prompt, chosen, rejected, system=row_system, tools=tools)

    def _cell(self, row: Mapping[str, Any], role: str, required: bool = False) -> Any:
        name = self.columns.get(role)
        if name is None:
            return None
        if name not in row:  # other rows may write it in another case
            name = next((key for key in row if str(key).strip().lower() == name.strip().lower()), name)
        if required and name not in row:
            raise InvalidRecord(f"no column '{name}' (it has: {format_list(map(str, row)) or 'none'})")
        return row.get(name)


def row_flag(value: Any) -> bool | None:
    """What a cell of a column `train` or `loss` says about a row: to train on it or not; None: nothing."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None
