"""Code that a model brings along: `auto_map` in its JSON files names classes in .py files of its folder.

The files are copied, never run. An entry whose file is not copied would keep the output from loading, so it is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mergeforge.core.messages import WarningText
from mergeforge.io.aux_files import AuxFile, AuxFiles
from mergeforge.tokenizer.hf_files import read_object
from mergeforge.tokenizer.output_files import json_file

_KEY = "auto_map"
_OTHERS = ("tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def without_missing_code(
    config: Mapping[str, Any], files: AuxFiles, label: str
) -> tuple[Mapping[str, Any], dict[str, AuxFile], list[str]]:
    """The config and the files without the `auto_map` entries whose code is not among the files, and notes."""
    new_files, notes = dict(files), list[str]()
    modules = {name.removesuffix(".py") for name in files if name.endswith(".py")}
    for name, value in [("config.json", config), *((name, _object(files, name)) for name in _OTHERS)]:
        missing = sorted(set(_missing(value.get(_KEY), modules)))
        if not missing:
            continue
        notes.append(_warning(name, label, missing))
        kept = {key: value[key] for key in value if key != _KEY} | _with_code(value[_KEY], modules)
        if name == "config.json":
            config = kept
        else:
            new_files[name] = json_file(name, kept)
    if code := sorted(name for name in files if name.endswith(".py")):
        notes.append(f"custom code of {label} is copied ({', '.join(code)}): load the output with trust_remote_code")
    return config, new_files, notes


def _warning(name: str, label: str, missing: list[str]) -> WarningText:
    files = ", ".join(f"{module}.py" for module in missing)
    return WarningText(f"{name} of {label} needs {files}, which is not copied: the auto_map entry is removed")


def _missing(auto_map: Any, modules: set[str]) -> Iterator[str]:
    """Modules that an auto_map names and that are not there; `owner/repo--module.Class` is code of another repo."""
    for reference in _references(auto_map):
        module = reference.rpartition(".")[0]
        if "--" not in reference and module not in modules:
            yield module


def _references(auto_map: Any) -> Iterator[str]:
    """Every `module.Class` of an auto_map, whose values are strings, or (slow, fast) pairs for tokenizers."""
    for value in auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]:
        yield from (name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str))


def _with_code(auto_map: Any, modules: set[str]) -> dict[str, Any]:
    """The entries of an auto_map whose code is there, as {"auto_map": ...}, or {} if there are none."""
    entries = auto_map if isinstance(auto_map, Mapping) else {}
    kept = {key: value for key, value in entries.items() if not list(_missing({key: value}, modules))}
    return {_KEY: kept} if kept else {}


def _object(files: AuxFiles, name: str) -> Mapping[str, Any]:
    return (read_object(files, name) or {}) if name in files else {}
