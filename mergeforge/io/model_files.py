"""Which files of a model's folder a merge of it copies, decided by their names.

Everything is copied except weights, the model card, training state, caches, and records of how the folder was made (its
quantization, an earlier merge). A subfolder that holds weights is another model, unless it is a module of a
sentence-transformers model (2_Dense/).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path, PurePosixPath

MAX_SUBFOLDER_FILES = 1000  # of a subfolder that is copied

_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.pt2", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml", "*.npz"),
    *("*.onnx", "*.onnx_data*", "*.onnx.data", "*.ot", "*.tflite", "*.engine", "*.distcp", "openvino_*.xml"),
    *("*.safetensors.index.json", "*.bin.index.json", "*.msgpack.index.json", "*.h5.index.json"),
    *("adapter_config.json", "non_lora_trainables*"),  # of an adapter in the model's folder: transformers would load it
)
_TRAINING_STATE = (
    *("optimizer*.pt", "scheduler*.pt", "scaler.pt", "rng_state*", "random_states_*", "training_args.*", "*.pkl"),
    *("trainer_state.json", "trainer_log.jsonl", "all_results.json", "train_results.json", "eval_results.json"),
    *("events.out.tfevents*", "zero_to_fp32.py", "latest", "emissions.csv", "training_loss*"),
)
_CARD = ("README*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.mp4", "*.pdf")
_CACHE = (".*", "__pycache__", "*.pyc", "*.lock", "*.incomplete", "*.tmp")
_RECORDS = (
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"),
    *("mergeforge.json", "mergeforge.yml", "mergekit_config.yml", "Modelfile", "report.html"),
    *("journal.jsonl", "lock"),  # names that a run uses in its work folder
)
_KINDS = {"training state": _TRAINING_STATE, "weights": _WEIGHTS, "model card": _CARD, "record": _RECORDS}
_TRAINING_FOLDERS = ("checkpoint-*", "global_step*", "runs", "logs", "wandb")
_EXTRA_HEADS = ("value_head.*", "v_head.*")  # of LLaMA-Factory and TRL, beside the weights
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_MODULE = re.compile(r"\d+_[A-Za-z]\w*")  # the folder of a sentence-transformers module, e.g. 1_Pooling


@dataclass
class ModelFiles:
    """Names of a folder's files: those that a merge copies, and the others by what they are. Caches are in neither."""

    copied: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def sort_model_files(names: Iterable[str]) -> ModelFiles:
    """Sort the names of a folder's files; names are relative to it and have forward slashes."""
    paths = [PurePosixPath(name) for name in sorted(names)]
    paths = [path for path in paths if not any(_matches(part, _CACHE) for part in path.parts)]
    model_folders = {path.parts[0] for path in paths if _kind(path) == "weights" and len(path.parts) > 1}
    files = ModelFiles()
    for path in paths:
        kind = _kind(path) or ("weights" if path.parts[0] in model_folders else "")
        (files.left_out.setdefault(kind, []) if kind else files.copied).append(str(path))
    return files


def model_files(folder: Path) -> ModelFiles:
    """Sort the files of a folder. A subfolder of more than MAX_SUBFOLDER_FILES files is left out without reading on."""
    names, crowded = [entry.name for entry in folder.iterdir() if entry.is_file()], list[str]()
    for subfolder in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()):
        inner = [] if _matches(subfolder.name, _CACHE) else list(islice(_names_in(subfolder), MAX_SUBFOLDER_FILES + 1))
        if len(inner) > MAX_SUBFOLDER_FILES:
            crowded.append(f"{subfolder.name}/")
        else:
            names += [f"{subfolder.name}/{name}" for name in inner]
    files = sort_model_files(names)
    if crowded:
        files.left_out[f"more than {MAX_SUBFOLDER_FILES} files"] = crowded
    return files


def _names_in(folder: Path) -> Iterator[str]:
    """The names of all files below a folder, relative to it."""
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not _matches(name, _CACHE))
        relative = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        yield from (str(relative / name) for name in sorted(names) if Path(parent, name).is_file())


def is_complete_set(names: Sequence[str]) -> bool:
    """Whether the names are those of all shards of one model: NAME-00001-of-0000N.safetensors."""
    shards = [_NUMBERED.fullmatch(name) for name in names]
    found = {(match["stem"], int(match["number"]), int(match["count"])) for match in shards if match}
    stems, counts = {stem for stem, _, _ in found}, {count for _, _, count in found}
    numbers = {number for _, number, _ in found}
    return all(shards) and len(stems) == len(counts) == 1 and numbers == set(range(1, counts.pop() + 1))


def _kind(path: PurePosixPath) -> str:
    """What a file is that is not copied; "" for one that is, as far as its own name tells."""
    if any(_matches(folder, _TRAINING_FOLDERS) for folder in path.parts[:-1]):
        return "training state"
    if (path.parts[1:] and _MODULE.fullmatch(path.parts[0])) or _matches(path.name, _EXTRA_HEADS):
        return ""
    return next((kind for kind, patterns in _KINDS.items() if _matches(path.name, patterns)), "")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
