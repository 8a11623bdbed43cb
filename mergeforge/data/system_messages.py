"""System messages for templates that refuse them (Gemma, Mistral) or leave them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MERGE, DROP, REFUSE = SYSTEM_POLICIES = ("merge", "drop", "refuse")


def without_system_messages(messages: Sequence[Mapping[str, Any]], policy: str) -> list[Mapping[str, Any]]:
    """The messages without system messages.

    `merge` puts the text in front of the user turn that follows; if none follows, at the end of the one before it; else
    it becomes a user turn of its own. So what precedes an answer does not depend on what comes after it.
    """
    if policy == DROP:
        return [message for message in messages if message["role"] != "system"]
    result: list[Mapping[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(str(message["content"]))
            continue
        if waiting and message["role"] == "user":
            message = {**message, "content": _joined([*waiting, str(message["content"])])}
        elif waiting:
            _append_as_user(result, waiting)
        waiting = []
        result.append(message)
    if waiting:
        _append_as_user(result, waiting)
    return result


def _append_as_user(messages: list[Mapping[str, Any]], texts: Sequence[str]) -> None:
    if messages and messages[-1]["role"] == "user":
        messages[-1] = {**messages[-1], "content": _joined([str(messages[-1]["content"]), *texts])}
    else:
        messages.append({"role": "user", "content": _joined(texts)})


def _joined(texts: Sequence[str]) -> str:
    return "\n\n".join(text for text in texts if text)
