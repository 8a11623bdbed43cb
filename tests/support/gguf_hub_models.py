"""Tiny models of code on the Hub: config.json and shapes, as the published checkpoints have them.

Their model types end with `_x` where transformers has a class of its own, whose config differs from the published one.
"""

from __future__ import annotations

import re
from typing import Any

from support.gguf_models import LLAMA3, SIZES, VOCAB, Shapes, normed, plain, shared, with_experts

Made = tuple[dict[str, Any], Shapes]
MAMBA: Shapes = {
    "in_proj.weight": (2 * 256 + 2 * 2 * 32 + 8, 256),
    "conv1d.weight": (256 + 2 * 2 * 32, 1, 4),
    "conv1d.bias": (256 + 2 * 2 * 32,),
    "out_proj.weight": (256, 256),
    "norm.weight": (256,),
    **dict.fromkeys(("A_log", "D", "dt_bias"), (8,)),
}
ATTENTION: Shapes = {
    **dict.fromkeys(("q_proj.weight", "o_proj.weight"), (256, 256)),
    **dict.fromkeys(("k_proj.weight", "v_proj.weight"), (128, 256)),
}
UP_DOWN: Shapes = {"up_proj.weight": (512, 256), "down_proj.weight": (256, 512)}
LATENT_EXPERTS: Shapes = {
    "gate.weight": (4, 256),
    "gate.e_score_correction_bias": (4,),
    "fc1_latent_proj.weight": (128, 256),
    "fc2_latent_proj.weight": (256, 128),
    "shared_experts.up_proj.weight": (192, 256),
    "shared_experts.down_proj.weight": (256, 192),
    **{f"experts.{at}.up_proj.weight": (64, 128) for at in range(4)},
    **{f"experts.{at}.down_proj.weight": (128, 64) for at in range(4)},
}
MIXERS = {"M": MAMBA, "*": ATTENTION, "-": UP_DOWN, "E": LATENT_EXPERTS}


def nemotron_h(pattern: str = "M-*", **options: Any) -> Made:
    config: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h_x",
        **SIZES,
        "head_dim": 64,
    }
    config |= {"num_hidden_layers": len(pattern), "hybrid_override_pattern": pattern, "layer_norm_epsilon": 1e-5}
    config |= {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 2, "conv_kernel": 4}
    shapes: Shapes = {"backbone.embeddings.weight": (VOCAB, 256), "lm_head.weight": (VOCAB, 256)}
    shapes["backbone.norm_f.weight"] = (256,)
    for at, kind in enumerate(pattern):
        shapes |= mixer(f"backbone.layers.{at}", kind)
    return {**config, "expand": 2, "tie_word_embeddings": False, **options}, shapes


def mixer(layer: str, kind: str) -> Shapes:
    return {f"{layer}.norm.weight": (256,), **{f"{layer}.mixer.{name}": MIXERS[kind][name] for name in MIXERS[kind]}}


def nemotron_h_moe() -> Made:
    config, shapes = nemotron_h("ME*", num_experts_per_tok=2, **NEMOTRON_EXPERTS, num_nextn_predict_layers=1)
    shapes |= mixer("mtp.layers.0", "*") | mixer("mtp.layers.1", "E")
    shapes |= dict.fromkeys(("mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight"), (256,))
    return config, shapes | {"mtp.layers.0.eh_proj.weight": (256, 512), "mtp.layers.1.final_layernorm.weight": (256,)}


def nemotron_h_puzzle() -> Made:
    config, shapes = nemotron_h("ME*", architectures=["NemotronHPuzzleForCausalLM"], **NEMOTRON_EXPERTS)
    del config["hybrid_override_pattern"]
    blocks = [{"block_type": "mamba"}, {"block_type": "moe", "moe_intermediate_size": 64, "num_experts_per_tok": 3}]
    shapes = {name.replace("backbone.", "model."): shape for name, shape in shapes.items()}
    return {**config, "block_configs": [*blocks, {"block_type": "attention"}]}, shapes | mixer("mtp.layers.0", "*")


NEMOTRON_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
NEMOTRON_EXPERTS |= {"moe_shared_expert_intermediate_size": 192, "routed_scaling_factor": 2.5, "n_group": 1}
NEMOTRON_EXPERTS |= {"topk_group": 1, "moe_latent_size": 128}


