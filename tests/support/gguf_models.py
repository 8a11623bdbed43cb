"""Tiny models of every family, as Hugging Face folders: config, weights, a small tokenizer.

Made by transformers' own classes, so that names, shapes and configs are what it saves. Weights are
integers over 2048, seeded by the tensor's name: exact in every 16-bit type and on every machine.
The configs obey what llama.cpp takes for granted (Gemma's query_pre_attn_scalar is the head's size,
Qwen 3 normalizes the experts' weights, DeepSeek has q_lora_rank), so the engine can run them.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
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
    `legacy`: config.json as transformers 4 wrote it; `without`: keys that config.json leaves out; `extra`: keys
    that it has beside the class's; `fused`: experts in one tensor.
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


MINICPM = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 64}


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
    Tiny("internlm2", by_hand=lambda: internlm2(), tokenizer="spm"),
    Tiny("internlm3", by_hand=lambda: plain("InternLM3ForCausalLM", "internlm3", head_dim=64), tokenizer="spm"),
    Tiny("baichuan", by_hand=lambda: baichuan(), tokenizer="spm", official=False),
    Tiny("minicpm", by_hand=lambda: plain("MiniCPMForCausalLM", "minicpm", **MINICPM), tokenizer="spm"),
    Tiny("exaone", by_hand=lambda: exaone()),
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
    for name, data in (spm() if tiny.tokenizer == "spm" else bpe()).items():
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
    if tiny.head:
        shapes["lm_head.weight"] = (VOCAB, 256)
    config = json.loads((folder / "config.json").read_text())
    return _stated(tiny, config), shapes


def _model(tiny: Tiny) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    config = _config(tiny)
    if str(tiny.extra.get("architectures")).endswith("Model']"):
        return AutoModel.from_config(config)
    kind = AutoModelForImageTextToText if tiny.kind in ("gemma3", "mistral3") else AutoModelForCausalLM
    return kind.from_config(config)


def _config(tiny: Tiny) -> Any:
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[tiny.kind]
    if tiny.kind in ("gpt2", "gpt_bigcode"):
        return known(**tiny.options)
    text = {**SIZES, "tie_word_embeddings": tiny.kind.startswith(("gemma", "cohere")), **tiny.options}
    if tiny.kind not in ("gemma3", "mistral3"):
        return known(**text)
    seeing = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return known(text_config=text, vision_config={**seeing, "image_size": 28, "patch_size": 14})


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


def internlm2() -> tuple[dict[str, Any], Shapes]:
    names = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    made = packed(plain("InternLM2ForCausalLM", "internlm2", vocab=SPM_PIECES), "attention.wqkv", 512)
    return renamed(made, {**names, "post_attention_norm": "ffn_norm"})


def baichuan() -> tuple[dict[str, Any], Shapes]:
    made = plain("BaichuanForCausalLM", "baichuan", num_key_value_heads=4)
    return packed(made, "self_attn.W_pack", 768)


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
def bpe() -> dict[str, bytes]:
    """A byte-level BPE tokenizer with two special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 3,  # a tokenizer class may add some
        special_tokens=["<pad>", "<s>", "</s>"],
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


def _settings(kind: str) -> dict[str, bytes]:
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    return {"tokenizer_config.json": json.dumps(settings).encode()}
