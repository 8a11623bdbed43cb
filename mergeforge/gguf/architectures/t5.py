"""T5, mT5 and UMT5: an encoder and a decoder, or the encoder alone."""

from __future__ import annotations

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import FILE_TYPE, head_sizes, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, f32, u32

_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_o", "ffn_norm", "ffn_up", "ffn_down")
_CROSS = ("cross_attn_norm", "cross_attn_q", "cross_attn_k", "cross_attn_v", "cross_attn_o")
_CONTEXT = 512  # where config.json has no n_positions


@architecture(
    "T5ForConditionalGeneration",
    "T5WithLMHeadModel",
    "MT5ForConditionalGeneration",
    "UMT5ForConditionalGeneration",
    "UMT5Model",
)
def t5(model: HFModel) -> GGUFModelSpec:
    decoder_layers = int(model.find("num_decoder_layers") or model.layers)
    start = {"decoder_start_token_id": u32(model.require("decoder_start_token_id"))}
    keys = _keys(model, optional(u32, decoder_block_count=model.find("num_decoder_layers"))) | start | FILE_TYPE
    needs = (*_parts("enc", model.layers, _LAYER), *_parts("dec", decoder_layers, (*_LAYER, *_CROSS)))
    return _spec(model, "t5", keys, (*needs, "enc.output_norm", "dec.output_norm"), max(model.layers, decoder_layers))


@architecture("T5EncoderModel")
def t5_encoder(model: HFModel) -> GGUFModelSpec:
    needs = (*_parts("enc", model.layers, _LAYER), "enc.output_norm")
    return _spec(model, "t5encoder", _keys(model, {}) | FILE_TYPE, needs, model.layers)


def _keys(model: HFModel, decoder: dict[str, Value]) -> dict[str, Value]:
    epsilon = f32(model.require("layer_norm_epsilon"))
    return {
        "context_length": u32(model.find("n_positions") or _CONTEXT),
        "embedding_length": u32(model.require("d_model")),
        "feed_forward_length": u32(model.require("d_ff")),
        "block_count": u32(model.layers),
        **decoder,
        "attention.head_count": u32(model.require("num_heads")),
        **head_sizes(model.require("d_kv")),
        "attention.layer_norm_epsilon": epsilon,
        "attention.relative_buckets_count": u32(model.require("relative_attention_num_buckets")),
        "attention.layer_norm_rms_epsilon": epsilon,
    }


def _parts(stack: str, layers: int, parts: tuple[str, ...]) -> list[str]:
    return [f"{stack}.blk.{layer}.{part}" for layer in range(layers) for part in parts]


def _spec(model: HFModel, arch: str, keys: dict[str, Value], needs: tuple[str, ...], layers: int) -> GGUFModelSpec:
    embedding = next((name for name in model.tensors if name in _EMBEDDINGS), "")

    def one_embedding(stored: HFTensor) -> RuleResult:
        """The embedding may be stored up to three times."""
        if stored.name not in _EMBEDDINGS:
            return None
        return (stored.tensor("token_embd.weight"),) if stored.name == embedding else f"the same as {embedding}"

    return make_spec(
        model,
        arch,
        keys,
        one_embedding,
        vocab="t5",
        required_per_block=(),
        required=("token_embd", *needs),
        layers=layers,
    )
