"""GGUF specs of model families, against llama.cpp's converter: installed, or as recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gguf_assembly import Arrays, architecture_keys, assembled, digest, infos, kept, spelled_keys, weights
from support.gguf_models import (
    LLAMA3,
    SIZES,
    TINY,
    VOCAB,
    Shapes,
    Tiny,
    baichuan,
    folders,
    plain,
    stored_shapes,
    values,
)
from support.llama_cpp_tools import convert, needs_converter, read

from mergeforge.core.messages import warnings_in
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import ARCHITECTURES, GGUFModelSpec, build_spec, class_name
from mergeforge.gguf.architectures.hf_defaults import hf_defaults

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_architectures.json").read_text())
TRANSFORMERS = "5.23"  # whose defaults defaults.py holds


def spec_and_tensors(config: Mapping[str, Any], shapes: Shapes, dtype: str = "float32") -> tuple[GGUFModelSpec, Arrays]:
    """A model's spec and its GGUF tensors."""
    tensors = infos(shapes, dtype)
    spec = build_spec(config, tensors)
    assert {*spec.targets, *spec.dropped} == tensors.keys()
    return spec, assembled(spec, tensors, weights(shapes))


def golden_model(name: str) -> tuple[dict[str, Any], Shapes]:
    facts = GOLDEN[name]
    return dict(facts["config"]), {key: tuple(shape) for key, shape in facts["stored"].items()}


