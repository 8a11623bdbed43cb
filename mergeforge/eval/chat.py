"""A conversation with a model: turns, settings, and slash commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mergeforge.errors import OutputError, RecipeError, did_you_mean
from mergeforge.eval.backend import Answer, ModelBackend, OnText, PromptTooLong
from mergeforge.eval.sampling import Sampling, with_setting

DEMO = (
    "Hello! Who are you, in one sentence?",
    "Explain to a child why the sky is blue.",
    "Write a haiku about autumn rain.",
    "Give me three tips for learning a language.",
)
HELP = """\
/system TEXT       set the system message (without TEXT: show it; `none` removes it)
/reset             forget the conversation
/regen             answer the last message again
/set NAME VALUE    temperature, top_p, top_k, max_tokens, repetition_penalty, seed, stop (alone: show them)
/save FILE         save the conversation: .md for reading; .jsonl appends a row for training
/help              show this list
/exit              quit, like Ctrl-D; Ctrl-C stops an answer
//...              send a message that starts with a slash"""
Message = Mapping[str, str]


@dataclass
class Chat:
    """A conversation. `on_message` gets notes for the user, such as that turns were dropped."""

    model: ModelBackend
    sampling: Sampling
    system: str = ""
    on_message: OnText = lambda text: None
    turns: list[Message] = field(default_factory=list)

    def send(self, text: str, on_text: OnText | None = None) -> Answer:
        """Answer a message; both join the conversation. Raises PromptTooLong for a message that never fits."""
        return self._answer([*self.turns, {"role": "user", "content": text}], on_text)

    def regenerate(self, on_text: OnText | None = None) -> Answer:
        """Answer the last message again. Raises RecipeError if there is none."""
        if not self.turns:
            raise RecipeError("there is no answer to regenerate")
        return self._answer(self.turns[:-1], on_text)

    @property
    def messages(self) -> list[Message]:
        """The system message and the turns."""
        return self._with_system(self.turns)

    def save(self, path: Path) -> None:
        """Write the conversation in the format that the suffix names. Raises OutputError."""
        if path.suffix == ".md":
            text = "\n\n".join(f"**{message['role']}**: {message['content']}" for message in self.messages) + "\n"
        else:
            text = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            with open(path, "a" if path.suffix == ".jsonl" else "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None

    def _answer(self, turns: list[Message], on_text: OnText | None) -> Answer:
        """Answer the last of these turns, which become the conversation; drop the oldest ones if they do not fit."""
        dropped = 0
        while True:
            try:
                answer = self.model.chat(self._with_system(turns), self.sampling, _without_leading_space(on_text))
                break
            except PromptTooLong:
                if len(turns) < 3:
                    raise
                turns, dropped = turns[2:], dropped + 1
        self.turns = [*turns, {"role": "assistant", "content": answer.text.strip()}]
        if dropped:
            count = f"{dropped} oldest turns were" if dropped > 1 else "oldest turn was"
            self.on_message(f"the context is full: the {count} forgotten")
        return answer

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]


def run_slash_command(chat: Chat, line: str) -> str:
    """Execute a slash command (except /regen and /exit) and return the text to show. Raises RecipeError."""
    name, _, rest = line.strip().partition(" ")
    commands: dict[str, Callable[[Chat, str], str]] = {
        "/system": _system,
        "/reset": _reset,
        "/set": _set,
        "/save": _save,
        "/help": lambda chat, rest: HELP,
    }
    if name not in commands:
        hint = did_you_mean(name, [*commands, "/regen", "/exit"]) or "/help lists the commands"
        raise RecipeError(f"there is no command {name}", hint=hint)
    return commands[name](chat, rest.strip())


def format_settings(sampling: Sampling) -> str:
    """The settings, one per line."""
    values: dict[str, Any] = asdict(sampling)
    return "\n".join(f"{name:18} {_format_value(value)}" for name, value in values.items())


def _without_leading_space(on_text: OnText | None) -> OnText | None:
    """`on_text` without the white space that some templates leave to the start of the answer."""
    if on_text is None:
        return None
    started = False

    def strip_first(piece: str) -> None:
        nonlocal started
        piece = piece if started else piece.lstrip()
        started = started or bool(piece)
        if piece:
            on_text(piece)

    return strip_first


def _system(chat: Chat, text: str) -> str:
    if text:
        chat.system = "" if text == "none" else text
    return f"system: {chat.system or 'none'}"


def _reset(chat: Chat, text: str) -> str:
    chat.turns.clear()
    return "the conversation is forgotten"


def _set(chat: Chat, text: str) -> str:
    name, _, value = text.partition(" ")
    if name and not value.strip():
        raise RecipeError(f"/set {name} needs a value", hint="such as /set temperature 0.2")
    if name:
        chat.sampling = with_setting(chat.sampling, name, value.strip())
    return format_settings(chat.sampling)


def _save(chat: Chat, text: str) -> str:
    if not text:
        raise RecipeError("/save needs a file", hint="such as /save chat.md")
    chat.save(Path(text).expanduser())
    return f"wrote {text}"


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(repr(item) for item in value) or "none"
    return "none" if value is None else str(value)
