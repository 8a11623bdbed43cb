"""Split a finished folder for two repos: the model without its GGUF files, and the GGUF files alone.

Weights are linked, not copied. Each folder gets a receipt of its own files, so that `verify` works for both.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeforge.core.file_names import MODEL_CARD, RECEIPT
from mergeforge.core.sizes import format_size
from mergeforge.errors import MALFORMED_ERRORS, RecipeError, SourceError
from mergeforge.hub.model_card import LICENSE_KEYS, read_front_matter, write_card
from mergeforge.hub.publish import Publication, plan_publication

MODELFILE, CONFIG = "Modelfile", "config.json"
COPIED_KEYS = (*LICENSE_KEYS, "language")  # from the model card to that of the GGUF files


@dataclass(frozen=True)
class SplitFolders:
    """The two folders, and the repo for the GGUF files."""

    model: Path
    ggufs: Path
    gguf_repo: str


def split_gguf_repo(folder: Path, into: Path, repo: str) -> SplitFolders:
    """Create both folders inside `into`. Raises SourceError if the folder cannot be split."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        names = list(receipt["files"])
    except (OSError, *MALFORMED_ERRORS) as error:
        raise SourceError(f"{folder} has no receipt to split it by ({error})", hint="publish it as one repo") from None
    gguf_names = {name for name in names if name.endswith(".gguf") or name.startswith(MODELFILE)}
    if not any(name.endswith(".gguf") for name in gguf_names) or not any(
        name.endswith(".safetensors") for name in names
    ):
        raise SourceError(f"{folder} does not hold both safetensors and GGUF files", hint="publish it as one repo")
    folders = SplitFolders(into / "model", into / "ggufs", f"{repo}-GGUF")
    _lay_out(folder, folders.model, [name for name in names if name not in gguf_names], _without(receipt, gguf_names))
    card = _card(folder, sorted(gguf_names), repo, folders.gguf_repo).encode()
    _lay_out(folder, folders.ggufs, [*sorted(gguf_names), CONFIG], _only(receipt, gguf_names, card))
    (folders.ggufs / MODEL_CARD).write_bytes(card)
    return folders


def _lay_out(folder: Path, into: Path, names: list[str], receipt: Mapping[str, Any]) -> None:
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).symlink_to((folder / name).resolve())
    (into / RECEIPT).write_text(json.dumps(receipt, indent=1), encoding="utf-8")


def _without(receipt: Mapping[str, Any], gguf_names: set[str]) -> dict[str, Any]:
    """The receipt of all files except the GGUF files."""
    files = {name: entry for name, entry in receipt["files"].items() if name not in gguf_names}
    tensors = {name: {key: value for key, value in entry.items() if key != "gguf"} for name, entry in _tensors(receipt)}
    return {**receipt, "files": files, "tensors": tensors}


def _only(receipt: Mapping[str, Any], gguf_names: set[str], card: bytes) -> dict[str, Any]:
    """The receipt of the GGUF files and their model card."""
    files = {name: entry for name, entry in receipt["files"].items() if name in gguf_names or name == CONFIG}
    files[MODEL_CARD] = {"size": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    safetensors_keys = ("file", "xxh3")
    tensors = {
        name: {key: value for key, value in entry.items() if key not in safetensors_keys}
        for name, entry in _tensors(receipt)
    }
    return {**receipt, "files": files, "tensors": tensors}


def _tensors(receipt: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(receipt["tensors"].items())


def _card(folder: Path, names: list[str], model: str, repo: str) -> str:
    front: dict[str, Any] = {"base_model": [model], "base_model_relation": "quantized", "library_name": "gguf"}
    front |= {"tags": ["mergeforge", "gguf"]} | {
        key: value for key, value in read_front_matter(folder / MODEL_CARD).items() if key in COPIED_KEYS
    }
    ggufs = [name for name in names if name.endswith(".gguf")]
    rows = "\n".join(f"| {name} | {format_size((folder / name).stat().st_size)} |" for name in ggufs)
    models = [name for name in ggufs if not name.startswith("mmproj-")] or ggufs
    label = models[0].removesuffix(".gguf").rpartition("-")[2]
    body = f"""GGUF files of [{model}](https://huggingface.co/{model}), encoded by mergeforge.

| file | size |
|---|---|
{rows}

```sh
llama-server -hf {repo}:{label}
ollama run hf.co/{repo}:{label}
```
"""
    return write_card(front, repo.rpartition("/")[2], body)


@contextmanager
def publications(
    folder: str | Path,
    repo: str,
    *,
    revision: str = "main",
    private: bool = True,
    gguf: str = "beside",
    dry_run: bool = False,
) -> Iterator[tuple[Publication, ...]]:
    """What publishing a folder would do: in one repo, or with gguf="apart" in two. Raises as plan_publication does."""
    if gguf not in ("beside", "apart"):
        raise RecipeError(f"gguf must be beside or apart, not {gguf!r}")
    if gguf == "beside":
        yield (plan_publication(folder, repo, revision=revision, private=private, dry_run=dry_run),)
        return
    with tempfile.TemporaryDirectory() as work:
        split = split_gguf_repo(Path(folder), Path(work), repo)
        yield tuple(
            plan_publication(part, name, revision=revision, private=private, links_into=folder, dry_run=dry_run)
            for part, name in ((split.model, repo), (split.ggufs, split.gguf_repo))
        )
