"""A model's checkpoint: a folder or file of safetensors, or (on request) of pickled tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mergeforge.checkpoints.pickle_reader import read_pickled
from mergeforge.checkpoints.quantized import recognise
from mergeforge.errors import SourceError, listing
from mergeforge.io.disk import DiskFile, InputFile
from mergeforge.io.safetensors_header import header_of, read_header, require_regular
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor

NOTHING: Mapping[str, InputFile] = {}
_SHARD_NAME = re.compile(r"[^/\\\0]+\.(safetensors|bin)")


class ModelSource(Protocol):
    """A model that is merged: one that lies in files, or an earlier merge's result that lies nowhere."""

    @property
    def label(self) -> str:
        """What the recipe calls it."""

    @property
    def folder(self) -> Path:
        """Where the files beside its weights lie."""

    @property
    def tensors(self) -> Mapping[str, LazyTensor]: ...

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json; empty where there is none."""

    @property
    def warnings(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A table of contents: every tensor by name, and the model's config.

    `label` is what the recipe calls it; `revision` the Hub commit, if it came from there.
    `file_hashes` maps each weight file's name to the sha256 of its header.
    """

    label: str
    folder: Path
    revision: str | None
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    file_hashes: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its weights as they are stored."""
        return sum(getattr(way, "stored_nbytes", way.info.nbytes) for way in self.tensors.values())

    @property
    def lies_elsewhere(self) -> bool:
        """Whether any of it is not on a disk here."""
        return any(not isinstance(file, DiskFile) for file in self.files)

    @property
    def files(self) -> tuple[InputFile, ...]:
        """Every file that its tensors are read from, each once."""
        every = (file for way in self.tensors.values() for file in getattr(way, "files", (way.file,)))
        return tuple({id(file): file for file in every}.values())


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that lm_head is the embedding (its text_config counts too)."""
    inner = config.get("text_config")
    outer = config.get("tie_word_embeddings")
    if outer is None and isinstance(inner, Mapping):
        outer = inner.get("tie_word_embeddings")
    return outer is True


@dataclass
class _Shards:
    """What was read so far; `files`: those that lie elsewhere, by name."""

    files: Mapping[str, InputFile]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def open_checkpoint(
    path: Path,
    label: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    stem: str = "model",
    files: Mapping[str, InputFile] = NOTHING,
) -> Checkpoint:
    """Read every header of a checkpoint; no weights. Quantised ones become what they stand for (sources/quantised).

    `stem` is the weights' file name: `model`, or `adapter_model` in an adapter's folder. `files`: weights of
    the folder that lie elsewhere.
    Raises SourceError when something is missing, malformed or refused.
    """
    shards = _Shards(files)
    if path.is_file():
        _add_shard(shards, path, allow_pickle)
        path = path.parent
    else:
        _open_folder(shards, path, stem, allow_pickle)
    config: Any = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    tensors: Any = shards.tensors
    if stem == "model":
        tensors, config, notes = recognise(label, tensors, config)
        shards.warnings.extend(notes)
    return Checkpoint(label, path, revision, tensors, config, shards.hashes, tuple(shards.warnings))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises SourceError."""
    require_regular(str(path))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object")
    return value


def weight_files(names: list[str], stem: str) -> list[str]:
    """Of a folder's (or repo's) file names, those that hold its weights or their index: best first."""
    wanted = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    pickled = "pytorch_model" if stem == "model" else stem
    wanted += [f"{pickled}.bin", f"{pickled}.bin.index.json"]
    return [name for name in wanted if name in names]


def _open_folder(shards: _Shards, folder: Path, stem: str, allow_pickle: bool) -> None:
    if not folder.is_dir():
        raise SourceError(f"{folder} is neither a folder nor a file")
    try:
        names = {entry.name for entry in folder.iterdir()} | shards.files.keys()
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}") from None
    found = weight_files(sorted(names), stem)
    if not found:
        if stem == "model" and (folder / "adapter_config.json").exists():
            raise SourceError(f"{folder} is an adapter, not a model", hint="list it under 'adapters'")
        others = sorted(name for name in names if name.endswith(".safetensors"))
        if len(others) != 1:
            what = f"{stem}.safetensors or {stem}.safetensors.index.json"
            raise SourceError(f"{folder} holds no {what}", hint="is it the model's folder?")
        found = others
    if len(found) > 1 and found[1].endswith(".safetensors.index.json"):
        shards.warnings.append(f"{folder} holds both {found[0]} and {found[1]}; the index is left aside")
    if found[0].endswith(".index.json"):
        _open_index(shards, folder, found[0], allow_pickle)
    else:
        _add_shard(shards, folder / found[0], allow_pickle)


def _open_index(shards: _Shards, folder: Path, name: str, allow_pickle: bool) -> None:
    where = f"{folder / name}"
    weight_map = read_json(folder / name).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(one, str) for one in weight_map.values())
    ):
        raise SourceError(f"{where} has no weight_map from tensor names to file names")
    files = sorted(set(weight_map.values()))
    if bad := [file for file in files if not _SHARD_NAME.fullmatch(file)]:
        raise SourceError(f"{where} names files outside its folder: {listing(map(repr, bad))}")
    if missing := [file for file in files if file not in shards.files and not (folder / file).exists()]:
        raise SourceError(f"{folder} lacks {listing(missing)}, which {name} names", hint="download them again")
    for file in files:
        _add_shard(shards, folder / file, allow_pickle)
    held = {tensor: Path(stored.file.path).name for tensor, stored in shards.tensors.items()}
    if astray := sorted(tensor for tensor, file in weight_map.items() if held.get(tensor) != file):
        raise SourceError(f"{where} and its files disagree on where {listing(astray)} lies")
    if unknown := sorted(set(held) - set(weight_map)):
        raise SourceError(f"{where} does not list {listing(unknown)}, which its files hold")


def _add_shard(shards: _Shards, path: Path, allow_pickle: bool) -> None:
    if path.suffix == ".safetensors":
        elsewhere = shards.files.get(path.name)
        header = header_of(elsewhere) if elsewhere and not path.exists() else read_header(path)
        found = {name: StoredTensor(info, header.file, offset) for name, (info, offset) in header.tensors.items()}
        digest = header.sha256
    elif allow_pickle:
        require_regular(str(path))
        found, digest = read_pickled(path)
    else:
        hint = "--allow-pickle reads it with torch's weights_only loader; better, get a safetensors version"
        raise SourceError(f"{path} is a pickle, which can run code when it is loaded", hint=hint)
    if twice := sorted(set(found) & set(shards.tensors)):
        raise SourceError(f"{path} holds {listing(twice)}, which another file of its folder holds too")
    shards.tensors.update(found)
    shards.hashes[path.name] = digest
