"""What a user may have meant by an unknown command or option: a near spelling, or another program's name for it."""

from __future__ import annotations

from collections.abc import Iterable

import click

from mergeforge.errors import did_you_mean, nearest_name

COMMANDS = {
    "mergekit": "run",
    "mergekit-yaml": "run",
    "mergekit-multi": "run",
    "mergekit-legacy": "merge",
    "mergekit-extract-lora": "extract-lora",
    "extract": "extract-lora",
    "apply": "merge",
    "fold": "merge",
    "fuse": "merge",
    "check": "verify",
    "validate": "plan",
    "quantize": "gguf",
    "quantise": "gguf",
    "llama-quantize": "gguf",
    "convert_hf_to_gguf": "gguf",
    "convert_hf_to_gguf.py": "gguf",
    "convert-to-gguf": "gguf",
    "convert_lora_to_gguf": "gguf",
    "export": "gguf",
    "dequantize": "convert",
    "gguf-to-hf": "convert",
    "ls": "list",
    "methods": "list methods",
    "info": "inspect",
    "show": "inspect",
    "finetune": "train",
    "fine-tune": "train",
    "sft": "train",
    "evaluate": "eval",
    "generate": "chat",
    "upload": "publish",
    "push": "publish",
    "new": "init",
    "env": "doctor",
    "version": "--version",
    "help": "--help",
}
# Commands of other programs that have no counterpart here.
_ABSENT = {
    "moe": "mergeforge makes no mixture of experts yet; mergekit-moe does",
    "mergekit-moe": "mergeforge makes no mixture of experts yet (`mergeforge moe` is to do it)",
    "mergekit-tokensurgeon": "mergeforge transplants no tokenizers; `tokenizer_source` in a recipe maps vocabularies",
    "mergekit-evolve": "mergeforge does not search for weights yet",
    "mergekit-pytorch": "give the .safetensors files as models of a recipe to `mergeforge run`",
    "mergekit-layershuffle": "write the layers as `slices` of a recipe for `mergeforge run`",
}
# Options of other programs, and the options here that mean the same, where a command has them.
_OPTIONS = {
    **dict.fromkeys(("output", "outfile", "out-path", "out-dir", "output-dir", "output-path"), ("out",)),
    **dict.fromkeys(("quantize", "quantization", "quant", "outtype", "gguf-type"), ("gguf", "type")),
    **dict.fromkeys(("base-model", "base_model"), ("base",)),
    **dict.fromkeys(("lora", "peft"), ("adapter",)),
    **dict.fromkeys(("merge-method", "merge_method"), ("method",)),
    **dict.fromkeys(("workers", "jobs", "n-threads"), ("threads",)),
    **dict.fromkeys(("max-memory", "ram", "mem"), ("memory",)),
    **dict.fromkeys(("force", "replace"), ("overwrite",)),
    **dict.fromkeys(("gpu",), ("device",)),
    **dict.fromkeys(("shard-size", "max-shard-size"), ("shard-size", "out-shard-size")),
    **dict.fromkeys(("seed",), ("random-seed",)),
}


def unknown_command(name: str, known: Iterable[str]) -> click.UsageError:
    """The error for a command that does not exist."""
    text = f"there is no command '{name}'"
    if name.endswith((".yaml", ".yml")):
        return click.UsageError(f"{text}: did you mean 'mergeforge run {name}'?")
    hint = _ABSENT.get(name) or did_you_mean(name, known, COMMANDS) or "`mergeforge --help` lists the commands"
    return click.UsageError(f"{text}: {hint}")


def unknown_option(error: click.NoSuchOption) -> str:
    """The message for an option that a command does not have."""
    command = error.ctx.command if error.ctx else None
    known = [name for param in command.params for name in (*param.opts, *param.secondary_opts)] if command else []
    text, near = f"there is no option {error.option_name}", _near_option(error.option_name, known)
    path = error.ctx.command_path if error.ctx else "mergeforge"
    return f"{text}: did you mean {near}?" if near else f"{text}: `{path} --help` lists the options"


def _near_option(name: str, known: Iterable[str]) -> str:
    names = [option.removeprefix("--") for option in known if option.startswith("--")]
    word = name.removeprefix("--")
    meant = [option for option in _OPTIONS.get(word, ()) if option in names]
    near = meant[0] if meant else nearest_name(word, names)
    return f"--{near}" if near else ""
