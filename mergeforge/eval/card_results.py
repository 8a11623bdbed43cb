"""The table of evaluations in a model's card (README.md): a row for each model and data set, the newest result."""

from __future__ import annotations

from pathlib import Path

from mergeforge.errors import ODD, RecipeError, SourceError
from mergeforge.eval.evaluate import Evaluation
from mergeforge.execute.workspace import CARD
from mergeforge.io.disk import write_durably

BEGIN, END = "<!-- mergeforge eval -->", "<!-- /mergeforge eval -->"
HEAD = ("model", "data", "rows", "tokens", "NLL", "perplexity", "bits per byte", "token accuracy")


def card_of(model: str) -> Path:
    """The card beside a folder's or a GGUF file's weights, there or not. Raises RecipeError for a model elsewhere."""
    path = Path(model)
    if not path.exists():
        raise RecipeError(
            f"{model} is not in a folder here, so it has no card", hint="leave out --card, or download it"
        )
    return (path if path.is_dir() else path.parent) / CARD


def note_in_card(found: Evaluation, data: str) -> Path:
    """Put the result into the card of its model, in the place of an earlier one of the same model and data.

    The table stands before the section "Use", or at the end. A card is made where there is none. Raises SourceError
    for one that is not text.
    """
    path = card_of(found.model)
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else f"# {path.parent.absolute().name}\n"
    except (OSError, *ODD) as error:
        raise SourceError(f"{path} cannot be read: {error}", hint="leave out --card") from None
    write_durably(path, with_row(text, _row(found, data)).encode())
    return path


def with_row(card: str, row: tuple[str, ...]) -> str:
    """The card with this row of its table; a row of the same model and data is replaced."""
    before, table, after = _parted(card)
    rows = {cells[:2]: cells for cells in map(_cells, table.splitlines()[2:]) if len(cells) == len(HEAD)}
    rows[row[:2]] = row
    lines = [HEAD, ("---",) * len(HEAD), *rows.values()]
    shown = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{before}{BEGIN}\n\n{shown}\n\n{END}{after}"


def _parted(card: str) -> tuple[str, str, str]:
    """What stands before the table, the table (empty: there was none), what comes after it."""
    before, begin, rest = card.partition(BEGIN)
    table, end, after = rest.partition(END)
    if begin and end:
        return before, table.strip(), after
    before, use, after = card.partition("\n## Use\n")
    return f"{before.rstrip()}\n\n## Evaluation\n\n", "", f"\n{use}{after}" if use else "\n"


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split(" | "))


def _row(found: Evaluation, data: str) -> tuple[str, ...]:
    """Names without folders: a card is read elsewhere."""
    names = (Path(found.model).absolute().name, data if "://" in data else Path(data).name)
    measured = (f"{found.nll:.4f}", f"{found.perplexity:.4g}", f"{found.bits_per_byte:.4f}", f"{found.accuracy:.2%}")
    return (*(name.replace("|", "/") for name in names), str(len(found.rows)), str(found.tokens), *measured)
