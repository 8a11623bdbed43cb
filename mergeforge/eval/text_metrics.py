"""How close the models' answers are to the expected ones: BLEU, chrF, ROUGE (packages sacrebleu, rouge-score)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.eval.backend import require
from mergeforge.eval.evaluate import Sample


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


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"bleu": bleu, "chrf": chrf, "rouge": rouge}


def read_metrics(text: str) -> tuple[str, ...]:
    """The names in `bleu,rouge`. Raises RecipeError for an unknown one, MissingExtraError if a package is missing."""
    names = tuple(name.strip().lower() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise RecipeError(f"there is no metric '{name}'", hint=did_you_mean(name, METRICS) or ", ".join(METRICS))
        require("rouge_score.rouge_scorer" if name == "rouge" else "sacrebleu")
    return names


def text_metrics(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, float]:
    """Each metric over all samples. Raises MissingExtraError."""
    if not samples:
        return {}
    answers = [sample.answer.text.strip() for sample in samples]
    expected = [sample.expected.strip() for sample in samples]
    return {name: METRICS[name](answers, expected) for name in names}
