"""mergeforge list."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("list")
@click.argument("kind", type=click.Choice(["methods", "adapters", "architectures", "quants", "models"]))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def list_names(kind: str, as_json: bool) -> None:
    """List merge methods with their parameters, adapter types, GGUF architectures or GGUF types.

    `models` lists well-known base models: parameters, license, GPU memory that training takes by method, and the
    smallest GPU that is enough for QLoRA. Its figures come from memory; check them before you rely on them. Merging
    needs no GPU.

    \b
    Examples:
      mergeforge list methods
      mergeforge list quants --json
      mergeforge list models
    """
    tables = {
        "methods": _methods,
        "adapters": _adapters,
        "architectures": _architectures,
        "quants": _quants,
        "models": _models,
    }
    rows = tables[kind]()
    if as_json:
        click.echo(json.dumps(rows))
        return
    if kind == "models":
        _show_models(rows)
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
    from mergeforge.gguf.typical_size import TYPICAL_MODEL, typical_bits_per_weight, typically_needs_imatrix

    rows = []
    for name, file_type in FILE_TYPES.items():
        bits = typical_bits_per_weight(file_type)
        about = f"{bits:5.2f} bits per weight in {TYPICAL_MODEL}, mostly {file_type.default_type}"
        about += ", with --imatrix" if typically_needs_imatrix(file_type) else ""
        about += ", only for models trained for it" if file_type.needs_training else ""
        rows.append({"name": name, "about": about, "bits_per_weight": round(bits, 3)})
    return rows


def _models() -> list[dict[str, Any]]:
    from mergeforge.train.known_models import DATE, KNOWN_MODELS, METHODS, SOURCE

    rows = []
    for model in KNOWN_MODELS:
        gpus = {method: model.smallest_gpu(method) for method in METHODS}
        names = {method: f"{gpu.name} ({gpu.memory} GB)" if gpu else None for method, gpu in gpus.items()}
        rows.append(
            {
                "name": model.repo,
                "parameters": model.parameters,
                "license": model.license,
                "memory": {method: model.memory(method) for method in METHODS},
                "smallest_gpu": names,
                "as_of": DATE,
                "source": SOURCE,
            }
        )
    return rows


def _show_models(rows: list[dict[str, Any]]) -> None:
    from mergeforge.train.known_models import METHODS, RANK, SEQ_LEN, SOURCE

    width = max(len(row["name"]) for row in rows)
    heads = "".join(f"{name:>8}" for name in ("QLoRA", "LoRA", "full"))
    click.echo(f"{'model':{width}}  {'params':>7}  {'license':13}{heads}  smallest GPU (QLoRA)")
    for row in rows:
        sizes = "".join(f"{row['memory'][method] / 1e9:8.1f}" for method in METHODS)
        gpu = row["smallest_gpu"]["qlora"] or "none with enough memory"
        params = f"{row['parameters'] / 1e9:.2f} B"
        click.echo(f"{row['name']:{width}}  {params:>7}  {row['license']:13}{sizes}  {gpu}")
    click.echo(f"GB of GPU memory, estimated for sequences of {SEQ_LEN} tokens, rank {RANK}, AdamW.")
    click.echo(f"Sizes, licenses and GPUs: {SOURCE}.")
    click.echo("Merging needs no GPU: it takes the memory that --memory allows.")


def _default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else f"{value:g}"
