"""Conversations: what a row of any format becomes, except plain text.

Messages are as chat templates expect them: role, content, and whatever else a template may read (tool_calls, name,
reasoning_content). Roles are system, user, assistant and tool; their common aliases are mapped here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from mergeforge.data.readers.base import type_name
from mergeforge.errors import did_you_mean, format_list

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bard", "bing", "function_call"),
    "tool": ("tool", "function", "observation", "ipython", "function_response", "tool_response"),
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
FLAG_KEYS = ("train", "training", "loss")
TRAIN_KEYS = (*FLAG_KEYS, "weight")
PARTIAL_KEYS = ("train_detail", "training_detail")  # axolotl's ranges of characters
_ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
SURROGATE = re.compile("[\ud800-\udfff]")


class InvalidRecord(Exception):
    """A record that cannot be used; the text says why."""


class EmptyRecord(Exception):
    """A record with nothing to train on; the text says what is empty."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order. `train_flags`: what the row says about training on each (None: nothing); `tools`: as
    templates take them."""

    messages: tuple[Mapping[str, Any], ...]
    train_flags: tuple[bool | None, ...]
    tools: tuple[Any, ...] = ()

    def key(self, seed: int = 0) -> int:
        """A 64-bit hash of the content."""
        content = [self.messages, self.train_flags, self.tools]
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
        return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed)


@dataclass(frozen=True)
class TextSample:
    """Plain text, trained on in full."""

    text: str

    def key(self, seed: int = 0) -> int:
        """A 64-bit hash of the content."""
        return xxhash.xxh3_64_intdigest(self.text.encode("utf-8", "surrogatepass"), seed)


def parse_conversation(
    messages: Sequence[Mapping[str, Any]], *, system: str | None = None, tools: Any = None, columns: Any = None
) -> Conversation:
    """A checked conversation from the messages of a row.

    system: the system message if there is none. columns: {"role": key, "content": key} if the messages use other keys.
    Raises InvalidRecord and EmptyRecord.
    """
    parsed = [_parse_message(message, index, columns or {}) for index, message in enumerate(messages)]
    parsed = [(message, train) for message, train in parsed if message["role"] != "system" or message["content"]]
    if system and not any(message["role"] == "system" for message, _ in parsed):
        parsed.insert(0, ({"role": "system", "content": system}, None))
    for message, train in parsed:
        if message["role"] == "user" and not message["content"].strip():
            raise EmptyRecord("an empty question")
        if message["role"] == "assistant" and train is not False and not _has_content(message):
            raise EmptyRecord("an empty answer")
    return Conversation(tuple(message for message, _ in parsed), tuple(train for _, train in parsed), _tools(tools))


def conversation_from_pair(
    prompt: str, response: str, *, system: str | None = None, row_system: str | None = None, history: Any = None
) -> Conversation:
    """A question and its answer. row_system: the system message in the row itself; history: earlier pairs."""
    if not prompt.strip():
        raise EmptyRecord("an empty question")
    messages: list[dict[str, Any]] = [{"role": "system", "content": row_system}] if row_system else []
    for question, answer in _history_pairs(history):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return parse_conversation(messages, system=system)


def is_message_list(value: Any) -> bool:
    """Whether a value is a non-empty list of mappings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def as_messages(value: Any, role: str) -> list[Mapping[str, Any]]:
    """A list of messages; a text becomes one message of the role."""
    return list(value) if is_message_list(value) else [{"role": role, "content": value}]


def cell_text(value: Any, what: str) -> str:
    """A cell as text: numbers as written, None and NaN as "". Raises InvalidRecord for anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise InvalidRecord(f"{what} must be text, not {type_name(value)}")
    if SURROGATE.search(value):
        raise InvalidRecord(f"{what} is not UTF-8 text")
    return value


def parse_json_cell(value: Any, what: str) -> Any:
    """A list or mapping, which a text cell may hold as JSON. Raises InvalidRecord."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRecord(f"{what} holds text that is not JSON") from None


