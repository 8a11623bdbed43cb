"""BERT, RoBERTa and XLM-RoBERTa: encoders that embed or rank.

The pooling type comes from a sentence-transformers folder (modules.json); for others a note says how to set it when the
model is run.
"""

from __future__ import annotations

from dataclasses import replace

from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import hparams
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys, pooling_notes
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, RuleResult, make_spec
from mergeforge.gguf.key_values import array, boolean

_NEEDS = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm")
_ONCE = ("token_embd", "token_embd_norm", "position_embd")
_HEADS = ("cls.predictions", "cls.seq_relationship", "lm_head.", "pooler.dense")


@architecture("BertModel", "BertForMaskedLM", "BertForSequenceClassification")
def bert(model: HFModel) -> GGUFModelSpec:
    return _encoder(model, "bert", 0)


@architecture("RobertaModel", "RobertaForSequenceClassification")
def roberta(model: HFModel) -> GGUFModelSpec:
    return _encoder(model, "roberta", 1 + int(model.require("pad_token_id")))


@architecture("XLMRobertaModel", "XLMRobertaForSequenceClassification")
def xlm_roberta(model: HFModel) -> GGUFModelSpec:
    return _encoder(model, "unigram", 1 + int(model.require("pad_token_id")))


def _encoder(model: HFModel, vocab: str, unused: int) -> GGUFModelSpec:
    """`unused`: leading rows of a RoBERTa's position table, which are dropped."""
    context = int(model.require("max_position_embeddings")) - unused
    labels = _labels(model)
    keys = hparams(replace(model, config={**model.config, "max_position_embeddings": context}))
    keys |= {"attention.causal": boolean(False)} | pooling_keys(model)
    keys |= {"classifier.output_labels": array("string", labels)} if labels else {}

    def target(stored: HFTensor) -> RuleResult:
        plain = replace(stored, name=_plain(stored.name, bool(labels)))
        if plain.name.startswith(_HEADS):
            return "a head that llama.cpp's encoders do not use"
        if unused and plain.name == "embeddings.position_embeddings.weight":
            return _positions(plain, unused)
        return (plain.tensor(),)

    notes = pooling_notes(model, embeds=not labels)
    return make_spec(model, "bert", keys, target, vocab=vocab, required_per_block=_NEEDS, required=_ONCE, notes=notes)


def _labels(model: HFModel) -> list[str]:
    """Labels of a classifier; two labels that are only numbered are transformers' default."""
    named = {int(number): str(label) for number, label in (model.find("id2label") or {}).items()}
    if len(named) == 2 and named.get(0) == "LABEL_0":
        return []
    return [named[number] for number in sorted(named)]


def _plain(name: str, classifies: bool) -> str:
    for prefix in ("bert.", "roberta."):
        name = name.removeprefix(prefix)
    if name.endswith(".gamma"):
        name = name.removesuffix(".gamma") + ".weight"
    if name.endswith(".beta"):
        name = name.removesuffix(".beta") + ".bias"
    if classifies and name in ("classifier.weight", "classifier.bias"):
        name = name.replace("classifier.", "classifier.out_proj.")
    return name


def _positions(stored: HFTensor, unused: int) -> RuleResult:
    import numpy as np

    rows, columns = stored.info.shape
    return (stored.tensor(shape=(rows - unused, columns), rows=np.arange(unused, rows, dtype=np.int64)),)