def as_read(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys from JSON as they are in a file: kinds are tuples."""
    return {key: (tuple(kinds), value) for key, (kinds, value) in keys.items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_keys_equal_the_converters(name: str) -> None:
    config, shapes = golden_model(name)
    spec = build_spec(config, infos(shapes))
    assert spec.arch == GOLDEN[name]["arch"]
    assert list(spelled_keys(spec).items()) == list(as_read(GOLDEN[name]["keys"]).items())


@pytest.mark.parametrize("name", GOLDEN)
def test_tensors_equal_the_converters(name: str) -> None:
    spec, arrays = spec_and_tensors(*golden_model(name), GOLDEN[name]["dtype"])
    wanted = GOLDEN[name]["tensors"]
    assert {key: array.shape for key, array in arrays.items()} == {key: tuple(one[0]) for key, one in wanted.items()}
    assert kept(spec) == {key for key, one in wanted.items() if one[1]}
    # constants come from torch's pow, whose last bit may be another one elsewhere
    stored = wanted.keys() - spec.constants.keys()
    assert not [key for key in stored if digest(arrays[key].tobytes()) != wanted[key][2]]


@needs_converter
def test_tiny_models_equal_the_converters_files(tmp_path: Path) -> None:
    """All models in TINY that the converter can write: keys, their order, tensor names, shapes and bytes."""
    models = [tiny for tiny in TINY if tiny.official]
    made = folders(models, tmp_path)
    jobs = [(made[tiny.name][1], tmp_path / f"{tiny.name}.gguf", "f32", "gpt-2") for tiny in models]
    assert convert(jobs) == {}
    for tiny in models:
        _compare_with_file(tiny, made[tiny.name][0], tmp_path / f"{tiny.name}.gguf")


def _compare_with_file(tiny: Tiny, folder: Path, official: Path) -> None:
    config, shapes = json.loads((folder / "config.json").read_text()), stored_shapes(folder)
    spec, arrays = spec_and_tensors(config, shapes, tiny.dtype)
    file = read(official)
    assert file.keys["general.architecture"][1] == spec.arch
    assert list(spelled_keys(spec).items()) == list(architecture_keys(file.keys, spec.arch).items()), tiny.name
    assert arrays.keys() == file.tensors.keys(), tiny.name
    for name, (kind, shape, data) in file.tensors.items():
        assert (kind, shape) == ("F32", arrays[name].shape)
        assert data == arrays[name].tobytes(), f"{tiny.name}: {name}"
    assert shapes == golden_model(tiny.name)[1], "the golden facts are old: run tools/golden_gguf"


def test_experts_saved_by_transformers_5_equal_published_ones() -> None:
    """Qwen 3-VL MoE: the same experts with outputs as rows, which b11549's converter would transpose."""
    config, shapes = golden_model("qwen3vlmoe")
    stored, tensors = weights(shapes), infos(shapes)
    wanted = assembled(build_spec(config, tensors), tensors, stored)
    turned = {name: np.swapaxes(array, 1, 2) if "experts." in name else array for name, array in stored.items()}
    tensors = infos({name: array.shape for name, array in turned.items()})
    found = assembled(build_spec(config, tensors), tensors, turned)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    assert wanted["blk.0.ffn_gate_exps.weight"].shape == (4, 256, 256)


def test_rope_of_step35_is_scaled_only_where_attention_is_full() -> None:
    """llama3 rope, against that of a Llama with half of the head size; the other dimensions are not scaled."""
    config, shapes = golden_model("step35")
    spec = build_spec({**config, "rope_scaling": LLAMA3}, infos(shapes))
    theta = config["rope_theta"][0]
    llama, llama_shapes = golden_model("llama3")
    rope = {**LLAMA3, "rope_theta": theta}
    half = build_spec({**llama, "head_dim": 32, "rope_parameters": rope}, infos(llama_shapes))
    wanted = np.concatenate([half.constants["rope_freqs.weight"], np.ones(16, np.float32)])
    np.testing.assert_allclose(spec.constants["rope_freqs.weight"], wanted, rtol=1e-5)
    assert wanted.max() > 1


def test_stablelm_head_norms_are_stacked() -> None:
    """Rows of attn_q_norm are the heads' norms; the converter of b11549 loses them in a generator."""
    config = {**golden_model("stablelm")[0], "num_attention_heads": 4, "num_key_value_heads": 2}
    shapes = golden_model("stablelm")[1]
    norms = {f"model.layers.{layer}.self_attn.q_layernorm.norms.{head}.weight" for layer in (0, 1) for head in range(4)}
    spec, arrays = spec_and_tensors(config, shapes | dict.fromkeys(norms, (64,)))
    wanted = [values(f"model.layers.1.self_attn.q_layernorm.norms.{head}.weight", (64,)).numpy() for head in range(4)]
    assert np.array_equal(arrays["blk.1.attn_q_norm.weight"], np.stack(wanted))
    assert "blk.1.attn_q_norm.weight" in kept(spec)


def test_baichuans_packed_rows_equal_separate_ones() -> None:
    """W_pack, against the same rows as q, k and v of an InternLM 3, which the converter can write."""
    packed = np.arange(768 * 256, dtype=np.float32).reshape(768, 256)
    apart = dict(zip("qkv", np.split(packed, 3), strict=True))
    config, shapes = baichuan()
    tensors = infos(shapes)
    stored = weights(shapes) | {name: packed for name in shapes if "W_pack" in name}
    one = assembled(build_spec(config, tensors), tensors, stored)
    config, shapes = plain("InternLM3ForCausalLM", "internlm3", num_key_value_heads=4)
    shapes = {name: (256, 256) if "self_attn" in name else shape for name, shape in shapes.items()}
    tensors = infos(shapes)
    parts = {name: apart[name[-13]] for name in shapes if re.search("[qkv]_proj", name)}
    two = assembled(build_spec(config, tensors), tensors, weights(shapes) | parts)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[f"blk.0.attn_{part}.weight"], two[f"blk.0.attn_{part}.weight"]) for part in "qkv")


@pytest.mark.parametrize("name", ["mixtral", "mixtral-many", "olmoe", "deepseek3", "qwen3moe", "phimoe"])
def test_fused_experts_equal_single_ones(name: str) -> None:
    """Stacked experts of transformers 5 (gate and up fused), against the same experts as single tensors."""
    config, shapes = golden_model(name)
    stored = weights(shapes)
    tensors = infos(shapes)
    single = assembled(build_spec(config, tensors), tensors, stored)
    fused = fused_experts(stored)
    assert len(fused) < len(stored)
    tensors = infos({key: array.shape for key, array in fused.items()})
    whole = assembled(build_spec(config, tensors), tensors, fused)
    assert whole.keys() == single.keys()
    assert all(np.array_equal(whole[key], single[key]) for key in single)


