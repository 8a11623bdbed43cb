"""Files that mergeforge writes, whole: against llama.cpp's converter and quantiser, and in its engine.

What differs on purpose stands in DIFFERENT, with the reason.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import TINY, Tiny, folders
from support.llama_cpp_tools import convert, needs_converter, needs_quantiser, quantise, read

from mergeforge.errors import SourceError
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.operations import convert_gguf

UNTIED = "gemma2-legacy"  # has an lm_head unlike its embedding: a GGUF Gemma has none, and the converter drops it
OFFICIAL = [tiny for tiny in TINY if tiny.official and tiny.name != UNTIED]
# (model, key): why the converter's value is not ours; "" for all models.
DIFFERENT = {
    ("", "tokenizer.ggml.pre"): "the converter knows no tiny tokenizer's hash and is told gpt-2",
} | {
    (model, f"tokenizer.ggml.{key}"): "transformers adds an <|endoftext|> that the tokenizer's files do not have"
    for model in ("qwen2", "qwen2-yarn", "qwen2-body")
    for key in ("tokens", "token_type")
}
# The converter writes their attn_factor when it comes to the tensors, before general.type.
OTHER_ORDER = ("phi-three-long", "phimoe-long")


def written(folder: Path, out: Path, *kinds: str, **settings: Any) -> dict[str, Path]:
    """mergeforge's GGUF files of a model by type."""
    plan = convert_gguf.plan_export(str(folder), kinds, str(out), settings, memory="64MiB", device="cpu", threads=1)
    deque(convert_gguf.export(plan, overwrite=True), maxlen=0)
    return dict(zip(kinds, plan.files, strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Every tiny model's folder, and the one that the converter is given."""
    return folders(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_files_equal_the_converters(models: dict[str, tuple[Path, Path]], kind: str, tmp_path: Path) -> None:
    """All key/values with their types, all tensors with their bytes, and the order of both."""
    jobs = [(models[tiny.name][1], tmp_path / f"{tiny.name}.gguf", kind, "gpt-2") for tiny in OFFICIAL]
    assert convert(jobs) == {}
    wrong = []
    for tiny in OFFICIAL:
        ours = read(written(models[tiny.name][0], tmp_path / tiny.name, kind)[kind])
        theirs = read(tmp_path / f"{tiny.name}.gguf")
        wrong += [f"{tiny.name}: {found}" for found in differences(tiny, ours, theirs)]
    assert not wrong, "\n".join(wrong)


def differences(tiny: Tiny, ours: Any, theirs: Any) -> Iterator[str]:
    for key in dict.fromkeys([*ours.keys, *theirs.keys]):
        known = {(tiny.name, key), ("", key)} & DIFFERENT.keys()
        if ours.keys.get(key) != theirs.keys.get(key) and not known:
            yield f"{key}: {str(ours.keys.get(key))[:200]}, not {str(theirs.keys.get(key))[:200]}"
    if list(ours.keys) != list(theirs.keys) and tiny.name not in OTHER_ORDER:
        yield f"order of keys: {list(ours.keys)}, not {list(theirs.keys)}"
    if list(ours.tensors) != list(theirs.tensors):
        yield f"order of tensors: {list(ours.tensors)}, not {list(theirs.tensors)}"
    for name in ours.tensors.keys() & theirs.tensors.keys():
        if ours.tensors[name] != theirs.tensors[name]:
            yield f"{name}: {ours.tensors[name][:2]}, not {theirs.tensors[name][:2]}, or other bytes"


def test_a_head_that_gguf_cannot_hold_is_refused(tmp_path: Path) -> None:
    made = folders([tiny for tiny in TINY if tiny.name == UNTIED], tmp_path)
    with pytest.raises(SourceError, match="output"):
        written(made[UNTIED][0], tmp_path / "out", "f32")


QUANTISED = ["llama", "mixtral", "qwen2", "qwen3moe", "gemma2", "gemma3", "phi-three", "gpt2", "falcon", "olmo2"]
QUANTISED += ["starcoder2", "deepseek3", "granite", "cohere2", "qwen2moe", "roberta"]
KINDS = [name for name, mix in FILE_TYPES.items() if mix.quantizer]


@pytest.mark.slow
@needs_quantiser
@pytest.mark.parametrize("tiny", [tiny for tiny in TINY if tiny.name in QUANTISED], ids=lambda tiny: tiny.name)
def test_files_equal_the_quantisers(models: dict[str, tuple[Path, Path]], tiny: Tiny, tmp_path: Path) -> None:
    """Byte by byte, the whole file: llama_model_quantize on our f32 file, and our quantised file."""
    folder = models[tiny.name][0]
    ours = written(folder, tmp_path / "ours", "f32", *KINDS)
    different = []
    for kind in KINDS:
        theirs = tmp_path / "theirs.gguf"
        quantise(ours["f32"], theirs, FILE_TYPES[kind].file_type)
        if theirs.read_bytes() != ours[kind].read_bytes():
            different.append(f"{kind}: {list(differences(tiny, read(ours[kind]), read(theirs)))[:3]}")
    assert different == []


# What this engine, or transformers' generation classes, cannot run at these sizes, and why. The files equal the
# converter's all the same.
NOT_RUN = {
    "llama-yarn": "llama.cpp computes yarn's attention factor itself, and this one's is unusual",
    "llama-longrope": "llama.cpp reads long and short factors in Phi-3 and MiniCPM alone",
    "phi-three-long": "its context is at least 256 tokens here: then it takes the long factors, transformers the short",
    "phimoe": "llama.cpp's router is a plain softmax, transformers' a sparse mixer",
    "phimoe-long": "as phimoe",
    "cohere-norms": "llama.cpp looks for the heads' norms in models of 64 layers and more",
    "llama4": "llama.cpp asserts 16 or 128 experts",
    "exaone4": "llama.cpp takes a sliding window for granted in models of 64 layers alone",
    "mistral3": "has a vision tower in transformers",
    UNTIED: "is refused",
}
RUN = [
    tiny
    for tiny in TINY
    if not tiny.by_hand and tiny.name not in NOT_RUN and not tiny.name.endswith(("-body", "bert", "roberta"))
]


@pytest.mark.slow
@pytest.mark.parametrize("tiny", RUN, ids=lambda tiny: tiny.name)
def test_the_engine_computes_what_transformers_does(
    models: dict[str, tuple[Path, Path]], tiny: Tiny, tmp_path: Path
) -> None:
    """Next-token log-probabilities of the F32 file in llama.cpp, against transformers in float32."""
    pytest.importorskip("xllamacpp")
    from mergeforge.gguf.llama_cpp import compare_with_transformers

    folder = models[tiny.name][0]
    file = written(folder, tmp_path / "out", "f32")["f32"]
    (found,) = compare_with_transformers(folder, {str(file): "F32"})
    assert found.largest < 0.01 and math.isfinite(found.divergence)
