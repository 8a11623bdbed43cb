"""How close the models' answers are to the expected ones: BLEU, chrF, ROUGE, BERTScore.

The packages sacrebleu, rouge-score and bert-score compute them. BERTScore needs a model of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mergeforge.errors import RecipeError, SourceError, did_you_mean
from mergeforge.eval.backend import quiet_transformers, require
from mergeforge.eval.evaluate import Sample

BERTSCORE_MODEL = "roberta-large"  # bert-score's own choice for English


def bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Corpus BLEU by sacrebleu, 0 to 100."""
    return float(require("sacrebleu").corpus_bleu(list(answers), [list(expected)]).score)


def chrf(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Corpus chrF by sacrebleu, 0 to 100. It compares characters, so it suits any language."""
    return float(require("sacrebleu").corpus_chrf(list(answers), [list(expected)]).score)


def rouge(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Mean F-measure of ROUGE-L by rouge-score, without stemming, 0 to 100."""
    scorer = require("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(answers, expected, strict=True)
    total = sum(float(scorer.score(reference, answer)["rougeL"].fmeasure) for answer, reference in pairs)
    return 100 * total / len(answers)


def bertscore(answers: Sequence[str], expected: Sequence[str], model: str = BERTSCORE_MODEL) -> float:
    """Mean F1 of BERTScore by bert-score, without rescaling, 0 to 100.

    It compares the hidden states of `model`, a folder or Hub repo of an encoder, so it sees synonyms. Raises
    SourceError for a model that cannot be loaded.
    """
    package, layers = require("bert_score"), _compared_layer(model)
    require("transformers").utils.logging.disable_progress_bar()
    with _as_source_error(model), quiet_transformers():
        scorer = package.BERTScorer(model_type=model, num_layers=layers)
    # transformers refuses the length of a tokenizer that states none
    longest = scorer._model.config.max_position_embeddings - scorer._model.config.pad_token_id - 1
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, longest)
    with quiet_transformers():
        _, _, scores = scorer.score(list(answers), list(expected))
    return 100 * float(scores.mean())


def _compared_layer(model: str) -> int:
    """The layer whose states are compared: bert-score's choice, or for a model that it does not know, two thirds up.

    Raises SourceError for a model without a config.json.
    """
    if known := require("bert_score.utils").model2layers.get(model):
        return int(known)
    with _as_source_error(model):
        layers = int(require("transformers").AutoConfig.from_pretrained(model).num_hidden_layers)
    return max(1, round(layers * 2 / 3))


@contextmanager
def _as_source_error(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        hint = "give a folder or Hub repo of an encoder: --bertscore-model MODEL"
        raise SourceError(f"BERTScore cannot load {model}: {str(error).splitlines()[0]}", hint=hint) from None


METRICS: dict[str, Callable[..., float]] = {"bleu": bleu, "chrf": chrf, "rouge": rouge, "bertscore": bertscore}
MODULES = {"rouge": "rouge_score.rouge_scorer", "bertscore": "bert_score"}  # sacrebleu computes the others


def read_metrics(text: str, *, bertscore_model: str = BERTSCORE_MODEL) -> tuple[str, ...]:
    """The names in `bleu,rouge`. Raises RecipeError for an unknown one, MissingExtraError if a package is missing.

    Raises SourceError if BERTScore is among them and its model has no config.json.
    """
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise RecipeError(f"there is no metric '{name}'", hint=did_you_mean(name, METRICS) or ", ".join(METRICS))
        require(MODULES.get(name, "sacrebleu"))
    if "bertscore" in names:
        _compared_layer(bertscore_model)
    return names


def text_metrics(
    samples: Sequence[Sample], names: Sequence[str], *, bertscore_model: str = BERTSCORE_MODEL
) -> dict[str, float]:
    """Each metric over all samples. Raises MissingExtraError, and SourceError for a model of BERTScore."""
    if not samples:
        return {}
    answers = [sample.answer.text.strip() for sample in samples]
    expected = [sample.expected.strip() for sample in samples]
    options = {"bertscore": {"model": bertscore_model}}
    return {name: METRICS[name](answers, expected, **options.get(name, {})) for name in names}
