"""A conversation with a model: turns, settings, and the commands that begin with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mergeforge.errors import OutputError, RecipeError, did_you_mean
from mergeforge.eval import Answer, Answerer, Sampling, TooLong, with_setting

DEMO = (
    "Hello! Who are you, in one sentence?",
    "Explain to a child why the sky is blue.",
    "Write a haiku about autumn rain.",
    "Give me three tips for learning a language.",
)
HELP = """\
/system TEXT       what the model is told before everything else (alone: shows it; `none` takes it away)
/reset             forget the conversation
/regen             answer the last question again
/set NAME VALUE    temperature, top_p, top_k, max_tokens, repetition_penalty, seed, stop (alone: shows them)
/save FILE         write the conversation: .md to read; .jsonl appends a row that can be trained on
/help              this
/exit              end, as Ctrl-D does; Ctrl-C stops an answer
//...              a message that begins with a slash"""
Message = Mapping[str, str]
Tell = Callable[[str], object]


@dataclass
class Chat:
    """A conversation. `note` is told what a person should know, as when turns are dropped."""

    model: Answerer
    sampling: Sampling
    system: str = ""
    note: Tell = lambda text: None
    turns: list[Message] = field(default_factory=list)

    def say(self, text: str, tell: Tell | None = None) -> Answer:
        """Answer a message; both become part of the conversation. Raises TooLong for a message that never fits."""
        return self._answer([*self.turns, {"role": "user", "content": text}], tell)

    def again(self, tell: Tell | None = None) -> Answer:
        """Answer the last message anew. Raises RecipeError where there is none."""
        if not self.turns:
            raise RecipeError("there is no answer to give again")
        return self._answer(self.turns[:-1], tell)

    @property
    def messages(self) -> list[Message]:
        """The system message and the turns."""
        return self._with_system(self.turns)

    def save(self, path: Path) -> None:
        """Write the conversation; the ending says how. Raises OutputError."""
        if path.suffix == ".md":
            text = "\n\n".join(f"**{one['role']}**: {one['content']}" for one in self.messages) + "\n"
        else:
            text = json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n"
        try:
            with open(path, "a" if path.suffix == ".jsonl" else "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None

    def _answer(self, turns: list[Message], tell: Tell | None) -> Answer:
        """Answer the last of these turns, which become the conversation; the oldest go where there is no room."""
        dropped = 0
        while True:
            try:
                answer = self.model.reply(self._with_system(turns), self.sampling, _from_first_word(tell))
                break
            except TooLong:
                if len(turns) < 3:
                    raise
                turns, dropped = turns[2:], dropped + 1
        self.turns = [*turns, {"role": "assistant", "content": answer.text.strip()}]
        if dropped:
            self.note(f"the {dropped} oldest turn{'s were' if dropped > 1 else ' was'} forgotten: no room is left")
        return answer

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *turns]


def command(chat: Chat, line: str) -> str:
    """Do what a line that begins with a slash says, but for /regen and /exit; what to tell. Raises RecipeError."""
    name, _, rest = line.strip().partition(" ")
    known: dict[str, Callable[[Chat, str], str]] = {
        "/system": _system,
        "/reset": _reset,
        "/set": _set,
        "/save": _save,
        "/help": lambda chat, rest: HELP,
    }
    if name not in known:
        hint = did_you_mean(name, [*known, "/regen", "/exit"]) or "/help lists them"
        raise RecipeError(f"there is no command {name}", hint=hint)
    return known[name](chat, rest.strip())


def settings(sampling: Sampling) -> str:
    """The settings, a line each."""
    values: dict[str, Any] = asdict(sampling)
    return "\n".join(f"{name:18} {_shown(value)}" for name, value in values.items())


def _from_first_word(tell: Tell | None) -> Tell | None:
    """`tell` without the white space that some templates leave to the answer's start."""
    if tell is None:
        return None
    begun = False

    def after(piece: str) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        if piece:
            tell(piece)

    return after


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
    return settings(chat.sampling)


def _save(chat: Chat, text: str) -> str:
    if not text:
        raise RecipeError("/save needs a file", hint="such as /save chat.md")
    chat.save(Path(text).expanduser())
    return f"wrote {text}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(repr(one) for one in value) or "none"
    return "none" if value is None else str(value)
