"""BERT, DistilBERT, RoBERTa, XLM-RoBERTa, Jina v2, NeoBERT, ModernBERT, EuroBERT, Nomic: encoders that embed or rank.

The pooling type comes from a sentence-transformers folder (modules.json); for others a note says how to set it when the
model is run.
"""

from __future__ import annotations

from dataclasses import replace

from mergeforge.errors import SourceError
from mergeforge.gguf.architectures import GGUFModelSpec, architecture
from mergeforge.gguf.architectures.hparams import NO_SCALING, hparams, optional
from mergeforge.gguf.architectures.model import HFModel
from mergeforge.gguf.architectures.pooling import pooling_keys, pooling_notes
from mergeforge.gguf.architectures.tensor_mapping import HFTensor, Rule, RuleResult, make_spec
from mergeforge.gguf.key_values import Value, array, boolean, f32, string, u32
from mergeforge.gguf.pooling import POOLING_TYPES

_NOMIC_POSITIONS = {(8192, 2048): 2048, (2048, 2048): 512}
_CLS = 2  # llama.cpp's number of pooling by the first token
_NEEDS = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm")
_ONCE = ("token_embd", "token_embd_norm", "position_embd")
_HEADS = ("cls.predictions", "cls.seq_relationship", "lm_head.", "pooler.dense")


