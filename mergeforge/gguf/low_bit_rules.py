"""Rules of llama-quantize for the file types of about 1 to 3 bits, and which of their tensors need an imatrix.

From src/llama-quant.cpp, build b11549.
"""

from __future__ import annotations

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

IQ1 = ("IQ1_S", "IQ1_M")
IQ2_LARGER = ("IQ2_S", "IQ2_M")
# File types of 1 and 2 bits: their rules are apart from those of the others.
LOW_BIT = (*IQ1, "IQ2_XXS", "IQ2_XS", *IQ2_LARGER)

# Tensor types that give useless weights without an imatrix. llama-quantize makes an exception for embeddings and
# outputs, except of the types that ggml cannot encode without one.
_NEED_IMATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
_ALWAYS_NEED_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ1_S")


def embedding_type(label: str, default: str) -> str:
    """The type of an embedding that is not the output too."""
    if label in (*IQ1, "IQ2_XXS", "IQ2_XS"):
        return "Q2_K"
    if label in (*IQ2_LARGER, "IQ3_XXS"):
        return "IQ3_S"
    return "Q4_K" if label in ("TQ1_0", "TQ2_0", "Q2_0") else default


def attention_v_type(label: str, grouped: bool, expert_count: int) -> str:
    """The type of attn_v in a file of LOW_BIT; `grouped`: four query heads or more share a key/value head."""
    if grouped or expert_count >= 4:
        return "Q4_K"
    return _better(label)


def attention_output_type(label: str, default: str, expert_count: int) -> str:
    """The type of attn_output in a file of LOW_BIT."""
    if expert_count == 8:
        return "Q5_K"
    if label in IQ1:
        return "IQ2_XXS"
    return "IQ3_S" if label in IQ2_LARGER else default


def ffn_down_type(label: str, default: str, early: bool) -> str:
    """The type of ffn_down in a file of LOW_BIT; `early`: it is in the first eighth of the layers."""
    return _better(label) if early else default


def _better(label: str) -> str:
    return "IQ3_S" if label in IQ2_LARGER else "Q2_K"


def needs_imatrix(name: str, type_name: str, label: str) -> bool:
    """Whether a tensor of a file type cannot be quantized to this type without an imatrix."""
    if name in EMBEDDINGS or name == "output.weight":
        return type_name in _ALWAYS_NEED_IMATRIX
    return type_name in _NEED_IMATRIX or (type_name == "Q2_K" and label == "Q2_K_S")
