"""The table of evaluations in a model card (README.md): one row per model and data set, with the latest result."""

from __future__ import annotations

from pathlib import Path

from mergeforge.core.file_names import MODEL_CARD
from mergeforge.errors import MALFORMED_ERRORS, RecipeError, SourceError
from mergeforge.eval.evaluate import Evaluation
from mergeforge.io.disk import write_durably

BEGIN, END = "<!-- mergeforge eval -->", "<!-- /mergeforge eval -->"
HEAD = ("model", "data", "rows", "tokens", "NLL", "perplexity", "bits per byte", "token accuracy")


def model_card_path(model: str) -> Path:
    """The path of the model card beside the weights of a folder or GGUF file. Raises RecipeError for a remote model."""
    path = Path(model)
    if not path.exists():
        raise RecipeError(
            f"{model} is not a local folder or file, so it has no model card", hint="omit --card, or download it"
        )
    return (path if path.is_dir() else path.parent) / MODEL_CARD


def write_result(result: Evaluation, data: str) -> Path:
    """Write the result into its model's card, replacing an earlier one of the same model and data.

    The table goes before the section "Use", or to the end. A missing card is created. Raises SourceError for a card
    that is not text.
    """
    path = model_card_path(result.model)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else f"# {path.parent.absolute().name}\n"
    except (OSError, *MALFORMED_ERRORS) as error:
        raise SourceError(f"{path} cannot be read: {error}", hint="omit --card") from None
    write_durably(path, with_result_row(text, _row(result, data)).encode())
    return path


def with_result_row(card: str, row: tuple[str, ...]) -> str:
    """The card with this row in its table; it replaces a row of the same model and data."""
    before, table, after = _split_card(card)
    rows = {cells[:2]: cells for cells in map(_cells, table.splitlines()[2:]) if len(cells) == len(HEAD)}
    rows[row[:2]] = row
    lines = [HEAD, ("---",) * len(HEAD), *rows.values()]
    new_table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{before}{BEGIN}\n\n{new_table}\n\n{END}{after}"


def _split_card(card: str) -> tuple[str, str, str]:
    """(text before the table, the table or "", text after it)."""
    before, begin, rest = card.partition(BEGIN)
    table, end, after = rest.partition(END)
    if begin and end:
        return before, table.strip(), after
    before, use, after = card.partition("\n## Use\n")
    return f"{before.rstrip()}\n\n## Evaluation\n\n", "", f"\n{use}{after}" if use else "\n"


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split(" | "))


def _row(result: Evaluation, data: str) -> tuple[str, ...]:
    """The cells of a result. Names come without folders, because the card is read on other machines."""
    names = (Path(result.model).absolute().name, data if "://" in data else Path(data).name)
    measures = (
        f"{result.nll:.4f}",
        f"{result.perplexity:.4g}",
        f"{result.bits_per_byte:.4f}",
        f"{result.accuracy:.2%}",
    )
    return (*(name.replace("|", "/") for name in names), str(len(result.rows)), str(result.tokens), *measures)
