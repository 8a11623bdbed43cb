"""Tiny Llamas, each with a byte-level BPE tokenizer of its own, and their embeddings as the merge would map them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.core.tensor_info import TensorInfo, blocks, split_into_tiles
from mergeforge.io.aux_files import AuxFiles
from mergeforge.operations.synthetic_models import ModelShape, write_model
from mergeforge.tensors.lazy import LazyTensor, Stats, StatsPass, collect_stats
from mergeforge.tensors.remapped_vocab import remap_vocab
from mergeforge.tensors.worker import Worker
from mergeforge.tokenizer import ModelTokenizer, TokenizerPlan, TokenizerSettings, plan_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = {
    "english": ["the quick brown fox jumps over the lazy dog and then the other dogs", "there is nothing here"] * 20,
    "code": ["def main(args): return [print(one) for one in range(10)]", "class Point: pass"] * 20,
    "german": ["der schnelle braune Fuchs springt über den faulen Hund und dann", "das ist nichts"] * 20,
}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@cache
def trained(language: str, size: int, kind: str) -> str:
    """tokenizer.json of a byte-level BPE (or another kind), trained on one language."""
    return _byte_level(language, size) if kind == "bpe" else _other(language, kind)


def _other(language: str, kind: str) -> str:
    """Pieces with a space before a text, as in T5 (unigram) and Llama 2 (its normalizer); or whole words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        trainer = trainers.UnigramTrainer(
            vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    tokenizer.train_from_iterator(TEXTS[language], trainer)
    value = json.loads(tokenizer.to_str())
    return json.dumps(value | {"added_tokens": []})


def _byte_level(language: str, size: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS[language], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return str(tokenizer.to_str())


def tokenizer_json(language: str, added: Sequence[str | Mapping[str, Any]], size: int, kind: str) -> dict[str, Any]:
    """A trained tokenizer with added tokens, special ones where only their text is given."""
    value: dict[str, Any] = json.loads(trained(language, size, kind))
    entries = [PLAIN | ({"content": token} if isinstance(token, str) else dict(token)) for token in added]
    value["added_tokens"] = [
        {"id": len(value["model"]["vocab"]) + index, **entry} for index, entry in enumerate(entries)
    ]
    return value


def write(
    folder: Path,
    language: str,
    added: Sequence[str | Mapping[str, Any]] = ("<s>", "</s>"),
    *,
    rows: int = 0,
    seed: int = 0,
    size: int = 290,
    kind: str = "bpe",
    config: Mapping[str, Any] | None = None,
    **names: Any,
) -> Path:
    """A model whose embedding has a row for each token, or `rows`; `names` go into tokenizer_config.json."""
    tokenizer = tokenizer_json(language, added, size, kind)
    count = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    write_model(folder, ModelShape(16, 32, 1, 2, 2, rows or count), seed=seed, dtype="F32")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    settings = json.loads((folder / "config.json").read_text()) | dict(config or {})
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD):
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_three(root: Path) -> list[Path]:
    """Three models whose tokens partly overlap; b and c add tokens that a lacks."""
    chat = [{"content": "<|im_end|>", "normalized": False}, {"content": "<think>", "special": False, "lstrip": True}]
    return [
        write(root / "a", "english", seed=1),
        write(root / "b", "code", ["</s>", "<s>", *chat], seed=2, size=300),
        write(root / "c", "german", ["<s>", "</s>", "<tool>", *chat[:1]], seed=3, size=280),
    ]


def write_all(root: Path) -> None:
    """And tokens without rows (d, e), other kinds (f unigram, g words), classes that rebuild themselves (h, i)."""
    write_three(root)
    write(root / "d", "german", ["<s>", "</s>", "<lost>", "<lost too>"], rows=292, seed=4)
    write(root / "e", "english", ["<s>", "</s>", "<lost>", "<pad>"], rows=292, seed=5, pad_token="<pad>")
    write(root / "f", "german", ["<s>", "</s>"], seed=6, kind="unigram")
    write(root / "g", "english", ["<s>", "</s>"], seed=7, kind="words")
    _write_family(root / "h", "code", "Qwen2", ["<|endoftext|>", "<|im_end|>", {"content": "<tool>", "special": False}])
    _write_family(root / "i", "german", "Llama", ["<unk>", "<s>", "</s>"])


def _write_family(folder: Path, language: str, kind: str, added: Sequence[str | Mapping[str, Any]]) -> None:
    """A tokenizer of a class that lists its added tokens in tokenizer_config.json."""
    entries = tokenizer_json(language, added, 290, "bpe")["added_tokens"]
    decoder = {str(entry.pop("id")): entry for entry in entries}
    names = {"tokenizer_class": f"{kind}Tokenizer", "eos_token": added[1], "bos_token": None}
    write(folder, language, added, seed=8, added_tokens_decoder=decoder, **names)


def projected(rows: torch.Tensor, vocabulary: Mapping[str, int]) -> list[float]:
    """An embedding in few numbers that no two rows can change places in: a sum with a weight for each token's text.

    Rows behind the tokens count with 1.
    """
    total = rows[len(vocabulary) :].double().sum(0)
    for token, number in vocabulary.items():
        weight = int.from_bytes(hashlib.sha256(token.encode()).digest()[:4]) / 2**31 - 1
        total += rows[number].double() * weight
    return [round(value, 6) for value in total.tolist()]


def files_of(folder: Path) -> AuxFiles:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def model(folder: Path, rows: int | None = None) -> ModelTokenizer:
    """A written model; its label is its folder's name."""
    if rows is None:
        rows = open_checkpoint(folder, folder.name).tensors[EMBEDDING].info.rows
    return ModelTokenizer(folder.name, files_of(folder), rows)


def planned(folders: Sequence[Path], base: str | None = None, **settings: Any) -> TokenizerPlan:
    return plan_tokenizer(TokenizerSettings(**settings), [model(folder) for folder in folders], base)


def written(plan: TokenizerPlan, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in plan.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file.read_bytes())
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ways(folders: Sequence[Path], name: str) -> dict[str, LazyTensor]:
    return {folder.name: open_checkpoint(folder, folder.name).tensors[name] for folder in folders}


def computed(way: LazyTensor, rows: int = 1 << 20, staging: int = 0) -> torch.Tensor:
    """All of a way, in tiles of about `rows` rows, in the memory that it says it needs."""
    need = way.memory_cost
    tiles = split_into_tiles(way.info, rows)
    highest = max(tile.rows for tile in tiles)
    worker = Worker("cpu", staging or need.row_nbytes * highest + need.fixed_nbytes + 64 * 64)
    facts: Stats = {}
    collect_stats(
        way, StatsPass(way.info, [range(tile.start, tile.stop) for tile in tiles], worker, facts, torch.float32)
    )
    out = torch.empty(way.info.rows, way.info.columns)
    for tile in tiles:
        if len(tiles) > 1:
            worker.clear()
        else:
            worker.reset_scratch()
        block = way.load(range(tile.start, tile.stop), worker, facts, torch.float32)
        for start, stop in blocks(tile, way.info):
            out[start:stop] = block(start, stop)
    return out


def maps(folders: Sequence[Path], plan: TokenizerPlan, name: str = EMBEDDING) -> dict[str, torch.Tensor]:
    """Every model's embedding, with the rows of the output's tokenizer."""
    every = ways(folders, name)
    return {label: computed(remap_vocab(name, picks, every)) for label, picks in plan.row_sources.items()}


def info(rows: int, columns: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(EMBEDDING, dtype, (rows, columns))
