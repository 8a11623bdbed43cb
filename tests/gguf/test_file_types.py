"""mergeforge.gguf.file_types against the types that llama-quantize selects (recorded).

golden_file_types.json was made by tools/golden_file_types with llama_model_quantize() of the npm package
@node-llama-cpp/linux-x64 3.22.1. For each model of file_type_models a GGUF file was written (F32, the required keys of
that architecture) and quantized to each file type, without an imatrix and with one; then the tensors' types were read
in the order of the file. "codes" names the types. "types" has, for "MODEL TYPE" (and "MODEL TYPE imatrix" where an
imatrix changes anything), one word for all tensors outside of blocks and one per block; "*n": it occurs n times.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.file_type_models import MODELS

from mergeforge.errors import RecipeError
from mergeforge.gguf.file_types import (
    ALIASES,
    FILE_TYPES,
    ModelHparams,
    TypeOverrides,
    file_order,
    file_type_named,
    quant_type_named,
    select_tensor_types,
)
from mergeforge.gguf.quantize import QUANT_TYPES

GOLDEN = json.loads((Path(__file__).parent / "golden_file_types.json").read_text(encoding="utf-8"))
BY_LLAMA_QUANTIZE = [name for name, file_type in FILE_TYPES.items() if file_type.by_llama_quantize]
TINY = ModelHparams("llama", 4, 0, 4, 2)


def recorded(key: str) -> list[str]:
    words = [word.split("*") for word in GOLDEN["types"][key].split()]
    return [GOLDEN["codes"][code] for word, *times in words for code in word * int(times[0] if times else 1)]


@pytest.mark.parametrize("name", MODELS)
def test_types_and_order_equal_llama_quantizes(name: str) -> None:
    """All file types, without and with an imatrix, against the recorded types in the recorded order."""
    model = MODELS[name]
    tensors = model.tensors()
    for file_type in BY_LLAMA_QUANTIZE:
        for imatrix in (False, True):
            key = f"{name} {file_type}"
            key += " imatrix" * (imatrix and f"{key} imatrix" in GOLDEN["types"])
            if key not in GOLDEN["types"]:  # llama-quantize refuses
                continue
            selected = select_tensor_types(FILE_TYPES[file_type], tensors, model.hparams, has_imatrix=imatrix)
            assert [selected[tensor].name for tensor in file_order(list(tensors))] == recorded(key), key


def test_file_types_match_the_gguf_package() -> None:
    """Labels and numbers against the gguf package's LlamaFileType; the newest types may not be in it."""
    from gguf import LlamaFileType

    known = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind.value for kind in LlamaFileType}
    for key, file_type in FILE_TYPES.items():
        assert known.get(file_type.label, file_type.number) == file_type.number
        assert key == file_type.label.lower() and file_type.default_type in QUANT_TYPES


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0"])
def test_converter_types_keep_small_tensors_in_f32(name: str) -> None:
    """Vectors, norms, biases, routers and position embeddings stay F32; columns that do not fit Q8_0 become F16."""
    stay_f32 = {
        "a.weight": (64,),
        "blk.0.attn_q_norm.weight": (2, 64),
        "blk.0.ffn_down_exps.bias": (2, 64),
        "blk.3.ffn_gate_inp.weight": (2, 64),
        "blk.3.ssm_conv1d.weight": (2, 64),
        "position_embd.weight": (2, 64),
        "mine.weight": (2, 64),
    }
    rest = {"token_embd.weight": (2, 64), "blk.0.ffn_up.weight": (2, 64), "blk.0.altup_proj.weight": (2, 64)}
    tensors, file_type = {**stay_f32, **rest, "odd.weight": (2, 33)}, FILE_TYPES[name]
    selected = select_tensor_types(file_type, tensors, TINY, f32={"mine.weight"})
    assert {selected[tensor].name for tensor in stay_f32} == {"F32"}
    assert {selected[tensor].name for tensor in rest} == {file_type.label}
    assert selected["odd.weight"].name == ("F16" if name == "q8_0" else file_type.label)


def test_unquantized_tensors_keep_the_type_of_the_source_file() -> None:
    """As in llama-quantize: F32 from an F32 file, BF16 from a BF16 file; norms are F32 in both."""
    tensors = {"blk.0.altup_proj.weight": (4, 256), "blk.0.attn_norm.weight": (256,), "blk.0.attn_q.weight": (4, 256)}
    for source in ("f32", "bf16"):
        selected = select_tensor_types(FILE_TYPES["q4_k_m"], tensors, TINY, source=source)
        assert [selected[name].name for name in tensors] == [source.upper(), "F32", "Q4_K"]


