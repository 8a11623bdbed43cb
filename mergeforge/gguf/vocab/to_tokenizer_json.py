"""tokenizer.json and tokenizer_config.json from the keys of a GGUF file with a byte-level BPE vocabulary.

The reverse of bpe.py: tokens, merges and special tokens are stored as they are, and `tokenizer.ggml.pre` names the
regexes that cut a text (pre_tokenizer_table.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.gguf.reader import GGUFHeader
from mergeforge.gguf.vocab.pre_tokenizer_table import DIGIT, GPT2, PRE_TOKENIZERS, PreTokenizer

CONTROL, USER_DEFINED = 3, 4  # types of tokens that are cut out of a text before it is split
UNUSED = 5  # type of rows of the embedding that no token has
ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def write_tokenizer_files(header: GGUFHeader, folder: Path) -> None:
    """Write both files into the folder. Raises SourceError for another kind of vocabulary."""
    kind, name = header.get("tokenizer.ggml.model"), str(header.get("tokenizer.ggml.pre") or "default")
    pre_tokenizer = PRE_TOKENIZERS.get(name)
    if kind != "gpt2" or pre_tokenizer is None or not pre_tokenizer.splits:
        text = f"no tokenizer.json can be made from a vocabulary of the kind {kind} with the pre-tokenizer {name}"
        raise SourceError(text, hint="use the folder of the model that the file was made from")
    files = {"tokenizer.json": _tokenizer(header, pre_tokenizer), "tokenizer_config.json": _config(header)}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def special_token_ids(header: GGUFHeader) -> dict[str, int]:
    """The ids of BOS, EOS, the unknown and the padding token, by their names in config.json."""
    ids = {role: header.get(f"tokenizer.ggml.{role}_token_id") for role in ROLES}
    return {f"{ROLES[role]}_id": token for role, token in ids.items() if token is not None}


def _tokenizer(header: GGUFHeader, pre_tokenizer: PreTokenizer) -> dict[str, Any]:
    tokens = header.get("tokenizer.ggml.tokens")
    types = header.get("tokenizer.ggml.token_type") or ()
    added = [index for index, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, tokens[index], special=types[index] == CONTROL) for index in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _splits(pre_tokenizer)},
        "post_processor": _post_processor(header, tokens, pre_tokenizer),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens) if types[index : index + 1] != (UNUSED,)},
            "merges": [merge.split(" ", 1) for merge in header.get("tokenizer.ggml.merges")],
        },
    }


def _added_token(index: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def _splits(pre_tokenizer: PreTokenizer) -> list[dict[str, Any]]:
    steps = [_split(regex) for regex in pre_tokenizer.splits if regex != GPT2]
    with_regex = GPT2 in pre_tokenizer.splits
    return [*steps, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": with_regex}]


def _split(regex: str) -> dict[str, Any]:
    if regex == DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _post_processor(header: GGUFHeader, tokens: Any, pre_tokenizer: PreTokenizer) -> dict[str, Any]:
    """BOS before a text, if the file or its pre-tokenizer says so."""
    stored, bos = header.get("tokenizer.ggml.add_bos_token"), header.get("tokenizer.ggml.bos_token_id")
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    if bos is None or not (pre_tokenizer.bos if stored is None else stored):
        return byte_level
    start = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
    }


def _config(header: GGUFHeader) -> dict[str, Any]:
    tokens, arch = header.get("tokenizer.ggml.tokens"), header.get("general.architecture")
    names = {role.removesuffix("_id"): tokens[token] for role, token in special_token_ids(header).items()}
    template = header.get("tokenizer.chat_template")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": header.get(f"{arch}.context_length")}
    return config | ({"chat_template": template} if template else {})