def _parse_message(message: Any, index: int, columns: Mapping[str, str]) -> tuple[dict[str, Any], bool | None]:
    """(message, its train flag)."""
    where = f"message {index + 1}"
    if not isinstance(message, Mapping):
        raise InvalidRecord(f"{where} is {type_name(message)}, not a mapping")
    fields = {str(key): value for key, value in message.items() if value is not None}  # Parquet fills up with None
    by_lower_case = {key.lower(): key for key in fields}
    role_key = columns.get("role") or next((by_lower_case[key] for key in ROLE_KEYS if key in by_lower_case), "")
    content_key = columns.get("content") or next(
        (by_lower_case[key] for key in CONTENT_KEYS if key in by_lower_case), ""
    )
    if role_key not in fields:
        raise InvalidRecord(f"{where} has no role (it has: {format_list(fields)})")
    train = _train_flag(fields, where)
    if partial := next((key for key in PARTIAL_KEYS if key in fields), None):
        raise InvalidRecord(f"{where} has {partial}; a message can only be trained on as a whole")
    if isinstance(fields.get("function_call"), Mapping) and "tool_calls" not in fields:  # OpenAI's first format
        fields["tool_calls"] = [fields.pop("function_call")]
    content = _content(fields.get(content_key), where)
    rest = {key: fields[key] for key in fields if key not in (role_key, content_key, *TRAIN_KEYS)}
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(parse_json_cell(rest["tool_calls"], "tool_calls"), where)
    if content_key not in fields and not rest.get("tool_calls"):
        raise InvalidRecord(f"{where} has no content (it has: {format_list(fields)})")
    return {"role": _role(fields[role_key], where), "content": content, **rest}, train


def _role(value: Any, where: str) -> str:
    role = _ROLE_OF.get(str(value).strip().lower())
    if role is None:
        hint = did_you_mean(str(value).lower(), _ROLE_OF) or f"known: {', '.join(ROLES)}"
        raise InvalidRecord(f"{where} has the unknown role {value!r} ({hint})")
    return role


def _content(value: Any, where: str) -> str:
    """Content as text; a list of parts, as OpenAI's API has it, may hold text only."""
    if not isinstance(value, list | tuple):
        return cell_text(value, where)
    texts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            texts.append(cell_text(part.get("text"), where))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
            raise InvalidRecord(f"{where} has a part of type {kind!r}; only text can be trained on")
    return "".join(texts)


def _train_flag(message: Mapping[str, Any], where: str) -> bool | None:
    """The message's own train (or training) true or false, or weight 0 or 1; None if it has none of them."""
    flag = None
    for key in TRAIN_KEYS:
        if key in message:
            if message[key] not in (0, 1):
                allowed = "0 or 1" if key == "weight" else "true or false"
                hint = "; only whole rows have other weights" if key == "weight" else ""
                raise InvalidRecord(f"{where}: {key} must be {allowed}, not {message[key]!r}{hint}")
            if flag is not None and flag != bool(message[key]):
                raise InvalidRecord(f"{where}: train and weight contradict each other")
            flag = bool(message[key])
    return flag


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Tool calls with their arguments as mappings: OpenAI's API writes JSON text, templates take mappings."""
    if not isinstance(calls, list | tuple):
        raise InvalidRecord(f"{where}: tool_calls must be a list")
    if not all(isinstance(call, Mapping) for call in calls):
        raise InvalidRecord(
            f"{where}: tool_calls holds {next(type_name(c) for c in calls if not isinstance(c, Mapping))}"
        )
    parsed = [_tool_call(call) for call in calls]
    if any(not isinstance(call.get("function"), Mapping) or not call["function"].get("name") for call in parsed):
        raise InvalidRecord(f"{where} has a tool call without the name of a function")
    return parsed


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" not in call and "name" in call:
        call = {"type": "function", "function": call}
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), Mapping):
        call["function"] = _function(call["function"])
    return call


def _function(function: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: value for key, value in function.items() if value is not None}
    if isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return function
        function["arguments"] = arguments if isinstance(arguments, dict) else function["arguments"]
    return function


def _tools(value: Any) -> tuple[Any, ...]:
    tools = parse_json_cell(value, "tools") if value else ()
    if not isinstance(tools, list | tuple):
        raise InvalidRecord(f"tools must be a list, not {type_name(tools)}")
    return tuple(tools)


def _history_pairs(history: Any) -> list[tuple[str, str]]:
    pairs = parse_json_cell(history, "history") if history else []
    if not isinstance(pairs, list | tuple) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs
    ):
        raise InvalidRecord("history must be a list of [question, answer] pairs")
    return [(cell_text(question, "history"), cell_text(answer, "history")) for question, answer in pairs]


def _has_content(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
