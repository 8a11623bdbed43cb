"""GGUF files of a finished merge in llama.cpp, against the same model in transformers: `verify --engine`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergeforge.core.file_names import RECEIPT
from mergeforge.core.messages import OnMessage
from mergeforge.errors import SourceError
from mergeforge.execute.executor import run_plan
from mergeforge.execute.workspace import read_receipt
from mergeforge.gguf.llama_cpp import EngineComparison, compare_with_transformers
from mergeforge.planner import WORK, make_plan


def compare_in_engine(out: str | Path, on_message: OnMessage = lambda _: None) -> list[EngineComparison]:
    """Load every GGUF of a finished merge in llama.cpp and compare it with transformers on the merged model.

    If the folder holds only GGUF, the model is the one that was converted, or it is merged again into a temporary
    folder beside it. Raises SourceError where there is no GGUF or no such model, MissingExtraError without llama.cpp or
    transformers.
    """
    out = Path(out)
    receipt = read_receipt(out)
    if receipt is None:
        raise SourceError(f"{out} has no receipt ({RECEIPT})", hint="only finished merges of mergeforge have one")
    files = {name: facts for name, facts in receipt["files"].items() if name.endswith(".gguf")}
    first = {name: facts for name, facts in files.items() if "-of-" not in name or "-00001-of-" in name}
    if not first:
        hint = f"`mergeforge gguf {out} --type q8_0 --out {out}` adds one"
        raise SourceError(f"{out} contains no GGUF file to load in llama.cpp", hint=hint)
    with _model(out, receipt, on_message) as model:
        return compare_with_transformers(model, {str((out / name).absolute()): first[name]["type"] for name in first})


@contextmanager
def _model(out: Path, receipt: Mapping[str, Any], on_message: OnMessage) -> Iterator[Path]:
    """The folder of the merged model."""
    if (out / "config.json").is_file() and any(name.endswith(".safetensors") for name in receipt["files"]):
        yield out
        return
    *stages, last = receipt["recipe"] if isinstance(receipt["recipe"], list) else [receipt["recipe"]]
    converted = _converted_model(last) if not stages else None
    if converted:
        yield converted
        return
    on_message(f"{out} holds only GGUF: merging again for the comparison")
    kept = {key: value for key, value in last.get("output", {}).items() if key == "gguf_from"}
    with tempfile.TemporaryDirectory(suffix=WORK, dir=out.absolute().parent) as folder:
        recipe = [*stages, {**last, "output": kept | {"safetensors": True}}]
        if kept.get("gguf_from") != "stored":
            recipe[-1]["out_dtype"] = "float32"  # the values that were encoded
        yield run_plan(make_plan(recipe, out=Path(folder) / "model"))


def _converted_model(recipe: Mapping[str, Any]) -> Path | None:
    """The folder of the model that `mergeforge gguf` has converted."""
    models = recipe.get("models", [])
    if (
        recipe.get("merge_method") != "passthrough"
        or len(models) != 1
        or recipe.keys() - {"merge_method", "models", "output"}
    ):
        return None
    folder = Path(str(models[0]["model"] if isinstance(models[0], Mapping) else models[0])).expanduser()
    is_plain = not isinstance(models[0], Mapping) or models[0].keys() == {"model"}
    return folder if is_plain and (folder / "config.json").is_file() else None
