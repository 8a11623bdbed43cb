"""The `general.*` key/values of a GGUF file: name, authors, license, origins, size, sampling settings.

Their sources are those of llama.cpp's converter: the front matter of README.md, config.json, generation_config.json and
the name of the model's folder ("Llama-3.2-1B-Instruct": basename, version, size label, finetune). gguf-py parses the
name; what differs between its versions is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mergeforge.core.file_names import MODEL_CARD
from mergeforge.gguf.key_values import Keys, Value, array, f32, i32, string, u32
from mergeforge.hub.model_card import front_matter
from mergeforge.io.aux_files import AuxFiles

_SAMPLING = (  # key under general.sampling, names in generation_config.json, type
    ("sequence", ("sequence",), string),
    ("top_k", ("top_k",), i32),
    ("top_p", ("top_p",), f32),
    ("min_p", ("min_p",), f32),
    ("xtc_probability", ("xtc_probability",), f32),
    ("xtc_threshold", ("xtc_threshold",), f32),
    ("temp", ("temperature",), f32),
    ("penalty_last_n", ("penalty_last_n",), i32),
    ("penalty_repeat", ("penalty_repeat", "repetition_penalty"), f32),
    ("mirostat", ("mirostat",), i32),
    ("mirostat_tau", ("mirostat_tau",), f32),
    ("mirostat_eta", ("mirostat_eta",), f32),
)
_PLAIN = ("author", "version", "organization", "finetune", "basename", "description", "quantized_by", "size_label")
_LINKS = ("license", "license_name", "license_link", "url", "doi", "uuid", "repo_url")
_SOURCES = ("source_url", "source_doi", "source_uuid", "source_repo_url")
_KEYS = {name: name.replace("license_", "license.").replace("source_", "source.") for name in (*_LINKS, *_SOURCES)}
_PARENT = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model: in total, outside of experts, of one expert; and the number of experts."""

    total: int
    shared: int
    expert: int
    expert_count: int

    @property
    def label(self) -> str:
        """The size label in a file's name: 1.2B, or 8x7B with experts."""
        import gguf

        label: str = gguf.size_label(self.total, self.shared, self.expert, self.expert_count)
        return label


def parameter_counts(tensors: Mapping[str, tuple[int, ...]]) -> ParameterCounts:
    """Count the parameters of GGUF tensors: name -> shape, slowest dimension first."""
    total = expert = experts = stacks = 0
    for name, shape in tensors.items():
        size = prod(shape)
        total += size
        if "_exps." in name and len(shape) >= 3:
            count = shape[-2 if ".bias" in name else -3]
            expert += size // count
            experts += count
            stacks += 1
    inside = sum(prod(shape) for name, shape in tensors.items() if "_exps." in name and len(shape) >= 3)
    return ParameterCounts(total, total - inside, expert, experts // stacks if stacks else 0)


def general_keys(
    files: AuxFiles,
    config: Mapping[str, Any],
    folder_name: str,
    sizes: ParameterCounts,
    *,
    name: str | None = None,
) -> Keys:
    """The `general.*` keys that follow general.type, in the converter's order.

    `name` replaces the model name from the sources. llama.cpp reads it: if it contains "phi-3", the vocabulary must
    have Phi-3's special tokens.
    """
    fields = _gguf_metadata(files, config, folder_name, sizes)
    keys = _sampling(files)
    keys["general.name"] = string(name or fields.name or folder_name)
    fields.size_label = fields.size_label or (sizes.label if sizes.total > 0 else None)
    if isinstance(fields.license, list):
        fields.license = ",".join(map(str, fields.license))
    for field in (*_PLAIN, *_LINKS, *_SOURCES):
        _put(keys, f"general.{_KEYS.get(field, field)}", getattr(fields, field, None))
    _put_parents(keys, "base_model", fields.base_models)
    _put_parents(keys, "dataset", fields.datasets)
    for field in ("tags", "languages"):
        values = getattr(fields, field) or []
        if values:
            keys[f"general.{field}"] = array("string", map(str, values))
    return keys


def _gguf_metadata(files: AuxFiles, config: Mapping[str, Any], folder_name: str, sizes: ParameterCounts) -> Any:
    import gguf

    card = _card(files)
    return gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, dict(config), Path(folder_name), sizes.total)


def _sampling(files: AuxFiles) -> dict[str, Value]:
    """The sampling settings of generation_config.json; none if it is missing or unreadable."""
    import json

    keys: dict[str, Value] = {}
    try:
        settings = json.loads(files["generation_config.json"].read_text("utf-8"))
    except (KeyError, OSError, ValueError, RecursionError):
        return keys
    for key, names, make_value in _SAMPLING if isinstance(settings, dict) else ():
        value = next((settings[name] for name in names if name in settings), None)
        if value is not None and value != "":
            keys[f"general.sampling.{key}"] = make_value(value)
    return keys


def _card(files: AuxFiles) -> dict[str, Any]:
    """The front matter of README.md; empty where there is none."""
    try:
        return front_matter(files[MODEL_CARD].read_text("utf-8"))
    except (KeyError, OSError, UnicodeDecodeError):
        return {}


def _put_parents(keys: dict[str, Value], kind: str, parents: list[Any] | None) -> None:
    if parents is None:
        return
    keys[f"general.{kind}.count"] = u32(len(parents))
    for number, parent in enumerate(parents):
        for field in _PARENT:
            _put(keys, f"general.{kind}.{number}.{field}", parent.get(field))


def _put(keys: dict[str, Value], key: str, value: Any) -> None:
    if value is not None and value != "":
        keys[key] = string(value)
