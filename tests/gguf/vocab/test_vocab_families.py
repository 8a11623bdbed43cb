"""Families with vocabularies of their own against llama.cpp's converter: names, order, types and values."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from support.llama_cpp_tools import needs_converter
from support.special_token_cases import BASE, Case, listed
from support.tokenizer_folders import (
    TEXTS,
    byte_level,
    config,
    of_sentencepiece,
    sentencepiece_model,
    special,
    template,
)
from test_vocab_against_converter import compared

from mergeforge.gguf.vocab.sentencepiece import piece_model

pytestmark = needs_converter
PIECES = 420
IDS = {"bos_token_id": 1, "eos_token_id": 2}
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
NAMES = {f"{role}_token": text for role, text in ROLES.items()}


def settings(architecture: str, model_type: str, rows: int, **more: Any) -> dict[str, Any]:
    return config("LlamaForCausalLM", rows, **{"architectures": [architecture], "model_type": model_type, **more})


@lru_cache(maxsize=1)
def unigram_model() -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([line for text in TEXTS[:4] for line in text.splitlines() if line] * 3),
        model_writer=out,
        model_type="unigram",
        vocab_size=119,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def unigram(folder: Path) -> dict[str, Any]:
    """tokenizer.json as XLM-RoBERTa has it."""
    path = folder / "unigram.model"
    path.write_bytes(unigram_model())
    model = piece_model(path)
    texts = [[text, 0.0] for text in SPECIAL] + [[one.text, one.score] for one in model.pieces[3:]] + [["<mask>", 0.0]]
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    charsmap = base64.b64encode(model.charsmap).decode()
    return of_sentencepiece(
        added_tokens=[special(i, text) for i, text in enumerate(SPECIAL)] + [special(len(texts) - 1, "<mask>")],
        normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap},
        pre_tokenizer=spaces,
        decoder=spaces,
        post_processor=template("<s>", "</s>", {"<s>": 0, "</s>": 2}),
        model={"type": "Unigram", "unk_id": 3, "vocab": texts, "byte_fallback": False},
    )


def encoders(folder: Path) -> dict[str, Case]:
    """XLM-RoBERTa from both of its files, RoBERTa."""
    sizes = {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1}
    tokenizer = unigram(folder)
    rows = len(tokenizer["model"]["vocab"])
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer", **NAMES}}
    added = [special(BASE, "<s>"), special(BASE + 1, "</s>"), special(BASE + 2, "<mask>")]
    around = {"type": "RobertaProcessing", "sep": ["</s>", BASE + 1], "cls": ["<s>", BASE]}
    bpe = byte_level(added=added, post_processor={**around, "trim_offsets": True, "add_prefix_space": False})
    names = {"tokenizer_class": "RobertaTokenizer", **NAMES, "pad_token": "<s>", "unk_token": "<s>"}
    xlm = settings("XLMRobertaModel", "xlm-roberta", rows, **sizes)
    return {
        "unigram": Case(xlm, files, "unigram"),
        "unigram-model": Case(xlm, {**files, "sentencepiece.bpe.model": unigram_model()}, "unigram"),
        "roberta": Case(
            settings("RobertaModel", "roberta", BASE + 3, **sizes),
            {"tokenizer.json": bpe, "tokenizer_config.json": names},
            "roberta",
            pre="roberta-bpe",
        ),
    }


def decoders() -> dict[str, Case]:
    """Gemma 1 and 3, InternLM 2 and 3, GLM-4 and 4.5, StableLM."""
    model = {"tokenizer.model": sentencepiece_model()}
    own = [special(i, text) for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    chat = {"tokenizer_config.json": {"added_tokens_decoder": listed(*own, special(77, "<|im_end|>"))}}
    spaced = {"tokenizer_config.json": {**chat["tokenizer_config.json"], "add_prefix_space": True}}
    texts = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
    tokenizer = byte_level(added=[special(BASE + i, text) for i, text in enumerate(texts)])
    glm = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    half = {"partial_rotary_factor": 0.5, "eos_token_id": BASE, "use_parallel_residual": False}
    experts = {"n_routed_experts": 2, "num_nextn_predict_layers": 0}
    rows = BASE + len(texts)
    return {
        "gemma": Case(settings("GemmaForCausalLM", "gemma", PIECES, **IDS), model, "gemma"),
        "gemma3": Case(
            settings("Gemma3ForCausalLM", "gemma3_text", PIECES, sliding_window=8, **IDS), {**model, **chat}, "gemma3"
        ),
        "internlm2": Case(settings("InternLM2ForCausalLM", "internlm2", PIECES, **IDS), {**model, **chat}, "internlm2"),
        "internlm3": Case(settings("InternLM3ForCausalLM", "llama", PIECES, **IDS), {**model, **spaced}, "internlm3"),
        "glm4": Case(settings("Glm4ForCausalLM", "glm4", rows, **half), glm, "glm4", pre="glm4"),
        "glm4-moe": Case(
            settings("Glm4MoeForCausalLM", "glm4_moe", rows, **half, **experts), glm, "glm4_moe", pre="glm4"
        ),
        "stablelm": Case(settings("StableLmForCausalLM", "stablelm", rows, **half), glm, "stablelm", pre="stablelm2"),
    }


def test_families(tmp_path: Path) -> None:
    assert compared({**encoders(tmp_path), **decoders()}, tmp_path) == {}
