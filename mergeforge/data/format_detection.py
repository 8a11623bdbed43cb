"""Detects the format of a file from its first rows.

Tried in this order: a list of messages (also under a ShareGPT name), a question and its answer, plain text. If two
columns could be the same thing, nothing is guessed: the error lists the columns and says what to write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergeforge.data.conversation import FLAG_KEYS, is_message_list
from mergeforge.data.formats import IN_MESSAGES, Format, row_flag
from mergeforge.data.preference import LABELS
from mergeforge.data.settings import FORMATS, LABELED, PAIRS, PREFERENCE_FORMATS, DataSource
from mergeforge.errors import RecipeError, SourceError, did_you_mean, format_list

# role -> the column names that it commonly has, in lower case
ALIASES = {
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("instruction", "prompt", "question", "query", "input", "user"),
    "input": ("input", "context"),
    "response": ("output", "response", "answer", "completion", "assistant", "target"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "text": ("text", "content", "document"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label",),
    "weight": ("weight",),
}
# other names of roles that `columns:` accepts
ROLE_ALIASES = {
    **dict.fromkeys(("instruction", "question", "query", "user"), "prompt"),
    **dict.fromkeys(("output", "answer", "completion", "assistant"), "response"),
    "conversations": "messages",
    "context": "input",
}
_MEDIA = {"image": "images", "audio": "sound", "video": "videos"}
_PREFERENCE = ("chosen", "rejected")
_PREFERENCE_HINTS = {
    PAIRS: "it needs chosen and rejected, and usually prompt; columns: {chosen: COLUMN, rejected: COLUMN} names others",
    LABELED: "it needs prompt, completion and label (true or false), or prompt, chosen and rejected",
}
_PAIR_FORMATS = ("alpaca", "prompt_response")  # a question and its answer


def detect(rows: Sequence[Mapping[str, Any]], source: DataSource, name: str) -> Format:
    """The format of a file from its first rows. name: the file, for messages.

    Raises SourceError for unknown or ambiguous columns, RecipeError for a wrong `columns:`.
    """
    if source.format not in FORMATS:
        hint = did_you_mean(source.format, FORMATS) or f"one of: {', '.join(FORMATS)}"
        raise RecipeError(f"there is no data format '{source.format}'", hint=hint)
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    assigned = _assigned_columns(source.columns, columns, name)
    free = tuple(column for column in columns if column not in assigned.values())
    guesser = _ColumnGuesser(name, rows, assigned, free)
    if source.format not in PREFERENCE_FORMATS:
        guesser.refuse_preference_data()
        guesser.refuse_labels()
    _refuse_media(rows, free, name)
    for guess in guesser.guesses(source.format):
        format = guess()
        if format is not None:
            kind = source.format if source.format in _PAIR_FORMATS else format.name
            flags, roles = _flag_columns(rows, columns), guesser.with_weight(format.columns)
            used = (*roles.values(), *flags)
            unused = tuple(column for column in columns if column not in used)
            return replace(format, name=kind, columns=roles, unused=unused, flags=flags)
    if source.format in PREFERENCE_FORMATS:
        raise SourceError(
            f"{name} has no columns for the format {source.format} (it has: {format_list(columns, 20)})",
            hint=_PREFERENCE_HINTS[source.format],
        )
    wanted = f" for the format {source.format}" if source.format != "auto" else ""
    raise SourceError(
        f"{name} has no known columns{wanted} (it has: {format_list(columns, 20)})", hint=_suggestion(columns)
    )


@dataclass(frozen=True)
class _ColumnGuesser:
    """The first rows of a file. `assigned`: role -> the column that `columns:` names for it; `free`: the others."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    assigned: Mapping[str, str]
    free: tuple[str, ...]

    def guesses(self, format: str) -> Sequence[Callable[[], Format | None]]:
        """What to look for, in order: what the format says, what `columns:` names, or everything."""
        if format in PREFERENCE_FORMATS:
            return (self.labeled, self.preference) if format == LABELED else (self.preference,)
        if format in _PAIR_FORMATS:
            return (self.pair,)
        if format == "text" or (format == "auto" and "text" in self.assigned):
            return (self.text,)
        if format == "auto" and {"prompt", "response"} & self.assigned.keys():
            return (self.pair,)
        if format == "auto" and "messages" not in self.assigned:
            return (self.messages, self.pair, self.text)
        return (self.messages,)

    def messages(self) -> Format | None:
        """A list of messages."""
        candidates = [self.assigned["messages"]] if "messages" in self.assigned else self._message_columns()
        if not candidates:
            return None
        column = self._only("messages", candidates)
        keys = {str(key) for message in _first_messages(self.rows, column) for key in message}
        columns = {"messages": column} | {role: self.assigned[role] for role in IN_MESSAGES if role in self.assigned}
        kind = "sharegpt" if "from" in keys and "role" not in keys else "messages"
        why = f"'{column}' is a list of messages ({format_list(sorted(keys))})"
        return Format(kind, columns | self._optional(("system", "tools")), why)

    def pair(self) -> Format | None:
        """A question and its answer."""
        response = self._column("response")
        candidates = [column for column in self._columns_named("prompt") if column != response]
        candidates = [column for column in candidates if column.strip().lower() != "input"] or candidates
        prompt = self.assigned.get("prompt") or (self._only("prompt", candidates) if candidates else None)
        if response is None or prompt is None:
            return None
        columns = {"prompt": prompt, "response": response}
        columns |= self._optional(("input", "system", "history", "tools"), taken=(prompt, response))
        kind = "alpaca" if prompt.strip().lower() == "instruction" else "prompt_response"
        appended = f" ('{columns['input']}' follows it after an empty line)" if "input" in columns else ""
        return Format(kind, columns, f"'{prompt}' is the question{appended}, '{response}' the answer")

    def text(self) -> Format | None:
        """Plain text."""
        column = self._column("text")
        if column is None:
            return None
        return Format("text", {"text": column}, f"'{column}' is plain text, trained on in full")

    def preference(self) -> Format | None:
        """A chosen and a rejected answer."""
        chosen, rejected = self._column("chosen"), self._column("rejected")
        if chosen is None or rejected is None:
            return None
        columns = {"chosen": chosen, "rejected": rejected} | self._optional(("prompt", "system", "tools"))
        return Format(PAIRS, columns, f"'{chosen}' is preferred to '{rejected}'")

    def labeled(self) -> Format | None:
        """An answer with a label."""
        label, response, prompt = self._column("label"), self._column("response"), self._column("prompt")
        if label is None or response is None or prompt is None:
            return None
        columns = {"prompt": prompt, "response": response, "label": label} | self._optional(("system", "tools"))
        return Format(LABELED, columns, f"'{label}' says whether '{response}' is a good answer to '{prompt}'")

    def with_weight(self, columns: Mapping[str, str]) -> dict[str, str]:
        """The columns of a format, and the one with the weights of rows."""
        return {**columns, **self._optional(("weight",), taken=tuple(columns.values()))}

    def refuse_labels(self) -> None:
        """Raise SourceError for answers that are labeled good or bad, unless `columns:` says which column to use."""
        label, response = self._columns_named("label"), self._columns_named("response")
        if self.assigned or not response or not any(self._is_boolean(column) for column in label):
            return
        text = f"{self.name} labels its answers as good or bad ('{label[0]}'); training would treat all of them as good"
        fix = f"columns: {{response: {response[0]}}}"
        raise SourceError(text, hint=f"set objective: kto, or to train on all answers alike: {fix}")

    def refuse_preference_data(self) -> None:
        """Raise SourceError for chosen and rejected answers, unless `columns:` says which column to use."""
        by_lower_case = {column.lower(): column for column in self.free}
        if self.assigned or not all(column in by_lower_case for column in _PREFERENCE):
            return
        chosen = by_lower_case["chosen"]
        prompt = next((by_lower_case[word] for word in ALIASES["prompt"] if word in by_lower_case), None)
        fix = f"columns: {{prompt: {prompt}, response: {chosen}}}" if prompt else f"columns: {{messages: {chosen}}}"
        text = f"{self.name} is preference data (chosen, rejected), which DPO and similar methods use"
        raise SourceError(text, hint=f"set objective: dpo, or to train on the chosen answers only: {fix}")

    def _is_boolean(self, column: str) -> bool:
        values = [row[column] for row in self.rows if row.get(column) is not None]
        return bool(values) and all(isinstance(value, bool) or str(value).strip().lower() in LABELS for value in values)

    def _message_columns(self) -> list[str]:
        return [column for column in self._columns_named("messages") if _first_messages(self.rows, column)]

    def _columns_named(self, role: str) -> list[str]:
        return [column for column in self.free if column.strip().lower() in ALIASES[role]]

    def _column(self, role: str, taken: Sequence[str] = ()) -> str | None:
        candidates = [column for column in self._columns_named(role) if column not in taken]
        return self.assigned.get(role) or (self._only(role, candidates) if candidates else None)

    def _optional(self, roles: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
        columns = {role: self._column(role, taken) for role in roles}
        return {role: column for role, column in columns.items() if column is not None}

    def _only(self, role: str, columns: Sequence[str]) -> str:
        if len(columns) > 1:
            names = " or ".join(f"'{column}'" for column in columns)
            hint = f"name it: columns: {{{role}: {columns[0]}}}"
            raise SourceError(f"{self.name}: the {role} could be {names}", hint=hint)
        return columns[0]


def _assigned_columns(columns: Mapping[str, str], known_columns: Sequence[str], name: str) -> dict[str, str]:
    """`columns:` by role; the file must have each of the columns."""
    roles = (*ALIASES, *IN_MESSAGES)
    assigned: dict[str, str] = {}
    for word, column in columns.items():
        role = ROLE_ALIASES.get(word, word)
        if role not in roles:
            hint = did_you_mean(word, (*roles, *ROLE_ALIASES)) or f"known: {', '.join(roles)}"
            raise RecipeError(f"columns: there is no role '{word}'", hint=hint)
        if role in assigned:
            raise RecipeError(f"columns: '{word}' repeats the role '{role}'", hint="keep one of them")
        if role not in IN_MESSAGES and column not in known_columns:
            hint = did_you_mean(column, known_columns) or f"it has: {format_list(known_columns, 20)}"
            raise RecipeError(f"{name} has no column '{column}'", hint=hint)
        assigned[role] = column
    return assigned


def _flag_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that say whether a row is trained on: true and false under a few names."""
    named = [column for column in columns if column.strip().lower() in FLAG_KEYS]
    return tuple(column for column in named if any(row_flag(row.get(column)) is not None for row in rows))


def _refuse_media(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], name: str) -> None:
    """Raise SourceError for rows with images, sound or video: only the text would be trained on."""
    for column in columns:
        kind = column.strip().lower().removesuffix("s")
        if kind in _MEDIA and any(row.get(column) not in (None, "", [], {}) for row in rows):
            text = f"{name} holds {_MEDIA[kind]} (the column '{column}'), and only text can be trained on"
            raise SourceError(
                text, hint="to train on the text alone, remove the column and the placeholders in the text"
            )


def _first_messages(rows: Sequence[Mapping[str, Any]], column: str) -> list[Mapping[str, Any]]:
    """The messages of the first row whose column holds any."""
    for row in rows:
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue
        if value is not None and is_message_list(value):
            return list(value)
    return []


def _suggestion(columns: Sequence[str]) -> str:
    """What to write for unknown columns, as a hint."""
    for role in ("messages", "response", "prompt", "text"):
        for column in columns:
            if did_you_mean(column.lower(), ALIASES[role]):
                rest = {"prompt": ", response: COLUMN", "response": ", prompt: COLUMN"}.get(role, "")
                return f"name them: columns: {{{role}: {column}{rest}}}"
    if len(columns) == 1:
        return f"if it is plain text: columns: {{text: {columns[0]}}}"
    return "name them: columns: {prompt: COLUMN, response: COLUMN}, {messages: COLUMN} or {text: COLUMN}"
