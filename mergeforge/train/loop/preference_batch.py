"""Answers with a preference -> the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mergeforge.train.loop.chunked_loss import IGNORE_INDEX
from mergeforge.train.loop.collate import Row, Rows, SequenceStore, collate


@dataclass(frozen=True)
class AnswerTokens:
    """A prompt with an answer. `labels`: -100 outside of the answer; `preference`: 1 or -1."""

    tokens: Tensor
    labels: Tensor
    preference: int

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return int((self.labels != IGNORE_INDEX).int().argmax())


Answers = list[AnswerTokens]


class PreferenceSequences(Dataset[Answers]):
    """The sequences of a data set: the answers that each pack names by index; both answers of a pair are in one."""

    def __init__(self, store: SequenceStore, packs: Sequence[Sequence[int]]) -> None:
        self.store = store
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Answers:
        examples = (self.store[row] for row in self.packs[index])
        return [
            AnswerTokens(torch.tensor(example.tokens), torch.tensor(example.labels), example.preference)
            for example in examples
        ]


def collate_answers(
    sequences: Sequence[Answers], *, pad: int, packed: bool, prompts: bool, mismatched: bool
) -> dict[str, Tensor]:
    """input_ids, position_ids, labels and segments, each (sequences, width); preferences (answers).

    `packed`: the answers of a sequence stay in one; otherwise each answer gets a sequence of its own. Segment i is
    answer i, and with `prompts`, segment answers + i is the prompt of answer i, which then has labels if the answer is
    preferred (ORPO). With `mismatched`, the same tensors, under names that begin with "mismatched_", hold each prompt
    with another row's answer (KTO).
    """
    batch = _tensors(sequences, pad, packed, prompts)
    answers = [answer for sequence in sequences for answer in sequence]
    batch["preferences"] = torch.tensor([answer.preference for answer in answers])
    if mismatched:
        others = iter(_mismatched(answers))
        rotated = [[next(others) for _ in sequence] for sequence in sequences]
        batch |= {f"mismatched_{name}": tensor for name, tensor in _tensors(rotated, pad, packed, False).items()}
    return batch


def _tensors(sequences: Sequence[Answers], pad: int, packed: bool, prompts: bool) -> dict[str, Tensor]:
    if not packed:
        sequences = [[answer] for sequence in sequences for answer in sequence]
    count = sum(len(sequence) for sequence in sequences)
    rows: list[Rows] = []
    segments: list[Rows] = []
    number = 0
    for sequence in sequences:
        rows.append([Row(answer.tokens, _labels(answer, prompts)) for answer in sequence])
        segments.append([])
        for answer in sequence:
            segments[-1].append(Row(_segments(answer, number, count, prompts), answer.labels))
            number += 1
    batch = collate(rows, pad=pad)
    return batch | {"segments": collate(segments, pad=-1)["input_ids"]}


def _labels(answer: AnswerTokens, prompts: bool) -> Tensor:
    return answer.tokens if prompts and answer.preference > 0 else answer.labels


def _segments(answer: AnswerTokens, number: int, count: int, prompts: bool) -> Tensor:
    is_answer = answer.labels != IGNORE_INDEX
    return torch.where(is_answer, number, number + count if prompts else -1)


def _mismatched(answers: Answers) -> Answers:
    """Each prompt with the answer of the row before it; the first gets the last one's."""
    return [_with_answer_of(answers[index], answers[index - 1]) for index in range(len(answers))]


def _with_answer_of(row: AnswerTokens, other: AnswerTokens) -> AnswerTokens:
    tokens = torch.cat([row.tokens[: row.prompt], other.tokens[other.prompt :]])
    labels = torch.cat([torch.full((row.prompt,), IGNORE_INDEX), other.labels[other.prompt :]])
    return AnswerTokens(tokens, labels, row.preference)
