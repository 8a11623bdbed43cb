"""More tiny models, for tests of classes that tie embeddings in their own ways."""

from __future__ import annotations

from support.tiny_architectures import (
    BOTH,
    ENCODER_DECODER,
    GROUPED,
    SPEAKS,
    TEXT,
    VISION,
    Architecture,
)

LAYERS = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48}
FLORENCE = {
    "vision_config": {
        "model_type": "florence_vision",
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "depths": [1, 1],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 2,
        "projection_dim": 32,
    },
    "text_config": ENCODER_DECODER | {"model_type": "bart", "vocab_size": 96, "max_position_embeddings": 64},
    "image_token_id": 5,
}
PALI = {
    "vision_config": VISION | {"model_type": "siglip_vision_model"},
    "text_config": TEXT | SPEAKS | {"model_type": "gemma"},
    "image_token_id": 5,
    "projection_dim": 32,
}


def _a(
    kind: str, auto: str = "CausalLM", eats: str = "input_ids", *, usual: bool = True, **config: object
) -> Architecture:
    name = "AutoModel" if not auto else f"AutoModelFor{auto}"
    return Architecture(kind, name, config, tuple(eats.split()), usual)


MORE = [
    *(_a(kind, "MaskedLM") for kind in ("xlm-roberta", "camembert", "ernie", "mpnet", "nystromformer", "roformer")),
    *(_a(kind, "MaskedLM") for kind in ("convbert", "deberta", "deberta-v2", "data2vec-text", "rembert", "big_bird")),
    _a("megatron-bert", "MaskedLM"),
    *(_a(kind, "") for kind in ("bert", "roberta", "modernbert", "distilbert", "mpnet")),
    *(_a(kind, "Seq2SeqLM", BOTH, **ENCODER_DECODER) for kind in ("mbart", "pegasus", "blenderbot", "m2m_100")),
    *(_a(kind, "Seq2SeqLM", BOTH, **ENCODER_DECODER) for kind in ("plbart", "blenderbot-small")),
    *(_a(kind, "Seq2SeqLM", BOTH, decoder_start_token_id=0, **LAYERS) for kind in ("umt5", "switch_transformers")),
    *(_a(kind) for kind in ("biogpt", "gpt_neox_japanese")),
    _a("codegen", rotary_dim=4, n_ctx=64),
    _a("xglm", ffn_dim=48, num_layers=2, attention_heads=4),
    _a("gpt_neo", attention_types=[[["global", "local"], 1]]),
    *(_a(kind, **GROUPED, head_dim=8) for kind in ("ministral", "vaultgemma")),
    _a("qwen3_next", **GROUPED, head_dim=8, num_hidden_layers=4),
    _a("florence2", "ImageTextToText", "input_ids", usual=False, **FLORENCE),
    _a("paligemma", "ImageTextToText", "input_ids pixel_values", usual=False, **PALI),
]  # fmt: skip
