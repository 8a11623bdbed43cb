"""The tokenizer.* keys equal those of llama.cpp's converter: names, order, types and values, for every kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.gguf_keys import as_read, differences, with_prefix
from support.llama_cpp_tools import TREE, convert, needs_converter, read
from support.pre_tokenizer_splits import pre_tokenizer_steps
from support.special_token_cases import BASE, Case, decoder_entries, random_case
from support.tokenizer_folders import (
    added_token,
    byte_level_model,
    byte_level_tokenizer,
    config,
    sentencepiece_model,
    sentencepiece_tokenizer,
    template_processor,
    tokenizer_files,
    wordpiece_tokenizer,
    write_model,
)

from mergeforge.gguf.vocab import vocabulary

pytestmark = needs_converter
PIECES = 420


def differences_by_case(cases: Mapping[str, Case], root: Path) -> dict[str, dict[str, str]]:
    """Convert all cases in one run; the differences of each case that has any."""
    jobs = [
        (write_model(root / name, case.settings, case.files), root / f"{name}.gguf", "f16", case.pre or "")
        for name, case in cases.items()
    ]
    assert convert(jobs) == {}
    by_case = {}
    for (name, case), (folder, file, *_) in zip(cases.items(), jobs, strict=True):
        settings = {**case.settings, **({"model_type": case.family} if case.family else {})}
        rows = int(settings["vocab_size"])
        keys = vocabulary(tokenizer_files(folder), settings, case.kind, rows=rows, pre=case.pre).keys
        ours, theirs = as_read(keys), with_prefix(read(file).keys, "tokenizer.")
        for key in case.improved_keys:
            ours.pop(key, None)
            theirs.pop(key, None)
        if differing := differences(ours, theirs):
            by_case[name] = differing
    return by_case


OWN_TOKENS = decoder_entries(added_token(0, "<unk>"), added_token(1, "<s>"), added_token(2, "</s>"))
FURTHER_TOKENS = decoder_entries(
    added_token(PIECES, "<|im_start|>", special=False),
    added_token(PIECES + 1, "▁▁x", special=False),
    added_token(9, "<new>"),
)
GEMMA = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0, "sliding_window": 8}
PHI = {"sliding_window": None, "original_max_position_embeddings": 64}


def cases_with_tokenizer_model() -> dict[str, Case]:
    """tokenizer.model with padding, added tokens from both files and special tokens, in five families."""
    model = {"tokenizer.model": sentencepiece_model()}
    names = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>"}
    return {
        "plain": Case(config("LlamaForCausalLM", PIECES), model, "llama"),
        "padded": Case(
            config("LlamaForCausalLM", PIECES + 12, bos_token_id=1, eos_token_id=2),
            {
                **model,
                "added_tokens.json": {"<extra>": PIECES, "<far>": 9999},
                "tokenizer_config.json": {**names, "add_prefix_space": True, "chat_template": "{{ x }}"},
            },
            "llama",
        ),
        "listed": Case(
            config("LlamaForCausalLM", PIECES + 12, bos_token_id=1, eos_token_id=2, pad_token_id=5000),
            {**model, "tokenizer_config.json": {"added_tokens_decoder": {**OWN_TOKENS, **FURTHER_TOKENS}}},
            "llama",
        ),
        "with-json": Case(
            config("LlamaForCausalLM", PIECES),
            {**model, "tokenizer.json": sentencepiece_tokenizer(), "tokenizer_config.json": {"eos_token": "</s>"}},
            "llama",
        ),
        "gemma2": Case(config("Gemma2ForCausalLM", PIECES + 2, **GEMMA), model, "gemma"),
        "qwen2": Case(config("Qwen2ForCausalLM", PIECES), model, "spm_or_gpt2"),
        "phi3": Case(
            config("Phi3ForCausalLM", PIECES + 12, bos_token_id=1, **PHI),
            {
                **model,
                "tokenizer_config.json": {
                    "tokenizer_class": "LlamaTokenizer",
                    "added_tokens_decoder": {**OWN_TOKENS, **FURTHER_TOKENS},
                },
                "tokenizer.json": sentencepiece_tokenizer(
                    added_tokens=[added_token(7, "<|x|>", special=False), added_token(8, "<y>")]
                ),
            },
            "phi3",
        ),
        "code-llama": Case(config("LlamaForCausalLM", 32016), model, "llama"),
    }


def cases_without_tokenizer_model() -> dict[str, Case]:
    """tokenizer.json alone: equal to the converter's except for the scores, which are better."""
    settings = config("LlamaForCausalLM", PIECES + 1, bos_token_id=1, eos_token_id=2)
    added = [
        added_token(0, "<unk>"),
        added_token(1, "<s>"),
        added_token(2, "</s>"),
        added_token(PIECES, "<tool>", special=False),
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": True}
    files = {"tokenizer.json": sentencepiece_tokenizer(added_tokens=added), "tokenizer_config.json": names}
    return {"rebuilt": Case(settings, files, "llama", improved_keys=("tokenizer.ggml.scores",))}


def cases_with_added_tokens() -> dict[str, Case]:
    """Padding, gaps between ids, normalized or not, special-looking, named only by tokenizer_config.json."""
    added = [
        added_token(BASE, "<|endoftext|>"),
        added_token(BASE + 1, "ĠĠ x", special=False),
        added_token(BASE + 3, "norm Ġ", special=False, normalized=True),
        added_token(BASE + 6, "<|fim|>", special=False),
        added_token(BASE + 7, "a▁b", special=False),
        added_token(90, byte_level_text(90), special=False),
    ]
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|fim|>", "mask_token": "<nowhere>", "image_token": "a▁b"}
    files = {"tokenizer.json": byte_level_tokenizer(added=added)}
    settings = config("LlamaForCausalLM", BASE + 9)
    decoder = {
        "added_tokens_decoder": decoder_entries(
            added_token(BASE, "<|endoftext|>", special=False), added_token(BASE + 5, "<listed>")
        )
    }
    return {
        "bare": Case(settings, files, "llama", pre="gpt-2"),
        "named": Case(settings, {**files, "tokenizer_config.json": names}, "llama", pre="gpt-2"),
        "listed": Case(settings, {**files, "tokenizer_config.json": {**names, **decoder}}, "llama", pre="gpt-2"),
    }


def byte_level_text(token_id: int) -> str:
    return {known_id: text for text, known_id in byte_level_model()[0].items()}[token_id]


def cases_with_wordpiece() -> dict[str, Case]:
    """BERT."""
    tokenizer = wordpiece_tokenizer()
    rows = len(tokenizer["model"]["vocab"])
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    settings = config("BertModel", rows, layer_norm_eps=1e-12, type_vocab_size=2)
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"mask_token": "[MASK]", **names}}
    return {"bert": Case(settings, files, "bert", pre="bert-bge")}


