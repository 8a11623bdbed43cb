"""A quick check that models answer as they should: the same few prompts, greedily, through each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.errors import MergeforgeError, SourceError
from mergeforge.eval.backend import Answer, ModelBackend
from mergeforge.eval.sampling import Sampling

PROMPTS = (
    "Say hello in one short sentence.",
    "What is two plus two? Answer with the number alone.",
    "Name three colors of the rainbow.",
    "Write one sentence about the sea.",
)
SMOKE_SAMPLING = Sampling(max_tokens=256, temperature=0)
MIN_REPEATS = 6  # consecutive copies of a text at the end of an answer that count as a loop
MIN_LOOP_CHARS = 40  # that the copies have together
MAX_COPY_CHARS = 400  # that one copy has
# Turn markers of well-known templates: in the text of an answer they mean that a special token was not recognized.
TURN_MARKERS = (
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
    """A check that a model fails, and the evidence."""

    check: str
    why: str


@dataclass(frozen=True)
class SmokeResult:
    """What one model answered, and the checks that it fails: those of the answers, `template`, or `runs`."""

    model: str
    kind: str
    prompts: tuple[str, ...]
    answers: tuple[Answer, ...]
    failures: tuple[Failure, ...]

    @property
    def ok(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        answers = [
            {"prompt": prompt, **asdict(answer)} for prompt, answer in zip(self.prompts, self.answers, strict=True)
        ]
        failures = [asdict(failure) for failure in self.failures]
        return {"model": self.model, "kind": self.kind, "ok": self.ok, "failures": failures, "answers": answers}


@dataclass(frozen=True)
class Agreement:
    """How far the greedy answers of two models agree: equal answers, and the share of the text before they diverge."""

    one: str
    other: str
    same: int
    prompts: int
    share: float


def smoke(
    model: ModelBackend,
    prompts: Sequence[str] = PROMPTS,
    sampling: Sampling = SMOKE_SAMPLING,
    *,
    system: str | None = None,
) -> SmokeResult:
    """Answer each prompt and check the answers. The temperature is always 0."""
    context = [{"role": "system", "content": system}] if system else []
    greedy = replace(sampling, temperature=0.0)
    answers = tuple(model.chat([*context, {"role": "user", "content": prompt}], greedy) for prompt in prompts)
    failures = list(check_answers([_with_structural_marks(answer, model) for answer in answers]))
    if not model.template:
        failures.append(Failure("template", "it has no chat template, so programs must guess the prompt format"))
    return SmokeResult(model.name, model.kind, tuple(prompts), answers, tuple(failures))


def _with_structural_marks(answer: Answer, model: ModelBackend) -> Answer:
    """The answer with only those special tokens that structure a chat; others, such as tokens that training added, may
    be part of an answer."""
    tokenizer = model.tokenizer
    named = {str(getattr(tokenizer, f"{name}_token", None)) for name in ("bos", "eos", "pad", "unk", "sep", "cls")}
    marks = (name for name in answer.leaked if name in TURN_MARKERS or name in named or name in model.template)
    return replace(answer, leaked=tuple(marks))


def agreement(one: SmokeResult, other: SmokeResult) -> Agreement:
    """How far the answers to the same prompts agree."""
    pairs = [(a.text.strip(), b.text.strip()) for a, b in zip(one.answers, other.answers, strict=True)]
    common = sum(_common_prefix(a, b) for a, b in pairs)
    longest = sum(max(len(a), len(b)) for a, b in pairs)
    same = sum(a == b for a, b in pairs)
    return Agreement(one.model, other.model, same, len(pairs), common / longest if longest else 1.0)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """One prompt per line; empty lines and lines that start with # are skipped. Raises SourceError."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not prompts:
        raise SourceError(f"{path} holds no prompts", hint="write one per line")
    return prompts


def repeated_ending(text: str) -> str:
    """What is repeated over and over at the end of a text; "" if nothing is."""
    for size in range(1, min(len(text) // MIN_REPEATS, MAX_COPY_CHARS) + 1):
        part = text[-size:]
        repeats = max(MIN_REPEATS, -(-MIN_LOOP_CHARS // size))
        if part.strip() and text.endswith(part * repeats):
            return part
    return ""


def check_answers(answers: Sequence[Answer]) -> list[Failure]:
    """The checks that these answers fail."""
    failures = []
    empty = [number for number, answer in enumerate(answers, 1) if not answer.text.strip()]
    if empty:
        failures.append(Failure("not empty", f"the answer to {_prompt_numbers(empty)} is empty"))
    endless = [number for number, answer in enumerate(answers, 1) if answer.ended in ("length", "context")]
    if endless:
        tokens = max(answers[number - 1].tokens for number in endless)
        why = f"the answer to {_prompt_numbers(endless)} does not end within {tokens} tokens"
        failures.append(Failure("ends by itself", why))
    loops = {number: part for number, answer in enumerate(answers, 1) if (part := repeated_ending(answer.text))}
    if loops:
        number, part = next(iter(loops.items()))
        why = f"the answer to {_prompt_numbers(list(loops))} repeats {part[:40]!r} (prompt {number})"
        failures.append(Failure("no repetition", why))
    if any(not answer.finite for answer in answers):
        failures.append(Failure("finite", "probabilities are NaN or infinite"))
    markers = dict.fromkeys(
        marker
        for answer in answers
        for marker in (*answer.leaked, *(marker for marker in TURN_MARKERS if marker in answer.text))
    )
    if markers:
        failures.append(Failure("no marks in the text", f"answers contain {', '.join(markers)}"))
    return failures


def _prompt_numbers(numbers: Sequence[int]) -> str:
    return f"prompt{'s' if len(numbers) > 1 else ''} {', '.join(str(number) for number in numbers)}"


def _common_prefix(first: str, second: str) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def could_not_run(model: str, error: MergeforgeError) -> SmokeResult:
    """The result of a model that could not be run at all."""
    return SmokeResult(model, "", (), (), (Failure("runs", str(error)),))
