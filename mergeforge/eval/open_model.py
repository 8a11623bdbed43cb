"""Opens any model as a ModelBackend: a folder or Hub repo of a model or an adapter, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval.backend import ModelBackend, require

CONTEXT = 4096  # tokens of context for a GGUF file, if it was trained with at least as many


def open_model(
    path: str | Path,
    *,
    base: str | None = None,
    quantize: str = "none",
    device: str = "auto",
    adapter: bool = True,
    tokenizer: str | None = None,
    context: int = CONTEXT,
    template: str = "auto",
) -> ModelBackend:
    """Open a model that answers and scores.

    path: a folder or Hub repo (owner/name[@revision]) of a model or a PEFT adapter, or a GGUF file. base: the base of
    an adapter, if not the one in its configuration. quantize: nf4 loads in 4 bits. adapter: False opens the adapter's
    base. tokenizer: its folder, if it is not with the model (for a GGUF file: beside it, or named by its receipt).
    context: tokens of context for a GGUF file. template: the chat template for answers, instead of the model's own.
    Raises SourceError, RecipeError and MissingExtraError.
    """
    file = gguf_file(path)
    if file is not None:
        if base or quantize != "none":
            option = "--base" if base else "--quantize"
            raise RecipeError(f"{option} does not apply to {path}: a GGUF file holds a whole model")
        return _open_gguf(str(path), file, tokenizer, context, template)
    return _open_transformers(
        str(path), tokenizer=tokenizer, base=base, quantize=quantize, device=device, adapter=adapter, template=template
    )


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file at a path, or in a folder that holds one and no model. Raises SourceError if there are several."""
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        return local
    if not local.is_dir() or (local / "config.json").exists() or (local / "adapter_config.json").exists():
        return None
    files = sorted(local.glob("*.gguf"))
    first_parts = [file for file in files if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(first_parts) > 1:
        names = ", ".join(file.name for file in first_parts[:5])
        raise SourceError(f"{path} holds several GGUF files: {names}", hint="name one of them")
    return first_parts[0] if first_parts else None


def _open_gguf(name: str, file: Path, tokenizer: str | None, context: int, template: str) -> ModelBackend:
    from mergeforge.eval.llama_cpp_backend import LlamaCppModel
    from mergeforge.gguf.reader import read_gguf

    if not file.is_file():
        raise SourceError(f"there is no file {file}", hint="`mergeforge gguf MODEL --type q4_k_m` writes one")
    require("xllamacpp")
    return LlamaCppModel(name, file, read_gguf(file), context, tokenizer, template)


def _open_transformers(name: str, *, template: str, **options: Any) -> ModelBackend:
    from mergeforge.eval.load_transformers import load_model, local_path
    from mergeforge.eval.transformers_backend import TransformersModel

    loaded = load_model(local_path(name), **options)
    return TransformersModel(name, loaded, str(loaded.tokenizer.chat_template or ""), template_override=template)
