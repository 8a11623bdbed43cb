"""Folders of tiny models with tokenizers of every kind; a test overrides what it needs to differ.

The weights are a single embedding: llama.cpp's converter accepts a model with fewer tensors than its config implies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_BYTE_LEVEL = {**BYTE_LEVEL, "use_regex": True}
TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 1234567890 o'clock, we'll see; they've gone!",
    "def main(args: list[str]) -> None:\n    for i in range(10):\n        print(f'{i:>3}\t{args[i]}')\n\n",
    "Größe, naïve café, Привет мир, 你好世界, こんにちは, 안녕하세요, مرحبا, हिन्दी, ไทย",
    "emoji 🚀🦙 👨‍👩‍👧 ✅  double  spaces   triple\n\n\n lines \r\n\t tabs",
    "3 33 333 3333 33333 3.14 1,000 x² ½ №5 $100 50% a_b-c/d\\e ~~~~ ------ =====",
    "CamelCaseWords SHOUTING'S I'M you'LL We'Ve 'tis",
]


def config(architecture: str, rows: int, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model."""
    sizes = {"vocab_size": rows, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "head_dim": 16}
    model_type = {
        "LlamaForCausalLM": "llama",
        "Qwen2ForCausalLM": "qwen2",
        "Gemma2ForCausalLM": "gemma2",
        "Gemma3ForCausalLM": "gemma3_text",
        "BertModel": "bert",
        "Phi3ForCausalLM": "phi3",
        "MistralForCausalLM": "mistral",
    }[architecture]
    return {"architectures": [architecture], "model_type": model_type, "rms_norm_eps": 1e-5, **sizes, **changes}


def write_model(folder: Path, settings: Mapping[str, Any], files: Mapping[str, Any]) -> Path:
    """Write a model's folder: config.json, an embedding, and the files (objects as JSON; bytes and text unchanged)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bert": "embeddings.word_embeddings.weight", "t5": "shared.weight"}
    name = names.get(settings["model_type"], "model.embed_tokens.weight")
    rows, columns = settings["vocab_size"], settings["hidden_size"]
    save_file({name: torch.zeros(rows, columns, dtype=torch.float16)}, folder / "model.safetensors", {"format": "pt"})
    for file, content in {"config.json": settings, **files}.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """All files in a folder except the weights, by name."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in paths.items() if not name.endswith(".safetensors")}


def added_token(token_id: int, text: str, *, special: bool = True, normalized: bool = False) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized, "special": special}
    return {"id": token_id, "content": text, **flags}


@lru_cache(maxsize=1)
def sentencepiece_model() -> bytes:
    """A tiny sentencepiece BPE model with byte fallback, like Llama 2's."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([line for text in TEXTS[:4] for line in text.splitlines() if line] * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


@lru_cache(maxsize=1)
def byte_level_model() -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of a byte-level BPE, trained on words as GPT-2 splits them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def byte_level_tokenizer(
    steps: Sequence[Mapping[str, Any]] = (GPT2_BYTE_LEVEL,),
    *,
    added: Sequence[Mapping[str, Any]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE that splits in these steps; <|endoftext|> is the default added token."""
    vocab, merges = byte_level_model()
    default_added = [added_token(len(vocab), "<|endoftext|>")]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(default_added if added is None else added),
        "normalizer": None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)},
        "post_processor": GPT2_BYTE_LEVEL,
        "decoder": GPT2_BYTE_LEVEL,
        "model": {**model, "vocab": vocab, "merges": merges, **changes.pop("model", {})},
        **changes,
    }


def split_step(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def template_processor(
    first: str | None, last: str | None = None, ids: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """A post-processor that puts tokens before and after a text."""
    texts = [token for token in (first, last) if token]
    entries = {token: {"id": token, "ids": [(ids or {}).get(token, 0)], "tokens": [token]} for token in texts}
    start = [{"SpecialToken": {"id": first, "type_id": 0}}] if first else []
    stop = [{"SpecialToken": {"id": last, "type_id": 0}}] if last else []
    text_a, text_b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [*start, text_a, *stop],
        "pair": [*start, text_a, *stop, *start, text_b, *stop],
        "special_tokens": entries,
    }


def sentencepiece_tokenizer(**changes: Any) -> dict[str, Any]:
    """tokenizer.json as transformers makes it from sentencepiece_model(): a merge for each way to compose a piece."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [processor.IdToPiece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (processor.GetScore(token_id), vocab[piece[:at]], vocab[piece[at:]], [piece[:at], piece[at:]])
        for piece, token_id in vocab.items()
        if not (processor.IsControl(token_id) or processor.IsByte(token_id) or processor.IsUnknown(token_id))
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(token_id, pieces[token_id]) for token_id in range(3)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaced]},
        "pre_tokenizer": None,
        "post_processor": template_processor("<s>", ids={"<s>": 1}),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**model, "ignore_merges": False, "vocab": vocab, "merges": [merge[3] for merge in merges]},
        **changes,
    }


def wordpiece_tokenizer() -> dict[str, Any]:
    """tokenizer.json of a tiny BERT (WordPiece)."""
    texts = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'"]
    texts += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"] + ["the", "quick", "##own", "over"]
    bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    ids = {text: i for i, text in enumerate(texts)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": ids}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, text) for i, text in enumerate(texts[:5])],
        "normalizer": {**bert, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template_processor("[CLS]", "[SEP]", ids),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {**model, "max_input_chars_per_word": 100},
    }
