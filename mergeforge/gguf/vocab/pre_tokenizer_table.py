r"""How llama.cpp splits text for every `tokenizer.ggml.pre` (src/llama-vocab.cpp, b11549).

One row per name. `splits`: the regexes that cut a text one after another, in the canonical form of pre_tokenizer.py; ()
if llama.cpp has custom code for the name, which no tokenizer.json can be compared with, so only the user can choose it.
Names with equal rows are the same to the engine. `families`: the model types whose files get that name from llama.cpp's
converter, which decides between equal rows.
"""

# ruff: noqa: RUF001  (these regexes need the look-alike letters)
from __future__ import annotations

from dataclasses import dataclass

CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
    rf"\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
_ASCII_MARK = "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"  # the tokenizers library's Punctuation, runs kept together
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
LLAMA3 = f"{CONTRACTION}|{_WORDS}|{THREE_DIGITS}|{_MARKS}|{_LINES}"
QWEN2 = f"{CONTRACTION}|{_WORDS}|{DIGIT}|{_MARKS}|{_LINES}"
QWEN35 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}"
CHINESE = "[一-龥ࠀ-一가-퟿]+"
JAPANESE = "[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK3 = rf"{_ASCII_MARK}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
SPARK = rf"{_ASCII_MARK}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
DEEPSEEK_LETTERS = rf"\s?[{_LETTERS}]+"
DEEPSEEK_MARKS = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
GPT4O = _CASED % (f"{CONTRACTION}?", f"{CONTRACTION}?", "{1,3}")
TEKKEN = _CASED % ("", "", "")
YOUTU = _CASED % (f"{CONTRACTION}?", f"{CONTRACTION}?", "")
YOUTU_ASIAN = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
SEED_CODER = rf"{CONTRACTION}|{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}"
BAILING = rf"{CONTRACTION}|{_WORDS}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"
UFAKZEKA = f"{_WORDS}|{DIGIT}|{_MARKS}|{_LINES}"
JAIS2 = rf"{CONTRACTION}|{_WORDS}|{THREE_DIGITS}|{_MARKS}|\s*[\r\n]+|{_SPACES}"
EXAONE_MOE = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
MINICPM5 = f"{CONTRACTION}|{_WORDS}|{DIGITS}|{_MARKS}|{_LINES}"
K2_HORIZON = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}|\p{{M}}|\u200C|\u200D)+|{THREE_DIGITS}|{_MARKS}|{_LINES}"
LOOK_AHEAD_THREES = r"\d{1,3}(?=(?:\d{3})*\b)"


@dataclass(frozen=True)
class PreTokenizer:
    """A name that the engine knows, and what the engine does under it.

    `ignore_merges`: a word that is a token becomes that token, whatever the merges say. `bos`: BOS is added unless the
    file says otherwise. `clean_spaces`: spaces before punctuation are removed when tokens become text.
    """

    name: str
    splits: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    ignore_merges: bool = False
    bos: bool = False
    clean_spaces: bool = False
    only_families: bool = False  # never matched for other families: the name implies more than the splits


