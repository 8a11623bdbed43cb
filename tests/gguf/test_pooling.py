"""The pooling of sentence-transformers folders in GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import TINY, folders
from support.llama_cpp_tools import read

import mergeforge
from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError

OLD_MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
OLD_CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
OLD_LAST = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}


def embedder(tiny: str, root: Path, pooling: dict[str, Any] | None, *more: tuple[str, str]) -> Path:
    """A model's folder as sentence-transformers saves it; `more`: further (type, path) modules."""
    ((folder, _),) = folders([one for one in TINY if one.name == tiny], root).values()
    modules = [("sentence_transformers.models.Transformer", ""), ("sentence_transformers.models.Pooling", "1_Pooling")]
    entries = [{"idx": at, "path": path, "type": kind} for at, (kind, path) in enumerate([*modules, *more])]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir()
    if pooling is not None:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def planned(folder: Path) -> mergeforge.planner.Plan:
    recipe = {"merge_method": "passthrough", "models": [str(folder)], "output": {"gguf": ["f32"], "safetensors": False}}
    return mergeforge.plan(recipe, out=folder.parent / "out", device="cpu")


@pytest.mark.parametrize(
    ("tiny", "pooling", "number"),
    [
        ("bert", OLD_MEAN, 1),
        ("bert", OLD_CLS, 2),
        ("bert", {"pooling_mode": "cls"}, 2),
        ("roberta", OLD_MEAN, 1),
        ("qwen2-body", OLD_LAST, 3),
        ("qwen3-body", {"pooling_mode": "lasttoken"}, 3),
        ("qwen3", OLD_LAST, 3),
    ],
)
def test_the_key_has_the_converters_number(tmp_path: Path, tiny: str, pooling: dict[str, Any], number: int) -> None:
    """The file's pooling_type, against llama.cpp's numbers, after the key that the converter writes before it."""
    folder = embedder(tiny, tmp_path, pooling)
    (path,) = mergeforge.convert_to_gguf(folder, "f32", out=tmp_path / "out", device="cpu")
    keys = read(path).keys
    (name,) = (key for key in keys if key.endswith(".pooling_type"))
    assert keys[name] == (("UINT32",), number)
    before = list(keys)[list(keys).index(name) - 1]
    assert before == (f"{name.partition('.')[0]}.attention.causal" if "bert" in name else "general.file_type")


@pytest.mark.parametrize(
    ("tiny", "pooling", "more", "said"),
    [
        ("bert", {"pooling_mode_max_tokens": True}, (), "no pooling by max"),
        ("bert", {"pooling_mode": "weightedmean"}, (), "no pooling by weightedmean"),
        ("bert", {**OLD_MEAN, "pooling_mode_cls_token": True}, (), "concatenates 2 poolings (mean, cls)"),
        ("bert", OLD_MEAN, (("sentence_transformers.models.Dense", "2_Dense"),), "does not contain 2_Dense"),
    ],
)
def test_what_the_engine_cannot_do_is_a_warning(
    tmp_path: Path, tiny: str, pooling: dict[str, Any], more: tuple[tuple[str, str], ...], said: str
) -> None:
    plan = planned(embedder(tiny, tmp_path, pooling, *more))
    assert any(said in warning for warning in plan.warnings)


def test_notes_say_how_to_run_a_file_without_the_key(tmp_path: Path) -> None:
    """llama.cpp's converter writes no key for LlamaModel; without modules.json the mode is not known."""
    notes = planned(embedder("llama-body", tmp_path, OLD_LAST)).notes
    assert any("--pooling last" in note for note in notes) and not any(isinstance(note, WarningText) for note in notes)
    unknown = embedder("bert", tmp_path / "unknown", None)
    assert any("--pooling mean, cls or last" in note for note in planned(unknown).notes)


def test_malformed_modules_are_refused(tmp_path: Path) -> None:
    folder = embedder("bert", tmp_path, OLD_MEAN)
    (folder / "modules.json").write_text('{"a": 1}')
    with pytest.raises(SourceError, match=r"modules\.json is malformed"):
        planned(folder)
