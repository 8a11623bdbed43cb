"""Detecting: the format of a file from its first rows.

In this order: a list of messages (also under a sharegpt name), a question and its answer, plain text. Where
two columns could be the same thing nothing is guessed: it is an error that lists the columns and says what to write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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


def detect(rows: Sequence[Mapping[str, Any]], source: DataSource, name: str) -> Format:
    """The format of a file from its first rows. `name`: the file, for messages.

    Raises SourceError for columns that are not known or could be two things, RecipeError for a mapping that is wrong.
    """
    seen = list(dict.fromkeys(str(column) for row in rows for column in row))
    given = _given(source.columns, seen, name)
    _check_format(source.format)
    free = [column for column in seen if column not in given.values()]
    _refuse_preference(free, given, name)
    for look in _LOOKS[source.format]:
        found = look(rows, free, given, name)
        if found is not None:
            kind, columns, why = found
            unused = tuple(column for column in seen if column not in columns.values())
            return Format(kind, columns, why, unused)
    asked = f" for the format {source.format}" if source.format != "auto" else ""
    raise SourceError(f"{name} has no columns that are known{asked}: it has {listing(seen, 20)}", hint=_fix(seen))


def _messages(rows: Sequence[Mapping[str, Any]], free: list[str], given: dict[str, str], name: str) -> Any:
    if {"prompt", "response", "text"} & given.keys():
        return None
    named = [given["messages"]] if "messages" in given else _called("messages", free)
    held = [column for column in named if "messages" in given or _holds_messages(rows, column)]
    if len(held) > 1:
        raise _ambiguous(name, "messages", held)
    if not held:
        return None
    keys = {str(key) for message in _first_messages(rows, held[0]) for key in message}
    sharegpt = "from" in keys and "role" not in keys
    columns = {"messages": held[0]} | {role: given[role] for role in IN_MESSAGES if role in given}
    columns |= _optional(("system", "tools"), free, given, name)
    return (
        "sharegpt" if sharegpt else "messages",
        columns,
        f"'{held[0]}' is a list of messages ({listing(sorted(keys))})",
    )


def _pair(rows: Sequence[Mapping[str, Any]], free: list[str], given: dict[str, str], name: str) -> Any:
    if {"messages", "text"} & given.keys():
        return None
    response = _one("response", free, given, name)
    columns: dict[str, str] = {}
    if "prompt" in given:
        columns["prompt"] = given["prompt"]
    elif asked := [column for column in _called("prompt", free) if column != response]:
        main = [column for column in asked if column.strip().lower() != "input"] or asked
        if len(main) > 1:
            raise _ambiguous(name, "prompt", main)
        columns["prompt"] = main[0]
    if response is None or "prompt" not in columns:
        return None
    columns["response"] = response
    rest = [column for column in free if column not in columns.values()]
    columns |= _optional(("input", "system", "history", "tools"), rest, given, name)
    kind = "alpaca" if columns["prompt"].strip().lower() == "instruction" else "prompt_response"
    joined = f" (after it '{columns['input']}', an empty line between)" if "input" in columns else ""
    return kind, columns, f"'{columns['prompt']}'{joined} asks, '{response}' answers"


def _alpaca(rows: Sequence[Mapping[str, Any]], free: list[str], given: dict[str, str], name: str) -> Any:
    found = _pair(rows, free, given, name)
    return found and ("alpaca", *found[1:])


def _exchange(rows: Sequence[Mapping[str, Any]], free: list[str], given: dict[str, str], name: str) -> Any:
    found = _pair(rows, free, given, name)
    return found and ("prompt_response", *found[1:])


def _text(rows: Sequence[Mapping[str, Any]], free: list[str], given: dict[str, str], name: str) -> Any:
    column = _one("text", free, given, name)
    return None if column is None else ("text", {"text": column}, f"'{column}' is plain text, all of it trained on")


_LOOKS = {
    "auto": (_messages, _pair, _text),
    "messages": (_messages,),
    "sharegpt": (_messages,),
    "alpaca": (_alpaca,),
    "prompt_response": (_exchange,),
    "text": (_text,),
}


def _one(role: str, free: list[str], given: dict[str, str], name: str) -> str | None:
    if role in given:
        return given[role]
    found = _called(role, free)
    if len(found) > 1:
        raise _ambiguous(name, role, found)
    return found[0] if found else None


def _optional(roles: Iterable[str], free: list[str], given: dict[str, str], name: str) -> dict[str, str]:
    found = {role: _one(role, free, given, name) for role in roles}
    return {role: column for role, column in found.items() if column is not None}


def _called(role: str, columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column.strip().lower() in ALIASES[role]]


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


def _refuse_preference(free: Sequence[str], given: Mapping[str, str], name: str) -> None:
    lower = {column.lower(): column for column in free}
    if all(column in lower for column in _PREFERENCE) and not given:
        chosen = lower["chosen"]
        prompt = next((lower[word] for word in ALIASES["prompt"] if word in lower), None)
        way = f"columns: {{prompt: {prompt}, response: {chosen}}}" if prompt else f"columns: {{messages: {chosen}}}"
        text = f"{name} is preference data (chosen, rejected), which is for DPO and its kin"
        raise SourceError(text, hint=f"to train on the chosen answers alone: {way}")


def _holds_messages(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return bool(_first_messages(rows, column))


def _first_messages(rows: Sequence[Mapping[str, Any]], column: str) -> list[Mapping[str, Any]]:
    """The messages of the first row in which the column holds any."""
    for row in rows:
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                continue
        if value is not None and are_messages(value):
            return list(value)
    return []


def _check_format(name: str) -> None:
    if name not in FORMATS:
        hint = did_you_mean(name, FORMATS) or f"one of: {', '.join(FORMATS)}"
        raise RecipeError(f"there is no data format '{name}'", hint=hint)


def _ambiguous(name: str, role: str, columns: Sequence[str]) -> SourceError:
    both = " and ".join(f"'{column}'" for column in columns)
    hint = f"say which: columns: {{{role}: {columns[0]}}}"
    return SourceError(f"{name}: {both} could each be the {role}", hint=hint)


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
