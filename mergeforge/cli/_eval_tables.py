"""What eval, compare and eval --smoke print for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mergeforge.data import Counts
    from mergeforge.eval import Comparison, Evaluation, Interval, Smoke
    from mergeforge.eval.smoke_test import Agreement

SHOWN = 400  # characters of a text in a sample
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COMMANDS = {at: "\ufffd" for at in (*range(32), *range(127, 160)) if chr(at) not in "\n\t"}
COLOURS = {"worse": "red", "better": "green"}


def show_evaluation(found: Evaluation, metrics: Mapping[str, float]) -> None:
    """The numbers line by line, then the samples."""
    _show_counts(found)
    measured = [(name, f"{value:.2f} of {len(found.samples)} answers") for name, value in metrics.items()]
    for line in _aligned([*_facts(found), *measured]):
        click.echo(line)
    for sample in found.samples:
        click.echo(f"\n--- row {sample.row + 1}: {_short(sample.prompt, end=True)}")
        click.echo(f"expected: {_short(sample.expected.strip())}")
        click.echo(f"answered: {_short(sample.answer.text.strip())}  [{sample.answer.ended}]")


def show_comparison(found: Comparison, metrics: Sequence[Mapping[str, float]]) -> None:
    """A row a model, then samples side by side."""
    _show_counts(found.evaluations[0])
    names = list(metrics[0]) if metrics else []
    head = ("", "model", "NLL", "perplexity", "bits/byte", "accuracy", "tok/s", *names, f"{found.measure} against A")
    rows = [
        (letter, one.model, *_columns(one), *(f"{texts[name]:.2f}" for name in names), _difference(interval))
        for letter, one, texts, interval in zip(
            LETTERS, found.evaluations, metrics, [None, *found.intervals], strict=False
        )
    ]
    first, *lines = _aligned([head, *rows])
    click.echo(first)
    for line, interval in zip(lines, [None, *found.intervals], strict=True):
        click.secho(line, fg=COLOURS.get(interval.verdict) if interval else None)
    click.echo(f"{found.rows} rows; less is better but for accuracy; intervals: paired bootstrap, 95 %")
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    _show_samples(found)


def _show_samples(found: Comparison) -> None:
    for at, first in enumerate(found.evaluations[0].samples):
        click.echo(f"\n--- {_short(first.prompt, end=True)}")
        click.echo(f"expected: {_short(first.expected.strip())}")
        for letter, one in zip(LETTERS, found.evaluations, strict=False):
            if at < len(one.samples):
                click.echo(f"{letter}: {_short(one.samples[at].answer.text.strip())}  [{one.samples[at].answer.ended}]")


def show_smoke(found: Sequence[Smoke], agreements: Sequence[Agreement]) -> None:
    """Each model's verdict and answers, and how far they agree."""
    for one in found:
        click.secho("ok    " if one.ok else "FAILS ", fg="green" if one.ok else "red", bold=True, nl=False)
        click.echo(f"{one.model} ({one.kind})" if one.kind else one.model)
        for failure in one.failures:
            click.echo(f"      {failure.check}: {failure.why}")
        for prompt, answer in zip(one.prompts, one.answers, strict=True):
            click.echo(f"      > {_short(prompt)}")
            click.echo(f"        {_short(answer.text.strip())}  [{answer.ended}, {answer.tokens} tokens]")
    for pair in agreements:
        same = f"{pair.same} of {pair.prompts} answers are the same"
        click.echo(f"{pair.other} against {pair.one}: {same}, {pair.share:.0%} of the text before they part")


def sample_dicts(found: Evaluation) -> list[dict[str, Any]]:
    """The samples for JSON."""
    return [
        {"row": one.row, "prompt": one.prompt, "expected": one.expected, "answer": one.answer.text}
        | {"tokens": one.answer.tokens, "ended": one.answer.ended}
        for one in found.samples
    ]


def _facts(found: Evaluation) -> list[tuple[str, str]]:
    facts = [
        ("model", f"{found.model} ({found.kind})"),
        ("rows", f"{len(found.rows)}, {found.tokens} tokens of answers" + _left_out(found)),
        ("NLL", f"{_number(found.nll)} nats a token"),
        ("perplexity", _number(found.perplexity)),
        ("bits per byte", _number(found.bits_per_byte)),
        ("token accuracy", f"{found.accuracy:.2%}"),
        ("read", f"{found.speed:,.0f} tokens/s, {found.seconds:.1f} s"),
    ]
    if found.samples:
        facts.append(("written", f"{found.answer_speed:,.1f} tokens/s, the first after {found.first_token:.3f} s"))
    return facts


def _left_out(found: Evaluation) -> str:
    return f"; {found.left_out} rows left out (too long, or nothing counts)" if found.left_out else ""


def _show_counts(found: Evaluation) -> None:
    """On stderr: how the rows were rendered, and which could not be used."""
    counts: Counts | None = found.counts
    if counts is None:
        return
    click.echo(f"template: {found.template}" if found.template else "rows are plain text", err=True)
    skipped = [f"{getattr(counts, kind)} {kind.replace('_', ' ')}" for kind in ("bad", "empty", "too_long")]
    missing = counts.rows - counts.used
    if missing:
        click.echo(f"{missing} of {counts.rows} rows are not scored ({', '.join(skipped)}):", err=True)
        for one in counts.skipped[:5]:
            click.echo(f"  {one.place}: {one.why}", err=True)


def _columns(one: Evaluation) -> tuple[str, ...]:
    numbers = (_number(one.nll), _number(one.perplexity), _number(one.bits_per_byte))
    return (*numbers, f"{one.accuracy:.2%}", f"{one.speed:,.0f}")


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.difference:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]  {interval.verdict}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of one width; a terminal's width is the terminal's affair."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def printable(text: str) -> str:
    """A text without what a terminal takes as commands (colours, the window's title, the cursor)."""
    return text.translate(_COMMANDS)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _short(text: str, *, end: bool = False) -> str:
    """A text in one line, its start or its end."""
    line = printable(text).replace("\n", "\\n")
    if len(line) <= SHOWN:
        return line
    return f"...{line[-SHOWN:]}" if end else f"{line[:SHOWN]}..."
