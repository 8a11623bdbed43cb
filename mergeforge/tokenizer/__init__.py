"""The output's tokenizer: its tokens, its files, and the rows of each model's embedding.

    plan = plan_tokenizer(TokenizerSettings("union"), models, base="meta/base")
    plan.files["tokenizer.json"], plan.row_sources["meta/base"], plan.size

Settings mean the same as in mergekit (mergekit/tokenizer/build.py and embed.py), with these differences. The order
of a union follows from the recipe: the tokens of the base (or the first model), then those of the other models in
the recipe's order, each in the order of its ids. A padded vocabulary stays padded, unless `pad_to_multiple_of` is
set: a row without a token counts as a token of that id. A token that has no row in a model counts as missing there.
New `tokens` can be added to a base.

Only JSON is read and written: neither transformers nor tokenizers is needed. The ids of added tokens are those that
the tokenizers library assigns, which ignores the ids in tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.tokenizer.chat_templates import chat_template, with_chat_template
from mergeforge.tokenizer.hf_vocabulary import read_vocabulary
from mergeforge.tokenizer.output_files import TOKENIZER_FILES, output_files, replace_tokenizer_files, tokenizer_files_in
from mergeforge.tokenizer.output_vocabulary import output_vocabulary
from mergeforge.tokenizer.row_sources import describe_row_sources, plan_row_sources
from mergeforge.tokenizer.settings import (
    ModelToken,
    ModelTokenizer,
    RowSources,
    TokenizerPlan,
    TokenizerSettings,
    TokenSetting,
    Zero,
)
from mergeforge.tokenizer.special_ids import remap_special_ids, special_ids

__all__ = [
    "TOKENIZER_FILES",
    "ModelToken",
    "ModelTokenizer",
    "RowSources",
    "TokenSetting",
    "TokenizerPlan",
    "TokenizerSettings",
    "Zero",
    "chat_template",
    "plan_tokenizer",
    "remap_special_ids",
    "replace_tokenizer_files",
    "tokenizer_files_in",
    "with_chat_template",
]


def plan_tokenizer(settings: TokenizerSettings, models: Sequence[ModelTokenizer], base: str | None) -> TokenizerPlan:
    """Plan the output's tokenizer. `models`: every model of the merge, in the recipe's order; `base`: the base's label.

    Raises RecipeError for invalid settings, SourceError for invalid tokenizer files.
    """
    labels = [model.label for model in models]
    merged = [model.label for model in models if model.merged]
    first = _known(base, merged, "base_model") if base is not None else merged[0]
    source_model = (
        first if settings.source in ("union", "base") else _known(settings.source, labels, "tokenizer source")
    )
    if settings.pad_to_multiple_of is not None and settings.pad_to_multiple_of < 1:
        raise RecipeError(f"pad_to_multiple_of must be at least 1, not {settings.pad_to_multiple_of}")
    ordered = sorted(models, key=lambda model: model.label != source_model)  # stable: this one, then the recipe's order
    vocabularies = {model.label: read_vocabulary(model) for model in ordered}
    output = output_vocabulary(settings, vocabularies, source_model)
    sources, notes = plan_row_sources(settings, vocabularies, output, base)
    row_sources = {label: sources[label] for label in labels}
    row_notes = describe_row_sources({label: row_sources[label] for label in merged})
    files, file_notes = output_files(vocabularies[source_model], output)
    return TokenizerPlan(
        source_model=source_model,
        files=files,
        size=output.size,
        row_sources=row_sources,
        special_ids=special_ids(vocabularies[first], vocabularies[source_model], output),
        notes=(*output.notes, *file_notes, *notes, *row_notes),
    )


def _known(label: str, labels: Sequence[str], what: str) -> str:
    if label not in labels:
        hint = did_you_mean(label, labels) or "one of: " + ", ".join(labels)
        raise RecipeError(f"{what} '{label}' is not a model of this merge", hint=hint)
    return label