def fused_experts(stored: Arrays) -> Arrays:
    """Experts as transformers 5 keeps them in memory: gate_up_proj and down_proj, stacked per layer."""
    parts: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    others = {}
    for name, array in stored.items():
        if found := re.match(r"(.*experts)\.(\d+)\.(\w+)\.weight", name):
            kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(found[3], found[3])
            parts.setdefault(found[1], {})[kind, int(found[2])] = array
        else:
            others[name] = array
    for layer, found in parts.items():
        count = len(found) // 3
        gate_up = [np.concatenate([found["gate_proj", at], found["up_proj", at]]) for at in range(count)]
        others[f"{layer}.gate_up_proj"] = np.stack(gate_up)
        others[f"{layer}.down_proj"] = np.stack([found["down_proj", at] for at in range(count)])
    return others


def test_configs_of_transformers_4_and_5_give_the_same_spec() -> None:
    """rope_theta and rope_scaling at the root mean the same as rope_parameters."""
    for new, old in (("gemma2", "gemma2-legacy"), ("starcoder2-tied", "starcoder2-tied"), ("llama3", "llama3-legacy")):
        config, shapes = golden_model(old)
        renewed = {**config, "rope_parameters": golden_model(new)[0].get("rope_parameters")}
        renewed = {key: value for key, value in renewed.items() if key not in ("rope_theta", "rope_scaling")}
        assert spelled_keys(build_spec(renewed, infos(shapes))) == spelled_keys(build_spec(config, infos(shapes)))


