"""Conversations: what every row of every format becomes, but for plain text.

Messages are as chat templates take them: role, content, and what else a template may look at (tool_calls, name,
reasoning_content). Roles are system, user, assistant and tool; the names that others give them are known here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from mergeforge.data.readers.open import kind_of
from mergeforge.errors import did_you_mean, listing

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bard", "bing", "function_call"),
    "tool": ("tool", "function", "observation", "ipython", "function_response", "tool_response"),
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
TRAIN_KEYS = ("train", "training", "weight")
_ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """A row that cannot be used; the text says why."""


class EmptyRow(Exception):
    """A row in which there is nothing to train on; the text says what is empty."""


@dataclass(frozen=True)
class Conversation:
    """Messages in order; `trained`: what the row says of each (None: nothing); `tools`: as templates take them."""

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool | None, ...]
    tools: tuple[Any, ...] = ()

    def key(self, seed: int = 0) -> int:
        """64 bits that are the same for the same content."""
        content = [self.messages, self.trained, self.tools]
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
        return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed)


@dataclass(frozen=True)
class Passage:
    """Plain text, all of which is trained on."""

    text: str

    def key(self, seed: int = 0) -> int:
        return xxhash.xxh3_64_intdigest(self.text.encode("utf-8", "surrogatepass"), seed)


def conversation(
    messages: Sequence[Mapping[str, Any]], *, system: str | None = None, tools: Any = None, columns: Any = None
) -> Conversation:
    """Messages as a row holds them, checked. `columns`: {"role": key, "content": key} where they have other names.

    Raises BadRow and EmptyRow.
    """
    read = [_message(message, at, columns or {}) for at, message in enumerate(messages)]
    kept = [(one, train) for one, train in read if one["role"] != "system" or one["content"]]
    if system and not any(one["role"] == "system" for one, _ in kept):
        kept.insert(0, ({"role": "system", "content": system}, None))
    for one, train in kept:
        if one["role"] == "user" and not one["content"].strip():
            raise EmptyRow("an empty question")
        if one["role"] == "assistant" and train is not False and not _says_something(one):
            raise EmptyRow("an empty answer")
    return Conversation(tuple(one for one, _ in kept), tuple(train for _, train in kept), _tools(tools))


def exchange(
    prompt: str, response: str, *, system: str | None = None, before: str | None = None, history: Any = None
) -> Conversation:
    """A question and its answer. `before`: the system message that the row itself gives; `history`: earlier pairs."""
    if not prompt.strip():
        raise EmptyRow("an empty question")
    messages: list[dict[str, Any]] = [{"role": "system", "content": before}] if before else []
    for pair in _pairs(history):
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return conversation(messages, system=system)


def text_of(value: Any, what: str) -> str:
    """A cell as text: numbers as they are written, nothing and NaN as none. Raises BadRow for anything else."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if not isinstance(value, str):
        raise BadRow(f"{what} holds {kind_of(value)}, not text")
    if SURROGATE.search(value):
        raise BadRow(f"{what} is not UTF-8 text")
    return value


def parsed(value: Any, what: str) -> Any:
    """A list or mapping that may be written as JSON in a text cell. Raises BadRow."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} holds text that is not JSON") from None


def _message(message: Any, at: int, columns: Mapping[str, str]) -> tuple[dict[str, Any], bool | None]:
    """(message, whether it is to be trained on if it says so)."""
    if not isinstance(message, Mapping):
        raise BadRow(f"message {at + 1} is {kind_of(message)}, not a mapping")
    held = {str(key): value for key, value in message.items() if value is not None}  # parquet fills up with None
    lower = {key.lower(): key for key in held}
    role_key = columns.get("role") or next((lower[key] for key in ROLE_KEYS if key in lower), "")
    content_key = columns.get("content") or next((lower[key] for key in CONTENT_KEYS if key in lower), "")
    if role_key not in held:
        raise BadRow(f"message {at + 1} has no role (it has: {listing(held)})")
    train = _trained(held, at)
    content = _content(held.get(content_key), f"message {at + 1}")
    rest = {key: held[key] for key in held if key not in (role_key, content_key, *TRAIN_KEYS)}
    if "tool_calls" in rest:
        rest["tool_calls"] = _calls(parsed(rest["tool_calls"], "tool_calls"), at)
    if content_key not in held and not rest.get("tool_calls"):
        raise BadRow(f"message {at + 1} has no content (it has: {listing(held)})")
    return {"role": _role(held[role_key], at), "content": content, **rest}, train


def _role(value: Any, at: int) -> str:
    role = _ROLE_OF.get(str(value).strip().lower())
    if role is None:
        hint = did_you_mean(str(value).lower(), _ROLE_OF) or f"known: {', '.join(ROLES)}"
        raise BadRow(f"message {at + 1} has the unknown role {value!r} ({hint})")
    return role


def _content(value: Any, what: str) -> str:
    """Content as text; a list of parts (as OpenAI's) may hold text alone."""
    if not isinstance(value, list | tuple):
        return text_of(value, what)
    texts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type", "text") == "text":
            texts.append(text_of(part.get("text"), what))
        else:
            kind = part.get("type") if isinstance(part, Mapping) else kind_of(part)
            raise BadRow(f"{what} holds a part of the type {kind!r}; only text is trained on")
    return "".join(texts)


def _trained(message: Mapping[str, Any], at: int) -> bool | None:
    """What a message says of itself: train (or training) true or false, or weight 0 or 1."""
    found = None
    for key in TRAIN_KEYS:
        if key in message:
            if message[key] not in (0, 1):
                wanted = "0 or 1" if key == "weight" else "true or false"
                raise BadRow(f"message {at + 1}: {key} must be {wanted}, not {message[key]!r}")
            if found is not None and found != bool(message[key]):
                raise BadRow(f"message {at + 1}: train and weight say different things")
            found = bool(message[key])
    return found


def _calls(calls: Any, at: int) -> list[Any]:
    """Tool calls with their arguments as a mapping: OpenAI writes them as JSON text, templates take mappings."""
    if not isinstance(calls, list | tuple):
        raise BadRow(f"message {at + 1}: tool_calls must be a list")
    return [_call(call) for call in calls]


def _call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    call = {key: value for key, value in call.items() if value is not None}
    if isinstance(call.get("function"), Mapping):
        call["function"] = _call(call["function"])
    if isinstance(call.get("arguments"), str):
        try:
            arguments = json.loads(call["arguments"])
        except (ValueError, RecursionError):
            return call
        call["arguments"] = arguments if isinstance(arguments, dict) else call["arguments"]
    return call


def _tools(value: Any) -> tuple[Any, ...]:
    tools = parsed(value, "tools") if value else ()
    if not isinstance(tools, list | tuple):
        raise BadRow(f"tools must be a list, not {kind_of(tools)}")
    return tuple(tools)


def _pairs(history: Any) -> list[tuple[str, str]]:
    pairs = parsed(history, "history") if history else []
    if not isinstance(pairs, list | tuple) or any(not isinstance(one, list | tuple) or len(one) != 2 for one in pairs):
        raise BadRow("history must be a list of [question, answer] pairs")
    return [(text_of(one[0], "history"), text_of(one[1], "history")) for one in pairs]


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
