"""Opens whatever is given as an Answerer: a folder or Hub repo of a model or an adapter, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergeforge.errors import RecipeError, SourceError
from mergeforge.eval.backend import Answerer

CONTEXT = 4096  # tokens that a GGUF file gets, where it was trained on so many


def open_model(
    path: str | Path,
    *,
    base: str | None = None,
    quantise: str = "none",
    device: str = "auto",
    adapter: bool = True,
    tokenizer: str | None = None,
    context: int = CONTEXT,
    template: str = "auto",
) -> Answerer:
    """A model that answers and scores.

    `path`: a folder or Hub repo (owner/name[@revision]) of a model or a PEFT adapter, or a GGUF file. `base`: of an
    adapter, where its configuration names another. `quantise`: nf4 loads in 4 bits. `adapter` False: the adapter's
    base. `tokenizer`: where it is, if not with the model (or for a GGUF file, neither beside it nor named by its
    receipt). `context`: tokens in which a GGUF file answers. `template`: to answer with, over the model's own.
    Raises SourceError, RecipeError and MissingExtraError.
    """
    file = gguf_file(path)
    if file is not None:
        if base or quantise != "none":
            given = "--base" if base else "--quantise"
            raise RecipeError(f"{path} is a GGUF file, which takes no {given}", hint="it holds a whole model")
        return _gguf(str(path), file, tokenizer, context, template)
    return _torch(
        str(path), tokenizer=tokenizer, base=base, quantise=quantise, device=device, adapter=adapter, template=template
    )


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file that is meant, also by a folder that holds one and no model. Raises SourceError for several."""
    here = Path(path).expanduser()
    if here.suffix == ".gguf":
        return here
    if not here.is_dir() or (here / "config.json").exists() or (here / "adapter_config.json").exists():
        return None
    files = sorted(here.glob("*.gguf"))
    firsts = [file for file in files if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(firsts) > 1:
        names = ", ".join(file.name for file in firsts[:5])
        raise SourceError(f"{path} holds several GGUF files: {names}", hint="name one of them")
    return firsts[0] if firsts else None


def _gguf(name: str, file: Path, tokenizer: str | None, context: int, template: str) -> Answerer:
    from mergeforge.eval.extras import extra
    from mergeforge.eval.llama_cpp_backend import GgufModel
    from mergeforge.gguf.reader import read_gguf

    if not file.is_file():
        raise SourceError(f"there is no {file}", hint="`mergeforge gguf MODEL --type q4_k_m` writes one")
    extra("xllamacpp", "engine")
    return GgufModel(name, file, read_gguf(file), context, tokenizer, template)


def _torch(name: str, *, template: str, **options: Any) -> Answerer:
    from mergeforge.eval.load_transformers import find, load
    from mergeforge.eval.transformers_backend import TorchModel

    loaded = load(find(name), **options)
    return TorchModel(name, loaded, str(loaded.tokenizer.chat_template or ""), asked=template)
