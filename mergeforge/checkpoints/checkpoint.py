"""Checkpoint: the tensors and the config of a model stored as safetensors or, if allowed, as a torch pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.pickle_reader import read_pickled
from mergeforge.checkpoints.quantized import detect_quantization
from mergeforge.errors import SourceError, format_list
from mergeforge.io.aux_files import AuxFiles
from mergeforge.io.disk import DiskFile, InputFile
from mergeforge.io.model_files import is_complete_set
from mergeforge.io.safetensors_header import check_is_file, parse_header, read_header
from mergeforge.tensors.stored import StoredTensor

NO_FILES: Mapping[str, InputFile] = {}
_SHARD_NAME = re.compile(r"[^/\\\0]+\.(safetensors|bin)")


@dataclass(frozen=True)
class Checkpoint:
    """Every stored tensor by name, and the model's config.

    `label`: the model's name in the recipe; `revision`: its Hub commit, if it comes from there; `file_hashes`: the
    name of each weight file -> the sha256 of its header. `is_single_file`: the user named a file, not its folder.
    `own_files`: the files beside the weights, where they are not those of the folder but made from a GGUF file's keys.
    """

    label: str
    folder: Path
    revision: str | None
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    file_hashes: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    is_single_file: bool = False
    own_files: AuxFiles | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are stored."""
        return sum(getattr(tensor, "stored_nbytes", tensor.info.nbytes) for tensor in self.tensors.values())

    @property
    def is_remote(self) -> bool:
        """Whether any of its files is not on a local disk."""
        return any(not isinstance(file, DiskFile) for file in self.files)

    @property
    def files(self) -> tuple[InputFile, ...]:
        """Every file that its tensors are read from, each once."""
        tensors = self.tensors.values()
        files = (file for one in tensors for file in (one.files if hasattr(one, "files") else (one.file,)))
        return tuple({id(file): file for file in files}.values())


@dataclass
class _Shards:
    """What was read so far; `files`: remote weight files by name."""

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
    files: Mapping[str, InputFile] = NO_FILES,
    dequantize: bool = True,
) -> Checkpoint:
    """Read every header of a checkpoint, but no weights. Quantized tensors are dequantized when they are read.

    With `dequantize` false, its tensors are those that are stored.

    `stem`: the file name of the weights: `model`, or `adapter_model` in an adapter's folder. `files`: remote weight
    files of the folder. Raises SourceError if something is missing, malformed or refused.
    """
    shards, is_single_file = _Shards(files), path.is_file()
    if is_single_file:
        _add_shard(shards, path, allow_pickle)
        path = path.parent
    else:
        _open_folder(shards, path, stem, allow_pickle)
    config: Any = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    tensors: Any = shards.tensors
    if stem == "model" and dequantize:
        tensors, config, notes = detect_quantization(label, tensors, config)
        shards.warnings.extend(notes)
    return Checkpoint(label, path, revision, tensors, config, shards.hashes, tuple(shards.warnings), is_single_file)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises SourceError."""
    check_is_file(str(path))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object")
    return value


def weight_files(names: list[str], stem: str) -> list[str]:
    """Of the file names of a folder or repo, those of the weights or their index, best first."""
    candidates = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    pickled = "pytorch_model" if stem == "model" else stem
    candidates += [f"{pickled}.bin", f"{pickled}.bin.index.json"]
    return [name for name in candidates if name in names]


def _open_folder(shards: _Shards, folder: Path, stem: str, allow_pickle: bool) -> None:
    if not folder.is_dir():
        raise SourceError(f"{folder} is neither a folder nor a file")
    try:
        names = {entry.name for entry in folder.iterdir()} | shards.files.keys()
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror}") from None
    weights = weight_files(sorted(names), stem)
    if not weights:
        if stem == "model" and (folder / "adapter_config.json").exists():
            raise SourceError(f"{folder} is an adapter, not a model", hint="list it under `adapters`")
        _open_other_names(shards, folder, names, stem)
        return
    if len(weights) > 1 and weights[1].endswith(".safetensors.index.json"):
        shards.warnings.append(f"{folder} holds both {weights[0]} and {weights[1]}; the index is ignored")
    if weights[0].endswith(".index.json"):
        _open_index(shards, folder, weights[0], allow_pickle)
    else:
        _add_shard(shards, folder / weights[0], allow_pickle)


def _open_other_names(shards: _Shards, folder: Path, names: Set[str], stem: str) -> None:
    """Open weights that are named otherwise: an index, a single file, or shards without an index."""
    others = sorted(name for name in names if name.endswith(".safetensors"))
    indices = sorted(name for name in names if name.endswith(".safetensors.index.json")) if stem == "model" else []
    if len(indices) == 1:
        _open_index(shards, folder, indices[0], allow_pickle=False)
    elif len(others) == 1 or (stem == "model" and is_complete_set(others)):
        for name in others:
            _add_shard(shards, folder / name, allow_pickle=False)
        if len(others) > 1:
            shards.warnings.append(f"{folder} has no index: all of its {len(others)} shards are read")
    else:
        expected = f"{stem}.safetensors or {stem}.safetensors.index.json"
        several = f" (it holds {format_list(others)}: name one of them)" if others else ""
        raise SourceError(f"{folder} holds no {expected}{several}", hint="is it the folder of a model?")


def _open_index(shards: _Shards, folder: Path, name: str, allow_pickle: bool) -> None:
    where = f"{folder / name}"
    weight_map = read_json(folder / name).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise SourceError(f"{where} has no weight_map of tensor names to file names")
    files = sorted(set(weight_map.values()))
    if unsafe := [file for file in files if not _SHARD_NAME.fullmatch(file)]:
        raise SourceError(f"{where} names files outside its folder: {format_list(map(repr, unsafe))}")
    if missing := [file for file in files if file not in shards.files and not (folder / file).exists()]:
        raise SourceError(
            f"{folder} lacks {format_list(missing)}, which {name} names", hint="download the missing files"
        )
    for file in files:
        _add_shard(shards, folder / file, allow_pickle)
    file_of = {tensor: Path(stored.file.path).name for tensor, stored in shards.tensors.items()}
    if misplaced := sorted(tensor for tensor, file in weight_map.items() if file_of.get(tensor) != file):
        raise SourceError(f"{where} and its files disagree about the file of {format_list(misplaced)}")
    if unlisted := sorted(set(file_of) - set(weight_map)):
        raise SourceError(f"{where} does not list {format_list(unlisted)}, which its files hold")


def _add_shard(shards: _Shards, path: Path, allow_pickle: bool) -> None:
    if path.suffix == ".safetensors":
        remote_file = shards.files.get(path.name)
        header = parse_header(remote_file) if remote_file and not path.exists() else read_header(path)
        tensors = {name: StoredTensor(info, header.file, offset) for name, (info, offset) in header.tensors.items()}
        digest = header.sha256
    elif allow_pickle:
        check_is_file(str(path))
        tensors, digest = read_pickled(path)
    else:
        hint = "--allow-pickle reads it with torch's weights_only loader; a safetensors version is safer"
        raise SourceError(f"{path} is a pickle, which can run code when it is loaded", hint=hint)
    if duplicates := sorted(set(tensors) & set(shards.tensors)):
        raise SourceError(f"{path} holds {format_list(duplicates)}, which another file of its folder holds too")
    shards.tensors.update(tensors)
    shards.hashes[path.name] = digest
