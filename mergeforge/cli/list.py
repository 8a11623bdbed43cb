"""mergeforge list."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("list")
@click.argument("kind", type=click.Choice(["methods", "adapters", "architectures", "quants"]))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def list_names(kind: str, as_json: bool) -> None:
    """List merge methods with their parameters, adapter types, GGUF architectures or GGUF types.

    \b
    Examples:
      mergeforge list methods
      mergeforge list quants --json
    """
    tables = {"methods": _methods, "adapters": _adapters, "architectures": _architectures, "quants": _quants}
    rows = tables[kind]()
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        click.echo(f"{row['name']:18} {row['about']}")
        if row.get("parameters"):
            click.echo(f"{'':18} {', '.join(row['parameters'])}")


def _methods() -> list[dict[str, Any]]:
    from mergeforge.methods import METHODS

    rows = []
    for name in METHODS:
        method = METHODS[name]
        parameters = [
            f"{param.name} (required)" if param.required else f"{param.name} = {_default(param.default)}"
            for param in method.parameters.values()
        ]
        rows.append({"name": name, "about": method.description, "parameters": parameters})
    return rows


def _adapters() -> list[dict[str, Any]]:
    from mergeforge.adapters.peft.kind import PEFT_METHODS
    from mergeforge.adapters.peft.unsupported import UNSUPPORTED

    lora = "LoRA, rsLoRA, DoRA; rank and alpha patterns, biases, embeddings, modules_to_save, trainable tokens"
    rows = [{"name": "LORA", "about": lora}]
    rows += [{"name": name, "about": PEFT_METHODS[name].description} for name in PEFT_METHODS]
    return rows + [{"name": name, "about": f"unsupported: {reason}"} for name, reason in UNSUPPORTED.items()]


def _architectures() -> list[dict[str, Any]]:
    from mergeforge.gguf.architectures import ARCHITECTURES

    return [{"name": name, "about": ARCHITECTURES[name].__module__.rpartition(".")[2]} for name in ARCHITECTURES]


def _quants() -> list[dict[str, Any]]:
    from mergeforge.gguf.file_types import FILE_TYPES
    from mergeforge.gguf.typical_size import TYPICAL_MODEL, typical_bits_per_weight

    rows = []
    for name, file_type in FILE_TYPES.items():
        bits = typical_bits_per_weight(file_type)
        about = f"{bits:5.2f} bits per weight in {TYPICAL_MODEL}, mostly {file_type.default_type}"
        rows.append({"name": name, "about": about, "bits_per_weight": round(bits, 3)})
    return rows


def _default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else f"{value:g}"
