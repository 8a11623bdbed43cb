"""mergeforge.gguf.file_types against llama-quantize's own choices, recorded.

golden_mixes.json was made with llama_model_quantize() of npm's @node-llama-cpp/linux-x64 3.22.1, called by ctypes: for
each model of mix_models a GGUF file was written (F32, that architecture's required keys, random values), quantised
to each mix with and without an imatrix (of one unrelated entry), and the tensors' types were read back in the order of
the file. "codes" names the types; "types" has, for "MODEL MIX" (and "MODEL MIX imatrix" where an imatrix changes
anything), a word for all tensors outside of blocks and one for each block, "*n" after one that comes n times.
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
    FileTypeFacts,
    TypeOverrides,
    file_order,
    file_type_named,
    select_tensor_types,
    type_named,
)
from mergeforge.gguf.quantize import QUANT_TYPES

GOLDEN = json.loads((Path(__file__).parent / "golden_file_types.json").read_text(encoding="utf-8"))
QUANTIZER = [name for name, mix in FILE_TYPES.items() if mix.quantizer]
TINY = FileTypeFacts("llama", 4, 0, 4, 2)


def recorded(key: str) -> list[str]:
    words = [word.split("*") for word in GOLDEN["types"][key].split()]
    return [GOLDEN["codes"][code] for word, *times in words for code in word * int(times[0] if times else 1)]


@pytest.mark.parametrize("name", MODELS)
def test_types_and_order_are_llama_quantize_s(name: str) -> None:
    """All 15 mixes, with and without an imatrix, against the recorded types in the recorded order."""
    model = MODELS[name]
    tensors = model.tensors()
    for mix in QUANTIZER:
        for imatrix in (False, True):
            key = f"{name} {mix}" + " imatrix" * (imatrix and f"{name} {mix} imatrix" in GOLDEN["types"])
            found = select_tensor_types(FILE_TYPES[mix], tensors, model.facts, has_importance=imatrix)
            assert [found[tensor].name for tensor in file_order(list(tensors))] == recorded(key), key


def test_file_types_are_gguf_s() -> None:
    """Labels and numbers against the gguf package's LlamaFileType."""
    from gguf import LlamaFileType

    known = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind.value for kind in LlamaFileType}
    assert {mix.label: mix.file_type for mix in FILE_TYPES.values()}.items() <= known.items()
    assert all(key == mix.label.lower() and mix.default in QUANT_TYPES for key, mix in FILE_TYPES.items())


@pytest.mark.parametrize("mix", ["f32", "f16", "bf16", "q8_0"])
def test_the_converter_s_rules(mix: str) -> None:
    """Vectors, norms, biases, routers and positions stay F32; columns that Q8_0 cannot take become F16."""
    kept = {
        "a.weight": (64,),
        "blk.0.attn_q_norm.weight": (2, 64),
        "blk.0.ffn_down_exps.bias": (2, 64),
        "blk.3.ffn_gate_inp.weight": (2, 64),
        "blk.3.ssm_conv1d.weight": (2, 64),
        "position_embd.weight": (2, 64),
        "mine.weight": (2, 64),
    }
    rest = {"token_embd.weight": (2, 64), "blk.0.ffn_up.weight": (2, 64), "blk.0.altup_proj.weight": (2, 64)}
    found = select_tensor_types(FILE_TYPES[mix], {**kept, **rest, "odd.weight": (2, 33)}, TINY, f32={"mine.weight"})
    assert {found[name].name for name in kept} == {"F32"}
    assert {found[name].name for name in rest} == {FILE_TYPES[mix].label}
    assert found["odd.weight"].name == ("F16" if mix == "q8_0" else FILE_TYPES[mix].label)


