"""Detecting: the format of a file from its first rows.

In this order: a list of messages (also under a sharegpt name), a question and its answer, plain text. Where
two columns could be the same thing nothing is guessed: it is an error that lists the columns and says what to write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.data.formats import IN_MESSAGES, Format, are_messages
from mergeforge.data.settings import FORMATS, DataSource
from mergeforge.errors import RecipeError, SourceError, did_you_mean, listing

# our role -> the names that columns have for it, in lower case
ALIASES = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("instruction", "prompt", "question", "query", "input", "user"),
    "input": ("input", "context"),
    "response": ("output", "response", "answer", "completion", "assistant", "target"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "text": ("text", "content", "document"),
}
# other words for our roles that `columns:` takes
OTHER_WORDS = {
    **dict.fromkeys(("instruction", "question", "query", "user"), "prompt"),
    **dict.fromkeys(("output", "answer", "completion", "assistant"), "response"),
    "conversations": "messages",
    "context": "input",
}
_PREFERENCE = ("chosen", "rejected")
_PAIRS = ("alpaca", "prompt_response")  # formats of a question and its answer


def detect(rows: Sequence[Mapping[str, Any]], source: DataSource, name: str) -> Format:
    """The format of a file from its first rows. `name`: the file, for messages.

    Raises SourceError for columns that are not known or could be two things, RecipeError for a mapping that is wrong.
    """
    if source.format not in FORMATS:
        hint = did_you_mean(source.format, FORMATS) or f"one of: {', '.join(FORMATS)}"
        raise RecipeError(f"there is no data format '{source.format}'", hint=hint)
    seen = list(dict.fromkeys(str(column) for row in rows for column in row))
    given = _given(source.columns, seen, name)
    table = _Table(name, rows, given, tuple(column for column in seen if column not in given.values()))
    table.refuse_preference()
    for look in table.looks(source.format):
        found = look()
        if found is not None:
            kind = source.format if source.format in _PAIRS else found.name
            return replace(found, name=kind, unused=tuple(one for one in seen if one not in found.columns.values()))
    asked = f" for the format {source.format}" if source.format != "auto" else ""
    raise SourceError(f"{name} has no columns that are known{asked}: it has {listing(seen, 20)}", hint=_fix(seen))


@dataclass(frozen=True)
class _Table:
    """A file's first rows. `given`: our role -> a column that is named for it; `free`: the other columns."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    given: Mapping[str, str]
    free: tuple[str, ...]

    def looks(self, format: str) -> Sequence[Callable[[], Format | None]]:
        """What is looked for, in order: what the format says, or the named columns, or all there is."""
        if format in _PAIRS:
            return (self.pair,)
        if format == "text" or (format == "auto" and "text" in self.given):
            return (self.text,)
        if format == "auto" and {"prompt", "response"} & self.given.keys():
            return (self.pair,)
        if format == "auto" and "messages" not in self.given:
            return (self.messages, self.pair, self.text)
        return (self.messages,)

    def messages(self) -> Format | None:
        """A list of messages."""
        held = [self.given["messages"]] if "messages" in self.given else self._with_messages()
        if not held:
            return None
        column = self._only("messages", held)
        keys = {str(key) for message in _first_messages(self.rows, column) for key in message}
        columns = {"messages": column} | {role: self.given[role] for role in IN_MESSAGES if role in self.given}
        kind = "sharegpt" if "from" in keys and "role" not in keys else "messages"
        why = f"'{column}' is a list of messages ({listing(sorted(keys))})"
        return Format(kind, columns | self._also(("system", "tools")), why)

    def pair(self) -> Format | None:
        """A question and its answer."""
        response = self._one("response")
        asked = [column for column in self._called("prompt") if column != response]
        main = [column for column in asked if column.strip().lower() != "input"] or asked
        prompt = self.given.get("prompt") or (self._only("prompt", main) if main else None)
        if response is None or prompt is None:
            return None
        columns = {"prompt": prompt, "response": response}
        columns |= self._also(("input", "system", "history", "tools"), taken=(prompt, response))
        kind = "alpaca" if prompt.strip().lower() == "instruction" else "prompt_response"
        joined = f" (after it '{columns['input']}', an empty line between)" if "input" in columns else ""
        return Format(kind, columns, f"'{prompt}'{joined} asks, '{response}' answers")

    def text(self) -> Format | None:
        """Plain text."""
        column = self._one("text")
        if column is None:
            return None
        return Format("text", {"text": column}, f"'{column}' is plain text, all of it trained on")

    def refuse_preference(self) -> None:
        """Raises SourceError for chosen and rejected answers, where nothing says which column is meant."""
        lower = {column.lower(): column for column in self.free}
        if self.given or not all(column in lower for column in _PREFERENCE):
            return
        chosen, prompt = lower["chosen"], next((lower[word] for word in ALIASES["prompt"] if word in lower), None)
        way = f"columns: {{prompt: {prompt}, response: {chosen}}}" if prompt else f"columns: {{messages: {chosen}}}"
        text = f"{self.name} is preference data (chosen, rejected), which is for DPO and its kin"
        raise SourceError(text, hint=f"to train on the chosen answers alone: {way}")

    def _with_messages(self) -> list[str]:
        return [column for column in self._called("messages") if _first_messages(self.rows, column)]

    def _called(self, role: str) -> list[str]:
        return [column for column in self.free if column.strip().lower() in ALIASES[role]]

    def _one(self, role: str, taken: Sequence[str] = ()) -> str | None:
        found = [column for column in self._called(role) if column not in taken]
        return self.given.get(role) or (self._only(role, found) if found else None)

    def _also(self, roles: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
        found = {role: self._one(role, taken) for role in roles}
        return {role: column for role, column in found.items() if column is not None}

    def _only(self, role: str, columns: Sequence[str]) -> str:
        if len(columns) > 1:
            both = " and ".join(f"'{column}'" for column in columns)
            hint = f"say which: columns: {{{role}: {columns[0]}}}"
            raise SourceError(f"{self.name}: {both} could each be the {role}", hint=hint)
        return columns[0]


def _given(columns: Mapping[str, str], seen: Sequence[str], name: str) -> dict[str, str]:
    """`columns:` in our own words, each of whose columns the file has."""
    known = (*ALIASES, *IN_MESSAGES)
    found: dict[str, str] = {}
    for word, column in columns.items():
        role = OTHER_WORDS.get(word, word)
        if role not in known:
            hint = did_you_mean(word, (*known, *OTHER_WORDS)) or f"known: {', '.join(known)}"
            raise RecipeError(f"columns: '{word}' is no role of a column", hint=hint)
        if role in found:
            raise RecipeError(f"columns: '{word}' and another word name the same thing", hint="keep one of them")
        if role not in IN_MESSAGES and column not in seen:
            hint = did_you_mean(column, seen) or f"it has: {listing(seen, 20)}"
            raise RecipeError(f"{name} has no column '{column}'", hint=hint)
        found[role] = column
    return found


def _first_messages(rows: Sequence[Mapping[str, Any]], column: str) -> list[Mapping[str, Any]]:
    """The messages of the first row in which the column holds any."""
    for row in rows:
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        if value is not None and are_messages(value):
            return list(value)
    return []


def _fix(seen: Sequence[str]) -> str:
    """The nearest thing to write for columns that are not known."""
    for role in ("messages", "response", "prompt", "text"):
        for column in seen:
            if did_you_mean(column.lower(), ALIASES[role]):
                other = {"prompt": ", response: COLUMN", "response": ", prompt: COLUMN"}.get(role, "")
                return f"say what they are: columns: {{{role}: {column}{other}}}"
    if len(seen) == 1:
        return f"if it is plain text: columns: {{text: {seen[0]}}}"
    return "say what they are: columns: {prompt: COLUMN, response: COLUMN}, {messages: COLUMN} or {text: COLUMN}"
