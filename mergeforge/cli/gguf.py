"""mergeforge gguf."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergeforge.cli import _options
from mergeforge.cli.merge import weighted_input
from mergeforge.core.sizes import format_size
from mergeforge.errors import RecipeError

if TYPE_CHECKING:
    from mergeforge.planner import Options
    from mergeforge.planner.requantize import Requantization

_COMMAND = ("types", "out", "fresh", "overwrite", "plan_only", "as_json", "quiet", "verbose")


@dataclass(frozen=True)
class _Command:
    """What is converted to which files, and what is printed. `started`: by the monotonic clock."""

    model: str
    started: float
    types: tuple[str, ...]
    out: str | None
    fresh: bool
    overwrite: bool
    plan_only: bool
    as_json: bool
    quiet: bool
    verbose: bool

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@click.command()
@click.argument("model")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help="q4_k_m, q8_0, f16, ... (repeatable). [default: q8_0; of a GGUF file: as it is; none with --mmproj]",
)
@click.option("--out", metavar="FILE_OR_DIR", help="Output file or folder. [default: the folder NAME-GGUF]")
@click.option("--imatrix", metavar="FILE", help="Importance matrix (GGUF or .dat).")
@click.option(
    "--tensor-type", "tensor_types", multiple=True, metavar="NAME=TYPE", help="Type of tensors whose names match."
)
@click.option("--output-tensor-type", metavar="TYPE", help="Type of output.weight.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="Use the same type for every tensor.")
@click.option("--mmproj", metavar="TYPE", help="Also write the vision and audio towers: f16, bf16, f32 or q8_0.")
@click.option(
    "--converter",
    metavar="official|DIR",
    help="Let llama.cpp's converter (installed, or in the tree DIR) read MODEL, for classes not supported here.",
)
@click.option("--split-max-size", metavar="SIZE", help="Largest size of a file, e.g. 4GB.")
@click.option("--pre", metavar="NAME", help="Pre-tokenizer, if it cannot be determined from the tokenizer.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[:WEIGHT]",
    help="Fold this LoRA (GGUF or PEFT) into the GGUF file (repeatable).",
)
@click.option(
    "--base", metavar="MODEL", help="Base model of a LoRA adapter. [default: as its adapter_config.json says]"
)
@click.option("--allow-requantize", is_flag=True, help="Quantize tensors of a GGUF file that are quantized already.")
@click.option("--keep-split", is_flag=True, help="Split the output as the GGUF file is split.")
@click.option(
    "--set-metadata", "metadata", multiple=True, metavar="KEY=VALUE", help="Metadata of a GGUF file (repeatable)."
)
@click.option("--chat-template", metavar="FILE", help="Jinja file with a new chat template for a GGUF file.")
@_options.resources
@_options.allow_pickle
@_options.fresh
@click.option("--overwrite", is_flag=True, help="Replace files of the same name; all others stay.")
@click.option("--plan", "plan_only", is_flag=True, help="Show what would be written, and write nothing.")
@_options.as_json
@_options.quiet
@_options.verbose
def gguf(
    model: str,
    *,
    adapters: tuple[str, ...],
    base: str | None,
    allow_requantize: bool,
    keep_split: bool,
    metadata: tuple[str, ...],
    chat_template: str | None,
    converter: str | None,
    memory: str | None,
    device: str,
    threads: int | None,
    allow_pickle: bool,
    **others: Any,
) -> None:
    """Write MODEL (a folder, Hub repo, GGUF file or LoRA adapter) as GGUF, quantized in the same pass.

    Files are added beside those that are in the output folder, which may be the model's own.

    \b
    Examples:
      mergeforge gguf ./merged --type q4_k_m --type q8_0
      mergeforge gguf ./merged --type q4_k_m --out ./merged/small.gguf
      mergeforge gguf org/model --type q4_k_m --out model.gguf --memory 1GiB
      mergeforge gguf model-f16.gguf --type q4_k_m --imatrix imatrix.gguf
      mergeforge gguf ./adapter --base org/model --type f16
      mergeforge gguf model-f16.gguf --adapter lora.gguf:0.8 --type q4_k_m
      mergeforge gguf model.gguf --set-metadata general.name=Aurora --out renamed.gguf
    """
    from mergeforge.operations.convert_lora import is_adapter
    from mergeforge.operations.requantize_gguf import is_gguf_file
    from mergeforge.planner import Options
    from mergeforge.planner.requantize import Requantization

    command = _Command(model, time.monotonic(), **{name: others.pop(name) for name in _COMMAND})
    settings = _settings(others)
    template = _read_template(chat_template) if chat_template else None
    folds = tuple(_adapter_and_weight(text) for text in adapters)
    request = Requantization(allow_requantize, keep_split, metadata, template, folds, base)
    if is_adapter(model) or (base and not is_gguf_file(model)):
        _refuse_options(settings, request)
        _convert_adapter(command, base, allow_pickle=allow_pickle)
        return
    options = Options(memory=memory, device=device, threads=threads, allow_pickle=allow_pickle)
    if converter:
        _refuse_for_converter(model, settings, request)
        _convert_officially(command, converter, settings, options)
        return
    _convert_model(command, settings, request, options)


def _convert_model(command: _Command, settings: Mapping[str, Any], request: Requantization, options: Options) -> None:
    """Write the GGUF files of a model or a GGUF file, and print what was written."""
    from mergeforge.cli import _progress, _result
    from mergeforge.operations.convert_gguf import convert
    from mergeforge.operations.requantize_gguf import plan_gguf

    out, overwrite = command.out, command.overwrite
    conversion = plan_gguf(command.model, command.types, out, settings, request, options, overwrite=overwrite)
    to = _progress.console()
    if command.plan_only or command.verbose:
        _progress.show_plan(conversion.plan, to, target=out or str(conversion.out))
    elif not command.quiet:
        _progress.show_notes(conversion.plan, to)
    if command.plan_only:
        return
    tiles = convert(conversion, fresh=command.fresh, overwrite=overwrite)
    for _ in _progress.watch(conversion.plan, tiles, to, quiet=command.quiet, fresh=command.fresh):
        pass
    if command.as_json:
        _print_json(conversion.files, command.seconds)
    elif not command.quiet:
        _result.show_conversion(conversion, to, command.seconds, out)


def _refuse_for_converter(model: str, settings: Mapping[str, Any], request: Requantization) -> None:
    """Raise RecipeError for options that llama.cpp's converter has no use for."""
    names = [f"--{name}" for name in ("pre", "mmproj") if settings.get(name)] + list(request.options)
    if names or model.endswith(".gguf"):
        text = f"{names[0]} has no effect with --converter" if names else "--converter is for a model's folder"
        raise RecipeError(text, hint="leave it out")


