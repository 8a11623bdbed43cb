"""Formats: which columns of a file hold what, and a row read by that. detecting.py finds them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergeforge.data.conversation import (
    BadRow,
    Conversation,
    EmptyRow,
    Passage,
    conversation,
    exchange,
    parsed,
    text_of,
)
from mergeforge.errors import listing

IN_MESSAGES = ("role", "content")


@dataclass(frozen=True)
class Format:
    """How rows are read. `columns`: our role -> the file's column; `unused`: columns that are not trained on."""

    name: str
    columns: Mapping[str, str]
    why: str
    unused: tuple[str, ...] = ()

    def read(self, row: Mapping[str, Any], system: str | None = None) -> Conversation | Passage:
        """One row. Raises BadRow and EmptyRow."""
        if self.name == "text":
            return self._passage(row)
        return self._conversation(row, system) if "messages" in self.columns else self._exchange(row, system)

    def _passage(self, row: Mapping[str, Any]) -> Passage:
        text = text_of(self._cell(row, "text", needed=True), f"'{self.columns['text']}'")
        if not text.strip():
            raise EmptyRow("no text")
        return Passage(text)

    def _conversation(self, row: Mapping[str, Any], system: str | None) -> Conversation:
        column = f"'{self.columns['messages']}'"
        messages = parsed(self._cell(row, "messages", needed=True), column)
        if messages is None or messages == []:
            raise EmptyRow("no messages")
        if not isinstance(messages, list | tuple):
            raise BadRow(f"{column} is no list of messages")
        inside = {role: name for role, name in self.columns.items() if role in IN_MESSAGES}
        before = text_of(self._cell(row, "system"), "'system'") or system
        return conversation(messages, system=before, tools=self._cell(row, "tools"), columns=inside)

    def _exchange(self, row: Mapping[str, Any], system: str | None) -> Conversation:
        prompt, response = self._cell(row, "prompt", needed=True), self._cell(row, "response", needed=True)
        if are_messages(prompt) or are_messages(response):
            return self._continued(prompt, response, row, system)
        asked = [text_of(prompt, f"'{self.columns['prompt']}'"), text_of(self._cell(row, "input"), "'input'")]
        return exchange(
            "\n\n".join(part for part in asked if part.strip()),
            text_of(response, f"'{self.columns['response']}'"),
            system=system,
            before=text_of(self._cell(row, "system"), "'system'"),
            history=self._cell(row, "history"),
        )

    def _continued(self, prompt: Any, response: Any, row: Mapping[str, Any], system: str | None) -> Conversation:
        """Prompt and completion as lists of messages (TRL's form): only the completion's answers are trained on."""
        given = [{**one, "train": False} for one in _turns(prompt, "user")]
        then = _turns(response, "assistant")
        return conversation([*given, *then], system=system, tools=self._cell(row, "tools"))

    def _cell(self, row: Mapping[str, Any], role: str, needed: bool = False) -> Any:
        name = self.columns.get(role)
        if name is None:
            return None
        if name not in row:  # a later row may spell it otherwise
            name = next((key for key in row if str(key).strip().lower() == name.strip().lower()), name)
        if needed and name not in row:
            raise BadRow(f"no column '{name}' (it has: {listing(map(str, row)) or 'none'})")
        return row.get(name)


def _turns(value: Any, role: str) -> list[Mapping[str, Any]]:
    return list(value) if are_messages(value) else [{"role": role, "content": value}]


def are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)
