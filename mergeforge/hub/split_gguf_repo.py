"""A finished folder as two, for two repos: the model without its GGUF files, and these alone.

Weights are linked, not copied. Each part has a receipt of its own files, so that `verify` holds for both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergeforge.core.sizes import show_size
from mergeforge.errors import ODD, SourceError

RECEIPT, CARD, MODELFILE, CONFIG = "mergeforge.json", "README.md", "Modelfile", "config.json"
KEPT = ("license", "license_name", "license_link", "language")  # of the model's card in that of its GGUF files


@dataclass(frozen=True)
class Parts:
    """The two folders, and the repo of the second."""

    model: Path
    ggufs: Path
    gguf_repo: str


def part(folder: Path, into: Path, repo: str) -> Parts:
    """Lay out both parts inside `into`. Raises SourceError where there is nothing to part."""
    try:
        receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        names = list(receipt["files"])
    except (OSError, *ODD) as error:
        raise SourceError(f"{folder} has no receipt to part it by ({error})", hint="publish it whole") from None
    apart = {name for name in names if name.endswith(".gguf") or name.startswith(MODELFILE)}
    if not any(name.endswith(".gguf") for name in apart) or not any(name.endswith(".safetensors") for name in names):
        raise SourceError(f"{folder} does not hold both safetensors and GGUF files", hint="publish it whole")
    parts = Parts(into / "model", into / "ggufs", f"{repo}-GGUF")
    _lay_out(folder, parts.model, [name for name in names if name not in apart], _without(receipt, apart))
    card = _card(folder, sorted(apart), repo, parts.gguf_repo).encode()
    _lay_out(folder, parts.ggufs, [*sorted(apart), CONFIG], _alone(receipt, apart, card))
    (parts.ggufs / CARD).write_bytes(card)
    return parts


def _lay_out(folder: Path, into: Path, names: list[str], receipt: Mapping[str, Any]) -> None:
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        (into / name).symlink_to((folder / name).resolve())
    (into / RECEIPT).write_text(json.dumps(receipt, indent=1), encoding="utf-8")


def _without(receipt: Mapping[str, Any], apart: set[str]) -> dict[str, Any]:
    """The receipt of everything but these files."""
    files = {name: facts for name, facts in receipt["files"].items() if name not in apart}
    tensors = {name: {key: one for key, one in facts.items() if key != "gguf"} for name, facts in _tensors(receipt)}
    return {**receipt, "files": files, "tensors": tensors}


def _alone(receipt: Mapping[str, Any], apart: set[str], card: bytes) -> dict[str, Any]:
    """The receipt of these files alone, and their card."""
    files = {name: facts for name, facts in receipt["files"].items() if name in apart or name == CONFIG}
    files[CARD] = {"size": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    gone = ("file", "xxh3")
    tensors = {name: {key: one for key, one in facts.items() if key not in gone} for name, facts in _tensors(receipt)}
    return {**receipt, "files": files, "tensors": tensors}


def _tensors(receipt: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(receipt["tensors"].items())


def _card(folder: Path, names: list[str], model: str, repo: str) -> str:
    front: dict[str, Any] = {"base_model": [model], "base_model_relation": "quantized", "library_name": "gguf"}
    front |= {"tags": ["mergeforge", "gguf"]} | {key: one for key, one in _front(folder).items() if key in KEPT}
    ggufs = [name for name in names if name.endswith(".gguf")]
    rows = "\n".join(f"| {name} | {show_size((folder / name).stat().st_size)} |" for name in ggufs)
    label = ggufs[0].removesuffix(".gguf").rpartition("-")[2]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"""---
{head}---
# {repo.rpartition("/")[2]}

GGUF files of [{model}](https://huggingface.co/{model}), encoded by [mergeforge](https://pypi.org/project/mergeforge/).

| file | size |
|---|---|
{rows}

```sh
llama-server -hf {repo}:{label}
ollama run hf.co/{repo}:{label}
```
"""


def _front(folder: Path) -> dict[str, Any]:
    """The front matter of the folder's card; empty where it has none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    return front if isinstance(front, dict) else {}