def mimo2() -> Made:
    own: dict[str, Any] = {
        "head_dim": 64,
        "v_head_dim": 64,
        "hybrid_layer_pattern": [0, 1],
        "swa_num_key_value_heads": 4,
    }
    own |= {"swa_head_dim": 64, "swa_v_head_dim": 64, "swa_num_attention_heads": 4, "sliding_window": 64}
    own |= {"swa_rope_theta": 5e3, "partial_rotary_factor": 0.5, "layernorm_epsilon": 1e-6, "topk_method": "noaux_tc"}
    own |= {"scoring_func": "sigmoid", "n_group": 1, "topk_group": 1, "moe_intermediate_size": 128}
    config, shapes = with_experts(plain("MiMoV2FlashForCausalLM", "mimo_x", **own), dense=1)
    del config["num_experts"], config["rms_norm_eps"]
    sliding: Shapes = {f"self_attn.{part}_proj.weight": (256, 256) for part in "kv"} | {
        "self_attn.attention_sink_bias": (4,)
    }
    shapes |= {f"model.layers.1.{name}": shape for name, shape in sliding.items()}
    shapes["model.layers.1.mlp.gate.e_score_correction_bias"] = (4,)
    for at in range(3):
        shapes |= prediction(f"model.mtp.layers.{at}", shapes, sliding)
    return {**config, "n_routed_experts": 4, "attention_value_scale": 0.707}, shapes


def prediction(name: str, shapes: Shapes, changed: Shapes) -> Shapes:
    """A dense prediction layer like layer 0, with some of its shapes changed."""
    start = "model.layers.0."
    layer = {key.removeprefix(start): shape for key, shape in shapes.items() if key.startswith(start)} | changed
    layer |= dict.fromkeys(("enorm.weight", "hnorm.weight", "final_layernorm.weight"), (256,))
    return {f"{name}.{key}": shape for key, shape in {**layer, "eh_proj.weight": (256, 512)}.items()}


def step35() -> Made:
    config, shapes = normed("Step3p5ForCausalLM", "step3p5_x", head_dim=64, rms_norm_eps=1e-5)
    del config["num_key_value_heads"]
    own: dict[str, Any] = {"num_attention_groups": 2, "layer_types": ["full_attention", "sliding_attention"]}
    own |= {"partial_rotary_factors": [0.5, 1.0], "rope_theta": [5e6, 1e4], "sliding_window": 64}
    own |= {"attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 4}}
    own |= {"moe_num_experts": 4, "moe_top_k": 2, "moe_intermediate_size": 128, "share_expert_dim": 128}
    own |= {
        "moe_router_scaling_factor": 3.0,
        "norm_expert_weight": True,
        "moe_layers_enum": "1",
        "moe_every_n_layer": 1,
    }
    own |= {"swiglu_limits": [None, 7.0], "swiglu_limits_shared": [0.0, 16.0], "num_nextn_predict_layers": 1}
    sliding: Shapes = {"q_proj.weight": (512, 256), "o_proj.weight": (256, 512), "g_proj.weight": (8, 256)}
    sliding |= dict.fromkeys(("k_proj.weight", "v_proj.weight"), (256, 256))
    sliding = {f"self_attn.{name}": shape for name, shape in sliding.items()}
    shapes |= {f"model.layers.1.{name}": shape for name, shape in sliding.items()}
    shapes["model.layers.0.self_attn.g_proj.weight"] = (4, 256)
    last = prediction("model.layers.2", shapes, {})
    heads = {"norm.weight": (256,), "output.weight": (VOCAB, 256)}
    last |= {f"model.layers.2.transformer.shared_head.{name}": shape for name, shape in heads.items()}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("model.layers.1.mlp")}
    experts: Shapes = {"moe.gate.weight": (4, 256), "moe.router_bias": (4,), "moe.down_proj.weight": (4, 256, 128)}
    experts |= dict.fromkeys(("moe.gate_proj.weight", "moe.up_proj.weight"), (4, 128, 256))
    shapes |= {f"model.layers.1.{name}": shape for name, shape in experts.items()}
    del last["model.layers.2.final_layernorm.weight"]
    return {**config, **own}, shapes | last | shared([1], name="share_expert")


def step37() -> Made:
    """Step 3.5 as the text part of a vision model."""
    config, shapes = step35()
    shapes["vision_model.conv1.weight"] = (8, 3, 2, 2)
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step37_x",
        "text_config": config,
    }, shapes