@architecture("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "CamembertModel")
def bert(model: HFModel) -> GGUFModelSpec:
    return _encoder(model, "bert", 0)


@architecture("DistilBertModel", "DistilBertForMaskedLM", "DistilBertForSequenceClassification")
def distilbert(model: HFModel) -> GGUFModelSpec:
    keys = {"attention.layer_norm_epsilon": f32(1e-12)} | _encoder_keys(model)
    rule = _targets(model, "bert", drops=("vocab_", "pre_classifier"))
    return make_spec(
        model, "bert", keys, rule, vocab="bert", required_per_block=_NEEDS, required=_ONCE, notes=pooling_notes(model)
    )


@architecture("JinaBertModel", "JinaBertForMaskedLM")
def jina_bert_v2(model: HFModel) -> GGUFModelSpec:
    needs = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_output_norm", "ffn_down", "layer_output_norm")
    return make_spec(
        model,
        "jina-bert-v2",
        _encoder_keys(model),
        _targets(model, "bert"),
        vocab="jina_bert",
        required_per_block=needs,
        required=("token_embd", "token_embd_norm"),
        notes=pooling_notes(model),
    )


@architecture("NeoBERT", "NeoBERTLMHead", "NeoBERTForSequenceClassification")
def neo_bert(model: HFModel) -> GGUFModelSpec:
    keys = _encoder_keys(model) | {
        "feed_forward_length": u32(int(2 * int(model.require("intermediate_size")) / 3)),
        "rope.freq_base": f32(10000.0),
        **NO_SCALING,
        "attention.layer_norm_rms_epsilon": f32(model.find("norm_eps") or 1e-6),
        "pooling_type": u32(_CLS),
    }
    needs = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    return make_spec(
        model,
        "neo-bert",
        keys,
        _targets(model, "neo", drops=("decoder.",)),
        vocab="bert",
        required_per_block=needs,
        required=("token_embd",),
    )


@architecture("ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification")
def modern_bert(model: HFModel) -> GGUFModelSpec:
    keys = _encoder_keys(model) | {"attention.sliding_window": u32(model.require("local_attention"))}
    keys |= optional(u32, attention__sliding_window_pattern=model.find("global_attn_every_n_layers"))
    keys |= {**NO_SCALING, "vocab_size": u32(model.require("vocab_size"))}
    keys |= optional(string, hidden_activation=model.find("hidden_activation") or None)
    needs = ("attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    return make_spec(
        model,
        "modern-bert",
        keys,
        _targets(model, "modern"),
        vocab="modern_bert",
        required_per_block=needs,
        required=("token_embd", "token_embd_norm", "output_norm"),
        notes=pooling_notes(model),
    )


@architecture("EuroBertModel", "JinaEmbeddingsV5Model")
def eurobert(model: HFModel) -> GGUFModelSpec:
    keys = hparams(model) | {"attention.causal": boolean(False), **NO_SCALING}
    keys |= pooling_keys(model) | _classifier_keys(model)
    return make_spec(
        model,
        "eurobert",
        keys,
        vocab="eurobert",
        rename=lambda name: name.removeprefix("model."),
        notes=pooling_notes(model),
    )


@architecture("RobertaModel", "RobertaForSequenceClassification")
def roberta(model: HFModel) -> GGUFModelSpec:
    return _encoder(model, "roberta", 1 + int(model.require("pad_token_id")))


@architecture("XLMRobertaModel", "XLMRobertaForSequenceClassification")
def xlm_roberta(model: HFModel) -> GGUFModelSpec:
    return _encoder(model, "unigram", 1 + int(model.require("pad_token_id")))


@architecture("NomicBertModel")
def nomic_bert(model: HFModel) -> GGUFModelSpec:
    """nomic-embed-text: rope, gated; version 2 has experts and XLM-RoBERTa's vocabulary."""
    period = int(model.find("moe_every_n_layers") or 0)
    keys = _encoder_keys(replace(model, config={**model.config, "n_positions": _trained_positions(model)}))
    if period:
        keys |= {"moe_every_n_layers": u32(period), "expert_used_count": u32(model.require("moe_top_k"))}
    return make_spec(
        model,
        "nomic-bert-moe" if period else "nomic-bert",
        keys,
        nomic_experts,
        _targets(model, "bert"),
        vocab="unigram" if period else "bert",
        required_per_block=(
            "attn_qkv",
            "attn_output",
            "attn_output_norm",
            "ffn_down|ffn_down_exps",
            "layer_output_norm",
        ),
        required=("token_embd", "token_embd_norm"),
        notes=pooling_notes(model),
    )


def _trained_positions(model: HFModel) -> int:
    """Those that the model was trained with, which n_positions of the published models exceeds."""
    stated, trained = model.require("n_positions"), model.find("max_trained_positions") or 2048
    if (stated, trained) not in _NOMIC_POSITIONS:
        text = f"config.json: n_positions {stated} with max_trained_positions {trained} is not a known Nomic model"
        raise SourceError(text, hint="copy them from the base model")
    return _NOMIC_POSITIONS[stated, trained]


def nomic_experts(stored: HFTensor) -> RuleResult:
    """All experts' rows are in one matrix; those of w2 are inputs."""
    if ".mlp.experts.bias" in stored.name:
        return "a bias that llama.cpp's nomic-bert-moe does not have"
    if not stored.name.endswith((".mlp.experts.mlp.w1", ".mlp.experts.mlp.w2")):
        return None
    count = stored.model.experts
    width, hidden = stored.rows_per_part(count), stored.info.columns
    if stored.name.endswith(".w1"):
        return (stored.block_tensor("ffn_up_exps", (count, width, hidden)),)
    return (stored.block_tensor("ffn_down_exps", (count, hidden, width), transpose=width),)


def _encoder(model: HFModel, vocab: str, unused: int) -> GGUFModelSpec:
    """`unused`: leading rows of a RoBERTa's position table, which are dropped."""
    context = int(model.require("max_position_embeddings")) - unused
    labels = _labels(model)
    keys = _encoder_keys(replace(model, config={**model.config, "max_position_embeddings": context}))
    rule, notes = _targets(model, "bert", unused), pooling_notes(model, embeds=not labels)
    return make_spec(model, "bert", keys, rule, vocab=vocab, required_per_block=_NEEDS, required=_ONCE, notes=notes)


def _encoder_keys(model: HFModel) -> dict[str, Value]:
    """The common keys of encoders; a classifier has labels."""
    labels = _labels(model)
    keys = hparams(model) | {"attention.causal": boolean(False)} | pooling_keys(model)
    keys |= _classifier_keys(model)
    return keys | ({"classifier.output_labels": array("string", labels)} if labels else {})


def _classifier_keys(model: HFModel) -> dict[str, Value]:
    """How a classifier pools, where llama.cpp knows it."""
    keys = optional(u32, classifier__pooling_type=POOLING_TYPES.get(str(model.find("classifier_pooling"))))
    return keys | optional(string, classifier__activation=model.find("classifier_activation"))


def _targets(model: HFModel, kind: str, unused: int = 0, drops: tuple[str, ...] = ()) -> Rule:
    """The rule for all tensors of an encoder. `unused`: see _encoder; `drops`: starts of names of unused heads."""
    labels = bool(_labels(model))

    def target(stored: HFTensor) -> RuleResult:
        plain = replace(stored, name=_plain(stored.name, labels, kind))
        if plain.name.startswith((*_HEADS, *drops)):
            return "a head that llama.cpp's encoders do not use"
        if unused and plain.name == "embeddings.position_embeddings.weight":
            return _positions(plain, unused)
        return (plain.tensor(),)

    return target


def _labels(model: HFModel) -> list[str]:
    """Labels of a classifier; two labels that are only numbered are transformers' default."""
    named = {int(number): str(label) for number, label in (model.find("id2label") or {}).items()}
    if len(named) == 2 and named.get(0) == "LABEL_0":
        return []
    return [named[number] for number in sorted(named)]


def _plain(name: str, classifies: bool, kind: str) -> str:
    for prefix in ("bert.", "distilbert.", "roberta.") if kind == "bert" else ("model.",):
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
