"""mergekit-yaml's options on `run` and `plan`: each does the same here, or a line says why nothing is needed.

They are hidden in --help; recipes/README.md has the table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergekitFlag:
    """An option of mergekit-yaml.

    note: why nothing is needed where it is given, if so. negated: the same for its `--no-` form; None: it has no such
    form. metavar: of its value; "": it has none.
    """

    name: str
    note: str = ""
    negated: str | None = ""
    metavar: str = ""

    @property
    def key(self) -> str:
        return "mergekit_" + self.name.replace("-", "_")


FLAGS = (
    MergekitFlag("allow-crimes"),
    MergekitFlag("cuda"),
    MergekitFlag("gpu-rich", negated=None),
    MergekitFlag("lazy-unpickle"),
    MergekitFlag("num-threads", metavar="N"),
    MergekitFlag("out-shard-size", metavar="SIZE"),
    MergekitFlag("random-seed", metavar="N"),
    MergekitFlag("transformers-cache", metavar="DIR"),
    MergekitFlag("unsafe-truncate-embeddings"),
    MergekitFlag("trust-remote-code", "no code of a model is ever run"),
    MergekitFlag(
        "lora-merge-cache", "adapters are folded tensor by tensor, without a merged copy on disk", metavar="DIR"
    ),
    MergekitFlag("lora-merge-dtype", "adapters are always folded in float32", metavar="DTYPE"),
    MergekitFlag("low-cpu-memory", "--memory limits the memory, whatever the size of the models"),
    MergekitFlag("read-to-gpu", "each worker copies its rows to the device as it reads them"),
    MergekitFlag("multi-gpu", "one GPU computes faster than disks read and write"),
    MergekitFlag("async-write", "workers read, compute and write at the same time"),
    MergekitFlag("write-threads", "each worker writes its own results; --threads sets their number", metavar="N"),
    MergekitFlag("copy-tokenizer", negated="the tokenizer's files are always copied; delete them if they are unwanted"),
    MergekitFlag("clone-tensors", "a layer that occurs several times is always written several times"),
    MergekitFlag("write-model-card", negated="the card, README.md, is always written; delete it if it is unwanted"),
    MergekitFlag("safe-serialization", negated="weights are always written as safetensors"),
    MergekitFlag("quiet"),
)


def mergekit_flags(command: F) -> F:
    """The flags as hidden options of a command, and OUT as its second argument (decorator)."""
    for flag in reversed(FLAGS):
        names = [f"--{flag.name}" + (f"/--no-{flag.name}" if flag.negated is not None and not flag.metavar else "")]
        if flag.name == "quiet":
            names = ["--no-quiet"]
        form: dict[str, Any] = {"metavar": flag.metavar} if flag.metavar else {"is_flag": True}
        command = click.option(*names, flag.key, default=None, hidden=True, **form)(command)
    return click.argument("out_path", required=False, metavar="[OUT]")(command)


def without_mergekit_flags(recipe: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of a command with those of mergekit replaced by ours, and a line for each that does nothing."""
    values = {flag.name: options[flag.key] for flag in FLAGS if options[flag.key] is not None}
    ours = {name: value for name, value in options.items() if not name.startswith("mergekit_") and name != "out_path"}
    ours["out"] = _out(ours["out"], options["out_path"])
    ours["sets"] = (*ours["sets"], *_overrides(values))
    if ours["device"] == "auto" and (values.get("cuda") is not None or values.get("gpu-rich")):
        ours["device"] = "cpu" if values.get("cuda") is False and not values.get("gpu-rich") else "cuda"
    if "num-threads" in values and ours["threads"] is None:
        ours["threads"] = _whole_number("--num-threads", values["num-threads"])
    ours["allow_pickle"] = ours["allow_pickle"] or bool(values.get("lazy-unpickle"))
    if "transformers-cache" in values:
        os.environ["HF_HUB_CACHE"] = values["transformers-cache"]  # huggingface_hub is not imported yet
    notes = _notes(values)
    if values.get("unsafe-truncate-embeddings") and not _has_tokenizer(recipe, ours["sets"]):
        ours["sets"] = (*ours["sets"], "tokenizer_source=base")
        notes.append("--unsafe-truncate-embeddings cuts no rows: tokenizer_source: base maps them token by token")
    return ours, notes


def _has_tokenizer(recipe: str, sets: tuple[str, ...]) -> bool:
    from mergeforge.cli._recipe import read_recipe

    return read_recipe(recipe, sets).tokenizer is not None


def _out(option: str | None, argument: str | None) -> str | None:
    if option and argument and option != argument:
        raise click.UsageError(f"there are two output folders: {argument} and --out {option}")
    return option or argument


def _overrides(values: dict[str, Any]) -> list[str]:
    """The recipe keys that options of mergekit stand for."""
    overrides = ["allow_mismatch=true"] if values.get("allow-crimes") else []
    if "random-seed" in values:
        overrides.append(f"random_seed={_whole_number('--random-seed', values['random-seed'])}")
    if "out-shard-size" in values:
        overrides.append(f"output.shard_size={_shard_size(values['out-shard-size'])}")
    return overrides


def _shard_size(text: str) -> str:
    """mergekit's 5B, 500M and 100K are billions, millions and thousands of bytes."""
    match = re.fullmatch(r"(\d+)([kmb])", text, re.IGNORECASE)
    return f"{match[1]}{match[2].upper().replace('B', 'G')}B" if match else text


def _whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise click.BadParameter(f"{text!r} is not a whole number", param_hint=name)
    return int(text)


def _notes(values: dict[str, Any]) -> list[str]:
    notes = []
    for flag in FLAGS:
        is_negated = values.get(flag.name) is False
        note = (flag.negated if is_negated else flag.note) if flag.name in values else ""
        if note:
            notes.append(f"--{'no-' if is_negated else ''}{flag.name} does nothing: {note}")
    return notes