def step3_vl() -> Made:
    config, shapes = normed("Qwen3ForCausalLM", "step3_vl_text_x", head_dim=64)
    shapes["vision_model.conv1.weight"] = (8, 3, 2, 2)
    return {"architectures": ["StepVLForConditionalGeneration"], "model_type": "step_x", "text_config": config}, shapes


def kimi_linear() -> Made:
    linear = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4}
    own: dict[str, Any] = {
        "num_key_value_heads": 4,
        "head_dim": 72,
        "linear_attn_config": linear,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
    }
    own |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "model_max_length": 512}
    own |= {"first_k_dense_replace": 1, "num_shared_experts": 1, "moe_intermediate_size": 128, "topk_group": 1}
    own |= {"moe_router_activation_func": "sigmoid", "routed_scaling_factor": 2.5, "num_experts_per_token": 2}
    config, shapes = with_experts(plain("KimiLinearForCausalLM", "kimi_x", **own), inside="block_sparse_moe", dense=1)
    del config["num_experts_per_tok"], config["max_position_embeddings"]
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    shapes = {name: shape for name, shape in shapes.items() if "self_attn" not in name}
    for old, new in names.items():
        shapes = {re.sub(rf"(experts\.\d)\.{old}", rf"\1.{new}", name): shape for name, shape in shapes.items()}
    shapes["model.layers.1.block_sparse_moe.gate.e_score_correction_bias"] = (4,)
    full: Shapes = {"q_proj.weight": (256, 256), "kv_a_proj_with_mqa.weight": (96, 256), "kv_a_layernorm.weight": (64,)}
    full |= {"kv_b_proj.weight": (256, 64), "o_proj.weight": (256, 128)}
    shapes |= {f"model.layers.1.self_attn.{name}": shape for name, shape in full.items()}
    shapes |= {f"model.layers.0.self_attn.{name}": shape for name, shape in KDA.items()}
    return config, shapes | shared([1], name="block_sparse_moe.shared_experts")


KDA: Shapes = {
    **{f"{part}_proj.weight": (128, 256) for part in "qkv"},
    **{f"{part}_conv1d.weight": (128, 1, 4) for part in "qkv"},
    **dict.fromkeys(("f_a_proj.weight", "g_a_proj.weight"), (32, 256)),
    **dict.fromkeys(("f_b_proj.weight", "g_b_proj.weight"), (128, 32)),
    "b_proj.weight": (4, 256),
    "A_log": (1, 1, 4, 1),
    "dt_bias": (128,),
    "o_norm.weight": (32,),
    "o_proj.weight": (256, 128),
}


def deci() -> Made:
    """Llama 3.1 Nemotron 51B: a layer with attention, one with a linear map, one without either."""
    blocks = [(2, False, 1.0), (None, True, 0.5), (None, False, None)]
    configs = [
        {"attention": {"n_heads_in_group": group, "replace_with_linear": linear}, "ffn": {"ffn_mult": width}}
        for group, linear, width in blocks
    ]
    config, shapes = plain("DeciLMForCausalLM", "nemotron_nas_x", vocab_size=128256, block_configs=configs)
    shapes = {name: shape for name, shape in shapes.items() if not re.search(r"layers\.1\.self_attn", name)}
    shapes["model.layers.1.self_attn.linear_attn.weight"] = (256, 256)
    config |= {"num_hidden_layers": 3, "num_key_value_heads": None, "intermediate_size": None}
    return {**config, "rope_theta": None, "rope_scaling": LLAMA3}, shapes


def deci_7b() -> Made:
    config, shapes = plain("DeciLMForCausalLM", "deci_x", vocab_size=128256, num_key_value_heads_per_layer=[2, 1])
    shapes |= {f"model.layers.1.self_attn.{part}_proj.weight": (64, 256) for part in "kv"}
    return {name: value for name, value in config.items() if name != "num_key_value_heads"}, shapes


