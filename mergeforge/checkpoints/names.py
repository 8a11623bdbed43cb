"""What tensor names and configs say about a model: embeddings, heads, tied heads, transposed weights."""

from __future__ import annotations

from collections.abc import Mapping

from mergeforge.checkpoints.model import ModelSource, config_ties_embeddings

HEADS = ("lm_head", "embed_out", "output_layer")  # output embeddings that may be tied to the input embedding
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # weights are stored as (in, out)
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # suffixes of architectures with a head


def tied_head(base: ModelSource) -> tuple[str, str] | None:
    """The names (head, embedding) of a model whose output embedding is its input embedding, or None."""
    if not (config_ties_embeddings(base.config) or _omits_head(base)):
        return None
    for name in base.tensors:
        module, _, leaf = name.rpartition(".")
        prefix, _, last = module.rpartition(".")
        if leaf == "weight" and last in EMBEDDINGS:
            head = "embed_out" if last == "embed_in" else "lm_head"
            outer = prefix.rpartition("language_model")[0] if "language_model" in prefix and prefix != "model" else ""
            heads = [tensor_name for tensor_name in base.tensors if is_head(tensor_name)]
            return (heads[0] if heads else f"{outer.removesuffix('model.')}{head}.weight"), name
    return None


def _omits_head(base: ModelSource) -> bool:
    """Whether the config has no tie_word_embeddings (GPT-2, Gemma) and no head is stored."""
    inner = base.config.get("text_config")
    configs = [base.config, *([inner] if isinstance(inner, Mapping) else [])]
    if any(config.get("tie_word_embeddings") is not None for config in configs) or any(map(is_head, base.tensors)):
        return False
    return any(str(name).endswith(GENERATIVE) for name in base.config.get("architectures") or ())


def is_head(name: str) -> bool:
    """Whether a tensor is an output embedding."""
    return name.endswith(".weight") and name.split(".")[-2] in HEADS