def test_defaults_equal_transformers() -> None:
    """Every default of the table against a config of its class."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        installed = "none"
    if not installed.startswith(TRANSFORMERS):
        pytest.skip(f"the table is of transformers {TRANSFORMERS}, installed: {installed}")
    from support.quiet import quiet
    from transformers import CONFIG_MAPPING

    for kind, table in hf_defaults().items():
        with quiet():
            stated = CONFIG_MAPPING[kind]().to_dict()
        rope = stated.get("rope_parameters") or {}
        found = {**rope.get("full_attention", rope), **stated}
        assert {key: found[key] for key, value in table.items() if value is not None} == {
            key: value for key, value in table.items() if value is not None
        }


# ---- What is refused, dropped and noted


def llama(**changes: Any) -> tuple[dict[str, Any], Shapes]:
    config, shapes = golden_model("llama")
    return {key: value for key, value in {**config, **changes}.items() if value != "gone"}, shapes


def refusal(config: Mapping[str, Any], shapes: Shapes, dtype: str = "float32") -> str:
    with pytest.raises(SourceError) as caught:
        build_spec(config, infos(shapes, dtype))
    return f"{caught.value} ({caught.value.hint})"


def test_an_unknown_class_is_refused_with_the_nearest_name() -> None:
    said = refusal(*llama(architectures=["LamaForCausalLM"]))
    assert "LamaForCausalLM" in said and "did you mean 'LlamaForCausalLM'" in said and "safetensors" in said
    assert "'architectures'" in refusal(*llama(architectures="gone"))


def test_a_missing_key_is_named() -> None:
    config, shapes = golden_model("minicpm")
    assert "'scale_emb'" in refusal({key: value for key, value in config.items() if key != "scale_emb"}, shapes)


def test_missing_layers_heads_and_tensors_are_named() -> None:
    config, shapes = llama()
    without = {name: shape for name, shape in shapes.items() if "layers.1.mlp.up_proj" not in name}
    assert "blk.1.ffn_up" in refusal(config, without)
    assert "blk.2.attn_norm" in refusal({**config, "num_hidden_layers": 3}, shapes)
    assert "model.layers.1." in refusal({**config, "num_hidden_layers": 1}, shapes)
    assert "tie_word_embeddings" in refusal(config, {name: shapes[name] for name in shapes if "lm_head" not in name})
    assert "equal parts" in refusal({**config, "num_attention_heads": 7}, shapes)


def test_gemma_has_no_output_tensor() -> None:
    """Whatever the config says: llama.cpp uses the embedding, and a stored head gives a warning."""
    config, shapes = golden_model("gemma2-legacy")
    spec = build_spec({**config, "tie_word_embeddings": False}, infos(shapes))
    assert "lm_head.weight" in spec.dropped and "lm_head.weight is not written" in " ".join(spec.notes)


def test_a_missing_expert_is_refused() -> None:
    config, shapes = golden_model("mixtral")
    without = {name: shape for name, shape in shapes.items() if "layers.1.block_sparse_moe.experts.2.w1" not in name}
    assert "blk.1.ffn_gate_exps.weight" in refusal(config, without)
    assert "config.json has 3 experts" in refusal({**config, "num_local_experts": 3}, shapes)


def test_an_unknown_tensor_is_refused_by_name() -> None:
    config, shapes = llama()
    assert "model.layers.0.self_attn.extra" in refusal(config, {**shapes, "model.layers.0.self_attn.extra": (4, 4)})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "U8"),
        ("model.layers.0.self_attn.q_proj.weight", "F8_E4M3"),
        ("model.layers.0.self_attn.q_proj.SCB", "F32"),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", "F32"),
        ("model.layers.0.self_attn.q_proj.qweight", "I32"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "F32"),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8"),
    ],
)
def test_quantized_weights_are_refused(name: str, dtype: str) -> None:
    config, shapes = llama()
    tensors = {**infos(shapes), name: TensorInfo(name, dtype, (256, 256))}
    with pytest.raises(SourceError, match=f"{re.escape(name)}.*already quantized"):
        build_spec(config, tensors)


def test_buffers_and_other_modalities_are_dropped_with_a_reason() -> None:
    config, shapes = golden_model("gemma3-vision")
    dropped = build_spec(config, infos(shapes)).dropped
    assert any("vision_tower" in name for name in dropped)
    assert all("mmproj" in why for why in dropped.values())
    config, shapes = llama()
    more = {**infos(shapes), "model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo("x", "F32", (16,))}
    assert "buffer" in build_spec(config, more).dropped["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_multi_token_prediction_layers_are_dropped() -> None:
    config, shapes = golden_model("deepseek3")
    more = {**shapes, "model.layers.3.eh_proj.weight": (256, 512), "model.layers.3.mlp.gate.weight": (4, 256)}
    assert build_spec(config, infos(more)).dropped.keys() == {
        "model.layers.3.eh_proj.weight",
        "model.layers.3.mlp.gate.weight",
    }


def test_a_model_without_its_prediction_layers_is_written_without_them() -> None:
    """transformers does not save mtp.*, though config.json counts them: block_count must not."""
    config, shapes = golden_model("qwen35")
    without = {name: shape for name, shape in shapes.items() if not name.startswith("mtp.")}
    spec = build_spec({**config, "mtp_num_hidden_layers": 1}, infos(without))
    assert spec.keys["qwen35.block_count"].value == 4 and "qwen35.nextn_predict_layers" not in spec.keys
    assert "without them" in " ".join(spec.notes)
    assert build_spec(config, infos(shapes)).keys["qwen35.block_count"].value == 5


def test_settings_that_llama_cpp_ignores_give_a_warning() -> None:
    odd_yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    sliding = {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
    scaled = odd_yarn | {"mscale": 2.0, "mscale_all_dim": 1.0}
    for name, change, word in (
        ("qwen2", {"rope_parameters": odd_yarn | {"attention_factor": 2.0}}, "attention factor"),
        ("qwen2", {"rope_parameters": scaled}, "mscale"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ("qwen2", {"rope_parameters": {"rope_type": "curled"}}, "'curled'"),
        ("qwen2", sliding, "last 64 tokens"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "one layer of every 6"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no rope"),
        ("cohere", {"use_qk_norm": True}, "64 layers"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("gemma2", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar"),
        ("gemma3", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar"),
        ("deepseek3", {"scoring_func": None}, "scoring_func"),
    ):
        config, shapes = golden_model(name)
        assert not build_spec(config, infos(shapes)).notes
        (warning,) = warnings_in(build_spec({**config, **change}, infos(shapes)).notes)
        assert word in warning


def test_settings_that_the_file_holds_give_no_warning() -> None:
    """Gemma 4's and HunYuan's rope, MiniCPM 3's factors, and a window that no layer uses."""
    for name in ("gemma4", "hunyuan-vl", "dots1"):
        config, shapes = golden_model(name)
        assert not build_spec(config, infos(shapes)).notes, name
    config, shapes = golden_model("minicpm3")
    factors = [1.0] * (config["qk_rope_head_dim"] // 2)
    rope = {"rope_type": "longrope", "long_factor": factors, "short_factor": factors}
    assert not build_spec({**config, "rope_scaling": rope}, infos(shapes)).notes


def test_other_differences_are_told() -> None:
    """PhiMoE's router, of which llama.cpp always differs, is a warning; the pooling that a BERT lacks is a note."""
    config, shapes = golden_model("phimoe")
    assert "sparse mixer" in warnings_in(build_spec(config, infos(shapes)).notes)[0]
    config, shapes = golden_model("bert")
    notes = build_spec(config, infos(shapes)).notes
    assert "--pooling" in " ".join(notes) and not warnings_in(notes)


def test_rows_beyond_the_vocabulary_are_dropped() -> None:
    """Gemma 3 embeddings are cut to config.json's vocab_size."""
    config, shapes = golden_model("gemma3")
    _, arrays = spec_and_tensors(config, {**shapes, "model.embed_tokens.weight": (VOCAB + 8, 256)})
    assert np.array_equal(arrays["token_embd.weight"], values("model.embed_tokens.weight", (VOCAB + 8, 256))[:VOCAB])


def test_xlm_roberta_is_a_roberta_with_another_vocabulary() -> None:
    config, shapes = golden_model("roberta")
    one, arrays = spec_and_tensors(config, shapes)
    other, same = spec_and_tensors(
        {**config, "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta"}, shapes
    )
    assert (one.vocab, other.vocab) == ("roberta", "unigram")
    assert spelled_keys(one) == spelled_keys(other)
    assert arrays.keys() == same.keys() and all(np.array_equal(arrays[key], same[key]) for key in arrays)


def test_a_classifiers_labels_are_keys() -> None:
    """Two numbered labels are transformers' default, and are not written."""
    config, shapes = golden_model("bert")
    shapes = {f"bert.{name}": shape for name, shape in shapes.items()} | {"classifier.weight": (3, 256)}
    told = {**config, "architectures": ["BertForSequenceClassification"]}
    named = build_spec({**told, "id2label": {"0": "no", "2": "yes", "1": "maybe"}}, infos(shapes))
    assert named.keys["bert.classifier.output_labels"].value == ("no", "maybe", "yes")
    assert named.targets["classifier.weight"][0].tensor == "cls.output.weight"
    assert build_spec(config, infos(golden_model("bert")[1])).keys.keys() < named.keys.keys()


def test_llama3_factors_follow_the_wavelengths() -> None:
    """rope_freqs.weight: 1 for short waves, `factor` for long ones, smooth in between (in float64)."""
    config, shapes = golden_model("llama3")
    rope = config["rope_parameters"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, 64, 2) / 64)
    smooth = (rope["original_max_position_embeddings"] / waves - 1) / 3
    wanted = np.where(smooth > 1, 1, np.where(smooth < 0, 8, 1 / ((1 - smooth) / 8 + smooth)))
    found = build_spec(config, infos(shapes)).constants["rope_freqs.weight"]
    assert found.dtype == np.float32 and np.allclose(found, wanted, rtol=1e-5)
    assert 1 in found and 8 in found and len(set(found)) > 2