def _row(name: str, *splits: str, families: str = "", flags: str = "") -> PreTokenizer:
    """`flags`: i = ignore_merges, b = bos, c = clean_spaces, o = only_families."""
    options = {
        "ignore_merges": "i" in flags,
        "bos": "b" in flags,
        "clean_spaces": "c" in flags,
        "only_families": "o" in flags,
    }
    return PreTokenizer(name, splits, tuple(families.split()), **options)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    row.name: row
    for row in (
        _row("llama-bpe", LLAMA3, families="llama", flags="ibc"),
        _row("llama3", LLAMA3, flags="ibco"),
        _row("llama-v3", LLAMA3, flags="ibco"),
        _row("falcon3", LLAMA3, flags="ibco"),
        _row("falcon-h1", LLAMA3, families="falcon_h1", flags="ibco"),
        _row("pixtral", LLAMA3, flags="ibco"),
        _row("midm-2.0", LLAMA3, flags="ibco"),
        _row("lfm2", LLAMA3, families="lfm2 lfm2_moe lfm2_vl", flags="ibco"),
        _row("jina-v5-nano", LLAMA3, flags="ibco"),
        _row("dbrx", LLAMA3, flags="c"),
        _row("smaug-bpe", LLAMA3, families="llama", flags="c"),
        _row("glm4", LLAMA3, families="glm glm4 glm4_moe glm4_moe_lite glm4v glm_moe_dsa", flags="ico"),
        _row("glm5", LLAMA3, flags="ico"),
        _row("chatglm-bpe", LLAMA3, families="chatglm", flags="co"),
        _row("qwen2", QWEN2, families="qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next"),
        _row("deepseek-r1-qwen", QWEN2),
        _row("kormo", QWEN2, families="kormo"),
        _row("f2llmv2", QWEN2),
        _row("hunyuan", QWEN2, families="hunyuan_v1_moe hunyuan"),
        _row("solar-open", QWEN2, families="solar_open"),
        _row("grok-2", QWEN2, families="grok"),
        _row("megrez", QWEN2, flags="c"),
        _row("stablelm2", QWEN2, families="stablelm", flags="c"),
        _row("qwen35", QWEN35),
        _row("gpt-2", GPT2, families="gpt2", flags="c"),
        _row("olmo", GPT2, families="olmo gpt_neox mpt", flags="c"),
        _row("mpt", GPT2, flags="c"),
        _row("phi-2", GPT2, families="phi", flags="c"),
        _row("jais", GPT2, families="jais", flags="c"),
        _row("gigachat", GPT2, flags="c"),
        _row("a.x-4.0", GPT2, flags="c"),
        _row("mellum", GPT2, flags="c"),
        _row("modern-bert", GPT2, families="modernbert", flags="c"),
        _row("exaone4", GPT2, families="exaone4", flags="c"),
        _row("jina-es", GPT2, flags="c"),
        _row("jina-de", GPT2, flags="c"),
        _row("jina-v2-es", GPT2, flags="c"),
        _row("jina-v2-de", GPT2, flags="c"),
        _row("trillion", GPT2),
        _row("granite-docling", GPT2, families="idefics3"),
        _row("roberta-bpe", GPT2, families="roberta", flags="co"),
        _row("jina-v1-en", GPT2, flags="co"),
        _row("jina-v2-code", GPT2, flags="co"),
        _row("starcoder", DIGIT, GPT2, families="starcoder2 gpt_bigcode", flags="c"),
        _row("refact", DIGIT, GPT2, families="gpt_refact", flags="c"),
        _row("codeshell", DIGIT, GPT2, families="codeshell", flags="c"),
        _row("exaone", DIGIT, GPT2, families="exaone", flags="c"),
        _row("minerva-7b", DIGIT, GPT2, flags="c"),
        _row("mellum2", DIGIT, GPT2, families="mellum", flags="c"),
        _row("smollm", DIGIT, GPT2, families="llama smollm3"),
        _row("command-r", DIGIT, GPT2, families="cohere cohere2"),
        _row(
            "falcon",
            PUNCTUATION,
            GPT2,
            DIGITS,
            "[0-9][0-9][0-9]",
            families="falcon RefinedWeb RefinedWebModel",
            flags="c",
        ),
        _row("deepseek-llm", r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_MARKS, r"\s+$", CHINESE, DIGIT),
        _row("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, DIGIT),
        _row("deepseek-v3", THREE_DIGITS, JAPANESE, DEEPSEEK3),
        _row("hunyuan-dense", THREE_DIGITS, JAPANESE, DEEPSEEK3, families="hunyuan_v1_dense"),
        _row("hy_v4", THREE_DIGITS, JAPANESE, DEEPSEEK3, families="hy_v4"),
        _row("joyai-llm", THREE_DIGITS, JAPANESE, DEEPSEEK3, families="joyai_llm"),
        _row("spark2_5", THREE_DIGITS, JAPANESE, SPARK, DIGIT),
        _row("gpt-4o", GPT4O, families="gpt_oss"),
        _row("llama4", GPT4O, families="llama4 llama4_text"),
        _row("kanana2", GPT4O),
        _row("talkie", GPT4O, families="talkie"),
        _row("minimax-m2", GPT4O, families="minimax_m2"),
        _row("tekken", TEKKEN, flags="ib"),
        _row("youtu", YOUTU_ASIAN, YOUTU, flags="i"),
        _row("tiny_aya", LOOK_AHEAD_THREES, GPT4O),
        _row("cohere2moe", LOOK_AHEAD_THREES, GPT4O, families="cohere2_moe"),
        _row("bloom", BLOOM, flags="c"),
        _row("gpt3-finnish", BLOOM, flags="co"),
        _row("poro-chat", BLOOM),
        _row("viking", BLOOM, DIGIT),
        _row("seed-coder", SEED_CODER),
        _row("bailingmoe", BAILING, families="bailing_moe"),
        _row("bailingmoe2", BAILING, families="bailing_moe_v2"),
        _row("llada-moe", BAILING, families="llada_moe"),
        _row("ufakzeka", UFAKZEKA),
        _row("jais-2", JAIS2, flags="c"),
        _row("superbpe", DIGITS, r"(?=(\d{3})+(?!\d))"),
        _row("exaone-moe", EXAONE_MOE, flags="c"),
        _row("minicpm5", THREE_DIGITS, MINICPM5, flags="ic"),
        _row("k2-horizon", K2_HORIZON),
        *map(_row, ("afmoe", "chameleon", "granite-embed-multi-97m", "granite-embed-multi-311m", "gemma4")),
        *map(_row, ("kimi-k2", "laguna", "mmbert", "sarvam-moe", "whitespace", "default")),
    )
}
