"""Tiny models of every family, as Hugging Face folders: config, weights, a small tokenizer.

Made by transformers' own classes, so that names, shapes and configs are what it saves. Weights are
integers over 2048, seeded by the tensor's name: exact in every 16-bit type and on every machine.
The configs obey what llama.cpp takes for granted (Gemma's query_pre_attn_scalar is the head's size,
Qwen 3 normalizes the experts' weights, DeepSeek has q_lora_rank), so the engine can run them.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from support.quiet import quiet

VOCAB = 320
SPM_PIECES = 316
TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs! How many words are there? "
    "One, two, three: 1234567890. We merge models and write them into small files, again and again, row by row."
)
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tiny:
    """A tiny model: `kind` names transformers' config class; `by_hand` gives config and shapes of code on the Hub.

    `stand_in`: what must be changed in config.json (None: left out) for the converter to get the model right,
    as a config without model_type is read as it is; `official` False: the converter cannot write it at all.
    `more`: tensors beside the class's; `legacy`: config.json as transformers 4 wrote it; `without`: keys that
    config.json leaves out; `extra`: keys that it has beside the class's; `fused`: experts in one tensor.
    """

    name: str
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "bpe"
    legacy: bool = False
    without: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = False
    dtype: str = "float32"
    by_hand: Callable[[], tuple[dict[str, Any], Shapes]] | None = None
    more: Callable[[Shapes], Shapes] | None = None
    head: bool = False  # lm_head is stored though it is tied
    stand_in: Mapping[str, Any] = field(default_factory=dict)
    official: bool = True


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
SCALED = {key: value for key, value in YARN.items() if key != "rope_theta"}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0 + at / 8 for at in range(32)],
    "short_factor": [1.0 + at / 64 for at in range(32)],
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    **EXPERTS,
}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64}
PHIMOE = {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}
OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 64}
GPT2 = {"vocab_size": VOCAB, "n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 256}
NEOX = {"num_key_value_heads": None}


_SEEING = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
_SEEING |= {"image_size": 28, "patch_size": 14}
_QWEN_SEEING = {"depth": 1, "hidden_size": 64, "out_hidden_size": 256, "num_heads": 2, "intermediate_size": 64}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": _SEEING,
    "mistral3": _SEEING,
    "qwen2_vl": {"depth": 1, "embed_dim": 64, "hidden_size": 256, "num_heads": 2},
    "qwen2_5_vl": _QWEN_SEEING,
    "qwen3_vl": {**_QWEN_SEEING, "deepstack_visual_indexes": [0]},
    "qwen3_vl_moe": {**_QWEN_SEEING, "deepstack_visual_indexes": [0]},
    "qwen3_5": _QWEN_SEEING,
    "glm4v": _QWEN_SEEING,
    "glm4v_moe": _QWEN_SEEING,
}
AUDIO = {"voxtral": "VoxtralForConditionalGeneration", "qwen2_audio": "Qwen2AudioForConditionalGeneration"}
CLASSES = {kind: f"{kind.upper()}ForConditionalGeneration" for kind in ("t5", "mt5", "umt5")}
CLASSES |= {"chameleon": "ChameleonForConditionalGeneration"}
LISTENING = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
LISTENING |= {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8]}
LINEAR = {
    "num_hidden_layers": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
SPARSE = {"num_experts": 4, "shared_expert_intermediate_size": 256, **EXPERTS}


PROTOBUF = bool(find_spec("google") and find_spec("google.protobuf"))  # the converter reads T5's spiece.model with it
T5 = {"d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
T5["tie_word_embeddings"] = True
CHAMELEON = {"vocabulary_map": {"<image>": 3, "IMGIMGA": 4}}
CHAMELEON["vq_config"] = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "num_embeddings": 16}
SLIDING = ["full_attention", "sliding_attention"]
LFM = ["conv", "full_attention", "conv"]
DISTIL = {"dim": 256, "n_layers": 2, "n_heads": 4, "hidden_dim": 512}
JAMBA = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4, "hidden_size": 128, "mamba_dt_rank": 8}
JAMBA |= {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}
GEMMA3N = {"num_hidden_layers": 4, "head_dim": 64, "sliding_window": 64, "intermediate_size": 512}
GEMMA3N |= {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}
GEMMA3N |= {"laurel_rank": 32, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4 = {"num_hidden_layers": 4, "head_dim": 64, "sliding_window": 64}
GEMMA4 |= {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2}
GEMMA4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
MINICPM3 = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 2}
GRANITE4 = {**MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 256}
FALCON_H1 = {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 2}
FALCON_H1 |= {"ssm_multipliers": [0.5, 0.7, 0.3, 1.1, 0.9], "mlp_multipliers": [0.8, 0.3], "key_multiplier": 0.7}
FALCON_H1 |= {"attention_in_multiplier": 1.3, "ssm_in_multiplier": 1.25, "lm_head_multiplier": 0.0625, "head_dim": 64}
GLM_DSA = {**LATENT, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 64, "num_nextn_predict_layers": 0}
EXAONE = {"num_hidden_layers": 4, "sliding_window": 64, "num_experts": 4, "num_shared_experts": 1, "head_dim": 64}
EXAONE |= EXPERTS
DOTS = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 64, **EXPERTS}
AFMOE = {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 64, "sliding_window": 64}
AFMOE |= {"num_hidden_layers": 4, **EXPERTS}
MPT = {"vocab_size": VOCAB, "d_model": 256, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}
XDROPE = {
    "head_dim": 64,
    "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0, "mrope_section": [8, 8, 8, 8]},
}


def input_rows(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Fused experts as they are published: their rows are inputs, not outputs."""
    fused = {name: shape for name, shape in shapes.items() if name.endswith(("gate_up_proj", "experts.down_proj"))}
    return {name: (shape[0], shape[2], shape[1]) for name, shape in fused.items()}


def next_layer(shapes: Mapping[str, tuple[int, ...]], last: int) -> Shapes:
    """A further layer like the last one, which predicts a further token."""
    old, new = f"layers.{last}.", f"layers.{last + 1}."
    layer = {name.replace(old, new): shape for name, shape in shapes.items() if old in name}
    own = {"eh_proj": (256, 512), "enorm": (256,), "hnorm": (256,), "shared_head.norm": (256,)}
    return {**layer, **{f"model.{new}{name}.weight": shape for name, shape in own.items()}}


def mtp_layer(shapes: Mapping[str, tuple[int, ...]], layer: int) -> Shapes:
    """mtp.*: a layer like `layer`, and the tensors that join it to the model."""
    pattern = re.compile(rf"(?:.*\.)?layers\.{layer}\.")
    inside = {pattern.sub("mtp.layers.0.", name): shape for name, shape in shapes.items() if pattern.match(name)}
    norms = ("mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
    return {**inside, "mtp.fc.weight": (256, 512), **dict.fromkeys(norms, (256,))}


MINICPM = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}