TENSORS = {"token_embd.weight": (4, 256), "output.weight": (4, 256)} | {
    f"blk.{layer}.{part}.weight": (4, 256) for layer in range(4) for part in ("attn_v", "attn_q", "ffn_down")
}


def types(name: str, **overrides: object) -> dict[str, str]:
    file_type, type_overrides = FILE_TYPES[name], TypeOverrides(**overrides)  # type: ignore[arg-type]
    selected = select_tensor_types(file_type, TENSORS, TINY, overrides=type_overrides)
    return {tensor: quant_type.name for tensor, quant_type in selected.items()}


def test_pure_gives_every_matrix_the_default_type() -> None:
    assert set(types("q4_k_m", pure=True).values()) == {"Q4_K"}


def test_first_matching_override_wins_in_upper_or_lower_case() -> None:
    selected = types("q4_k_m", tensor_types=[(r"BLK\.[01]\.ffn", "q8_0"), ("ffn", "f16"), ("token_embd", "bf16")])
    assert [selected[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q8_0", "Q8_0", "F16", "F16"]
    assert selected["token_embd.weight"] == "BF16"
    assert selected["output.weight"] == "Q6_K"


def test_overridden_tensors_are_not_counted() -> None:
    """llama-quantize skips them when it counts: attn_v of layer 1 is then the first of four."""
    selected = types("q3_k_m", tensor_types=[(r"blk\.0\.attn_v", "q8_0")])
    assert [selected[f"blk.{layer}.attn_v.weight"] for layer in range(4)] == ["Q8_0", "Q5_K", "Q5_K", "Q4_K"]


def test_output_and_embedding_types() -> None:
    selected = types("q4_k_m", output="q8_0", embedding="q5_k")
    assert (selected["output.weight"], selected["token_embd.weight"]) == ("Q8_0", "Q5_K")
    with pytest.raises(RecipeError, match=r"token_embd\.weight has 40 columns, but Q4_K needs a multiple of 256"):
        select_tensor_types(
            FILE_TYPES["q8_0"], {"token_embd.weight": (4, 40)}, TINY, overrides=TypeOverrides(embedding="q4_k")
        )


def test_overrides_apply_to_the_converters_file_types_too() -> None:
    selected = types("bf16", tensor_types=[("ffn_down", "q8_0")])
    assert selected["blk.0.ffn_down.weight"] == "Q8_0"
    assert selected["blk.0.attn_v.weight"] == "BF16"


def test_names_in_upper_or_lower_case_and_aliases() -> None:
    assert file_type_named("Q4_K_M") is FILE_TYPES["q4_k_m"]
    assert all(file_type_named(alias).label == f"{alias.upper()}_M" for alias in ALIASES)
    assert quant_type_named("iq4_xs") is QUANT_TYPES["IQ4_XS"]


def test_types_that_nothing_replaces_must_fit() -> None:
    """llama-quantize has no fallback for Q1_0; with blocks of 32 it takes F16."""
    with pytest.raises(RecipeError, match=r"a\.weight has 96 columns, but Q1_0 needs a multiple of 128"):
        select_tensor_types(FILE_TYPES["q1_0"], {"a.weight": (4, 96)}, TINY)
    overrides = TypeOverrides(tensor_types=[("a", "mxfp4")])
    assert (
        select_tensor_types(FILE_TYPES["q6_k"], {"a.weight": (4, 40)}, TINY, overrides=overrides)["a.weight"].name
        == "F16"
    )


def test_unknown_names_suggest_a_similar_one() -> None:
    with pytest.raises(RecipeError, match="unknown GGUF type 'q4_k_x'") as error:
        file_type_named("q4_k_x")
    assert "did you mean 'q4_k_" in error.value.hint
    with pytest.raises(RecipeError, match="unknown GGUF tensor type 'q4_k_m'"):
        select_tensor_types(
            FILE_TYPES["q4_k_m"], TENSORS, TINY, overrides=TypeOverrides(tensor_types=[("a", "q4_k_m")])
        )
    with pytest.raises(RecipeError, match="is not a valid regular expression"):
        select_tensor_types(FILE_TYPES["q4_k_m"], TENSORS, TINY, overrides=TypeOverrides(tensor_types=[("(", "q8_0")]))
    with pytest.raises(RecipeError, match="is outside of the model's 4 layers"):
        select_tensor_types(FILE_TYPES["q4_k_m"], {"mtp.ffn_down.weight": (4, 256)}, ModelHparams("llama", 4, 8, 4, 2))
