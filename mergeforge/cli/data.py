"""mergeforge data: preview, stats, split, build, scaffold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _data_options, _data_tables, _options
from mergeforge.core.messages import WarningText
from mergeforge.errors import RecipeError

if TYPE_CHECKING:
    from mergeforge.data import DataSettings, DataStats, Decision


@click.group()
def data() -> None:
    """Preview, count, split and build training data.

    \b
    Examples:
      mergeforge data preview train.jsonl --model ./model
      mergeforge data stats train.jsonl --model ./model --seq-len 1024
      mergeforge data split train.jsonl --val 0.1 --out split
      mergeforge data build structure.yaml --out train.jsonl
    """


_format = click.option(
    "--format",
    metavar="NAME",
    help=f"{_data_options.FORMATS_HELP} Also preference, unpaired_preference. [default: auto]",
)
_reading_options = _options.options(
    click.option("--model", metavar="PATH", help="Tokenizer: a model's folder or Hub repo id."),
    _format,
    _data_options.columns,
    click.option("--template", metavar="NAME", help="Chat template: auto, plain, chatml, ..., or a .jinja file."),
    _data_options.system,
    click.option("--loss-on", type=click.Choice(["assistant", "last", "all"]), help="What is trained on."),
    click.option("--seq-len", type=click.IntRange(2), help="Maximum length of an example, in tokens."),
    click.option(
        "--too-long",
        type=click.Choice(["drop", "cut_prompt", "cut_end"]),
        help="What to do with conversations longer than --seq-len.",
    ),
    _options.as_json,
)


@data.command()
@click.argument("files", nargs=-1, required=True, metavar="DATA...")
@_reading_options
@click.option("--rows", default=1, show_default=True, type=click.IntRange(1), help="Rows to show from each source.")
@click.option("--tokens", is_flag=True, help="List every token with its id.")
def preview(files: tuple[str, ...], rows: int, tokens: bool, as_json: bool, **options: Any) -> None:
    """Show how DATA is read, and its first rows with the trained tokens marked.

    DATA: a file, folder, glob, hf://owner/name, sample:chat, or a train.yaml.

    \b
    Examples:
      mergeforge data preview train.jsonl
      mergeforge data preview sample:chat --model ./model --rows 3
    """
    from mergeforge.cli import _progress
    from mergeforge.data import load_tokenizer
    from mergeforge.data.preview import make_preview

    settings, model = _settings_and_model(files, options)
    shown = make_preview(settings, rows, load_tokenizer(model) if model else None)
    if as_json:
        click.echo(json.dumps(shown.as_dict(), ensure_ascii=False, default=str))
        return
    to = _progress.console(stderr=False)
    _data_tables.show_decisions(shown.decisions, to)
    if shown.template:
        to.print(f"  template    {shown.template}", markup=False)
    for note in shown.notes:
        label = "warning" if isinstance(note, WarningText) else "note"
        to.print(f"  {label:11} {note}", markup=False)
    for row in shown.rows:
        _data_tables.show_row(row, shown, tokens, to)
    for skipped in shown.skipped:
        to.print(f"{skipped.place}: not used: {skipped.text}", markup=False)
    if model is None:
        to.print("\nadd --model (a folder or Hub repo id) to see tokens and what is trained on", markup=False)


@data.command()
@click.argument("files", nargs=-1, required=True, metavar="DATA...")
@_reading_options
def stats(files: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Count the rows of DATA (used, empty, duplicate, too long) and their lengths, in characters or tokens (--model).

    \b
    Examples:
      mergeforge data stats train.jsonl
      mergeforge data stats train.jsonl --model ./model --seq-len 1024
    """
    from mergeforge.cli import _progress

    settings, model = _settings_and_model(files, options)
    counts, decisions, notes = _token_stats(settings, model) if model else _character_stats(settings)
    unit = "tokens" if model else "characters"
    if as_json:
        decision_dicts = [asdict(decision) for decision in decisions]
        facts = {"unit": unit, **counts.as_dict(), "decisions": decision_dicts, "notes": notes}
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    to = _progress.console(stderr=False)
    _data_tables.show_decisions(decisions, to)
    _data_tables.show_counts(counts, unit, to)
    for note in notes:
        to.print(f"{'warning' if isinstance(note, WarningText) else 'note'}: {note}", markup=False)