RND1 = {"architectures": ["RND1"], "model_type": "rnd1", "mask_token_id": 3}


HUB = {  # in gguf_hub_models.py -> tokenizer
    **dict.fromkeys(("nemotron-h", "nemotron-h-moe", "nemotron-h-puzzle", "mimo2", "step35", "step37"), "bpe"),
    **dict.fromkeys(("cohere2-moe", "hy-v3", "maple", "deepseek32"), "bpe"),
    **dict.fromkeys(("step3-vl", "kimi-linear", "deci", "deci-7b"), "bpe"),
    **dict.fromkeys(("grok1", "grok2"), "spm"),
    **dict.fromkeys(("nomic-bert", "nomic-bert-moe"), "wordpiece"),
}


def hub_model(name: str) -> tuple[dict[str, Any], Shapes]:
    """A model that the function of its name in gguf_hub_models.py makes."""
    from support import gguf_hub_models

    made: tuple[dict[str, Any], Shapes] = getattr(gguf_hub_models, name.replace("-", "_"))()
    return made


def linear(theta: float = 1e4) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "linear", "rope_theta": theta, "factor": 2.0}}


TINY = (
    Tiny("llama", "llama", {"attention_bias": True, "head_dim": 32}, tokenizer="spm"),
    Tiny("llama-tied", "llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    Tiny("llama-tied-head", "llama", {"tie_word_embeddings": True}, head=True),
    Tiny("llama3", "llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}, dtype="bfloat16"),
    Tiny("llama3-legacy", "llama", {"rope_parameters": LLAMA3}, legacy=True, without=("head_dim",)),
    Tiny("llama-linear", "llama", linear(), legacy=True, tokenizer="spm"),
    Tiny("llama-dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    Tiny("llama-yarn", "llama", {"rope_parameters": {**YARN, "beta_fast": 16.0, "attention_factor": 1.25}}),
    Tiny("llama-longrope", "llama", {"rope_parameters": {**LONG, "factor": 4.0}}),
    Tiny(
        "llama-sparse",
        "llama",
        {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "num_key_value_heads": 4},
        without=("rms_norm_eps", "max_position_embeddings", "num_key_value_heads", "head_dim", "rope_parameters"),
    ),
    Tiny("code-llama", "llama", {"vocab_size": 32016, "hidden_size": 64, "intermediate_size": 64}, tokenizer="spm"),
    Tiny("mistral", "mistral", {"head_dim": 32}, tokenizer="spm", dtype="bfloat16"),
    Tiny("mixtral", "mixtral", {"num_local_experts": 4}, tokenizer="spm"),
    Tiny("mixtral-many", "mixtral", {"num_local_experts": 11, "head_dim": 64, "hidden_size": 64}, legacy=True),
    Tiny("ministral", "ministral3", {"head_dim": 64}, without=("rope_parameters",)),
    Tiny("mistral3", "mistral3", {"head_dim": 64}, tokenizer="spm"),
    Tiny("qwen2", "qwen2", {}),
    Tiny("qwen2-yarn", "qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}, legacy=True),
    Tiny("qwen2moe", "qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 512, **EXPERTS}),
    Tiny(
        "qwen2moe-fused", "qwen2_moe", {"num_experts": 3, "shared_expert_intermediate_size": 256, **EXPERTS}, fused=True
    ),
    Tiny("qwen3", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, dtype="bfloat16"),
    Tiny("qwen3moe", "qwen3_moe", {"num_experts": 12, "norm_topk_prob": True, "head_dim": 64, **EXPERTS}),
    Tiny(
        "qwen3moe-fused", "qwen3_moe", {"num_experts": 4, "norm_topk_prob": True, "head_dim": 64, **EXPERTS}, fused=True
    ),
    Tiny("gemma", "gemma", {"head_dim": 64}, tokenizer="spm"),
    Tiny("gemma2", "gemma2", GEMMA, tokenizer="spm"),
    Tiny("gemma2-legacy", "gemma2", GEMMA, tokenizer="spm", legacy=True, head=True, dtype="bfloat16"),
    Tiny("gemma3", "gemma3_text", GEMMA, tokenizer="spm"),
    Tiny("gemma3-legacy", "gemma3_text", {**GEMMA, "num_key_value_heads": 1}, legacy=True),
    Tiny("gemma3-vision", "gemma3", GEMMA, tokenizer="spm"),
    Tiny("phi-three", "phi3", {}, tokenizer="spm"),
    Tiny(
        "phi-three-long",
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 128, "sliding_window": 64},
        tokenizer="spm",
        legacy=True,
    ),
    Tiny(
        "phimoe",
        "phimoe",
        PHIMOE,
        tokenizer="spm",
        extra={"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 128},
    ),
    Tiny(
        "phimoe-long",
        "phimoe",
        {**PHIMOE, "rope_parameters": {**LONG, "short_mscale": 1.25, "long_mscale": 1.25}},
        tokenizer="spm",
        legacy=True,
        extra={"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 128},
    ),
    Tiny("phi2", "phi", {"num_key_value_heads": 4, "intermediate_size": 1024}),
    Tiny("gpt2", "gpt2", GPT2, extra={"n_ctx": 256}),
    Tiny("gptneox", "gpt_neox", NEOX, stand_in={"model_type": None, "rotary_pct": 0.25}),
    Tiny(
        "gptneox-legacy",
        "gpt_neox",
        {**NEOX, "use_parallel_residual": False},
        legacy=True,
        stand_in={"model_type": None},
    ),
    Tiny("starcoder", "gpt_bigcode", GPT2),
    Tiny("starcoder2", "starcoder2", {"use_bias": True}),
    Tiny("starcoder2-tied", "starcoder2", {"use_bias": True, "tie_word_embeddings": True}, legacy=True),
    Tiny("stablelm", "stablelm", {"use_qkv_bias": True}),
    Tiny("stablelm-norms", "stablelm", {"qk_layernorm": True, "use_parallel_residual": True}, official=False),
    Tiny("olmo", "olmo", {"clip_qkv": 8.0}),
    Tiny("olmo2", "olmo2", {}),
    Tiny("olmo3", "olmo3", {"num_hidden_layers": 4, "sliding_window": 64}),
    Tiny(
        "olmo3-yarn",
        "olmo3",
        {"num_hidden_layers": 4, "sliding_window": 64},
        legacy=True,
        extra={"rope_scaling": SCALED},
    ),
    Tiny("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    Tiny("deepseek2", "deepseek_v2", {**LATENT, "topk_method": "greedy"}, extra={"scoring_func": "softmax"}),
    Tiny(
        "deepseek3",
        "deepseek_v3",
        {**LATENT, "n_group": 1, "topk_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        extra={"scoring_func": "sigmoid"},
        legacy=True,
    ),
    Tiny("gpt-oss", "gpt_oss", OSS),
    Tiny("gpt-oss-bf16", "gpt_oss", OSS, legacy=True, dtype="bfloat16"),
    Tiny("smollm3", "smollm3", {"num_hidden_layers": 4}),
    Tiny("granite", "granite", {"attention_multiplier": 0.125, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    Tiny("granitemoe", "granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny(
        "granitemoe-shared", "granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 256}, legacy=True
    ),
    Tiny("falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    Tiny(
        "falcon-single",
        "falcon",
        {"multi_query": True, "num_kv_heads": None},
        stand_in={"model_type": None, "num_kv_heads": 1},
    ),
    Tiny("cohere-norms", "cohere", {"use_qk_norm": True}),
    Tiny("cohere", "cohere", extra={"model_max_length": 4096}),
    Tiny("cohere2", "cohere2", {"num_hidden_layers": 4, "sliding_window": 64}, extra={"rotary_pct": 1.0}),
    Tiny("arcee", "arcee", {"head_dim": 64}),
    Tiny("seed-oss", "seed_oss", {"head_dim": 64}),
    Tiny(
        "llama4", "llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 512, "interleave_moe_layer_step": 2}
    ),
    Tiny("exaone4", "exaone4", {"num_hidden_layers": 4, "sliding_window": 64}),
    Tiny(
        "phi-three-partial",
        "phi3",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75}},
        tokenizer="spm",
    ),
    Tiny("llama-body", "llama", {}, tokenizer="spm", extra={"architectures": ["LlamaModel"]}),
    Tiny("qwen2-body", "qwen2", {}, extra={"architectures": ["Qwen2Model"]}),
    Tiny("qwen3-body", "qwen3", {"head_dim": 64}, extra={"architectures": ["Qwen3Model"]}),
    Tiny("bert", "bert", {}, extra={"architectures": ["BertModel"]}),
    Tiny("roberta", "roberta", {"pad_token_id": 1, "type_vocab_size": 1}, extra={"architectures": ["RobertaModel"]}),
    Tiny("smolvlm", by_hand=lambda: smolvlm(), tokenizer="spm"),
    Tiny("llama-bidirectional", "llama", {}, extra={"architectures": ["LlamaBidirectionalModel"]}),
    Tiny("voxtral", "voxtral", {"head_dim": 64}),
    Tiny("qwen2-audio", "qwen2_audio", {"model_type": "qwen2"}),
    Tiny("rnd1", "qwen3_moe", {"num_experts": 4, "head_dim": 64, **EXPERTS}, extra=RND1),
    Tiny("qwen2vl", "qwen2_vl", {"rope_parameters": MROPE}),
    Tiny("qwen25vl", "qwen2_5_vl", {"rope_parameters": MROPE}),
    Tiny("qwen3vl", "qwen3_vl", {"rope_parameters": MROPE, "head_dim": 64}),
    Tiny(
        "qwen3vlmoe",
        "qwen3_vl_moe",
        {"rope_parameters": MROPE, "head_dim": 64, "num_experts": 4, **EXPERTS},
        more=lambda shapes: input_rows(shapes),
    ),
    Tiny("qwen3next", "qwen3_next", {**LINEAR, **SPARSE}, more=lambda shapes: mtp_layer(shapes, 3)),
    Tiny("qwen35", "qwen3_5_text", LINEAR, more=lambda shapes: mtp_layer(shapes, 3)),
    Tiny("qwen35-body", "qwen3_5_text", LINEAR, extra={"architectures": ["Qwen3_5TextModel"]}),
    Tiny("qwen35-vision", "qwen3_5", LINEAR, more=lambda shapes: mtp_layer(shapes, 3)),
    Tiny("qwen35moe", "qwen3_5_moe_text", {**LINEAR, **SPARSE}, more=lambda shapes: mtp_layer(shapes, 3)),
    Tiny("glm4", "glm4", {"head_dim": 64}, tokenizer="glm"),
    Tiny("glm", "glm", {"head_dim": 64, "attention_bias": True}, tokenizer="glm"),
    Tiny("glm4v", "glm4v", {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5}}, tokenizer="glm"),
    Tiny(
        "glm4moe",
        "glm4_moe",
        {"head_dim": 64, "n_routed_experts": 4, "use_qk_norm": True, **EXPERTS},
        tokenizer="glm",
        more=lambda shapes: next_layer(shapes, 1),
    ),
    Tiny("glm4vmoe", "glm4v_moe", {"rope_parameters": MROPE, "n_routed_experts": 4, **EXPERTS}, tokenizer="glm"),
    Tiny("solar-open", "solar_open", {"head_dim": 64, "n_routed_experts": 4, **EXPERTS}, tokenizer="glm"),
    Tiny("glm4-lite", "glm4_moe_lite", {**LATENT, "num_nextn_predict_layers": 0}, tokenizer="glm"),
    Tiny("deepseek1", by_hand=lambda: deepseek1()),
    Tiny(
        "exaone-moe",
        "exaone_moe",
        EXAONE,
        extra={"num_nextn_predict_layers": 1},
        more=lambda shapes: mtp_layer(shapes, 0),
    ),
    Tiny("ernie", "ernie4_5", {"head_dim": 64}, tokenizer="spm"),
    Tiny("ernie-fused", by_hand=lambda: ernie_fused(), tokenizer="spm"),
    Tiny(
        "ernie-moe",
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 256, "moe_num_shared_experts": 1},
        tokenizer="spm",
    ),
    Tiny("paddleocr", by_hand=lambda: plain("PaddleOCRVLForConditionalGeneration", "paddle"), tokenizer="spm"),
    Tiny("hunyuan", "hunyuan_v1_dense", {"head_dim": 64}, extra={"eod_token_id": 2}),
    Tiny("hunyuan-moe", by_hand=lambda: hunyuan_moe(), official=False),
    Tiny("hunyuan-vl", by_hand=lambda: normed("HunYuanVLForConditionalGeneration", "hunyuan_vl_x", **XDROPE)),
    Tiny("bailing", by_hand=lambda: bailing()),
    Tiny("bailing2", by_hand=lambda: bailing2()),
    Tiny("nemotron", "nemotron", {"head_dim": 64}, tokenizer="spm"),
    Tiny("minimax-m2", "minimax_m2", {"num_local_experts": 4, "head_dim": 64}, extra={"rotary_dim": 32}),
    Tiny("dots1", "dots1", {**DOTS, "n_group": 1, "topk_group": 1}),
    Tiny("afmoe", "afmoe", AFMOE),
    Tiny("smallthinker", by_hand=lambda: smallthinker()),
    Tiny("grovemoe", by_hand=lambda: grovemoe()),
    Tiny("llada-moe", by_hand=lambda: with_experts(normed("LLaDAMoEModelLM", "llada_x", expert_intermediate_size=128))),
    Tiny("dream", by_hand=lambda: plain("DreamModel", "dream_x", mask_token_id=3)),
    Tiny("llada", by_hand=lambda: llada()),
    Tiny("bloom", "bloom", {"hidden_size": 256, "n_layer": 2, "n_head": 4}, extra={"seq_length": 512}),
    Tiny("mpt", "mpt", MPT, extra={"architectures": ["MPTForCausalLM"]}),
    Tiny("dbrx", by_hand=lambda: dbrx()),
    Tiny("codeshell", by_hand=lambda: codeshell()),
    Tiny("refact", by_hand=lambda: refact()),
    Tiny("orion", by_hand=lambda: orion(), tokenizer="spm"),
    Tiny("openelm", by_hand=lambda: openelm(), tokenizer="spm"),
    Tiny("plm", by_hand=lambda: plm()),
    Tiny("pangu", by_hand=lambda: plain("PanguEmbeddedForCausalLM", "pangu_x"), tokenizer="spm"),
    Tiny("maincoder", by_hand=lambda: normed("MaincoderForCausalLM", "maincoder_x", head_dim=64)),
    Tiny("jais2", "jais2", {"head_dim": 64}),
    Tiny("mamba", "mamba", {"hidden_size": 128, "intermediate_size": 256, "state_size": 16, "time_step_rank": 8}),
    Tiny("falcon-mamba", "falcon_mamba", {"hidden_size": 128, "intermediate_size": 256, "time_step_rank": 8}),
    Tiny(
        "mamba2",
        "mamba2",
        {"hidden_size": 128, "num_heads": 4, "head_dim": 64, "n_groups": 2, "state_size": 32},
        without=("intermediate_size",),
    ),
    Tiny("jamba", "jamba", JAMBA, tokenizer="spm"),
    Tiny("lfm2", "lfm2", {"num_hidden_layers": 3, "layer_types": LFM}),
    Tiny("lfm2-body", "lfm2", {"num_hidden_layers": 3, "layer_types": LFM}, extra={"architectures": ["Lfm2Model"]}),
    Tiny(
        "lfm2moe",
        "lfm2_moe",
        {"num_hidden_layers": 3, "layer_types": LFM, "num_experts": 4, "tie_word_embeddings": True, **EXPERTS},
    ),
    Tiny("distilbert", "distilbert", DISTIL, tokenizer="wordpiece", extra={"architectures": ["DistilBertModel"]}),
    Tiny("modernbert", "modernbert", {"local_attention": 64}, extra={"architectures": ["ModernBertModel"]}),
    Tiny(
        "eurobert",
        "eurobert",
        {"head_dim": 64, "classifier_pooling": "mean"},
        extra={"architectures": ["EuroBertModel"]},
    ),
    Tiny("jinabert", by_hand=lambda: jinabert(), tokenizer="wordpiece"),
    Tiny("neobert", by_hand=lambda: neobert(), tokenizer="wordpiece"),
    Tiny("embedding-gemma", "gemma3_text", GEMMA, tokenizer="spm", extra={"architectures": ["Gemma3TextModel"]}),
    Tiny("gemma3n", "gemma3n_text", GEMMA3N, tokenizer="spm", extra={"architectures": ["Gemma3nForCausalLM"]}),
    Tiny("gemma4", "gemma4_text", GEMMA4, tokenizer="gemma4", extra={"architectures": ["Gemma4ForCausalLM"]}),
    Tiny("minicpm3", "minicpm3", {**MINICPM3, "vocab_size": SPM_PIECES}, tokenizer="spm"),
    Tiny(
        "granite-hybrid",
        "granitemoehybrid",
        GRANITE4,
        stand_in={"model_type": None, "layer_types": ["mamba", "attention"]},
    ),
    Tiny("cogvlm", by_hand=lambda: cogvlm(), tokenizer="spm"),
    Tiny("janus", by_hand=lambda: janus(), tokenizer="spm"),
    Tiny("sarashina-vision", by_hand=lambda: sarashina(), tokenizer="spm"),
    Tiny("bamba", "bamba", {**MAMBA2, "attn_layer_indices": [1]}),
    Tiny("falcon-h1", "falcon_h1", FALCON_H1),
    Tiny("glm-dsa", "glm_moe_dsa", GLM_DSA, tokenizer="glm"),
    Tiny("internlm2", by_hand=lambda: internlm2(), tokenizer="spm"),
    Tiny("internlm3", by_hand=lambda: plain("InternLM3ForCausalLM", "internlm3", head_dim=64), tokenizer="spm"),
    Tiny("baichuan", by_hand=lambda: baichuan(), tokenizer="spm", official=False),
    Tiny("minicpm", by_hand=lambda: plain("MiniCPMForCausalLM", "minicpm", **MINICPM), tokenizer="spm"),
    Tiny("exaone", by_hand=lambda: exaone()),
    Tiny("xverse", by_hand=lambda: plain("XverseForCausalLM", "xverse_x", num_key_value_heads=4), tokenizer="gemma4"),
    Tiny("arctic", by_hand=lambda: arctic(), tokenizer="spm"),
    Tiny("rugpt3xl", by_hand=lambda: rugpt3xl()),
    Tiny("jais", by_hand=lambda: jais()),
    Tiny("jais-mup", by_hand=lambda: jais(mup_embeddings_scale=9.1, mup_output_alpha=2.2, mup_width_scale=0.16)),
    Tiny("chameleon", "chameleon", {"num_key_value_heads": 4, **CHAMELEON}),
    Tiny("t5", "t5", T5, tokenizer="unigram", extra={"n_positions": 512}, official=PROTOBUF),
    Tiny(
        "t5-gated", "t5", {**T5, "feed_forward_proj": "gated-gelu"}, tokenizer="unigram", head=True, official=PROTOBUF
    ),
    Tiny("mt5", "mt5", {**T5, "num_layers": 3, "num_decoder_layers": 2}, tokenizer="unigram", official=PROTOBUF),
    Tiny("umt5", "umt5", T5, tokenizer="unigram", official=PROTOBUF),
    Tiny("t5-encoder", "t5", T5, tokenizer="unigram", extra={"architectures": ["T5EncoderModel"]}, official=PROTOBUF),
    Tiny("sarvam", by_hand=lambda: sarvam()),
    Tiny("nanbeige", by_hand=lambda: plain("NanbeigeForCausalLM", "nanbeige", num_loops=2), tokenizer="spm"),
    Tiny("mellum", "mellum", {"num_local_experts": 4, "head_dim": 64, "layer_types": SLIDING, **EXPERTS}),
    Tiny("granite-swa", "granite_swa", {"embedding_multiplier": 12.0}),
    Tiny("granitemoe-swa", "granitemoe_swa", {"num_local_experts": 4, "shared_intermediate_size": 256}),
    *(Tiny(name, tokenizer=HUB[name], by_hand=partial(hub_model, name)) for name in HUB),
)


def folders(models: Iterable[Tiny], root: Path) -> dict[str, tuple[Path, Path]]:
    """Name -> the model's folder, and the one for the converter (the same, but for a stand-in)."""
    made = {}
    for tiny in models:
        folder = given = make(tiny, root / tiny.name)
        if tiny.stand_in:
            given = Path(shutil.copytree(folder, root / "given" / tiny.name))
            config = json.loads((folder / "config.json").read_text())
            (given / "config.json").write_text(json.dumps(stand_in(tiny, config)))
        made[tiny.name] = folder, given
    return made


def stored_shapes(folder: Path) -> Shapes:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def make(tiny: Tiny, folder: Path) -> Path:
    """Write the folder."""
    folder.mkdir(parents=True)
    config, shapes = tiny.by_hand() if tiny.by_hand else _saved(tiny, folder)
    for name in list(folder.iterdir()):
        name.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_weights(tiny, shapes, folder)
    for name, data in TOKENIZERS[tiny.tokenizer]().items():
        (folder / name).write_bytes(data)
    return folder


def stand_in(tiny: Tiny, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json that the converter is given."""
    changed = {**config, **tiny.stand_in}
    return {key: value for key, value in changed.items() if value is not None or key not in tiny.stand_in}


def write_weights(tiny: Tiny, shapes: Shapes, folder: Path) -> None:
    from safetensors.torch import save_file

    dtype = getattr(torch, tiny.dtype)
    tensors = {name: values(name, shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@lru_cache(1024)
def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 weights that follow from the name alone; norms near one."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randint(-127, 128, shape, generator=generator).float()
    norm = "norm" in name and name.endswith("weight") and len(shape) == 1
    return 1 + torch.round(drawn / 8) / 128 if norm else drawn / 2048


def _saved(tiny: Tiny, folder: Path) -> tuple[dict[str, Any], Shapes]:
    """config.json, and the names and shapes that transformers saves."""
    with quiet():
        _model(tiny).save_pretrained(folder, save_original_format=not tiny.fused)
    shapes = stored_shapes(folder)
    if tiny.more:
        shapes |= tiny.more(shapes)
    if tiny.head:
        shapes["lm_head.weight"] = (VOCAB, 256)
    config = json.loads((folder / "config.json").read_text())
    return _stated(tiny, config), shapes


def _model(tiny: Tiny) -> Any:
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    config = _config(tiny)
    if tiny.kind in CLASSES:
        return getattr(transformers, tiny.extra.get("architectures", [CLASSES[tiny.kind]])[0])(config)
    if str(tiny.extra.get("architectures")).endswith("Model']"):
        return AutoModel.from_config(config)
    if tiny.kind in VISION:
        return AutoModelForImageTextToText.from_config(config)
    if tiny.kind in AUDIO:
        return getattr(transformers, AUDIO[tiny.kind])(config)
    return AutoModelForCausalLM.from_config(config)


def _config(tiny: Tiny) -> Any:
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[tiny.kind]
    if tiny.kind in ("gpt2", "gpt_bigcode"):
        return known(**tiny.options)
    if tiny.kind in ("t5", "mt5", "umt5"):
        return known(vocab_size=VOCAB, **tiny.options)
    text = {**SIZES, "tie_word_embeddings": tiny.kind.startswith(("gemma", "cohere")), **tiny.options}
    if tiny.kind in VISION:
        return known(text_config=text, vision_config=VISION[tiny.kind])
    return known(text_config=text, audio_config={**LISTENING}) if tiny.kind in AUDIO else known(**text)


def _stated(tiny: Tiny, config: dict[str, Any]) -> dict[str, Any]:
    """config.json as the test wants it."""
    if tiny.legacy:
        config = legacy(config)
    return {key: value for key, value in {**config, **tiny.extra}.items() if key not in tiny.without}


def legacy(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of transformers 4: rope_theta and rope_scaling (`type`), rotary_pct, rope_local_base_freq."""
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    if "full_attention" in rope:
        if old["model_type"] == "gemma3_text":
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    neox = old["model_type"] == "gpt_neox"
    old["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
    if (part := rope.pop("partial_rotary_factor", None)) is not None:
        old["rotary_pct" if neox else "partial_rotary_factor"] = part
    kind = rope.pop("rope_type")
    old["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    return {**old, "torch_dtype": old.pop("dtype", "float32")}


def plain(architecture: str, kind: str, vocab: int = VOCAB, **options: Any) -> tuple[dict[str, Any], Shapes]:
    """A model of code on the Hub whose tensors are a Llama's."""
    config = {"architectures": [architecture], "model_type": kind, **SIZES, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, 256), "lm_head.weight": (vocab, 256)}
    shapes["model.norm.weight"] = (256,)
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LLAMA_LAYER.items()}
    return {**config, "vocab_size": vocab, **options}, shapes


LLAMA_LAYER: Shapes = {
    "input_layernorm": (256,),
    "post_attention_layernorm": (256,),
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (512, 256),
    "mlp.up_proj": (512, 256),
    "mlp.down_proj": (256, 512),
}


def renamed(made: tuple[dict[str, Any], Shapes], names: Mapping[str, str]) -> tuple[dict[str, Any], Shapes]:
    config, shapes = made
    for old, new in names.items():
        shapes = {name.replace(old, new): shape for name, shape in shapes.items()}
    return config, shapes


def packed(made: tuple[dict[str, Any], Shapes], name: str, rows: int) -> tuple[dict[str, Any], Shapes]:
    """q, k and v in one tensor of each layer."""
    config, shapes = made
    shapes = {
        key: shape for key, shape in shapes.items() if not key.endswith(tuple(f"{one}_proj.weight" for one in "qkv"))
    }
    return config, shapes | {f"model.layers.{layer}.{name}.weight": (rows, 256) for layer in range(2)}


def normed(architecture: str, kind: str, **options: Any) -> tuple[dict[str, Any], Shapes]:
    """plain(), with norms of each head's query and key."""
    config, shapes = plain(architecture, kind, **options)
    size = config.get("head_dim", 64)
    names = [f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in range(2) for part in "qk"]
    return config, shapes | dict.fromkeys(names, (size,))


def with_experts(
    made: tuple[dict[str, Any], Shapes], count: int = 4, width: int = 128, inside: str = "mlp", dense: int = 0
) -> tuple[dict[str, Any], Shapes]:
    """Feed-forwards from layer `dense` on become experts with a router."""
    config, shapes = made
    rest = {name: shape for name, shape in shapes.items() if ".mlp." not in name or f"layers.{dense - 1}." in name}
    sizes = {"gate_proj": (width, 256), "up_proj": (width, 256), "down_proj": (256, width)}
    for layer in range(dense, 2):
        start = f"model.layers.{layer}.{inside}"
        rest[f"{start}.gate.weight"] = (count, 256)
        rest |= {f"{start}.experts.{at}.{part}.weight": sizes[part] for at in range(count) for part in sizes}
    return {"num_experts": count, "num_experts_per_tok": 2, **config}, rest


def shared(layers: Iterable[int], width: int = 128, name: str = "mlp.shared_experts") -> Shapes:
    sizes = {"gate_proj": (width, 256), "up_proj": (width, 256), "down_proj": (256, width)}
    return {f"model.layers.{layer}.{name}.{part}.weight": sizes[part] for layer in layers for part in sizes}


def deepseek1() -> tuple[dict[str, Any], Shapes]:
    made = plain("DeepseekForCausalLM", "deepseek_x", first_k_dense_replace=1, moe_intermediate_size=128)
    config, shapes = with_experts(made, dense=1)
    return {**config, "n_routed_experts": 4, "n_shared_experts": 1}, shapes | shared([1])


def ernie_fused() -> tuple[dict[str, Any], Shapes]:
    made = packed(plain("Ernie4_5_ForCausalLM", "ernie_x"), "self_attn.qkv_proj", 512)
    config, shapes = renamed(made, {"model.": "ernie."})
    shapes = {
        name: shape for name, shape in shapes.items() if not name.endswith(("gate_proj.weight", "up_proj.weight"))
    }
    return config, shapes | {f"ernie.layers.{layer}.mlp.up_gate_proj.weight": (1024, 256) for layer in range(2)}


def hunyuan_moe() -> tuple[dict[str, Any], Shapes]:
    lists = {"moe_topk": [2, 2], "moe_intermediate_size": [128, 128], "num_shared_expert": [1, 1]}
    made = with_experts(normed("HunYuanMoEV1ForCausalLM", "hunyuan_x", **lists))
    config, shapes = renamed(made, {"mlp.gate.weight": "mlp.gate.wg.weight"})
    shapes = {
        name.replace("q_norm", "query_layernorm").replace("k_norm", "key_layernorm"): shapes[name] for name in shapes
    }
    return config, shapes | shared([0, 1], 512, "mlp.shared_mlp")


def bailing() -> tuple[dict[str, Any], Shapes]:
    options = {"first_k_dense_replace": 0, "moe_intermediate_size": 128, "num_shared_experts": 1}
    made = plain("BailingMoeForCausalLM", "bailing_x", norm_topk_prob=True, **options)
    made = with_experts(packed(made, "attention.query_key_value", 512))
    names = {"self_attn.o_proj": "attention.dense", "model.embed_tokens": "model.word_embeddings"}
    config, shapes = renamed(made, names)
    return config, shapes | shared([0, 1])


def bailing2() -> tuple[dict[str, Any], Shapes]:
    config, shapes = bailing()
    more = {"architectures": ["BailingMoeV2ForCausalLM"], "routed_scaling_factor": 2.5, "score_function": "sigmoid"}
    norms = [f"model.layers.{at}.attention.{part}_layernorm.weight" for at in (0, 1) for part in ("query", "key")]
    bias = {f"model.layers.{at}.mlp.gate.expert_bias": (4,) for at in (0, 1)}
    return {**config, **more, "n_group": 1, "topk_group": 1}, {**shapes, **dict.fromkeys(norms, (64,)), **bias}


def sarvam() -> tuple[dict[str, Any], Shapes]:
    config, shapes = bailing2()
    return {**config, "architectures": ["SarvamMoEForCausalLM"], "head_dim": 64}, shapes


def smallthinker() -> tuple[dict[str, Any], Shapes]:
    made = with_experts(plain("SmallThinkerForCausalLM", "smallthinker_x"), inside="block_sparse_moe")
    config, shapes = renamed(made, {"gate.weight": "primary_router.weight"})
    shapes = {re.sub(r"(experts\.\d+\.\w+)_proj", r"\1", name): shape for name, shape in shapes.items()}
    config = {key: value for key, value in config.items() if key not in ("num_experts", "num_experts_per_tok")}
    own = {"moe_num_primary_experts": 4, "moe_num_active_primary_experts": 2, "moe_ffn_hidden_size": 128}
    return {**config, **own, "sliding_window_layout": [0, 1], "sliding_window_size": 64}, shapes


def grovemoe() -> tuple[dict[str, Any], Shapes]:
    made = normed("GroveMoeForCausalLM", "grove_x", head_dim=64, moe_intermediate_size=128)
    config, shapes = with_experts(made)
    sizes = {"gate_proj": (64, 256), "up_proj": (64, 256), "down_proj": (256, 64)}
    for layer in range(2):
        start = f"model.layers.{layer}.mlp.chunk_experts"
        shapes |= {f"{start}.{at}.{part}.weight": sizes[part] for at in range(2) for part in sizes}
        shapes[f"model.layers.{layer}.mlp.expert_bias"] = (4,)
    return config, shapes


def llada() -> tuple[dict[str, Any], Shapes]:
    sizes = {"d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 512}
    config = {"architectures": ["LLaDAModelLM"], "model_type": "llada_x", "vocab_size": VOCAB, **sizes}
    layer = {"attn_norm": (256,), "ff_norm": (256,), "attn_out": (256, 256), "ff_out": (256, 512)}
    layer |= {"ff_proj": (512, 256), "up_proj": (512, 256)}
    layer |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), (256, 256))
    start = "model.transformer"
    shapes = {f"{start}.blocks.{at}.{name}.weight": shape for at in (0, 1) for name, shape in layer.items()}
    shapes |= {
        f"{start}.wte.weight": (VOCAB, 256),
        f"{start}.ln_f.weight": (256,),
        f"{start}.ff_out.weight": (VOCAB, 256),
    }
    return {**config, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_sequence_length": 512}, shapes


def dbrx() -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["DbrxForCausalLM"], "model_type": "dbrx_x", "vocab_size": VOCAB, "d_model": 256}
    config |= {"n_layers": 2, "n_heads": 4, "max_seq_len": 512, "tie_word_embeddings": False}
    config["ffn_config"] = {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2}
    config["attn_config"] = {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}
    layer = {"norm_attn_norm.attn.Wqkv.weight": (512, 256), "norm_attn_norm.attn.out_proj.weight": (256, 256)}
    layer |= {"norm_attn_norm.norm_1.weight": (256,), "norm_attn_norm.norm_2.weight": (256,)}
    layer |= {
        "ffn.router.layer.weight": (4, 256),
        **{f"ffn.experts.mlp.{part}": (512, 256) for part in ("w1", "v1", "w2")},
    }
    shapes = {f"transformer.blocks.{at}.{name}": shape for at in (0, 1) for name, shape in layer.items()}
    shapes |= {
        "transformer.wte.weight": (VOCAB, 256),
        "transformer.norm_f.weight": (256,),
        "lm_head.weight": (VOCAB, 256),
    }
    return config, shapes


def codeshell() -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["CodeShellForCausalLM"], "model_type": "codeshell_x", **GPT2, "num_query_groups": 2}
    layer = {"attn.c_attn": (512, 256), "attn.c_proj": (256, 256), "mlp.c_fc": (1024, 256), "mlp.c_proj": (256, 1024)}
    layer |= {"ln_1": (256,), "ln_2": (256,)}
    shapes: Shapes = {"transformer.wte.weight": (VOCAB, 256), "lm_head.weight": (VOCAB, 256)}
    shapes |= {f"transformer.ln_f.{kind}": (256,) for kind in ("weight", "bias")}
    for name, shape in ((f"transformer.h.{at}.{name}", shape) for at in (0, 1) for name, shape in layer.items()):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {**config, "layer_norm_epsilon": 1e-5}, shapes


def refact() -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["GPTRefactForCausalLM"], "model_type": "refact_x", **GPT2, "layer_norm_epsilon": 1e-5}
    layer = {"attn.q": (256, 256), "attn.kv": (128, 256), "attn.c_proj": (256, 256), "ln_1": (256,), "ln_2": (256,)}
    layer |= {"mlp.gate_up_proj": (1536, 256), "mlp.c_proj": (256, 768)}
    shapes = {f"transformer.h.{at}.{name}.weight": shape for at in (0, 1) for name, shape in layer.items()}
    shapes |= {
        "transformer.wte.weight": (VOCAB, 256),
        "transformer.ln_f.weight": (256,),
        "lm_head.weight": (VOCAB, 256),
    }
    return config, shapes


def orion() -> tuple[dict[str, Any], Shapes]:
    config, shapes = plain("OrionForCausalLM", "orion_x", vocab=SPM_PIECES)
    return config, shapes | {name.replace(".weight", ".bias"): (256,) for name in shapes if "norm" in name}


def openelm() -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["OpenELMForCausalLM"], "model_type": "openelm_x", "vocab_size": SPM_PIECES}
    config |= {"num_transformer_layers": 2, "model_dim": 256, "head_dim": 64, "ffn_multipliers": [1.0, 2.0]}
    config |= {"ffn_dim_divisor": 256, "num_kv_heads": [1, 2], "num_query_heads": [2, 4], "max_context_length": 512}
    shapes: Shapes = {"transformer.token_embeddings.weight": (SPM_PIECES, 256), "transformer.norm.weight": (256,)}
    for at, (kv, heads, width) in enumerate(((1, 2, 256), (2, 4, 512))):
        layer = {"attn.qkv_proj": (64 * (heads + 2 * kv), 256), "attn.out_proj": (256, 64 * heads)}
        layer |= {"attn.q_norm": (64,), "attn.k_norm": (64,), "attn_norm": (256,), "ffn_norm": (256,)}
        layer |= {"ffn.proj_1": (2 * width, 256), "ffn.proj_2": (256, width)}
        shapes |= {f"transformer.layers.{at}.{name}.weight": shape for name, shape in layer.items()}
    return {**config, "rope_freq_constant": 10000}, shapes


def plm() -> tuple[dict[str, Any], Shapes]:
    latent = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
    config, shapes = plain("PLMForCausalLM", "plm_x", num_key_value_heads=4, **latent)
    shapes = {name: shape for name, shape in shapes.items() if not re.search("[kv]_proj|gate_proj", name)}
    own = {"kv_a_proj_with_mqa": (96, 256), "kv_a_layernorm": (64,), "kv_b_proj": (384, 64)}
    more = {f"model.layers.{at}.self_attn.{name}.weight": shape for at in (0, 1) for name, shape in own.items()}
    return config, shapes | more


def jinabert() -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["JinaBertModel"], "model_type": "jinabert_x", **SIZES, "num_key_value_heads": 4}
    config |= {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "position_embedding_type": "alibi"}
    layer: Shapes = {f"attention.self.{name}": (256, 256) for name in ("query", "key", "value")}
    layer |= {"attention.output.dense": (256, 256), "attention.output.LayerNorm": (256,), "mlp.layernorm": (256,)}
    layer |= {"mlp.gated_layers": (1024, 256), "mlp.wo": (256, 512)}
    shapes: Shapes = {"embeddings.word_embeddings.weight": (VOCAB, 256), "embeddings.LayerNorm.weight": (256,)}
    shapes |= {"embeddings.LayerNorm.bias": (256,), "embeddings.token_type_embeddings.weight": (2, 256)}
    for name, shape in ((f"encoder.layer.{at}.{name}", shape) for at in (0, 1) for name, shape in layer.items()):
        shapes[f"{name}.weight"] = shape
        if "gated" not in name:
            shapes[f"{name}.bias"] = shape[:1]
    return config, shapes


def neobert() -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["NeoBERT"], "model_type": "neobert_x", **SIZES, "norm_eps": 1e-5}
    layer: Shapes = {"qkv": (768, 256), "wo": (256, 256), "ffn.w12": (680, 256), "ffn.w3": (256, 340)}
    layer |= {"attention_norm": (256,), "ffn_norm": (256,)}
    shapes: Shapes = {"model.encoder.weight": (VOCAB, 256), "model.layer_norm.weight": (256,)}
    shapes |= {f"model.transformer_encoder.{at}.{name}.weight": layer[name] for at in (0, 1) for name in layer}
    return config, shapes


def cogvlm() -> tuple[dict[str, Any], Shapes]:
    config, shapes = plain("CogVLMForCausalLM", "cogvlm_x", num_key_value_heads=4)
    names = {"self_attn.q_proj": "self_attn.language_expert_query_key_value", "mlp.": "mlp.language_mlp."}
    names |= {"self_attn.o_proj": "self_attn.language_expert_dense"}
    shapes = {name: shape for name, shape in shapes.items() if not re.search("[kv]_proj", name)}
    config, shapes = renamed((config, shapes), names)
    return config, {name: (768, 256) if "query_key" in name else shape for name, shape in shapes.items()}


def janus() -> tuple[dict[str, Any], Shapes]:
    config, shapes = plain("x", "llama", head_dim=64)
    config = {key: value for key, value in config.items() if key != "architectures"}
    shapes = {name.replace("model.", "model.language_model."): shape for name, shape in shapes.items()}
    shapes |= {"model.aligner.fc1.weight": (256, 256), "model.generation_head.proj_out.weight": (256, 256)}
    return {"architectures": ["JanusForConditionalGeneration"], "text_config": config}, shapes


def sarashina() -> tuple[dict[str, Any], Shapes]:
    config, shapes = plain("LlamaForCausalLM", "llama", head_dim=64)
    shapes = {f"llm.{name}": shape for name, shape in shapes.items()}
    return {"architectures": ["Sarashina2VisionForCausalLM"], "text_config": config}, {**shapes, "norm.weight": (256,)}


def smolvlm() -> tuple[dict[str, Any], Shapes]:
    """Idefics 3's naming of the text part."""
    config, shapes = plain("VLlama3ForCausalLM", "llama", head_dim=64)
    shapes = {name.replace("model.", "model.text_model."): shape for name, shape in shapes.items()}
    return {"architectures": ["Idefics3ForConditionalGeneration"], "text_config": config}, shapes


def internlm2() -> tuple[dict[str, Any], Shapes]:
    names = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    made = packed(plain("InternLM2ForCausalLM", "internlm2", vocab=SPM_PIECES), "attention.wqkv", 512)
    return renamed(made, {**names, "post_attention_norm": "ffn_norm"})


def baichuan() -> tuple[dict[str, Any], Shapes]:
    made = plain("BaichuanForCausalLM", "baichuan", num_key_value_heads=4)
    return packed(made, "self_attn.W_pack", 768)


def arctic() -> tuple[dict[str, Any], Shapes]:
    config, shapes = plain("ArcticForCausalLM", "arctic_x", num_local_experts=4, num_experts_per_tok=2)
    names = {"mlp.gate_proj": "residual_mlp.w1", "mlp.up_proj": "residual_mlp.w3", "mlp.down_proj": "residual_mlp.w2"}
    config, shapes = renamed((config, shapes), names)
    sizes = {"w1": (128, 256), "w2": (256, 128), "w3": (128, 256)}
    for layer in range(2):
        start = f"model.layers.{layer}.block_sparse_moe"
        shapes |= {f"{start}.experts.{at}.{part}.weight": sizes[part] for at in range(4) for part in sizes}
        shapes |= {f"{start}.gate.weight": (4, 256), f"model.layers.{layer}.residual_layernorm.weight": (256,)}
    return config, shapes


def rugpt3xl() -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["RuGPT3XLForCausalLM"], "model_type": "rugpt3xl_x", **SIZES, "layer_norm_eps": 1e-5}
    del config["num_key_value_heads"]
    layer: Shapes = {f"self_attn.{part}_proj": (256, 256) for part in "qkvo"}
    layer |= {"mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512)}
    layer |= {"input_layernorm": (256,), "post_attention_layernorm": (256,)}
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, 256), "model.embed_positions.weight": (512, 256)}
    shapes |= {f"model.norm.{kind}": (256,) for kind in ("weight", "bias")} | {"lm_head.weight": (VOCAB, 256)}
    for name, shape in ((f"model.layers.{at}.{name}", layer[name]) for at in (0, 1) for name in layer):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return config, shapes