def grok1() -> Made:
    layer: Shapes = {"rms_norm": (256,), "rms_norm_1": (256,), "rms_norm_2": (256,), "rms_norm_3": (256,)}
    layer |= {"multi_head_attention.query": (256, 256), "multi_head_attention.linear": (256, 256), "router": (4, 256)}
    layer |= {"multi_head_attention.key": (128, 256), "multi_head_attention.value": (128, 256)}
    layer |= {f"moe.{at}.{part}": (128, 256) for at in range(4) for part in ("linear", "linear_v")}
    layer |= {f"moe.{at}.linear_1": (256, 128) for at in range(4)}
    start = "transformer.decoder_layer"
    shapes = {f"{start}.{at}.{name}.weight": shape for at in (0, 1) for name, shape in layer.items()}
    shapes |= {"transformer.in_out_embed.weight": (VOCAB, 256), "transformer.rms_norm.weight": (256,)}
    config: dict[str, Any] = {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "grok_x",
        **SIZES,
        "rms_norm_eps": 1e-5,
    }
    config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "attn_output_multiplier": 0.08838834764831845}
    config |= {"embedding_multiplier_scale": 78.38, "output_multiplier_scale": 0.577, "rope_theta": 1e4}
    return config, shapes | {"lm_head.weight": (VOCAB, 256)}


def grok2() -> Made:
    own: dict[str, Any] = {
        "head_dim": 64,
        "attn_logit_softcapping": 25.0,
        "final_logit_softcapping": 50,
        "moe_intermediate_size": 128,
    }
    own |= {"rope_type": "original", "scaling_factor": 16.0, "original_max_position_embeddings": 128}
    own |= {
        "extrapolation_factor": 1.0,
        "attn_factor": 1.0,
        "beta_fast": 8,
        "beta_slow": 1,
        "attn_temperature_len": 1024,
    }
    own |= {"embedding_multiplier_scale": 90.5, "output_multiplier_scale": 0.5, "attn_output_multiplier": 0.125}
    config, dense = plain("Grok1ForCausalLM", "git_x", **own)
    config, shapes = with_experts((config, dense), inside="block_sparse_moe")
    shapes |= {name: shape for name, shape in dense.items() if ".mlp." in name}
    names = {"experts.(.).gate_proj": r"experts.\1.w1", "experts.(.).up_proj": r"experts.\1.w3"}
    names |= {"experts.(.).down_proj": r"experts.\1.w2", "input_layernorm": "pre_attn_norm"}
    names |= {"post_attention_layernorm": "post_attn_norm"}
    for old, new in names.items():
        shapes = {re.sub(old, new, name): shape for name, shape in shapes.items()}
    norms = [f"model.layers.{at}.{name}_moe_norm.weight" for at in (0, 1) for name in ("pre", "post")]
    config["num_local_experts"] = config.pop("num_experts")
    return config, shapes | dict.fromkeys(norms, (256,))


def own_tensors(shapes: Shapes, layer: int, norm: str = "shared_head.norm") -> Shapes:
    """A further layer like the one before it, with what predicts a further token."""
    old, new = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    made = {name.replace(old, new): shape for name, shape in shapes.items() if name.startswith(old)}
    own = {"eh_proj": (256, 512), **dict.fromkeys(("enorm", "hnorm", norm), (256,))}
    return made | {f"{new}{name}.weight": shape for name, shape in own.items()}


