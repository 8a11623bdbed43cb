"""What `eval`, `compare` and `chat` share: options, the settings that follow from them, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _data_options, _options
from mergeforge.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from mergeforge.data import DataSettings
    from mergeforge.eval import Sampling
    from mergeforge.eval.evaluate import Progress

SAMPLES, METRIC_SAMPLES = 3, 100  # default of --samples, without and with --metrics

template = click.option(
    "--template",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Chat template: auto, plain, chatml, ..., or a .jinja file.",
)
stop = click.option("--stop", multiple=True, metavar="TEXT", help="End an answer before this text (repeatable).")
open_options = _options.options(
    click.option("--base", metavar="MODEL", help="Base model of an adapter, if not the one in its configuration."),
    click.option(
        "--quantize",
        "quantize",
        default="none",
        show_default=True,
        metavar="none|nf4",
        help="nf4: load in 4 bits (bitsandbytes).",
    ),
    click.option("--quantise", "quantize", default="none", hidden=True),  # the old spelling of --quantize
    _options.device,
    click.option(
        "--context",
        type=click.IntRange(64),
        default=4096,
        show_default=True,
        metavar="N",
        help="Context window for GGUF models, in tokens.",
    ),
)
eval_options = _options.options(
    click.option("--data", "path", metavar="DATA", help="Rows: a file, folder, glob, hf://owner/name or sample:chat."),
    click.option(
        "--format", default="auto", show_default=True, metavar="NAME", help=f"Format: {_data_options.FORMATS_HELP}"
    ),
    _data_options.columns,
    template,
    _data_options.system,
    click.option(
        "--loss-on",
        default="assistant",
        show_default=True,
        metavar="WHAT",
        help="Which tokens are scored: assistant, last or all.",
    ),
    click.option(
        "--seq-len", type=click.IntRange(8), metavar="N", help="Leave out rows with more tokens. [default: 8192]"
    ),
    click.option("--limit", type=click.IntRange(1), metavar="N", help="Score N rows only, always the same ones."),
    click.option(
        "--batch", type=click.IntRange(1), metavar="N", help="Rows per batch. [default: depends on the device]"
    ),
    click.option(
        "--samples",
        type=click.IntRange(0),
        metavar="N",
        help=f"Answers to generate and show. [default: {SAMPLES}, or all up to {METRIC_SAMPLES} with --metrics]",
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        metavar="N",
        help="Maximum length of an answer, in tokens.",
    ),
    stop,
    click.option("--metrics", default="", metavar="NAMES", help="Measure the answers: bleu,chrf,rouge,bertscore."),
    click.option(
        "--bertscore-model",
        default="roberta-large",
        show_default=True,
        metavar="MODEL",
        help="Encoder for bertscore: a folder or Hub repo (bert-base-multilingual-cased for other languages).",
    ),
    open_options,
    click.option("--tokenizer", metavar="FOLDER", help="Tokenizer, if it is not in the model's folder."),
    _options.as_json,
    click.option("-q", "--quiet", is_flag=True, help="Hide the progress bar."),
)


def data_settings(options: Mapping[str, Any]) -> DataSettings:
    """The rows that the options name. Raises RecipeError."""
    from mergeforge.data.settings import FORMATS, LOSS_ON, PREFERENCE_FORMATS, DataSettings, DataSource

    if not options["path"]:
        raise RecipeError("name the rows to score: --data FILE", hint="to try it out: --data sample:chat")
    if options["format"] in PREFERENCE_FORMATS:
        hint = "leave out --format, and name the columns: --columns prompt=prompt --columns response=chosen"
        raise RecipeError(f"{options['format']}: only one answer of each row can be scored", hint=hint)
    for name, known in (("format", FORMATS), ("loss_on", LOSS_ON)):
        if options[name] not in known:
            hint = did_you_mean(options[name], known) or f"one of: {', '.join(known)}"
            raise RecipeError(f"--{name.replace('_', '-')}: there is no '{options[name]}'", hint=hint)
    source = DataSource(options["path"], options["format"], _data_options.parse_columns(options["columns"]))
    return DataSettings(
        sources=(source,),
        template=options["template"],
        system=options["system"],
        loss_on=options["loss_on"],
        seq_len=options["seq_len"],
    )


def evaluation_arguments(options: Mapping[str, Any], metrics: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments of eval.evaluate and eval.compare."""
    samples = options["samples"]
    if samples is None:
        samples = METRIC_SAMPLES if metrics else SAMPLES
    return {
        "limit": options["limit"],
        "batch": options["batch"],
        "samples": samples,
        "sampling": greedy_sampling(options),
        **open_arguments(options),
    }


def open_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of eval.open_model."""
    return {name: options[name] for name in ("base", "tokenizer", "quantize", "device", "context")}


def greedy_sampling(options: Mapping[str, Any]) -> Sampling:
    from mergeforge.eval import Sampling

    return Sampling(max_tokens=options["max_tokens"], temperature=0, top_p=1, stop=options["stop"])


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Callable[[str], Progress | None]]:
    """A function that starts a progress bar for a model; no bars if stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from mergeforge.cli._progress import console

    to = console()
    if quiet or not to.is_terminal:
        yield lambda name: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=to, transient=True) as bars:

        def start(name: str) -> Callable[[int, int], object]:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield start