@data.command()
@click.argument("file", metavar="DATA")
@click.option(
    "--val", default="0.1", show_default=True, metavar="SIZE", help="Fraction of the rows to hold out, or a number."
)
@click.option("--out", required=True, metavar="DIR", help="Folder for train.jsonl and validation.jsonl.")
@_format
@_data_options.columns
@click.option("--seed", default=0, show_default=True, help="Another seed gives another split.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@_options.as_json
def split(file: str, val: str, out: str, seed: int, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Split DATA into train.jsonl and validation.jsonl by the content of its rows; equal rows stay together.

    \b
    Examples:
      mergeforge data split train.csv --val 0.1 --out split
    """
    from mergeforge.data.split import SPLITS
    from mergeforge.data.split import split as split_rows

    settings, _ = _settings_and_model((file,), options)
    result = split_rows(settings.sources[0], _validation_size(val), Path(out), seed=seed, overwrite=overwrite)
    paths = {name: str(Path(out) / f"{name}.jsonl") for name in SPLITS}
    if as_json:
        click.echo(json.dumps({**result.counts.as_dict(), "written": result.written, "files": paths}))
        return
    for name, path in paths.items():
        click.echo(f"{path}: {result.written[name]:,} rows")
    for line in _data_tables.skipped_lines(result.counts):
        click.echo(line, err=True)


@data.command()
@click.argument("structure", metavar="STRUCTURE")
@click.option("--out", required=True, metavar="FILE", help="JSONL file to write.")
@click.option("--tokenizer", metavar="PATH", help="Count tokens with this tokenizer instead of characters.")
@click.option("--no-stats", is_flag=True, help="Do not count lengths.")
@click.option("--scaffold", is_flag=True, help="Create missing topic files, without entries.")
@_options.as_json
def build(structure: str, out: str, tokenizer: str | None, no_stats: bool, scaffold: bool, as_json: bool) -> None:
    """Flatten a hierarchy of topic files into one JSONL file for training.

    STRUCTURE (YAML or JSON) lists categories, subcategories and their types. The files
    topics/CATEGORY.SUBCATEGORY.TYPE.json hold entries of question, think, output and difficulty; they may also be in
    topics/CATEGORY/SUBCATEGORY/.

    \b
    Examples:
      mergeforge data build structure.yaml --out train.jsonl --scaffold
      mergeforge data build structure.yaml --out train.jsonl --tokenizer ./model
    """
    from mergeforge.cli import _progress
    from mergeforge.data.topics.build import build as build_rows

    result = build_rows(structure, out, scaffold=scaffold)
    settings, _ = _settings_and_model((out,), {"format": "messages"})
    counts = None
    if result.rows and not no_stats:
        counts, _, _ = _token_stats(settings, tokenizer) if tokenizer else _character_stats(settings)
    unit = "tokens" if tokenizer else "characters"
    if as_json:
        facts = {**asdict(result), "out": str(result.out)}
        click.echo(json.dumps(facts | ({"unit": unit, "counts": counts.as_dict()} if counts else {})))
        return
    to = _progress.console(stderr=False)
    _data_tables.show_built(result, to)
    if counts:
        _data_tables.show_counts(counts, unit, to)


@data.command()
@click.argument("structure", metavar="STRUCTURE")
@_options.as_json
def scaffold(structure: str, as_json: bool) -> None:
    """Create the topic files that STRUCTURE names and that do not exist yet, without entries.

    With `layout: hierarchical` they go into topics/CATEGORY/SUBCATEGORY/.

    \b
    Examples:
      mergeforge data scaffold structure.yaml
    """
    from mergeforge.data.topics.build import scaffold_topics

    created = scaffold_topics(structure)
    if as_json:
        click.echo(json.dumps({"created": [str(path) for path in created]}))
        return
    for path in created:
        click.echo(f"created {path}")
    click.echo(f"next: fill in the entries, then: mergeforge data build {structure} --out train.jsonl", err=True)


def _settings_and_model(files: tuple[str, ...], options: Mapping[str, Any]) -> tuple[DataSettings, str | None]:
    """(settings, model) from the options and, if a train.yaml is named, from that file; options win."""
    from mergeforge.data import FIELDS, data_settings

    keys: dict[str, Any] = {}
    model, seq_len = options.get("model"), options.get("seq_len")
    if files[0].endswith((".yaml", ".yml")):
        if len(files) > 1:
            raise RecipeError(f"{files[0]} names its own data", hint="give no other data")
        config = _read_train_yaml(files[0])
        model = model or config.get("model")
        seq_len = seq_len or (config.get("seq_len") if isinstance(config.get("seq_len"), int) else None)
        keys = {key: config[key] for key in FIELDS if key in config}
    else:
        columns = _data_options.parse_columns(options.get("columns") or ())
        keys["data"] = [{"path": file, "format": options.get("format"), "columns": columns} for file in files]
    keys |= {key: options[key] for key in ("template", "system", "loss_on", "too_long") if options.get(key)}
    return data_settings(_validated(keys), seq_len=seq_len), model


def _read_train_yaml(path: str) -> dict[str, Any]:
    from mergeforge.recipe import yaml_reader
    from mergeforge.recipe.overrides import read_recipe_file

    (value, _, problems), *_ = yaml_reader.parse(read_recipe_file(Path(path)), path)
    if problems or not isinstance(value, dict) or "data" not in value:
        raise RecipeError(f"{path} names no data", problems=problems, hint="a train.yaml has a key 'data'")
    return value


def _validated(keys: Mapping[str, Any]) -> dict[str, Any]:
    from mergeforge.data import FIELDS
    from mergeforge.errors import Problem
    from mergeforge.recipe.schema import Object

    problems: list[Problem] = []
    values: dict[str, Any] = Object(FIELDS).read(
        keys, (), lambda path, message, hint="": problems.append(Problem(0, 0, message, hint))
    )
    if problems:
        raise RecipeError("invalid data settings:", problems=problems)
    return values


def _validation_size(text: str) -> float | int:
    from mergeforge.recipe.yaml_reader import scalar

    size = _validated({"val": scalar(text)}).get("val")
    if not isinstance(size, int | float):
        raise RecipeError(f"--val {text}: give a fraction such as 0.1, or a number of rows such as 200")
    return size


def _character_stats(settings: DataSettings) -> tuple[DataStats, tuple[Decision, ...], tuple[str, ...]]:
    from mergeforge.data.stats import character_stats

    result = character_stats(settings)
    return result.counts, result.decisions, ()


def _token_stats(settings: DataSettings, model: str) -> tuple[DataStats, tuple[Decision, ...], tuple[str, ...]]:
    from mergeforge.data import load_tokenizer, prepare

    with tempfile.TemporaryDirectory(prefix="mergeforge-data-") as folder:
        prepared = prepare(settings, load_tokenizer(model), Path(folder))
        return prepared.counts, prepared.decisions, prepared.notes