def test_every_kind_of_vocabulary(tmp_path: Path) -> None:
    """SPM with tokenizer.model and without, BPE, WordPiece; then special tokens in random places."""
    cases = {
        **cases_with_tokenizer_model(),
        **cases_without_tokenizer_model(),
        **cases_with_added_tokens(),
        **cases_with_wordpiece(),
    }
    assert differences_by_case({**cases, **{f"seed-{seed}": random_case(seed) for seed in range(50)}}, tmp_path) == {}


@pytest.mark.slow
def test_random_special_tokens(tmp_path: Path) -> None:
    """Random roles, ids, flags, post-processors and chat templates, 300 times."""
    assert differences_by_case({f"seed-{seed}": random_case(seed) for seed in range(100, 400)}, tmp_path) == {}


# pre-tokenizer name -> the model family, what else tokenizer.json has, the BOS
REAL_TOKENIZERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-bpe": ("llama", {"model": {"ignore_merges": True}}, "<|begin_of_text|>"),
    "qwen2": ("qwen2", {"normalizer": {"type": "NFC"}}, ""),
    "gpt-2": ("gpt2", {}, ""),
    "starcoder": ("starcoder2", {}, ""),
    "refact": ("gpt_refact", {}, ""),
    "command-r": ("cohere", {"normalizer": {"type": "NFC"}}, "<BOS_TOKEN>"),
    "mpt": ("mpt", {"normalizer": {"type": "NFC"}}, ""),
    "falcon": ("falcon", {}, ""),
    "deepseek-llm": ("llama", {}, "<\uff5cbegin▁of▁sentence\uff5c>"),
    "deepseek-coder": ("llama", {}, "<\uff5cbegin▁of▁sentence\uff5c>"),
}
SAME_STEPS = {"refact": "starcoder", "mpt": "gpt-2"}


