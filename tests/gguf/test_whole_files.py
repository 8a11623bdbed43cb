"""Whole files that mergeforge writes, against llama.cpp's converter and quantizer, and run by llama.cpp.

DIFFERENT lists the intended differences with their reasons.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import TINY, Tiny, folders
from support.imatrix_files import NEED_IMATRIX, write_imatrix
from support.llama_cpp_tools import convert, needs_converter, needs_quantizer, quantize, read, read_tensors

from mergeforge.errors import SourceError
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.operations import convert_gguf
from mergeforge.planner import Options

UNTIED = "gemma2-legacy"  # its lm_head differs from its embedding; GGUF has none for Gemma, and the converter drops it
OFFICIAL = [tiny for tiny in TINY if tiny.official and tiny.name != UNTIED]
# (model, or "" for all; key): why the converter's value differs from ours.
DIFFERENT = {
    (
        "",
        "tokenizer.ggml.pre",
    ): "the converter does not know the hash of a tiny tokenizer; the test makes it use gpt-2",
} | {
    (model, f"tokenizer.ggml.{key}"): "transformers adds an <|endoftext|> that the tokenizer's files do not have"
    for model in ("qwen2", "qwen2-yarn", "qwen2-body", "qwen35-vision", "qwen35moe")
    for key in ("tokens", "token_type")
}
DIFFERENT |= {
    ("dbrx", f"blk.{layer}.ffn_gate_inp.weight"): "the router stays in F32, as llama-quantize has it"
    for layer in (0, 1)
}
DIFFERENT |= {
    ("xverse", "tokenizer.ggml.scores"): "the ranks of the merges; without scores llama.cpp merges anything",
    ("xverse", "tokenizer.ggml.add_space_prefix"): "this tokenizer puts no space before a text",
}
# For these the converter writes a key when it reaches the tensors, before general.type, or lacks one.
OTHER_ORDER = ("phi-three-long", "phimoe-long", "jais", "jais-mup", "xverse")


def written(folder: Path, out: Path, *types: str, **settings: Any) -> dict[str, Path]:
    """mergeforge's GGUF files of a model, by type."""
    options = Options(memory="64MiB", device="cpu", threads=1)
    conversion = convert_gguf.plan_conversion(str(folder), types, str(out), settings, options)
    deque(convert_gguf.convert(conversion, overwrite=True), maxlen=0)
    return dict(zip(types, conversion.files, strict=True))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The folder of every tiny model, and the one for the converter."""
    return folders(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("file_type", ["f32", "f16", "bf16", "q8_0"])
def test_files_equal_the_converters(models: dict[str, tuple[Path, Path]], file_type: str, tmp_path: Path) -> None:
    """All key/values with their types, all tensors with their bytes, both in the same order."""
    jobs = [(models[tiny.name][1], tmp_path / f"{tiny.name}.gguf", file_type, "gpt-2") for tiny in OFFICIAL]
    assert convert(jobs) == {}
    wrong = []
    for tiny in OFFICIAL:
        ours = read(written(models[tiny.name][0], tmp_path / tiny.name, file_type)[file_type])
        theirs = read(tmp_path / f"{tiny.name}.gguf")
        wrong += [f"{tiny.name}: {difference}" for difference in differences(tiny, ours, theirs)]
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
        if ours.tensors[name] != theirs.tensors[name] and (tiny.name, name) not in DIFFERENT:
            yield f"{name}: {ours.tensors[name][:2]}, not {theirs.tensors[name][:2]}, or other bytes"


def test_model_whose_head_gguf_cannot_store_is_refused(tmp_path: Path) -> None:
    model_folders = folders([tiny for tiny in TINY if tiny.name == UNTIED], tmp_path)
    with pytest.raises(SourceError, match="output"):
        written(model_folders[UNTIED][0], tmp_path / "out", "f32")


QUANTIZED = ["llama", "mixtral", "qwen2", "qwen3moe", "gemma2", "gemma3", "phi-three", "gpt2", "falcon", "olmo2"]
QUANTIZED += ["starcoder2", "deepseek3", "granite", "cohere2", "qwen2moe", "roberta"]
ODD = ("deepseek3",)  # models whose columns do not fit Q1_0, which llama-quantize then refuses
LLAMA_QUANTIZE_TYPES = [name for name, file_type in FILE_TYPES.items() if file_type.by_llama_quantize]


@pytest.mark.slow
@needs_quantizer
@pytest.mark.parametrize("tiny", [tiny for tiny in TINY if tiny.name in QUANTIZED], ids=lambda tiny: tiny.name)
def test_files_equal_llama_quantizes(models: dict[str, tuple[Path, Path]], tiny: Tiny, tmp_path: Path) -> None:
    """Whole files, byte by byte: llama_model_quantize() on our f32 file, and our quantized file.

    Then with an imatrix: all tensors, because only the program llama-quantize writes the imatrix's keys.
    """
    folder = models[tiny.name][0]
    plain = [
        name for name in LLAMA_QUANTIZE_TYPES if name not in NEED_IMATRIX and not (name == "q1_0" and tiny.name in ODD)
    ]
    ours = written(folder, tmp_path / "ours", "f32", *plain)
    different, theirs = [], tmp_path / "theirs.gguf"
    for name in plain:
        assert quantize(ours["f32"], theirs, FILE_TYPES[name].number) == 0
        if theirs.read_bytes() != ours[name].read_bytes():
            different.append(name)
    weights = write_imatrix(ours["f32"], tmp_path / "imatrix.dat")
    for name in dict.fromkeys([*plain, *NEED_IMATRIX]):
        weighted = written(folder, tmp_path / "weighted", name, imatrix=str(tmp_path / "imatrix.dat"))[name]
        assert quantize(ours["f32"], theirs, FILE_TYPES[name].number, imatrix=weights) == 0
        if list(read_tensors(weighted).items()) != list(read_tensors(theirs).items()):
            different.append(f"{name} with an imatrix")
        weighted.unlink()
    assert different == []


# Models that this llama.cpp, or transformers' generation classes, cannot run at these sizes, and why. Their files still
# equal the converter's.
NOT_RUN = {
    "llama-yarn": "llama.cpp computes yarn's attention factor itself, and the one of this model is unusual",
    "llama-longrope": "llama.cpp reads long and short factors only in Phi-3 and MiniCPM",
    "phi-three-long": "with 256 or more tokens of context, llama.cpp uses the long factors, transformers the short",
    "phimoe": "llama.cpp's router is a plain softmax, transformers' a sparse mixer",
    "phimoe-long": "as phimoe",
    "cohere-norms": "llama.cpp looks for the norms of the heads only in models of 64 or more layers",
    "llama4": "llama.cpp requires 16 or 128 experts",
    "exaone4": "llama.cpp uses a sliding window only in models of 64 layers",
    "mellum": "differs from transformers by up to 0.35, with the converter's file as well; not explained",
    "mistral3": "has a vision tower in transformers",
    "chameleon": "has an image tokenizer in transformers",
    **dict.fromkeys(("t5", "t5-gated", "t5-encoder", "mt5", "umt5"), "an encoder, or an encoder and a decoder"),
    UNTIED: "is refused",
}
RUN = [
    tiny
    for tiny in TINY
    if not tiny.by_hand and tiny.name not in NOT_RUN and not tiny.name.endswith(("-body", "bert", "roberta"))
]


@pytest.mark.slow
@pytest.mark.parametrize("tiny", RUN, ids=lambda tiny: tiny.name)
def test_llama_cpp_computes_what_transformers_does(
    models: dict[str, tuple[Path, Path]], tiny: Tiny, tmp_path: Path
) -> None:
    """Next-token log-probabilities of the F32 file in llama.cpp, against those of transformers in float32."""
    pytest.importorskip("xllamacpp")
    from mergeforge.gguf.llama_cpp import compare_with_transformers

    folder = models[tiny.name][0]
    file = written(folder, tmp_path / "out", "f32")["f32"]
    (comparison,) = compare_with_transformers(folder, {str(file): "F32"})
    assert comparison.max_difference < 0.01 and math.isfinite(comparison.kl_divergence)
