"""Where every model's embedding takes its rows for the output's tokens.

A model keeps its own row of a token. If it has none, it takes the row that the recipe names for that token, else the
base's row, else the only one that there is, else the mean of all, else zeros (mergekit/tokenizer/embed.py,
PermutedVocabulary). A row without a token, in a padded vocabulary, counts as a token of that id.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergeforge.errors import RecipeError, did_you_mean, format_list
from mergeforge.tokenizer.hf_vocabulary import ModelVocabulary
from mergeforge.tokenizer.output_vocabulary import OutputVocabulary
from mergeforge.tokenizer.settings import ModelToken, RowSources, TokenizerSettings, Zero

if TYPE_CHECKING:
    import numpy as np

    from mergeforge.tokenizer.settings import Rows


def plan_row_sources(
    settings: TokenizerSettings, vocabularies: Mapping[str, ModelVocabulary], output: OutputVocabulary, base: str | None
) -> tuple[dict[str, RowSources], list[str]]:
    """The row sources of every model, and notes. Raises RecipeError for unknown models or tokens in the settings."""
    import numpy as np

    own = {label: _own_rows(vocabulary, output) for label, vocabulary in vocabularies.items()}
    fallback = _fallback_rows({label: rows for label, rows in own.items() if vocabularies[label].model.merged}, base)
    fallback |= {label: np.full(output.size, -1, dtype=np.int32) for label in own if label not in fallback}
    missing_notes = _missing_notes(settings, fallback, output)
    forced = np.zeros(output.size, dtype=bool)
    for token in settings.tokens:
        _apply_setting(settings, token, output.ids[token], vocabularies, own, fallback)
        forced[output.ids[token]] = settings.tokens[token].force
    row_sources = {}
    for label, rows in own.items():
        lacks = (rows < 0) | forced
        taken = {other: np.where(lacks, fallback[other], rows if other == label else -1) for other in own}
        sources = {other: indices.astype(np.int32) for other, indices in taken.items() if (indices >= 0).any()}
        row_sources[label] = RowSources(sources, rows, output.size, output.padding)
    return row_sources, missing_notes


def describe_row_sources(row_sources: Mapping[str, RowSources]) -> list[str]:
    """A note for each model that does not only keep its own rows."""
    import numpy as np

    notes = []
    for label, plan in row_sources.items():
        no_rows = np.zeros(plan.size, dtype=np.int32)
        count = sum(((rows >= 0).astype(np.int32) for rows in plan.sources.values()), no_rows)
        parts = [
            f"{taken} {'of its own' if other == label else f'from {other}'}"
            for other, rows in plan.sources.items()
            if (taken := int(((rows >= 0) & (count == 1)).sum()))
        ]
        means, zeros = int((count > 1).sum()), int((count == 0).sum()) - plan.padding
        parts += [f"{means} averaged over several models"] * bool(means) + [f"{zeros} set to zero"] * bool(zeros)
        parts += [f"{plan.padding} padding rows (the mean of all rows)"] * bool(plan.padding)
        if list(plan.sources) != [label] or len(parts) > 1:
            notes.append(f"embedding rows of {label}: {', '.join(parts)}")
    return notes


def _own_rows(vocabulary: ModelVocabulary, output: OutputVocabulary) -> Rows:
    """The model's row of each output token; -1: none."""
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


def _fallback_rows(own: Mapping[str, Rows], base: str | None) -> dict[str, Rows]:
    """The rows whose mean a model takes for a token that it lacks."""
    import numpy as np

    in_base = own[base] >= 0 if base is not None else False
    return {label: np.where(in_base & (label != base), np.int32(-1), rows) for label, rows in own.items()}


def _apply_setting(
    settings: TokenizerSettings,
    token: str,
    number: int,
    vocabularies: Mapping[str, ModelVocabulary],
    own: Mapping[str, Rows],
    fallback: Mapping[str, np.ndarray],
) -> None:
    """Make the row that the recipe names for a token its fallback row."""
    setting = settings.tokens[token]
    if setting.source is None:
        if setting.force:
            raise RecipeError(f"tokenizer.tokens: {token!r} has 'force' but no source", hint="add 'source: MODEL'")
        return
    for rows in fallback.values():
        rows[number] = -1
    if isinstance(setting.source, Zero):
        return
    model = setting.source.model if isinstance(setting.source, ModelToken) else setting.source
    if model not in vocabularies:
        hint = did_you_mean(model, vocabularies) or "one of: " + ", ".join(vocabularies)
        text = f"tokenizer.tokens: {token!r} takes its row from '{model}', which is not a model of this merge"
        raise RecipeError(text, hint=hint)
    if isinstance(setting.source, ModelToken):
        fallback[model][number] = _row(token, setting.source, vocabularies[model])
    elif own[model][number] < 0:
        raise RecipeError(
            f"tokenizer.tokens: {model} has no token {token!r}", hint="name another token with kind: model_token"
        )
    else:
        fallback[model][number] = own[model][number]


def _row(token: str, source: ModelToken, vocabulary: ModelVocabulary) -> int:
    """The row of the token that a setting names."""
    prefix = f"tokenizer.tokens: {token!r} takes its row from"
    if (source.token is None) == (source.token_id is None):
        text = f"tokenizer.tokens: the source of {token!r} needs exactly one of token and token_id"
        raise RecipeError(text, hint="kind: model_token")
    if source.token is None:
        number = -1 if source.token_id is None else source.token_id
        if not 0 <= number < vocabulary.model.rows:
            text = f"{prefix} token_id {number}, but {source.model} has {vocabulary.model.rows} rows"
            raise RecipeError(text, hint=f"use 0 to {vocabulary.model.rows - 1}")
        return number
    if (row := vocabulary.row(source.token)) < 0:
        hint = did_you_mean(source.token, vocabulary.ids) if len(vocabulary.ids) < 10_000 else ""
        raise RecipeError(f"{prefix} {source.token!r}, but {source.model} has no such token", hint=hint)
    return row


def _missing_notes(settings: TokenizerSettings, fallback: Mapping[str, Rows], output: OutputVocabulary) -> list[str]:
    """A note on tokens that no model has a row for."""
    names = [
        token
        for token, number in output.ids.items()
        if all(rows[number] < 0 for rows in fallback.values())
        and (token not in settings.tokens or settings.tokens[token].source is None)
    ]
    if not names:
        return []
    return [f"no model has an embedding row for {format_list(map(repr, names))}: set to zero"]
