"""The tokenizer.* keys of special families equal those of llama.cpp's converter: names, order, types and values."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import PROTOBUF
from support.llama_cpp_tools import needs_converter
from support.special_token_cases import BASE, Case, decoder_entries
from support.tokenizer_folders import (
    TEXTS,
    added_token,
    byte_level_tokenizer,
    config,
    sentencepiece_model,
    sentencepiece_tokenizer,
    template_processor,
)
from test_vocab_against_converter import differences_by_case

from mergeforge.gguf.vocab.sentencepiece import read_sentencepiece

pytestmark = needs_converter
PIECES = 420
IDS = {"bos_token_id": 1, "eos_token_id": 2}
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
NAMES = {f"{role}_token": text for role, text in ROLES.items()}


def settings(architecture: str, model_type: str, rows: int, **changes: Any) -> dict[str, Any]:
    return config("LlamaForCausalLM", rows, **{"architectures": [architecture], "model_type": model_type, **changes})


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


def unigram_tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer.json in the form of XLM-RoBERTa's."""
    path = folder / "unigram.model"
    path.write_bytes(unigram_model())
    model = read_sentencepiece(path)
    texts = (
        [[text, 0.0] for text in SPECIAL]
        + [[piece.text, piece.score] for piece in model.pieces[3:]]
        + [["<mask>", 0.0]]
    )
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    charsmap = base64.b64encode(model.charsmap).decode()
    return sentencepiece_tokenizer(
        added_tokens=[added_token(i, text) for i, text in enumerate(SPECIAL)] + [added_token(len(texts) - 1, "<mask>")],
        normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap},
        pre_tokenizer=metaspace,
        decoder=metaspace,
        post_processor=template_processor("<s>", "</s>", {"<s>": 0, "</s>": 2}),
        model={"type": "Unigram", "unk_id": 3, "vocab": texts, "byte_fallback": False},
    )


def encoder_cases(folder: Path) -> dict[str, Case]:
    """XLM-RoBERTa from either of its files, and RoBERTa."""
    options = {"layer_norm_eps": 1e-5, "type_vocab_size": 1, "pad_token_id": 1}
    tokenizer = unigram_tokenizer(folder)
    rows = len(tokenizer["model"]["vocab"])
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer", **NAMES}}
    added = [added_token(BASE, "<s>"), added_token(BASE + 1, "</s>"), added_token(BASE + 2, "<mask>")]
    processor = {"type": "RobertaProcessing", "sep": ["</s>", BASE + 1], "cls": ["<s>", BASE]}
    bpe = byte_level_tokenizer(
        added=added, post_processor={**processor, "trim_offsets": True, "add_prefix_space": False}
    )
    names = {"tokenizer_class": "RobertaTokenizer", **NAMES, "pad_token": "<s>", "unk_token": "<s>"}
    xlm = settings("XLMRobertaModel", "xlm-roberta", rows, **options)
    return {
        "unigram": Case(xlm, files, "unigram"),
        "unigram-model": Case(xlm, {**files, "sentencepiece.bpe.model": unigram_model()}, "unigram"),
        "roberta": Case(
            settings("RobertaModel", "roberta", BASE + 3, **options),
            {"tokenizer.json": bpe, "tokenizer_config.json": names},
            "roberta",
            pre="roberta-bpe",
        ),
    }


def decoder_cases() -> dict[str, Case]:
    """Gemma 1 and 3, InternLM 2 and 3, GLM-4 and GLM-4.5, Arctic, StableLM."""
    model = {"tokenizer.model": sentencepiece_model()}
    own_tokens = [added_token(i, text) for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    chat = {
        "tokenizer_config.json": {"added_tokens_decoder": decoder_entries(*own_tokens, added_token(77, "<|im_end|>"))}
    }
    spaced = {"tokenizer_config.json": {**chat["tokenizer_config.json"], "add_prefix_space": True}}
    texts = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>")
    tokenizer = byte_level_tokenizer(added=[added_token(BASE + i, text) for i, text in enumerate(texts)])
    glm = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    rope = {"partial_rotary_factor": 0.5, "eos_token_id": BASE, "use_parallel_residual": False}
    experts = {"n_routed_experts": 2, "num_nextn_predict_layers": 0}
    rows = BASE + len(texts)
    return {
        "gemma": Case(settings("GemmaForCausalLM", "gemma", PIECES, **IDS), model, "gemma"),
        "gemma3": Case(
            settings("Gemma3ForCausalLM", "gemma3_text", PIECES, sliding_window=8, **IDS), {**model, **chat}, "gemma3"
        ),
        "internlm2": Case(settings("InternLM2ForCausalLM", "internlm2", PIECES, **IDS), {**model, **chat}, "internlm2"),
        "internlm3": Case(settings("InternLM3ForCausalLM", "llama", PIECES, **IDS), {**model, **spaced}, "internlm3"),
        "glm4": Case(settings("Glm4ForCausalLM", "glm4", rows, **rope), glm, "glm4", pre="glm4"),
        "glm4-moe": Case(
            settings("Glm4MoeForCausalLM", "glm4_moe", rows, **rope, **experts), glm, "glm4_moe", pre="glm4"
        ),
        "arctic": Case(
            settings("ArcticForCausalLM", "arctic_x", PIECES, **IDS), {**model, **arctic_config()}, "arctic"
        ),
        "stablelm": Case(settings("StableLmForCausalLM", "stablelm", rows, **rope), glm, "stablelm", pre="stablelm2"),
    }


def arctic_config() -> dict[str, Any]:
    """Two pieces get another text; one token has no special meaning."""
    entries = [added_token(0, "<unk>"), added_token(8, "<|im_start|>"), added_token(9, "plain", special=False)]
    return {"tokenizer_config.json": {"unk_token": "<unk>", "added_tokens_decoder": decoder_entries(*entries)}}


def t5_cases() -> dict[str, Case]:
    """T5's spiece.model with added tokens, and Pile-T5's BPE."""
    options = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    rows = 130
    files = {"spiece.model": unigram_model(), "added_tokens.json": {"<extra_id_0>": 125, "<far>": 9999}}
    return {
        "t5": Case(settings("T5ForConditionalGeneration", "t5", rows, **options), files, "t5"),
        "pile-t5": Case(
            settings("T5ForConditionalGeneration", "t5", PIECES, **options),
            {"tokenizer.model": sentencepiece_model()},
            "t5",
        ),
    }


@pytest.mark.skipif(not PROTOBUF, reason="the converter reads T5's files with the protobuf package")
def test_vocabularies_of_t5(tmp_path: Path) -> None:
    assert differences_by_case(t5_cases(), tmp_path) == {}


def test_vocabularies_of_families(tmp_path: Path) -> None:
    assert differences_by_case({**encoder_cases(tmp_path), **decoder_cases()}, tmp_path) == {}