def jais(**scales: float) -> tuple[dict[str, Any], Shapes]:
    config = {"architectures": ["JAISLMHeadModel"], "model_type": "jais_x", **GPT2, "n_inner": 680}
    config |= {"activation_function": "swiglu", "position_embedding_type": "alibi", "layer_norm_epsilon": 1e-5}
    config |= scales or {"embeddings_scale": 14.6, "width_scale": 0.22}
    layer: Shapes = {"attn.c_attn": (256, 768), "attn.c_proj": (256, 256), "ln_1": (256,), "ln_2": (256,)}
    layer |= {"mlp.c_fc": (256, 680), "mlp.c_fc2": (256, 680), "mlp.c_proj": (680, 256)}
    shapes: Shapes = {"transformer.wte.weight": (VOCAB, 256), "lm_head.weight": (VOCAB, 256)}
    shapes |= {f"transformer.ln_f.{kind}": (256,) for kind in ("weight", "bias")}
    for name, shape in ((f"transformer.h.{at}.{name}", layer[name]) for at in (0, 1) for name in layer):
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return config, shapes


def exaone() -> tuple[dict[str, Any], Shapes]:
    names = {"model.layers": "transformer.h", "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f"}
    names |= {"self_attn.o_proj": "attn.attention.out_proj", "self_attn": "attn.attention"}
    names |= {"post_attention_layernorm": "ln_2", "input_layernorm": "ln_1"}
    names |= {"mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1", "mlp.down_proj": "mlp.c_proj"}
    made = plain(
        "ExaoneForCausalLM",
        "exaone",
        activation_function="silu",
        rope_scaling=LLAMA3,
        rope_theta=None,
        layer_norm_epsilon=1e-5,
    )
    return renamed(made, names)


