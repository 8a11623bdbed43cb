"""Which rows every model's embedding takes for the output's tokens.

A model keeps its own row of a token. Where it has none, it takes what the recipe says of that token, else the
base's row, else the only one that there is, else the mean of all, else zeros (mergekit/tokenizer/embed.py,
PermutedVocabulary). A row without a token, in a padded vocabulary, counts like a token of that number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.errors import RecipeError, did_you_mean, listing
from mergeforge.tokenizer.hf_vocabulary import Vocabulary
from mergeforge.tokenizer.output_vocabulary import Output
from mergeforge.tokenizer.settings import ModelToken, RowPicks, TokenizerSettings, Zero

if TYPE_CHECKING:
    import numpy as np

    from mergeforge.tokenizer.settings import Rows


def row_picks(
    settings: TokenizerSettings, vocabularies: Mapping[str, Vocabulary], output: Output, base: str | None
) -> tuple[dict[str, RowPicks], list[str]]:
    """The picks of every model, and notes. Raises RecipeError for a setting that names what is not there."""
    import numpy as np

    own = {label: _own(vocabulary, output) for label, vocabulary in vocabularies.items()}
    given = _default({label: rows for label, rows in own.items() if vocabularies[label].model.merged}, base)
    given |= {label: np.full(output.size, -1, dtype=np.int32) for label in own if label not in given}
    nowhere = _nowhere(settings, given, output)
    forced = np.zeros(output.size, dtype=bool)
    for token in settings.tokens:
        _set(settings, token, output.ids[token], vocabularies, own, given)
        forced[output.ids[token]] = settings.tokens[token].force
    picks = {}
    for label, rows in own.items():
        lacks = (rows < 0) | forced
        taken = {other: np.where(lacks, given[other], rows if other == label else -1) for other in own}
        sources = {other: one.astype(np.int32) for other, one in taken.items() if (one >= 0).any()}
        picks[label] = RowPicks(sources, rows, output.size, output.padding)
    return picks, nowhere


def told(picks: Mapping[str, RowPicks]) -> list[str]:
    """What is taken from where, in words, for models that do not only keep their own rows."""
    import numpy as np

    notes = []
    for label, one in picks.items():
        count = sum(((rows >= 0).astype(np.int32) for rows in one.sources.values()), np.zeros(one.size, dtype=np.int32))
        parts = [
            f"{taken} {'its own' if other == label else f'of {other}'}"
            for other, rows in one.sources.items()
            if (taken := int(((rows >= 0) & (count == 1)).sum()))
        ]
        means, zeros = int((count > 1).sum()), int((count == 0).sum()) - one.padding
        parts += [f"{means} means of several models"] * bool(means) + [f"{zeros} zeros"] * bool(zeros)
        parts += [f"{one.padding} padding, the mean of all"] * bool(one.padding)
        if list(one.sources) != [label] or len(parts) > 1:
            notes.append(f"embedding rows of {label}: {', '.join(parts)}")
    return notes


def _own(vocabulary: Vocabulary, output: Output) -> Rows:
    """The row of the model that each output row is; -1: none."""
    import numpy as np

    rows = np.full(output.size, -1, dtype=np.int32)
    count = output.size - output.padding
    unnamed = np.ones(count, dtype=bool)
    unnamed[np.fromiter(output.ids.values(), dtype=np.int64, count=len(output.ids))] = False
    named = np.zeros(max(count, vocabulary.model.rows), dtype=bool)
    for number in vocabulary.ids.values():
        if number < len(named):
            named[number] = True
    same = np.flatnonzero(unnamed & ~named[:count] & (np.arange(count) < vocabulary.model.rows))
    rows[same] = same
    for token, number in output.ids.items():
        rows[number] = vocabulary.row(token)
    return rows


def _default(own: Mapping[str, Rows], base: str | None) -> dict[str, Rows]:
    """The rows whose mean a model takes that lacks a token."""
    import numpy as np

    based = own[base] >= 0 if base is not None else False
    return {label: np.where(based & (label != base), np.int32(-1), rows) for label, rows in own.items()}


def _set(
    settings: TokenizerSettings,
    token: str,
    number: int,
    vocabularies: Mapping[str, Vocabulary],
    own: Mapping[str, Rows],
    given: Mapping[str, np.ndarray],
) -> None:
    """Let the models that lack a token take the row that the recipe names."""
    setting = settings.tokens[token]
    if setting.source is None:
        if setting.force:
            raise RecipeError(f"tokenizer.tokens: {token!r} is forced, but has no source", hint="add 'source: MODEL'")
        return
    for rows in given.values():
        rows[number] = -1
    if isinstance(setting.source, Zero):
        return
    model = setting.source.model if isinstance(setting.source, ModelToken) else setting.source
    if model not in vocabularies:
        hint = did_you_mean(model, vocabularies) or "one of: " + ", ".join(vocabularies)
        raise RecipeError(f"tokenizer.tokens: {token!r} takes its row from '{model}', no model of the merge", hint=hint)
    if isinstance(setting.source, ModelToken):
        given[model][number] = _row(token, setting.source, vocabularies[model])
    elif own[model][number] < 0:
        raise RecipeError(f"tokenizer.tokens: {model} has no token {token!r}", hint="name one with kind: model_token")
    else:
        given[model][number] = own[model][number]


def _row(token: str, source: ModelToken, vocabulary: Vocabulary) -> int:
    """The row of the token that a setting names."""
    place = f"tokenizer.tokens: {token!r} takes its row from"
    if (source.token is None) == (source.token_id is None):
        raise RecipeError(f"tokenizer.tokens: {token!r} needs one of token and token_id", hint="kind: model_token")
    if source.token is None:
        number = -1 if source.token_id is None else source.token_id
        if not 0 <= number < vocabulary.model.rows:
            text = f"{place} token_id {number}, but {source.model} has {vocabulary.model.rows} rows"
            raise RecipeError(text, hint=f"0 to {vocabulary.model.rows - 1}")
        return number
    if (row := vocabulary.row(source.token)) < 0:
        hint = did_you_mean(source.token, vocabulary.ids) if len(vocabulary.ids) < 10_000 else ""
        raise RecipeError(f"{place} {source.token!r}, which {source.model} has not", hint=hint)
    return row


def _nowhere(settings: TokenizerSettings, given: Mapping[str, Rows], output: Output) -> list[str]:
    """A note on tokens that no model has a row for."""
    names = [
        token
        for token, number in output.ids.items()
        if all(rows[number] < 0 for rows in given.values())
        and (token not in settings.tokens or settings.tokens[token].source is None)
    ]
    return [f"no model has a row for {listing(map(repr, names))}: zeros"] if names else []