def real_tokenizer(name: str) -> tuple[dict[str, Any], int]:
    """tokenizer.json of a real model, made from its vocabulary in llama.cpp's source tree; and its size."""
    keys = read(Path(TREE) / "models" / f"ggml-vocab-{name}.gguf").keys
    texts, types = keys["tokenizer.ggml.tokens"][1], keys["tokenizer.ggml.token_type"][1]
    _, changes, bos = REAL_TOKENIZERS[name]
    post_processor = {"post_processor": template_processor(bos, ids={bos: texts.index(bos)})} if bos else {}
    token_ids = [i for i, (text, kind) in enumerate(zip(texts, types, strict=True)) if text != f"[PAD{i}]" or kind == 1]
    added = [
        added_token(i, texts[i], special=types[i] == 3, normalized=types[i] == 4) for i in token_ids if types[i] != 1
    ]
    tokenizer = byte_level_tokenizer(
        pre_tokenizer_steps(SAME_STEPS.get(name, name)), added=added, **{**changes, **post_processor}
    )
    tokenizer["model"] |= {"vocab": {texts[i]: i for i in token_ids}, "merges": keys["tokenizer.ggml.merges"][1]}
    return tokenizer, len(texts)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_real_vocabularies(name: str, tmp_path: Path) -> None:
    """Ten real vocabularies: the converter recognizes them by hash, mergeforge by structure; all keys are equal."""
    tokenizer, rows = real_tokenizer(name)
    family, _, bos = REAL_TOKENIZERS[name]
    names = {"tokenizer_class": "PreTrainedTokenizerFast", **({"bos_token": bos} if bos else {})}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": names}
    settings = config("LlamaForCausalLM", rows, eos_token_id=1)
    assert differences_by_case({name: Case(settings, files, "llama", family=family)}, tmp_path) == {}


@pytest.mark.slow
def test_pre_tokenizer_table_equals_llama_cpp_source(tmp_path: Path) -> None:
    """The table has every name in llama.cpp's source, with the same flags."""
    import re

    from mergeforge.gguf.vocab.pre_tokenizer_table import PRE_TOKENIZERS

    source = (Path(TREE) / "src" / "llama-vocab.cpp").read_text("utf-8")
    start = source.index("only BPE models have pre-tokenizers")
    branches = source[start : source.index("unknown pre-tokenizer type", start)]
    theirs = {}
    for names, body in re.findall(r"if \(([^{}]*?tokenizer_pre ==.*?)\) \{(.*?)\}", branches, re.DOTALL):
        flags = ("ignore_merges = true" in body, "add_bos = true" in body, "clean_spaces = false" not in body)
        theirs |= dict.fromkeys(re.findall(r'tokenizer_pre == "([^"]+)"', names), flags)
    ours = {row.name: (row.ignore_merges, row.bos, row.clean_spaces) for row in PRE_TOKENIZERS.values()}
    assert set(ours) == set(theirs)
    matchable = {name for name, row in PRE_TOKENIZERS.items() if row.splits}
    assert {name: ours[name] for name in matchable} == {name: theirs[name] for name in matchable}
