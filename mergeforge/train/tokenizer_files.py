"""The tokenizer and chat template beside an adapter or a checkpoint, readable by transformers 4 and 5.

transformers 5 saves `tokenizer_class: TokenizersBackend`, which 4.5x, vLLM and llama.cpp's converter do not know. So
the base's own files are copied unchanged; only a tokenizer that got new tokens is saved again, under a class name
that all of them know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"  # beside a whole model only
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    TEMPLATE,
)
COMMON_CLASS = "PreTrainedTokenizerFast"
LOCAL_KEYS = ("is_local", "local_files_only")  # how it was loaded on this machine


def write_tokenizer_files(
    folder: Path,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    changed: bool,
    template: str | None,
    eos: str | None = None,
) -> None:
    """Write the tokenizer's files into `folder`.

    `changed`: the tokenizer has tokens that the base lacks. `template`: a chat template to use instead of the base's.
    `eos`: the token that ends its answers, if that is not the tokenizer's EOS.
    """
    if changed:
        tokenizer.save_pretrained(str(folder))
        _edit_json(folder / CONFIG, _use_common_class)
    else:
        for name in COPIED:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
    if template:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)
        _edit_json(folder / CONFIG, lambda config: config.pop("chat_template", None))
    if eos:
        for name in (CONFIG, "special_tokens_map.json"):
            _edit_json(folder / name, lambda config: config.update(eos_token=eos))
        number = tokenizer.get_vocab()[eos]
        _edit_json(folder / GENERATION, lambda config: _stop_at(config, number))


def _stop_at(generation: dict[str, Any], token: int) -> None:
    """Add a token to those that end a generation: transformers and vLLM do not stop at the tokenizer's EOS."""
    stops = generation.get("eos_token_id")
    stops = [token, *(stops if isinstance(stops, list) else [stops])]
    generation["eos_token_id"] = list(dict.fromkeys(stop for stop in stops if stop is not None))


def _use_common_class(config: dict[str, Any]) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = COMMON_CLASS
    for name in LOCAL_KEYS:
        config.pop(name, None)


def _edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        change(config)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