def test_longrope_needs_a_factor_for_each_rotated_pair() -> None:
    config, shapes = golden_model("phi-three-long")
    short = {**config, "rope_scaling": {**config["rope_scaling"], "long_factor": [1.0] * 31}}
    assert "31 factors" in refusal(short, shapes)


def test_a_text_part_is_found_under_both_names() -> None:
    """transformers 4 puts language_model first, transformers 5 after model."""
    config, shapes = golden_model("gemma3-vision")
    new = {name.replace("language_model.model.", "model.language_model."): shape for name, shape in shapes.items()}
    assert new != shapes
    one, two = (build_spec(config, infos(some)).targets.values() for some in (new, shapes))
    assert [place.tensor for some in one for place in some] == [place.tensor for some in two for place in some]


def test_every_familys_vocabulary_is_known() -> None:
    from mergeforge.gguf.vocab import KINDS

    assert {build_spec(*(golden_model(name)[0], infos(golden_model(name)[1]))).vocab for name in GOLDEN} <= {*KINDS}


def test_every_family_has_a_tiny_model() -> None:
    tested = {ARCHITECTURES[class_name(facts["config"])] for facts in GOLDEN.values()}
    tested |= {ARCHITECTURES["BaichuanForCausalLM"], ARCHITECTURES["XLMRobertaModel"]}  # on their own
    tested |= {ARCHITECTURES["HunYuanMoEV1ForCausalLM"]}  # its converter needs a tokenizer with code of its own
    assert {ARCHITECTURES[name] for name in ARCHITECTURES} == tested
    assert SIZES["vocab_size"] == VOCAB
