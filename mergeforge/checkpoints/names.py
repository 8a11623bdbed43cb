"""What names and configs tell of a model's tensors: embeddings, heads, whether these are one, transposed weights."""

from __future__ import annotations

from collections.abc import Mapping

from mergeforge.checkpoints.checkpoint import ModelSource, says_tied

HEADS = ("lm_head", "embed_out", "output_layer")  # output embeddings that may be tied to the input's
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # weights stored (in, out)
GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of architectures with a head


def tied_head(base: ModelSource) -> tuple[str, str] | None:
    """(head, embedding) names of a checkpoint whose output embedding is its input embedding."""
    if not (says_tied(base.config) or _lacks_head(base)):
        return None
    for name in base.tensors:
        module, _, leaf = name.rpartition(".")
        prefix, _, last = module.rpartition(".")
        if leaf == "weight" and last in EMBEDDINGS:
            head = "embed_out" if last == "embed_in" else "lm_head"
            outer = prefix.rpartition("language_model")[0] if "language_model" in prefix and prefix != "model" else ""
            names = [held for held in base.tensors if is_head(held)]
            return (names[0] if names else f"{outer.removesuffix('model.')}{head}.weight"), name
    return None


def _lacks_head(base: ModelSource) -> bool:
    """Whether the config leaves the flag out (GPT-2, Gemma) and the head has no tensor of its own."""
    inner = base.config.get("text_config")
    parts = [base.config, *([inner] if isinstance(inner, Mapping) else [])]
    if any(part.get("tie_word_embeddings") is not None for part in parts) or any(map(is_head, base.tensors)):
        return False
    return any(str(name).endswith(GENERATIVE) for name in base.config.get("architectures") or ())


def is_head(name: str) -> bool:
    """Whether a tensor is an output embedding."""
    return name.endswith(".weight") and name.split(".")[-2] in HEADS
