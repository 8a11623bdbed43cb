"""What lies beside an adapter or a checkpoint: tokenizer and chat template, readable by transformers 4 and 5.

transformers 5 saves `tokenizer_class: TokenizersBackend`, which 4.5x, vLLM and llama.cpp's converter do not know. So
the base's own files are copied as they are; only a tokenizer that got tokens is written anew, under a class name
that all know.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
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
KNOWN_BY_ALL = "PreTrainedTokenizerFast"
LEAKED = ("is_local", "local_files_only")  # how it was loaded: nobody else's business


def write_tokenizer_files(
    folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, *, changed: bool, template: str | None
) -> None:
    """The tokenizer's files into `folder`.

    `changed`: it has tokens that the base lacks. `template`: in place of the base's own.
    """
    if changed:
        tokenizer.save_pretrained(str(folder))
        _edit(folder / CONFIG, _for_all)
    else:
        for name in COPIED:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
    if template:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)
        _edit(folder / CONFIG, lambda config: config.pop("chat_template", None))


def _for_all(config: dict[str, Any]) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = KNOWN_BY_ALL
    for name in LEAKED:
        config.pop(name, None)


def _edit(path: Path, change: Any) -> None:
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        change(config)
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
