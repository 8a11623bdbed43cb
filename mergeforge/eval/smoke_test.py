"""A quick look whether models answer as they should: the same few prompts, greedily, through each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.errors import MergeforgeError, SourceError
from mergeforge.eval.backend import Answer, Answerer
from mergeforge.eval.sampling import Sampling

PROMPTS = (
    "Say hello in one short sentence.",
    "What is two plus two? Answer with the number alone.",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
)
SMOKE = Sampling(max_tokens=256, temperature=0)
REPEATS = 6  # of one stretch of text, one after another at an answer's end, are a loop
SHORTEST, LONGEST = 40, 400  # characters that the repeats have together at least, and that one has at most
# What ends turns in the well-known templates: in a text it says that a mark was not taken as one.
MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "</s>",
    "[|endofturn|]",
)


@dataclass(frozen=True)
class Failure:
    """A check that a model does not pass, and what was seen."""

    check: str
    why: str


@dataclass(frozen=True)
class Smoke:
    """What one model answered, and the checks that it fails: of the answers, `template`, or `runs`."""

    model: str
    kind: str
    prompts: tuple[str, ...]
    answers: tuple[Answer, ...]
    failures: tuple[Failure, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Everything for JSON."""
        answers = [
            {"prompt": prompt, **asdict(answer)} for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]
        failures = [asdict(failure) for failure in self.failures]
        return {"model": self.model, "kind": self.kind, "ok": self.ok, "failures": failures, "answers": answers}


@dataclass(frozen=True)
class Agreement:
    """How far two models' greedy answers agree: answers that are the same, and share of the text before they part."""

    one: str
    other: str
    same: int
    prompts: int
    share: float


def smoke(
    answerer: Answerer,
    prompts: Sequence[str] = PROMPTS,
    sampling: Sampling = SMOKE,
    *,
    system: str | None = None,
) -> Smoke:
    """Answer each prompt and look at the answers. Temperature is 0 whatever `sampling` says."""
    before = [{"role": "system", "content": system}] if system else []
    greedy = replace(sampling, temperature=0.0)
    answers = tuple(answerer.reply([*before, {"role": "user", "content": one}], greedy) for one in prompts)
    failures = list(_failures(answers))
    if not answerer.template:
        failures.append(Failure("template", "it has no chat template, so programs guess how to ask it"))
    return Smoke(answerer.name, answerer.kind, tuple(prompts), answers, tuple(failures))


def agreement(one: Smoke, other: Smoke) -> Agreement:
    """How far the answers to the same prompts agree."""
    pairs = [(a.text.strip(), b.text.strip()) for a, b in zip(one.answers, other.answers, strict=True)]
    common = sum(_common(a, b) for a, b in pairs)
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    same = sum(a == b for a, b in pairs)
    return Agreement(one.model, other.model, same, len(pairs), common / longest if longest else 1.0)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """A prompt a line; empty lines and those after # are none. Raises SourceError."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    found = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not found:
        raise SourceError(f"{path} holds no prompts", hint="one a line")
    return found


def repeated(text: str) -> str:
    """What stands again and again at the end of a text; "" where nothing does."""
    for size in range(1, min(len(text) // REPEATS, LONGEST) + 1):
        part = text[-size:]
        times = max(REPEATS, -(-SHORTEST // size))
        if part.strip() and text.endswith(part * times):
            return part
    return ""


def _failures(answers: Sequence[Answer]) -> list[Failure]:
    found = []
    empty = [at for at, one in enumerate(answers, 1) if not one.text.strip()]
    if empty:
        found.append(Failure("not empty", f"the answer to {_places(empty)} is empty"))
    endless = [at for at, one in enumerate(answers, 1) if one.ended == "length"]
    if endless:
        most = max(answers[at - 1].tokens for at in endless)
        found.append(Failure("ends by itself", f"the answer to {_places(endless)} does not end in {most} tokens"))
    loops = {at: part for at, one in enumerate(answers, 1) if (part := repeated(one.text))}
    if loops:
        at, part = next(iter(loops.items()))
        found.append(
            Failure("no repetition", f"the answer to {_places(list(loops))} repeats {part[:40]!r} (prompt {at})")
        )
    if any(not one.finite for one in answers):
        found.append(Failure("finite", "probabilities are not numbers (NaN or infinite)"))
    marks = {mark: None for one in answers for mark in (*one.leaked, *(m for m in MARKS if m in one.text))}
    if marks:
        found.append(Failure("no marks in the text", f"answers hold {', '.join(marks)}"))
    return found


def _places(places: Sequence[int]) -> str:
    numbers = ", ".join(str(at) for at in places)
    return f"prompt{'s' if len(places) > 1 else ''} {numbers}"


def _common(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def failed(model: str, error: MergeforgeError) -> Smoke:
    """The outcome of a model that could not be run at all."""
    return Smoke(model, "", (), (), (Failure("runs", str(error)),))
