"""The output's tokenizer: whose tokens it has, its files, and the rows that each model's embedding takes for it.

    plan = plan_tokenizer(TokenizerSettings("union"), models, base="meta/base")
    plan.files["tokenizer.json"], plan.picks["meta/base"], plan.size

What a recipe says means what it means in mergekit (mergekit/tokenizer/build.py and embed.py), with these
differences. The order of a union follows from the recipe: the base's tokens (else the first model's), then those of
the others in the recipe's order, each in the order of its ids. A vocabulary that is padded stays so, unless
`pad_to_multiple_of` is given: a row without a token counts like a token of that number. Tokens that a model has no
row for count as missing there. A base may get new `tokens`.

JSON is all that is read and written: neither transformers nor tokenizers is needed. The ids of added tokens are
those that the tokenizers library gives them, which does not look at the ids in tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.tokenizer.chat_templates import chat_template, with_chat_template
from mergeforge.tokenizer.hf_vocabulary import read_vocabulary
from mergeforge.tokenizer.output_files import TOKENIZER_FILES, files_in, output_files, with_tokenizer
from mergeforge.tokenizer.output_vocabulary import output_vocabulary
from mergeforge.tokenizer.row_sources import row_picks, told
from mergeforge.tokenizer.settings import (
    ModelToken,
    RowPicks,
    TokenizerOf,
    TokenizerPlan,
    TokenizerSettings,
    TokenSetting,
    Zero,
)
from mergeforge.tokenizer.special_ids import moved_ids, special_ids

__all__ = [
    "TOKENIZER_FILES",
    "ModelToken",
    "RowPicks",
    "TokenSetting",
    "TokenizerOf",
    "TokenizerPlan",
    "TokenizerSettings",
    "Zero",
    "chat_template",
    "files_in",
    "moved_ids",
    "plan_tokenizer",
    "with_chat_template",
    "with_tokenizer",
]


def plan_tokenizer(settings: TokenizerSettings, models: Sequence[TokenizerOf], base: str | None) -> TokenizerPlan:
    """Decide the output's tokenizer. `models`: every model of the merge, in the recipe's order; `base`: its label.

    Raises RecipeError for settings that make no sense, SourceError for tokenizer files that do not.
    """
    labels = [model.label for model in models]
    merged = [model.label for model in models if model.merged]
    first = _known(base, merged, "base_model") if base is not None else merged[0]
    donor = first if settings.source in ("union", "base") else _known(settings.source, labels, "tokenizer source")
    if settings.pad_to_multiple_of is not None and settings.pad_to_multiple_of < 1:
        raise RecipeError(f"pad_to_multiple_of must be at least 1, not {settings.pad_to_multiple_of}")
    ordered = sorted(models, key=lambda model: model.label != donor)  # stable: the donor, then the recipe's order
    vocabularies = {model.label: read_vocabulary(model) for model in ordered}
    output = output_vocabulary(settings, vocabularies, donor)
    sources, notes = row_picks(settings, vocabularies, output, base)
    picks = {label: sources[label] for label in labels}
    files, file_notes = output_files(vocabularies[donor], output)
    return TokenizerPlan(
        donor=donor,
        files=files,
        size=output.size,
        picks=picks,
        special_ids=special_ids(vocabularies[first], vocabularies[donor], output),
        notes=(*output.notes, *file_notes, *notes, *told({label: picks[label] for label in merged})),
    )


def _known(label: str, labels: Sequence[str], what: str) -> str:
    if label not in labels:
        hint = did_you_mean(label, labels) or "one of: " + ", ".join(labels)
        raise RecipeError(f"{what} '{label}' is none of the merge's models", hint=hint)
    return label
