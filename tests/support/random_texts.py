"""Texts on which tokenizers differ: spaces, lines, digits, accents, scripts, symbols, and special tokens as text."""

from __future__ import annotations

import random

_LINES = """the of merge model Hello World naïve déjà 你好 мир 😀 1234 12.5 x=a[0]+1; don't I'm we'll ... --
<tag> </s> <|im_start|> http://a.b/c?d=e café 한국어 日本語 العربية हिन्दी ไทย
A1b2C3 __init__ ~~~~ !!!!! 0000000 <0x0A> ▁ Ġ e\u0301"""
_WORDS = [*_LINES.split(), "\t", "\n\n", "\r\n", "\ufb01", ""]
_RANGES = ((32, 127), (160, 0x250), (0x370, 0x500), (0x4E00, 0x4F00), (0x1F600, 0x1F640))
_CHARACTERS = [chr(code) for start, end in _RANGES for code in range(start, end)]


def random_texts(count: int = 1000, seed: int = 0) -> list[str]:
    """Two thirds words, one third characters of several scripts."""
    chance = random.Random(seed)
    spaces = ("", " ", "  ", "\n")
    return [
        "".join(chance.choice(_CHARACTERS) for _ in range(chance.randint(1, 40)))
        if at % 3 == 0
        else "".join(chance.choice(_WORDS) + chance.choice(spaces) for _ in range(chance.randint(1, 30)))
        for at in range(count)
    ]
