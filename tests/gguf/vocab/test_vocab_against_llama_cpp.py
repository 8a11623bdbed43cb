"""llama.cpp tokenizes with our keys to the same ids as sentencepiece and the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.llama_engine import tokenize, write_vocabulary
from support.pre_tokenizer_splits import IGNORES_MERGES, STEPS, WITH_BOS, pre_tokenizer_steps
from support.tokenizer_folders import (
    TEXTS,
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

pytest.importorskip("xllamacpp")
BOS = len(byte_level_model()[0])
FAMILY = {**WITH_BOS, "olmo": "olmo", "dbrx": "phi3", "qwen2": "qwen2", "gpt-4o": "gpt_oss"}
# The texts that llama.cpp splits differently from the original tokenizer. In the first three, marks of Indic scripts do
# not count as letters; in the next, digits are not split one by one; in the last, spaces stay with digits.
DIFFERING_TEXTS = {"tekken": (2,), "gpt-4o": (2,), "llama4": (2,), "deepseek-llm": (0, 1, 4), "falcon": (2, 4)}


def engine_ids(folder: Path, settings: dict[str, Any], kind: str, rows: int) -> list[list[int]]:
    vocab = vocabulary(tokenizer_files(folder), settings, kind, rows=rows)
    write_vocabulary(folder / "vocabulary.gguf", vocab.keys)
    return tokenize(folder / "vocabulary.gguf", TEXTS)


def library_ids(tokenizer: dict[str, Any]) -> list[list[int]]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(json.dumps(tokenizer))
    return [list(library.encode(text).ids) for text in TEXTS]


@pytest.mark.parametrize("name", STEPS)
def test_byte_level(name: str, tmp_path: Path) -> None:
    """Every pre-tokenizer: the name is found, and the engine's ids on code, numbers, scripts and emoji are equal."""
    post_processor = {"post_processor": template_processor("<s>", ids={"<s>": BOS})} if name in WITH_BOS else {}
    model = {"ignore_merges": name in IGNORES_MERGES}
    tokenizer = byte_level_tokenizer(
        pre_tokenizer_steps(name), added=[added_token(BOS, "<s>")], model=model, **post_processor
    )
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "<s>"}}
    folder = write_model(tmp_path, config("LlamaForCausalLM", BOS + 1), files)
    settings = {"model_type": FAMILY.get(name, "")}
    assert vocabulary(tokenizer_files(folder), settings, "gpt2", rows=BOS + 1).keys["tokenizer.ggml.pre"].value == name
    pairs = zip(engine_ids(folder, settings, "gpt2", BOS + 1), library_ids(tokenizer), strict=True)
    assert [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs] == list(DIFFERING_TEXTS.get(name, ()))


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_sentencepiece(file: str, tmp_path: Path) -> None:
    """With tokenizer.model, and with only the tokenizer.json made from it."""
    import sentencepiece

    content = sentencepiece_model() if file == "tokenizer.model" else sentencepiece_tokenizer()
    settings = config("LlamaForCausalLM", 420, bos_token_id=1, eos_token_id=2)
    folder = write_model(tmp_path, settings, {file: content})
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    theirs = [[1, *processor.EncodeAsIds(text)] for text in TEXTS]
    assert engine_ids(folder, settings, "llama", 420) == theirs


def test_added_tokens(tmp_path: Path) -> None:
    """Added tokens inside a text, special ones and others, and one of spaces only."""
    from tokenizers import Tokenizer

    added = [
        added_token(BOS, "<|im_start|>"),
        added_token(BOS + 1, "    ", special=False),
        added_token(BOS + 2, "<fim>", special=False),
    ]
    tokenizer = byte_level_tokenizer(added=added)
    folder = write_model(tmp_path, config("LlamaForCausalLM", BOS + 3), {"tokenizer.json": tokenizer})
    vocab = vocabulary(tokenizer_files(folder), {}, "gpt2", rows=BOS + 3)
    write_vocabulary(folder / "vocabulary.gguf", vocab.keys)
    texts = ["<|im_start|>user<fim>x", "a    b        c", "no added token"]
    library = Tokenizer.from_str(json.dumps(tokenizer))
    assert tokenize(folder / "vocabulary.gguf", texts) == [library.encode(text).ids for text in texts]


def test_wordpiece(tmp_path: Path) -> None:
    """BERT, with [CLS] before and [SEP] after the text."""
    from tokenizers import Tokenizer

    tokenizer = wordpiece_tokenizer()
    rows = len(tokenizer["model"]["vocab"])
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": names}
    folder = write_model(tmp_path, config("BertModel", rows), files)
    vocab = vocabulary(tokenizer_files(folder), {}, "bert", rows=rows)
    write_vocabulary(folder / "vocabulary.gguf", vocab.keys)
    texts = ["The quick brown fox", "over 12, the Fox's!", "unknown € sign"]
    library = Tokenizer.from_str(json.dumps(tokenizer))
    assert tokenize(folder / "vocabulary.gguf", texts) == [library.encode(text).ids for text in texts]
