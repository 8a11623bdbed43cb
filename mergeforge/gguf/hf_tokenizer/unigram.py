"""tokenizer.json of unigram vocabularies (T5, XLM-RoBERTa)."""

from __future__ import annotations

import base64
from typing import Any

from mergeforge.gguf.hf_tokenizer.settings import surrounding_tokens, template_processing, tokenizer_json
from mergeforge.gguf.hf_tokenizer.vocabulary import StoredVocabulary
from mergeforge.gguf.vocab.tokens import SPACE, UNKNOWN


def unigram_tokenizer(vocabulary: StoredVocabulary) -> tuple[dict[str, Any], list[str]]:
    """tokenizer.json; a text ends with EOS unless the file says otherwise."""
    before, after = surrounding_tokens(vocabulary, False, True)
    unknown = next(
        (index for index, kind in enumerate(vocabulary.types) if kind == UNKNOWN), vocabulary.roles.get("unk")
    )
    scheme = "never" if vocabulary.get("add_space_prefix") is False else "always"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    # XLM-RoBERTa always does; the converter writes remove_extra_whitespaces from another setting
    removes = vocabulary.get("remove_extra_whitespaces") or vocabulary.header.get("general.architecture") == "bert"
    cut = [{"type": "WhitespaceSplit"}] if removes else []
    scores = zip(vocabulary.tokens, vocabulary.scores, strict=True)
    tokenizer = tokenizer_json(
        vocabulary,
        normalizer=_normalizer(vocabulary),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*cut, metaspace]},
        post_processor=template_processing(vocabulary, before, after) if before or after else None,
        decoder=metaspace,
        model={
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[token, score] for token, score in scores],
            "byte_fallback": False,
        },
    )
    return tokenizer, []


def _normalizer(vocabulary: StoredVocabulary) -> dict[str, Any] | None:
    charsmap = vocabulary.get("precompiled_charsmap")
    if not charsmap:
        return None
    return {
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(bytes(byte & 255 for byte in charsmap)).decode(),
    }
