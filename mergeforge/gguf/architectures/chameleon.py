"""Chameleon: text and images as tokens of one vocabulary; only the text can be used in llama.cpp."""

from __future__ import annotations

import numpy as np

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.attention import permute_rope_heads
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.row_order import interleave_rope_halves
from mergeforge.gguf.architectures.tensor_mapping import GATED, HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import boolean

_FIRST_HEAD = np.zeros(1, dtype=np.int64)
_NORMS = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")


@architecture("ChameleonForConditionalGeneration", "ChameleonForCausalLM")
def chameleon(model: HFModel) -> GGUFModelSpec:
    return make_spec(
        model,
        "chameleon",
        hparams(model) | {"swin_norm": boolean(bool(model.find("swin_norm")))},
        _image_tokenizer,
        permute_rope_heads,
        _first_head_norm,
        vocab="gpt2",
        required_per_block=(*GATED, "attn_q_norm", "attn_k_norm"),
    )


def _image_tokenizer(stored: HFTensor) -> RuleResult:
    is_image = stored.name.startswith("model.vqmodel")
    return "the image tokenizer, which llama.cpp does not have" if is_image else None


def _first_head_norm(stored: HFTensor) -> RuleResult:
    """Norms of queries and keys, a row for each head: as the converter writes them, all rows are that of the first."""
    if not stored.name.endswith(_NORMS):
        return None
    heads, size = stored.info.shape
    order = interleave_rope_halves(size, 1)
    return tuple(stored.tensor(rows=_FIRST_HEAD, first_row=head, column_order=order) for head in range(heads))
