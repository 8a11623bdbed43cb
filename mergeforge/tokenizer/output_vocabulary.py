"""The output's tokens and their ids: one model's, those of all models, and those that the recipe adds.

Whatever the output's tokenizer gets is added to one model's, the donor's; so its own tokens keep their ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergeforge.errors import RecipeError, SourceError, listing
from mergeforge.tokenizer.hf_vocabulary import FLAGS, Flags, Vocabulary, added_ids
from mergeforge.tokenizer.settings import TokenizerSettings


@dataclass(frozen=True)
class Output:
    """`ids` of all tokens, `added` tokens' flags in the ids' order, rows of the embedding, the last `padding` new."""

    ids: Mapping[str, int]
    added: Mapping[str, Flags]
    size: int
    padding: int
    notes: tuple[str, ...]


def output_vocabulary(settings: TokenizerSettings, vocabularies: Mapping[str, Vocabulary], donor: str) -> Output:
    """The tokens of the output's tokenizer. Raises RecipeError or SourceError.

    `vocabularies`: the donor's first, then the others in the recipe's order.
    """
    one = vocabularies[donor]
    dropped = [token for token in one.rowless if token not in {*one.named.values(), *one.listed}]
    added = {token: flags for token, flags in one.added.items() if token not in dropped}
    notes = [f"tokenizer: {len(one.ids) - len(dropped)} tokens of {donor}"]
    if settings.source == "union":
        for label, count in _join(added, vocabularies, one).items():
            notes += [f"tokenizer: {count} more of {label}"] * bool(count)
    if dropped:
        text = f"{donor} has no row for {listing(map(repr, dropped))}: left out of the tokenizer"
        notes.append(text)
    if count := _add(added, settings, one):
        notes.append(f"tokenizer: {count} more of the recipe's")
    ids = {**one.plain, **added_ids(one.plain, added)}
    _check_distinct(ids, one)
    size, padding = _size(max(ids.values()) + 1, one.model.rows, settings.pad_to_multiple_of)
    ordered = {token: added[token] for token in sorted(added, key=lambda token: ids[token])}
    return Output(ids, ordered, size, padding, tuple(notes))


def _join(added: dict[str, Flags], vocabularies: Mapping[str, Vocabulary], one: Vocabulary) -> dict[str, int]:
    """Add the other merged models' tokens; gives how many each brings.

    A token that any model adds is matched as the first of these says, also where others have it in their
    vocabulary; what no model adds, but the donor's vocabulary lacks, is a plain added token.
    """
    merged = {label: vocabulary for label, vocabulary in vocabularies.items() if vocabulary.model.merged}
    flags: dict[str, Flags] = {}
    for vocabulary in merged.values():
        for token, own in vocabulary.added.items():
            if vocabulary.row(token) >= 0:
                flags.setdefault(token, own)
    brought: dict[str, int] = {}
    for label, vocabulary in list(merged.items())[1:]:
        before = len(added)
        for token in _with_rows(vocabulary):
            if token in flags or token not in one.plain:
                added.setdefault(token, flags.get(token, FLAGS))
        brought[label] = len(added) - before
    return brought


def _with_rows(vocabulary: Vocabulary) -> Iterator[str]:
    """Tokens that the embedding has a row for, in the order of their ids."""
    numbered = sorted((number, token) for token, number in vocabulary.ids.items() if number < vocabulary.model.rows)
    return (token for _, token in numbered if token)


def _add(added: dict[str, Flags], settings: TokenizerSettings, one: Vocabulary) -> int:
    if "" in settings.tokens:
        raise RecipeError("tokenizer.tokens: a token cannot be empty text")
    new = [token for token in settings.tokens if token not in added and token not in one.plain]
    added.update(dict.fromkeys(new, FLAGS))
    return len(new)


def _size(count: int, rows: int, multiple: int | None) -> tuple[int, int]:
    """Rows of the embedding, and how many of them are new padding."""
    if multiple is None:
        return max(count, rows), 0
    size = -(-count // multiple) * multiple
    return size, size - count


def _check_distinct(ids: Mapping[str, int], one: Vocabulary) -> None:
    """Two tokens cannot have one row. The library gives such ids where a vocabulary leaves numbers out."""
    if len(set(ids.values())) == len(ids):
        return
    by_id = {number: text for text, number in ids.items()}
    twice = [f"{text!r} and {by_id[number]!r} ({number})" for text, number in ids.items() if by_id[number] != text]
    raise SourceError(
        f"{one.label}: tokens of one id, {listing(twice)}",
        hint="the vocabulary in its tokenizer.json leaves numbers out: add a token for each",
    )
