"""Do two tokenizers read the same text alike? transformers may not load what tokenizer.json says: for some model types
(qwen2) it takes the rules for splitting text from its own class, whatever the file's are.

Tokens, not rules, are compared: rules that are written differently but give equal tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.messages import WarningText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[str], list[int]]  # text -> tokens, without special ones

# What tokenizers differ on: spaces and lines, digits, contractions, capitals, accents in two forms, scripts, code.
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 1234567890 o'clock; WE'LL see, they've paid 1,000.50 in 2024.",
    "  two  spaces,\ttabs\t\tand\n\n\nlines \r\n  end ",
    "def main(args: list[str]) -> None:\n    for i in range(10):\n        print(f'{i:>3}', args[i])\n",
    "Größe, naïve café, cafe\u0301, Привет мир, 你好世界, こんにちは, 안녕하세요, مرحبا, हिन्दी, ไทย",
    "emoji 🚀🦙 👨‍👩‍👧 x² ½ №5 ﬁn a_b-c/d\\e <tag> ~~~~ ====",
    "CamelCaseWords anti-dis-establishment http://example.org/a?b=c&d=%20 user@example.org",
)


@dataclass(frozen=True)
class Difference:
    """A text that two tokenizers read differently: the tokens of each, from the first different one on."""

    text: str
    first: tuple[int, ...]
    second: tuple[int, ...]


def find_difference(first: Encode, second: Encode) -> Difference | None:
    """The first word (or else the first text) of the samples that the tokenizers read differently."""
    for text in SAMPLE_TEXTS:
        if first(text) == second(text):
            continue
        for part in (*text.split(), text):
            tokens, others = first(part), second(part)
            if tokens != others:
                return Difference(part, tuple(tokens), tuple(others))
    return None


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """The tokens that a tokenizer of transformers makes of a text."""
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def tokenizer_of_file(
    tokenizer: PreTrainedTokenizerBase, folder: Path
) -> tuple[PreTrainedTokenizerBase, WarningText | None]:
    """The tokenizer to use for a folder of which transformers loaded `tokenizer`, and a warning where they differ.

    It is one that reads as tokenizer.json says, or the loaded one where tokenizer_config.json overrules the file
    (fix_mistral_regex).
    """
    path = folder / "tokenizer.json"
    if not path.is_file() or (difference := _difference_from_file(tokenizer, path)) is None:
        return tokenizer, None
    from transformers import PreTrainedTokenizerFast

    faithful: Any = PreTrainedTokenizerFast.from_pretrained(str(folder))
    text = f"transformers' {type(tokenizer).__name__} reads {difference.text!r} as {list(difference.first)}"
    text += f", but {path} says {list(difference.second)}: "
    if _difference_from_file(faithful, path) is not None:
        return tokenizer, WarningText(f"{text}programs that read the file, such as llama.cpp, get other tokens")
    faithful.chat_template = tokenizer.chat_template
    return faithful, WarningText(f"{text}the file is used here, but AutoTokenizer gives programs other tokens")


def _difference_from_file(tokenizer: PreTrainedTokenizerBase, path: Path) -> Difference | None:
    from tokenizers import Tokenizer

    stored = Tokenizer.from_file(str(path))
    stored.no_padding()
    stored.no_truncation()
    return find_difference(encoder(tokenizer), lambda text: list(stored.encode(text, add_special_tokens=False).ids))