def cohere2_moe() -> Made:
    own: dict[str, Any] = {"head_dim": 64, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": 64}
    own |= {"layer_types": ["sliding_attention", "full_attention"], "num_shared_experts": 1, "norm_topk_prob": True}
    own |= {"intermediate_size": 128, "prefix_dense_intermediate_size": 512, "first_k_dense_replace": 1}
    own |= {"expert_selection_fn": "sigmoid", "num_nextn_predict_layers": 1}
    config, shapes = with_experts(plain("Cohere2MoeForCausalLM", "cohere2_moe_x", **own), dense=1)
    del config["rms_norm_eps"]
    shapes = {name: shape for name, shape in shapes.items() if "post_attention" not in name} | shared([1])
    return config, shapes | own_tensors(shapes, 2)


def hy_v3() -> Made:
    own: dict[str, Any] = {"head_dim": 64, "moe_intermediate_size": 128, "num_shared_experts": 1, "route_norm": True}
    own |= {"router_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1}
    config, shapes = with_experts(normed("HYV3ForCausalLM", "hy_v3_x", **own), dense=1)
    shapes = {name.replace("mlp.gate.weight", "mlp.router.gate.weight"): shape for name, shape in shapes.items()}
    shapes |= shared([1], name="mlp.shared_mlp") | {"model.layers.1.mlp.expert_bias": (4,)}
    return config, shapes | own_tensors(shapes, 2, "final_layernorm")


def maple() -> Made:
    own: dict[str, Any] = {"head_dim": 64, "moe_intermediate_size": 128, "hidden_act": "silu", "sliding_window": 64}
    own |= {"layer_types": ["sliding_attention", "full_attention"], "nope_on_global_attention": True}
    return with_experts(normed("MapleForCausalLM", "maple_x", **own, norm_topk_prob=True, num_shared_experts=0))


def deepseek32() -> Made:
    own: dict[str, Any] = {"num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64, "qk_nope_head_dim": 32}
    own |= {"qk_rope_head_dim": 32, "v_head_dim": 32, "index_n_heads": 2, "index_head_dim": 64, "index_topk": 64}
    own |= {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 128}
    own |= {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 1}
    own |= {"topk_group": 1, "num_nextn_predict_layers": 1}
    config, shapes = with_experts(plain("DeepseekV32ForCausalLM", "deepseek_v32_x", **own), dense=1)
    del config["num_experts"]
    shapes = {name: shape for name, shape in shapes.items() if "self_attn" not in name} | shared([1])
    shapes["model.layers.1.mlp.gate.e_score_correction_bias"] = (4,)
    attention: Shapes = {"q_a_proj.weight": (128, 256), "q_a_layernorm.weight": (128,), "q_b_proj.weight": (256, 128)}
    attention |= {"kv_a_proj_with_mqa.weight": (96, 256), "kv_a_layernorm.weight": (64,), "kv_b_proj.weight": (256, 64)}
    attention |= {"o_proj.weight": (256, 128), "indexer.wq_b.weight": (128, 128), "indexer.wk.weight": (64, 256)}
    attention |= {"indexer.weights_proj.weight": (2, 256), "indexer.k_norm.weight": (64,), "indexer.k_norm.bias": (64,)}
    shapes |= {f"model.layers.{at}.self_attn.{name}": shape for at in (0, 1) for name, shape in attention.items()}
    return config, shapes | own_tensors(shapes, 2)


def nomic_bert(biased: bool = False, **options: Any) -> Made:
    """nomic-embed-text 1.5."""
    config: dict[str, Any] = {"architectures": ["NomicBertModel"], "model_type": "nomic_x", "vocab_size": VOCAB}
    config |= {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_inner": 512, "n_positions": 8192, "causal": False}
    config |= {"max_trained_positions": 2048, "activation_function": "swiglu", "layer_norm_epsilon": 1e-12}
    config |= dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), biased)
    config |= {"prenorm": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False, "rotary_emb_base": 1000}
    config |= {"rotary_emb_scale_base": None, "type_vocab_size": 2}
    layer: Shapes = {"attn.Wqkv": (768, 256), "attn.out_proj": (256, 256)}
    layer |= {"mlp.fc11": (512, 256), "mlp.fc12": (512, 256), "mlp.fc2": (256, 512)}
    shapes = {f"encoder.layers.{at}.{name}.weight": shape for at in (0, 1) for name, shape in layer.items()}
    norms = ["emb_ln", *(f"encoder.layers.{at}.norm{one}" for at in (0, 1) for one in (1, 2))]
    shapes |= {f"{norm}.{kind}": (256,) for norm in norms for kind in ("weight", "bias")}
    shapes |= {"embeddings.word_embeddings.weight": (VOCAB, 256), "embeddings.token_type_embeddings.weight": (2, 256)}
    return {**config, **options}, shapes


def nomic_bert_moe() -> Made:
    """Version 2: experts in every second layer."""
    own: dict[str, Any] = {"n_positions": 2048, "activation_function": "gelu", "moe_every_n_layers": 2, "moe_top_k": 2}
    config, shapes = nomic_bert(True, **own, num_experts=4)
    shapes = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    start = "encoder.layers.0.mlp"
    shapes |= {f"{start}.fc1.weight": (512, 256), f"{start}.fc1.bias": (512,)}
    shapes |= {f"{start}.fc2.weight": (256, 512), f"{start}.fc2.bias": (256,)}
    start = "encoder.layers.1.mlp"
    shapes |= {f"{start}.experts.mlp.w1": (2048, 256), f"{start}.experts.mlp.w2": (2048, 256)}
    shapes |= {f"{start}.experts.bias": (256,), f"{start}.router.layer.weight": (4, 256)}
    for at in (0, 1):
        shapes |= {f"encoder.layers.{at}.attn.Wqkv.bias": (768,), f"encoder.layers.{at}.attn.out_proj.bias": (256,)}
    return config, shapes
