"""What the data commands print: decisions, rows with the trained tokens marked, counts, a histogram."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from mergeforge.data import DataStats, Decision, Example
    from mergeforge.data.preview import Preview, PreviewRecord
    from mergeforge.data.topics.build import BuildResult

BAR = 40  # characters of the longest bar


def show_decisions(decisions: Iterable[Decision], to: Console) -> None:
    """How each source is read, and why."""
    for decision in decisions:
        columns = ", ".join(f"{role} = {column}" for role, column in decision.columns.items())
        files = len(decision.files)
        to.print(decision.source if files == 1 else f"{decision.source} ({files} files)", markup=False, style="bold")
        to.print(f"  format      {decision.format}: {decision.why}", markup=False)
        to.print(f"  columns     {columns}", markup=False)
        if decision.unused:
            to.print(f"  not used    {', '.join(decision.unused)}", markup=False)


def show_row(row: PreviewRecord, preview: Preview, tokens: bool, to: Console) -> None:
    """A row's examples with the trained tokens marked, or its text if there is no tokenizer."""
    for number, example in enumerate(row.examples, start=1):
        part = f", example {number} of {len(row.examples)}" if len(row.examples) > 1 else ""
        facts = f"{len(example)} tokens, {example.trained_tokens} trained on{part} (found by {row.strategy})"
        to.print(f"\n{row.place}: {facts}", markup=False, style="bold")
        _show_marked(example, preview, to)
        if tokens:
            _show_tokens(example, preview, to)
    if not row.examples:
        to.print(f"\n{row.place}", markup=False, style="bold")
        for line in row.lines():
            to.print(line, markup=False)


def _show_marked(example: Example, preview: Preview, to: Console) -> None:
    """The trained text in green, or between ⟦ and ⟧ if there are no colors."""
    from rich.text import Text

    if to.is_terminal and not to.no_color:
        spans = preview.token_spans(example)
        to.print(Text.assemble(*((span.text, "bold green" if span.trained else "dim") for span in spans)))
    else:
        to.print(preview.mark_trained(example), markup=False)


def _show_tokens(example: Example, preview: Preview, to: Console) -> None:
    for token, label in zip(example.tokens.tolist(), example.labels.tolist(), strict=True):
        to.print(f"  {token:>7}  {'trained' if label == token else '':7}  {preview.token_repr(token)}", markup=False)


def show_counts(counts: DataStats, unit: str, to: Console) -> None:
    """What became of the rows, by source and in total, and how long the examples are."""
    sources = list(counts.sources.items())
    for name, stats in [*sources, ("total", counts)] if len(sources) > 1 else sources:
        to.print(f"\n{name}", markup=False, style="bold")
        for line in _count_lines(stats, unit):
            to.print(f"  {line}", markup=False)
    largest = max((count for _, count in counts.histogram), default=0)
    if largest:
        to.print(f"\nexamples by {unit}", markup=False, style="bold")
    for bound, count in counts.histogram:
        bar = "█" * max(round(BAR * count / largest), int(count > 0))
        to.print(f"  up to {bound:>9,}  {bar:{BAR}}  {count:,}", markup=False)
    for line in skipped_lines(counts):
        to.print(line, markup=False)


def _count_lines(counts: DataStats, unit: str) -> Iterator[str]:
    parts = {"used": counts.used, "empty": counts.empty, "too long": counts.too_long, "bad": counts.bad}
    yield f"{counts.rows:,} rows: {', '.join(f'{number:,} {name}' for name, number in parts.items())}"
    if counts.duplicates or counts.cut:
        yield f"{counts.duplicates:,} duplicates, {counts.cut:,} cut"
    if counts.tokens:
        share = 100 * counts.trained / counts.tokens
        yield f"{counts.tokens:,} tokens in {counts.examples:,} examples, {counts.trained:,} ({share:.1f} %) trained on"
    yield (
        f"{unit} per example: {counts.p50:,} (p50), {counts.p95:,} (p95), {counts.p99:,} (p99), "
        f"{counts.longest:,} (longest)"
    )


def skipped_lines(counts: DataStats) -> Iterator[str]:
    """The first rows that are not used, and how many more there are."""
    for row in counts.skipped:
        yield f"{row.place}: not used: {row.text}"
    more = counts.rows - counts.used - sum(1 + row.more for row in counts.skipped)
    if more > 0:
        yield f"and {more:,} more rows that are not used"


def show_built(result: BuildResult, to: Console) -> None:
    """What was written, by category and difficulty."""
    written = f"{result.rows:,} rows from {result.topics:,} topic files" if result.rows else "nothing to write yet"
    to.print(f"{result.out}: {written}", markup=False, style="bold")
    for title, numbers in (("category", result.categories), ("difficulty", result.difficulties)):
        if numbers:
            to.print(f"  by {title}: {', '.join(f'{name} {count:,}' for name, count in numbers.items())}", markup=False)
    if result.scaffolded:
        to.print(f"  created without entries: {', '.join(result.scaffolded)}", markup=False)
    elif result.empty:
        to.print(f"  without entries: {', '.join(result.empty)}", markup=False)