def _convert_officially(command: _Command, converter: str, settings: Mapping[str, Any], options: Options) -> None:
    """Write the GGUF files of a model through llama.cpp's converter, and print what was written."""
    from mergeforge.cli import _progress, _result
    from mergeforge.operations.convert_gguf import convert
    from mergeforge.operations.official_converter import plan_official, remove_file, run_converter

    overwrite = command.overwrite
    conversion = plan_official(
        converter, command.model, command.types, command.out, settings, options, overwrite=overwrite
    )
    to = _progress.console()
    if command.plan_only or not command.quiet:
        _progress.print_notes([str(conversion)], to)
    if command.plan_only:
        return
    written = run_converter(conversion, fresh=command.fresh, overwrite=overwrite)
    tiles = convert(written, fresh=command.fresh, overwrite=overwrite)
    for _ in _progress.watch(written.plan, tiles, to, quiet=command.quiet, fresh=command.fresh):
        pass
    remove_file(conversion)
    if command.as_json:
        _print_json(written.files, command.seconds)
    elif not command.quiet:
        _result.show_conversion(written, to, command.seconds, command.out)


def _adapter_and_weight(text: str) -> tuple[str, float]:
    adapter, weight = weighted_input(text)
    if isinstance(weight, list):
        raise RecipeError(f"--adapter {text}: an adapter has one weight")
    return adapter, 1.0 if weight is None else weight


def _convert_adapter(command: _Command, base: str | None, *, allow_pickle: bool) -> None:
    """Write the GGUF files of an adapter, and print what was written."""
    from mergeforge.cli import _progress, _result
    from mergeforge.operations.convert_lora import plan_lora_conversion, write_lora

    model, overwrite = command.model, command.overwrite
    conversions = plan_lora_conversion(
        model, base, command.types, command.out, allow_pickle=allow_pickle, overwrite=overwrite
    )
    to = _progress.console()
    if not command.quiet:
        _progress.print_notes(conversions[0].plan.notes, to)
    for conversion in conversions:
        if command.plan_only:
            count = len(conversion.plan.tensors)
            to.print(f"{conversion.path}: {count} tensors, {format_size(conversion.plan.layout.nbytes)}", markup=False)
        else:
            write_lora(conversion)
    if command.plan_only:
        return
    paths = [conversion.path for conversion in conversions]
    if command.as_json:
        _print_json(paths, command.seconds)
    elif not command.quiet:
        listed = {
            conversion.path.name: (conversion.path.stat().st_size, conversion.label) for conversion in conversions
        }
        _result.show_files(to, str(paths[0].parent), listed, command.seconds)


def _print_json(paths: Sequence[Path], seconds: float) -> None:
    files = {str(path): path.stat().st_size for path in paths}
    click.echo(json.dumps({"files": files, "seconds": round(seconds, 3)}))


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an output.gguf entry that were given as options."""
    settings = {key: value for key, value in options.items() if value}
    if texts := settings.get("tensor_types"):
        settings["tensor_types"] = dict(_name_and_type(text) for text in texts)
    return settings


def _refuse_options(settings: Mapping[str, Any], request: Requantization) -> None:
    """Raise RecipeError for options that an adapter's file has no use for."""
    names = [f"--{name.replace('_', '-')}" for name in settings] + [
        name for name in request.options if name != "--base"
    ]
    if names:
        raise RecipeError(f"{names[0]} is for models, not for an adapter", hint="leave it out")


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"--chat-template {path} cannot be read: {error}") from None


def _name_and_type(text: str) -> tuple[str, str]:
    name, equals, type_ = text.rpartition("=")
    if not equals or not name or not type_:
        raise RecipeError(f"--tensor-type {text}: write NAME=TYPE, such as attn_v=q6_k")
    return name, type_
