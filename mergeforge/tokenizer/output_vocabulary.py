"""The output's tokens and their ids: one model's, those of all models, and those that the recipe adds.

The output's tokenizer is the source model's, and further tokens are added to it; so its own tokens keep their ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mergeforge.errors import RecipeError, SourceError, format_list
from mergeforge.tokenizer.hf_files import FLAGS
from mergeforge.tokenizer.hf_vocabulary import Flags, ModelVocabulary, assign_added_ids
from mergeforge.tokenizer.settings import TokenizerSettings


@dataclass(frozen=True)
class OutputVocabulary:
    """`ids`: every token's id. `added`: the flags of added tokens, in the order of their ids.

    `size`: rows of the embedding; the last `padding` of them are new padding rows.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Flags]
    size: int
    padding: int
    notes: tuple[str, ...]


def output_vocabulary(
    settings: TokenizerSettings, vocabularies: Mapping[str, ModelVocabulary], source_label: str
) -> OutputVocabulary:
    """The tokens of the output's tokenizer. Raises RecipeError or SourceError.

    `vocabularies`: the source model's first, then the others in the recipe's order.
    """
    source = vocabularies[source_label]
    dropped = [token for token in source.rowless if token not in {*source.roles.values(), *source.unnamed_special}]
    added = {token: flags for token, flags in source.added.items() if token not in dropped}
    notes = [f"tokenizer: {len(source.ids) - len(dropped)} tokens of {source_label}"]
    if settings.source == "union":
        for label, count in _add_union(added, vocabularies, source).items():
            notes += [f"tokenizer: {count} more {_tokens(count)} from {label}"] * bool(count)
    if dropped:
        text = f"{source_label} has no embedding row for {format_list(map(repr, dropped))}: left out of the tokenizer"
        notes.append(text)
    if count := _add_from_recipe(added, settings, source):
        notes.append(f"tokenizer: {count} more {_tokens(count)} from the recipe")
    ids = {**source.model_ids, **assign_added_ids(source.model_ids, added)}
    _check_distinct(ids, source)
    size, padding = _size(max(ids.values()) + 1, source.model.rows, settings.pad_to_multiple_of)
    ordered = {token: added[token] for token in sorted(added, key=lambda token: ids[token])}
    return OutputVocabulary(ids, ordered, size, padding, tuple(notes))


def _tokens(count: int) -> str:
    return "token" if count == 1 else "tokens"


def _add_union(
    added: dict[str, Flags], vocabularies: Mapping[str, ModelVocabulary], source: ModelVocabulary
) -> dict[str, int]:
    """Add the other merged models' tokens; return how many come from each.

    A token that is an added token in any model gets the flags of the first such model, even where other models have
    it in their vocabulary. Any other token that the source model's vocabulary lacks becomes a plain added token.
    """
    merged = {label: vocabulary for label, vocabulary in vocabularies.items() if vocabulary.model.merged}
    first_flags: dict[str, Flags] = {}
    for vocabulary in merged.values():
        for token, flags in vocabulary.added.items():
            if vocabulary.row(token) >= 0:
                first_flags.setdefault(token, flags)
    counts: dict[str, int] = {}
    for label, vocabulary in list(merged.items())[1:]:
        before = len(added)
        for token in _tokens_with_rows(vocabulary):
            if token in first_flags or token not in source.model_ids:
                added.setdefault(token, first_flags.get(token, FLAGS))
        counts[label] = len(added) - before
    return counts


def _tokens_with_rows(vocabulary: ModelVocabulary) -> Iterator[str]:
    """The tokens that have a row in the embedding, in the order of their ids."""
    numbered = sorted((number, token) for token, number in vocabulary.ids.items() if number < vocabulary.model.rows)
    return (token for _, token in numbered if token)


def _add_from_recipe(added: dict[str, Flags], settings: TokenizerSettings, source: ModelVocabulary) -> int:
    """Add the recipe's new tokens; return how many there are."""
    if "" in settings.tokens:
        raise RecipeError("tokenizer.tokens: a token cannot be an empty string")
    new = [token for token in settings.tokens if token not in added and token not in source.model_ids]
    added.update(dict.fromkeys(new, FLAGS))
    return len(new)


def _size(count: int, rows: int, multiple: int | None) -> tuple[int, int]:
    """Rows of the embedding, and how many of them are new padding."""
    if multiple is None:
        return max(count, rows), 0
    size = -(-count // multiple) * multiple
    return size, size - count


def _check_distinct(ids: Mapping[str, int], source: ModelVocabulary) -> None:
    """Refuse two tokens with one id. The tokenizers library assigns such ids where a vocabulary skips numbers."""
    if len(set(ids.values())) == len(ids):
        return
    by_id = {number: text for text, number in ids.items()}
    shared = [f"{text!r} and {by_id[number]!r} ({number})" for text, number in ids.items() if by_id[number] != text]
    raise SourceError(
        f"{source.label}: several tokens share one id: {format_list(shared)}",
        hint="the vocabulary in its tokenizer.json skips ids: add a token for each skipped id",
    )
