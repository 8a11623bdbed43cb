"""What the data commands print: decisions, rows with what is trained on marked, counts, a histogram."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from mergeforge.data import Counts, Decision, Example
    from mergeforge.data.preview import Shown, ShownRow
    from mergeforge.data.topics.build import Built

BAR = 40  # characters of the longest bar


def show_decisions(decided: Iterable[Decision], to: Console) -> None:
    """How each source is read, and why."""
    for one in decided:
        columns = ", ".join(f"{ours} = {theirs}" for ours, theirs in one.columns.items())
        name = one.source if len(one.files) == 1 else f"{one.source} ({len(one.files)} files)"
        to.print(name, markup=False, style="bold")
        to.print(f"  format      {one.format}: {one.why}", markup=False)
        to.print(f"  columns     {columns}", markup=False)
        if one.unused:
            to.print(f"  not used    {', '.join(one.unused)}", markup=False)


def show_row(row: ShownRow, shown: Shown, tokens: bool, to: Console) -> None:
    """A row's examples with what is trained on marked, or what it says where there is no tokenizer."""
    for number, example in enumerate(row.examples, start=1):
        part = f", example {number} of {len(row.examples)}" if len(row.examples) > 1 else ""
        facts = f"{len(example)} tokens, {example.trained} trained on{part} (found by {row.way})"
        to.print(f"\n{row.place}: {facts}", markup=False, style="bold")
        _show_marked(example, shown, to)
        if tokens:
            _show_tokens(example, shown, to)
    if not row.examples:
        to.print(f"\n{row.place}", markup=False, style="bold")
        for line in row.lines():
            to.print(line, markup=False)


def _show_marked(example: Example, shown: Shown, to: Console) -> None:
    """What is trained on in green, or between ⟦ and ⟧ where there are no colours."""
    from rich.text import Text

    if to.is_terminal and not to.no_color:
        to.print(Text.assemble(*((run.text, "bold green" if run.trained else "dim") for run in shown.runs(example))))
    else:
        to.print(shown.marked(example), markup=False)


def _show_tokens(example: Example, shown: Shown, to: Console) -> None:
    for token, label in zip(example.tokens.tolist(), example.labels.tolist(), strict=True):
        to.print(f"  {token:>7}  {'trained' if label == token else '':7}  {shown.spelling(token)}", markup=False)


def show_counts(counts: Counts, unit: str, to: Console) -> None:
    """What became of the rows of each source and of all, and how long the examples are."""
    named = list(counts.sources.items())
    for name, one in [*named, ("in all", counts)] if len(named) > 1 else named:
        to.print(f"\n{name}", markup=False, style="bold")
        for line in _count_lines(one, unit):
            to.print(f"  {line}", markup=False)
    most = max((count for _, count in counts.histogram), default=0)
    if most:
        to.print(f"\nexamples by {unit}", markup=False, style="bold")
    for upto, count in counts.histogram:
        bar = "█" * max(round(BAR * count / most), int(count > 0))
        to.print(f"  up to {upto:>9,}  {bar:{BAR}}  {count:,}", markup=False)
    for line in skipped_lines(counts):
        to.print(line, markup=False)


def _count_lines(counts: Counts, unit: str) -> Iterator[str]:
    parts = {"used": counts.used, "empty": counts.empty, "too long": counts.too_long, "bad": counts.bad}
    yield f"{counts.rows:,} rows: {', '.join(f'{number:,} {name}' for name, number in parts.items())}"
    if counts.duplicates or counts.cut:
        yield f"{counts.duplicates:,} are the same as an earlier one, {counts.cut:,} were cut"
    if counts.tokens:
        share = 100 * counts.trained / counts.tokens
        yield f"{counts.tokens:,} tokens in {counts.examples:,} examples, {counts.trained:,} ({share:.1f} %) trained on"
    yield (
        f"{unit} of an example: {counts.p50:,} (p50), {counts.p95:,} (p95), {counts.p99:,} (p99), "
        f"{counts.longest:,} (longest)"
    )


def skipped_lines(counts: Counts) -> Iterator[str]:
    """The first rows that are not used, and how many more there are."""
    for one in counts.skipped:
        yield f"{one.place}: not used: {one.why}"
    more = counts.rows - counts.used - len(counts.skipped)
    if more > 0:
        yield f"and {more:,} more rows that are not used"


def show_built(built: Built, to: Console) -> None:
    """What was written, by category and difficulty."""
    written = f"{built.rows:,} rows of {built.topics:,} topic files" if built.rows else "nothing to write yet"
    to.print(f"{built.out}: {written}", markup=False, style="bold")
    for title, numbers in (("category", built.categories), ("difficulty", built.difficulties)):
        if numbers:
            to.print(f"  by {title}: {', '.join(f'{name} {count:,}' for name, count in numbers.items())}", markup=False)
    if built.scaffolded:
        to.print(f"  made, without entries: {', '.join(built.scaffolded)}", markup=False)
    elif built.empty:
        to.print(f"  without entries: {', '.join(built.empty)}", markup=False)