def test_what_is_not_quantised_keeps_the_source_s_type() -> None:
    """As llama-quantize does it: F32 from an F32 file, BF16 from a BF16 file; norms are F32 in both."""
    tensors = {"blk.0.altup_proj.weight": (4, 256), "blk.0.attn_norm.weight": (256,), "blk.0.attn_q.weight": (4, 256)}
    for source in ("f32", "bf16"):
        found = select_tensor_types(FILE_TYPES["q4_k_m"], tensors, TINY, source=source)
        assert [found[name].name for name in tensors] == [source.upper(), "F32", "Q4_K"]


TENSORS = {"token_embd.weight": (4, 256), "output.weight": (4, 256)} | {
    f"blk.{layer}.{part}.weight": (4, 256) for layer in range(4) for part in ("attn_v", "attn_q", "ffn_down")
}


def types(mix: str, **wishes: object) -> dict[str, str]:
    found = select_tensor_types(FILE_TYPES[mix], TENSORS, TINY, wishes=TypeOverrides(**wishes))  # type: ignore[arg-type]
    return {name: kind.name for name, kind in found.items()}


def test_pure_means_the_default_type_everywhere() -> None:
    assert set(types("q4_k_m", pure=True).values()) == {"Q4_K"}


def test_the_first_override_that_is_found_wins_in_any_case() -> None:
    found = types("q4_k_m", overrides=[(r"BLK\.[01]\.ffn", "q8_0"), ("ffn", "f16"), ("token_embd", "bf16")])
    assert [found[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q8_0", "Q8_0", "F16", "F16"]
    assert found["token_embd.weight"] == "BF16"
    assert found["output.weight"] == "Q6_K"


def test_an_overridden_tensor_does_not_count() -> None:
    """llama-quantize's counter skips it: attn_v of layer 1 is then the first of four."""
    found = types("q3_k_m", overrides=[(r"blk\.0\.attn_v", "q8_0")])
    assert [found[f"blk.{layer}.attn_v.weight"] for layer in range(4)] == ["Q8_0", "Q5_K", "Q5_K", "Q4_K"]


def test_output_and_embedding_types() -> None:
    found = types("q4_k_m", output="q8_0", embedding="q5_k")
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q8_0", "Q5_K")
    with pytest.raises(RecipeError, match=r"token_embd.weight has 40 columns, Q4_K needs a multiple of 256"):
        select_tensor_types(
            FILE_TYPES["q8_0"], {"token_embd.weight": (4, 40)}, TINY, wishes=TypeOverrides(embedding="q4_k")
        )


def test_wishes_count_for_the_converter_s_mixes_too() -> None:
    found = types("bf16", overrides=[("ffn_down", "q8_0")])
    assert found["blk.0.ffn_down.weight"] == "Q8_0"
    assert found["blk.0.attn_v.weight"] == "BF16"


def test_names_in_any_case_and_aliases() -> None:
    assert file_type_named("Q4_K_M") is FILE_TYPES["q4_k_m"]
    assert all(file_type_named(alias).label == f"{alias.upper()}_M" for alias in ALIASES)
    assert type_named("iq4_xs") is QUANT_TYPES["IQ4_XS"]


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(RecipeError, match="unknown GGUF type 'q4_k_x'") as error:
        file_type_named("q4_k_x")
    assert "did you mean 'q4_k_" in error.value.hint
    with pytest.raises(RecipeError, match="unknown GGUF tensor type 'q4_k_m'"):
        select_tensor_types(FILE_TYPES["q4_k_m"], TENSORS, TINY, wishes=TypeOverrides(overrides=[("a", "q4_k_m")]))
    with pytest.raises(RecipeError, match="is no regular expression"):
        select_tensor_types(FILE_TYPES["q4_k_m"], TENSORS, TINY, wishes=TypeOverrides(overrides=[("(", "q8_0")]))
    with pytest.raises(RecipeError, match="no layer of a model with 4"):
        select_tensor_types(FILE_TYPES["q4_k_m"], {"mtp.ffn_down.weight": (4, 256)}, FileTypeFacts("llama", 4, 8, 4, 2))