@cache
def glm() -> dict[str, bytes]:
    """A byte-level BPE tokenizer with the special tokens of GLM and Solar."""
    return bpe(("<|endoftext|>", "<|user|>", "[gMASK]", "<|observation|>", "<unk>", "<|startoftext|>"))


@cache
def bpe(more: tuple[str, ...] = ()) -> dict[str, bytes]:
    """A byte-level BPE tokenizer with three special tokens, and `more`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 3,  # a tokenizer class may add some
        special_tokens=["<pad>", "<s>", "</s>", *more],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 4, trainer)
    return {"tokenizer.json": made.to_str().encode(), **_settings("PreTrainedTokenizerFast")}


@cache
def spm() -> dict[str, bytes]:
    """A sentencepiece tokenizer with byte fallback."""
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split() * 4),
        model_writer=out,
        vocab_size=SPM_PIECES,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return {"tokenizer.model": out.getvalue(), **_settings("LlamaTokenizer")}


@cache
def wordpiece() -> dict[str, bytes]:
    """A WordPiece tokenizer as BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    made.train_from_iterator([TEXT] * 4, trainer)
    settings = {"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    settings |= {"pad_token": "[PAD]", "mask_token": "[MASK]"}
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


@cache
def gemma4() -> dict[str, bytes]:
    """BPE over raw UTF-8 with byte fallback, as Gemma 4's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 8, special_tokens=special, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    told = json.loads(made.to_str())
    vocab = told["model"]["vocab"]
    vocab |= {f"<unused{at}>": at for at in range(len(vocab), VOCAB)}
    return {"tokenizer.json": json.dumps(told).encode(), **_settings("PreTrainedTokenizerFast")}


@cache
def unigram() -> dict[str, bytes]:
    """A unigram sentencepiece model under T5's name."""
    import io

    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split() * 4),
        model_writer=out,
        vocab_size=100,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return {"spiece.model": out.getvalue(), **_settings("T5Tokenizer")}


TOKENIZERS = {"unigram": unigram, "gemma4": gemma4, "wordpiece": wordpiece, "bpe": bpe, "spm": spm, "glm": glm}


def _settings(kind: str) -> dict[str, bytes]:
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    return {"tokenizer_config.json": json.dumps(settings).encode()}
