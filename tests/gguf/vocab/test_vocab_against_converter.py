"""tokenizer.* keys against llama.cpp's converter: names, order, types and values, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.gguf_keys import as_read, differences, some
from support.llama_cpp_tools import TREE, convert, needs_converter, read
from support.pre_tokenizer_splits import steps_of
from support.special_token_cases import BASE, Case, any_case, listed
from support.tokenizer_folders import (
    byte_level,
    byte_level_model,
    config,
    of_sentencepiece,
    sentencepiece_model,
    special,
    template,
    tokenizer_files,
    word_pieces,
    write_model,
)

from mergeforge.gguf.vocab import vocabulary

pytestmark = needs_converter
PIECES = 420


def compared(cases: Mapping[str, Case], root: Path) -> dict[str, dict[str, str]]:
    """Convert all cases at once; the differences of each that has any."""
    jobs = [
        (write_model(root / name, case.settings, case.files), root / f"{name}.gguf", "f16", case.pre or "")
        for name, case in cases.items()
    ]
    assert convert(jobs) == {}
    found = {}
    for (name, case), (folder, file, *_) in zip(cases.items(), jobs, strict=True):
        settings = {**case.settings, **({"model_type": case.family} if case.family else {})}
        rows = int(settings["vocab_size"])
        keys = vocabulary(tokenizer_files(folder), settings, case.kind, rows=rows, pre=case.pre).keys
        ours, theirs = as_read(keys), some(read(file).keys, "tokenizer.")
        for key in case.better:
            ours.pop(key, None)
            theirs.pop(key, None)
        if wrong := differences(ours, theirs):
            found[name] = wrong
    return found


OWN = listed(special(0, "<unk>"), special(1, "<s>"), special(2, "</s>"))
MORE = listed(special(PIECES, "<|im_start|>", on=False), special(PIECES + 1, "▁▁x", on=False), special(9, "<new>"))
GEMMA = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0, "sliding_window": 8}
PHI = {"sliding_window": None, "original_max_position_embeddings": 64}


def with_pieces() -> dict[str, Case]:
    """tokenizer.model with padding, added tokens of both files, special tokens, in four families."""
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
            {**model, "tokenizer_config.json": {"added_tokens_decoder": {**OWN, **MORE}}},
            "llama",
        ),
        "with-json": Case(
            config("LlamaForCausalLM", PIECES),
            {**model, "tokenizer.json": of_sentencepiece(), "tokenizer_config.json": {"eos_token": "</s>"}},
            "llama",
        ),
        "gemma2": Case(config("Gemma2ForCausalLM", PIECES + 2, **GEMMA), model, "gemma"),
        "qwen2": Case(config("Qwen2ForCausalLM", PIECES), model, "spm_or_gpt2"),
        "phi3": Case(
            config("Phi3ForCausalLM", PIECES + 12, bos_token_id=1, **PHI),
            {
                **model,
                "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {**OWN, **MORE}},
                "tokenizer.json": of_sentencepiece(added_tokens=[special(7, "<|x|>", on=False), special(8, "<y>")]),
            },
            "phi3",
        ),
        "code-llama": Case(config("LlamaForCausalLM", 32016), model, "llama"),
    }


def without_pieces() -> dict[str, Case]:
    """tokenizer.json alone: all but the scores, which are better, is as the converter writes it."""
    settings = config("LlamaForCausalLM", PIECES + 1, bos_token_id=1, eos_token_id=2)
    added = [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>"), special(PIECES, "<tool>", on=False)]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": True}
    files = {"tokenizer.json": of_sentencepiece(added_tokens=added), "tokenizer_config.json": names}
    return {"rebuilt": Case(settings, files, "llama", better=("tokenizer.ggml.scores",))}


def with_added_tokens() -> dict[str, Case]:
    """Padding, ids with holes, normalised or not, special-looking, named by tokenizer_config.json only."""
    added = [
        special(BASE, "<|endoftext|>"),
        special(BASE + 1, "ĠĠ x", on=False),
        special(BASE + 3, "norm Ġ", on=False, normalized=True),
        special(BASE + 6, "<|fim|>", on=False),
        special(BASE + 7, "a▁b", on=False),
        special(90, byte_level_text(90), on=False),
    ]
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|fim|>", "mask_token": "<nowhere>", "image_token": "a▁b"}
    files = {"tokenizer.json": byte_level(added=added)}
    some_rows = config("LlamaForCausalLM", BASE + 9)
    listing = {"added_tokens_decoder": listed(special(BASE, "<|endoftext|>", on=False), special(BASE + 5, "<listed>"))}
    return {
        "bare": Case(some_rows, files, "llama", pre="gpt-2"),
        "named": Case(some_rows, {**files, "tokenizer_config.json": names}, "llama", pre="gpt-2"),
        "listed": Case(some_rows, {**files, "tokenizer_config.json": {**names, **listing}}, "llama", pre="gpt-2"),
    }


def byte_level_text(number: int) -> str:
    return next(text for text, one in byte_level_model()[0].items() if one == number)


def with_word_pieces() -> dict[str, Case]:
    """BERT."""
    tokenizer = word_pieces()
    rows = len(tokenizer["model"]["vocab"])
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    settings = config("BertModel", rows, layer_norm_eps=1e-12, type_vocab_size=2)
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"mask_token": "[MASK]", **names}}
    return {"bert": Case(settings, files, "bert", pre="bert-bge")}


def test_every_kind(tmp_path: Path) -> None:
    """SPM with its model and without, BPE, WordPiece; then special tokens in all places that can have them."""
    cases = {**with_pieces(), **without_pieces(), **with_added_tokens(), **with_word_pieces()}
    assert compared({**cases, **{f"seed-{seed}": any_case(seed) for seed in range(50)}}, tmp_path) == {}


@pytest.mark.slow
def test_special_tokens(tmp_path: Path) -> None:
    """Roles, ids, flags, templates and chat templates at random, 300 times."""
    assert compared({f"seed-{seed}": any_case(seed) for seed in range(100, 400)}, tmp_path) == {}


# name -> the family whose model it is, what else tokenizer.json has, the BOS
REAL: dict[str, tuple[str, dict[str, Any], str]] = {
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
STEPS_OF = {"refact": "starcoder", "mpt": "gpt-2"}


def real_tokenizer(name: str) -> tuple[dict[str, Any], int]:
    """tokenizer.json of a real model, from the vocabulary that llama.cpp's source has of it; and its size."""
    keys = read(Path(TREE) / "models" / f"ggml-vocab-{name}.gguf").keys
    texts, types = keys["tokenizer.ggml.tokens"][1], keys["tokenizer.ggml.token_type"][1]
    _, changes, bos = REAL[name]
    first = {"post_processor": template(bos, ids={bos: texts.index(bos)})} if bos else {}
    kept = [i for i, (text, kind) in enumerate(zip(texts, types, strict=True)) if text != f"[PAD{i}]" or kind == 1]
    added = [special(i, texts[i], on=types[i] == 3, normalized=types[i] == 4) for i in kept if types[i] != 1]
    tokenizer = byte_level(steps_of(STEPS_OF.get(name, name)), added=added, **{**changes, **first})
    tokenizer["model"] |= {"vocab": {texts[i]: i for i in kept}, "merges": keys["tokenizer.ggml.merges"][1]}
    return tokenizer, len(texts)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies(name: str, tmp_path: Path) -> None:
    """Ten models' own vocabularies: the converter knows them by their hash, we by their structure; all keys equal."""
    tokenizer, rows = real_tokenizer(name)
    family, _, bos = REAL[name]
    names = {"tokenizer_class": "PreTrainedTokenizerFast", **({"bos_token": bos} if bos else {})}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": names}
    settings = config("LlamaForCausalLM", rows, eos_token_id=1)
    assert compared({name: Case(settings, files, "llama", family=family)}, tmp_path) == {}


@pytest.mark.slow
def test_the_engines_table(tmp_path: Path) -> None:
    """Every name that llama.cpp's source knows is known, with its flags."""
    import re

    from mergeforge.gguf.vocab.pre_tokenizer_table import PRE_TOKENIZERS

    source = (Path(TREE) / "src" / "llama-vocab.cpp").read_text("utf-8")
    start = source.index("only BPE models have pre-tokenizers")
    part = source[start : source.index("unknown pre-tokenizer type", start)]
    found = {}
    for names, body in re.findall(r"if \(([^{}]*?tokenizer_pre ==.*?)\) \{(.*?)\}", part, re.DOTALL):
        flags = ("ignore_merges = true" in body, "add_bos = true" in body, "clean_spaces = false" not in body)
        found |= dict.fromkeys(re.findall(r'tokenizer_pre == "([^"]+)"', names), flags)
    ours = {row.name: (row.ignore_merges, row.bos, row.clean_spaces) for row in PRE_TOKENIZERS.values()}
    assert set(ours) == set(found)
    compared_rows = {name for name, row in PRE_TOKENIZERS.items() if row.splits}
    assert {name: ours[name] for name in compared_rows} == {name: found[name] for name in compared_rows}
