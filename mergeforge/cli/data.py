"""mergeforge data: preview, stats, split, build."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _data_tables
from mergeforge.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mergeforge.data import Counts, DataSettings, Decision


@click.group()
def data() -> None:
    """Look at training data, split it, build it.

    \b
    mergeforge data preview train.jsonl --model ./model
    mergeforge data stats train.jsonl --model ./model --seq-len 1024
    mergeforge data split train.jsonl --val 0.1 --out split
    mergeforge data build structure.yaml --out train.jsonl
    """


def _reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how rows are read and rendered."""
    options = [
        click.option("--model", metavar="PATH", help="A tokenizer: a model's folder or Hub repo id (extra: train)."),
        click.option("--format", "kind", metavar="NAME", help="auto, messages, sharegpt, alpaca, text, ..."),
        click.option("--columns", multiple=True, metavar="OURS=THEIRS", help="Such as prompt=question (repeatable)."),
        click.option("--template", metavar="NAME", help="auto, plain, chatml, ..., or a .jinja file."),
        click.option("--system", metavar="TEXT", help="For conversations without a system message."),
        click.option("--loss-on", type=click.Choice(["assistant", "last", "all"]), help="What is trained on."),
        click.option("--seq-len", type=click.IntRange(2), help="The longest example, in tokens."),
        click.option("--too-long", type=click.Choice(["drop", "cut_prompt", "cut_end"]), help="What to do with more."),
        click.option("--json", "as_json", is_flag=True, help="Print as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@data.command()
@click.argument("files", nargs=-1, required=True, metavar="DATA...")
@_reading
@click.option("--rows", default=1, show_default=True, type=click.IntRange(1), help="How many rows of each to show.")
@click.option("--tokens", is_flag=True, help="List every token and its id.")
def preview(files: tuple[str, ...], rows: int, tokens: bool, as_json: bool, **options: Any) -> None:
    """Show how DATA is read, and its first rows with what is trained on marked.

    DATA: a file, folder, glob, hf://owner/name, sample:chat, or a train.yaml.

    \b
    mergeforge data preview train.jsonl
    mergeforge data preview sample:chat --model ./model --rows 3
    """
    from mergeforge.cli import _progress
    from mergeforge.data.preview import show

    settings, model = _asked(files, options)
    shown = show(settings, rows, _tokenizer(model))
    if as_json:
        click.echo(json.dumps(shown.json(), ensure_ascii=False, default=str))
        return
    to = _progress.console(stderr=False)
    _data_tables.show_decisions(shown.decisions, to)
    if shown.template:
        to.print(f"  template    {shown.template}", markup=False)
    for note in shown.notes:
        to.print(f"  note        {note}", markup=False)
    for row in shown.rows:
        _data_tables.show_row(row, shown, tokens, to)
    for one in shown.skipped:
        to.print(f"{one.place}: not used: {one.why}", markup=False)
    if model is None:
        to.print("\nto see tokens and what is trained on, add --model: a folder or Hub repo id", markup=False)


@data.command()
@click.argument("files", nargs=-1, required=True, metavar="DATA...")
@_reading
def stats(files: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Count DATA's rows: used, empty, equal, too long; and their lengths, in tokens (with --model) or characters.

    \b
    mergeforge data stats train.jsonl
    mergeforge data stats train.jsonl --model ./model --seq-len 1024
    """
    from mergeforge.cli import _progress

    settings, model = _asked(files, options)
    counts, decided, notes = _prepared(settings, model) if model else _surveyed(settings)
    unit = "tokens" if model else "characters"
    if as_json:
        facts = {"unit": unit, **counts.json(), "decisions": [asdict(one) for one in decided], "notes": notes}
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    to = _progress.console(stderr=False)
    _data_tables.show_decisions(decided, to)
    _data_tables.show_counts(counts, unit, to)
    for note in notes:
        to.print(f"note: {note}", markup=False)


@data.command()
@click.argument("file", metavar="DATA")
@click.option("--val", default="0.1", show_default=True, metavar="SHARE", help="A share of the rows, or a number.")
@click.option("--out", required=True, metavar="DIR", help="Where train.jsonl and validation.jsonl go.")
@click.option("--format", "kind", metavar="NAME", help="auto, messages, sharegpt, alpaca, text, ...")
@click.option("--columns", multiple=True, metavar="OURS=THEIRS", help="Such as prompt=question (repeatable).")
@click.option("--seed", default=0, show_default=True, help="Another seed, another split.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def split(file: str, val: str, out: str, seed: int, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Split DATA into train.jsonl and validation.jsonl, by the content of its rows: equal rows stay together.

    \b
    mergeforge data split train.csv --val 0.1 --out split
    """
    from mergeforge.data.split import SIDES
    from mergeforge.data.split import split as split_rows

    settings, _ = _asked((file,), options)
    done = split_rows(settings.sources[0], _share(val), Path(out), seed=seed, overwrite=overwrite)
    paths = {side: str(Path(out) / f"{side}.jsonl") for side in SIDES}
    if as_json:
        click.echo(json.dumps({**done.counts.json(), "written": done.written, "files": paths}))
        return
    for side, path in paths.items():
        click.echo(f"{path}: {done.written[side]:,} rows")
    for line in _data_tables.skipped_lines(done.counts):
        click.echo(line, err=True)


@data.command()
@click.argument("structure", metavar="STRUCTURE")
@click.option("--out", required=True, metavar="FILE", help="The JSONL file to write.")
@click.option("--tokenizer", metavar="PATH", help="Count tokens with this one, not characters (extra: train).")
@click.option("--no-stats", is_flag=True, help="Do not count lengths.")
@click.option("--scaffold", is_flag=True, help="Make topic files that are not there, without entries.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def build(structure: str, out: str, tokenizer: str | None, no_stats: bool, scaffold: bool, as_json: bool) -> None:
    """Flatten a hierarchy of topic files into one JSONL file to train on.

    STRUCTURE (YAML or JSON) lists categories, subcategories and their types; topics/CATEGORY.SUBCATEGORY.TYPE.json hold
    entries of question, think, output and difficulty.

    \b
    mergeforge data build structure.yaml --out train.jsonl --scaffold
    mergeforge data build structure.yaml --out train.jsonl --tokenizer ./model
    """
    from mergeforge.cli import _progress
    from mergeforge.data.topics.build import build as build_rows

    built = build_rows(structure, out, make_missing=scaffold)
    settings, _ = _asked((out,), {"kind": "messages"})
    counted = None
    if built.rows and not no_stats:
        counted = _prepared(settings, tokenizer) if tokenizer else _surveyed(settings)
    unit = "tokens" if tokenizer else "characters"
    if as_json:
        facts = {**asdict(built), "out": str(built.out)} | (
            {"unit": unit, "counts": counted[0].json()} if counted else {}
        )
        click.echo(json.dumps(facts))
        return
    to = _progress.console(stderr=False)
    _data_tables.show_built(built, to)
    if counted:
        _data_tables.show_counts(counted[0], unit, to)


def _asked(files: tuple[str, ...], options: Mapping[str, Any]) -> tuple[DataSettings, str | None]:
    """(settings, model) of data named on the command line, or in a train.yaml; options come first."""
    from mergeforge.data import FIELDS, settings_of

    record: dict[str, Any] = {}
    model, seq_len = options.get("model"), options.get("seq_len")
    if files[0].endswith((".yaml", ".yml")):
        if len(files) > 1:
            raise RecipeError(f"{files[0]} names its data itself", hint="give it alone")
        whole = _train_yaml(files[0])
        model = model or whole.get("model")
        seq_len = seq_len or (whole.get("seq_len") if isinstance(whole.get("seq_len"), int) else None)
        record = {key: whole[key] for key in FIELDS if key in whole}
    else:
        columns = dict(_column(one) for one in options.get("columns") or ())
        record["data"] = [{"path": file, "format": options.get("kind"), "columns": columns} for file in files]
    record |= {key: options[key] for key in ("template", "system", "loss_on", "too_long") if options.get(key)}
    return settings_of(_checked(record), seq_len=seq_len), model


def _column(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not (ours and equals and theirs):
        raise RecipeError(f"--columns {text}: write OURS=THEIRS, such as --columns prompt=question")
    return ours, theirs


def _train_yaml(path: str) -> dict[str, Any]:
    from mergeforge.recipe import yaml_reader
    from mergeforge.recipe.overrides import read_recipe_file

    (value, _, problems), *_ = yaml_reader.parse(read_recipe_file(Path(path)), path)
    if problems or not isinstance(value, dict) or "data" not in value:
        raise RecipeError(f"{path} names no data", problems=problems, hint="a train.yaml has a key 'data'")
    return value


def _checked(record: Mapping[str, Any]) -> dict[str, Any]:
    from mergeforge.data import FIELDS
    from mergeforge.errors import Problem
    from mergeforge.recipe.schema import Object

    problems: list[Problem] = []
    read: dict[str, Any] = Object(FIELDS).read(
        record, (), lambda path, message, hint="": problems.append(Problem(0, 0, message, hint))
    )
    if problems:
        raise RecipeError("the data cannot be read so:", problems=problems)
    return read


def _share(text: str) -> float | int:
    from mergeforge.recipe.yaml_reader import scalar

    value = _checked({"val": scalar(text)}).get("val")
    if not isinstance(value, int | float):
        raise RecipeError(f"--val {text}: a share such as 0.1, or a number of rows such as 200")
    return value


def _tokenizer(model: str | None) -> PreTrainedTokenizerBase | None:
    from mergeforge.data import load_tokenizer

    return None if model is None else load_tokenizer(model)


def _surveyed(settings: DataSettings) -> tuple[Counts, tuple[Decision, ...], tuple[str, ...]]:
    from mergeforge.data.stats import survey

    found = survey(settings)
    return found.counts, found.decisions, ()


def _prepared(settings: DataSettings, model: str) -> tuple[Counts, tuple[Decision, ...], tuple[str, ...]]:
    from mergeforge.data import load_tokenizer, prepare

    with tempfile.TemporaryDirectory(prefix="mergeforge-data-") as folder:
        found = prepare(settings, load_tokenizer(model), Path(folder))
        return found.counts, found.decisions, found.notes
