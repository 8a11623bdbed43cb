"""How near the models' own answers come to the expected ones, by the field's usual measures (extra `metrics`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.eval.evaluate import Sample
from mergeforge.eval.extras import extra


def bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Corpus BLEU of sacrebleu, 0 to 100."""
    return float(extra("sacrebleu", "metrics").corpus_bleu(list(answers), [list(expected)]).score)


def chrf(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Corpus chrF of sacrebleu, 0 to 100: characters, so any language and no words needed."""
    return float(extra("sacrebleu", "metrics").corpus_chrf(list(answers), [list(expected)]).score)


def rouge(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Mean F of ROUGE-L by rouge-score, without stemming, 0 to 100."""
    scorer = extra("rouge_score.rouge_scorer", "metrics").RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(answers, expected, strict=True)
    total = sum(float(scorer.score(wanted, answer)["rougeL"].fmeasure) for answer, wanted in pairs)
    return 100 * total / len(answers)


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"bleu": bleu, "chrf": chrf, "rouge": rouge}


def read_metrics(written: str) -> tuple[str, ...]:
    """The names in `bleu,rouge`. Raises RecipeError for one that is not known, MissingExtraError before any work."""
    found = tuple(name.strip().lower() for name in written.split(",") if name.strip())
    for name in found:
        if name not in METRICS:
            raise RecipeError(f"no metric is called '{name}'", hint=did_you_mean(name, METRICS) or ", ".join(METRICS))
        extra("rouge_score.rouge_scorer" if name == "rouge" else "sacrebleu", "metrics")
    return found


def text_metrics(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, float]:
    """Each metric over all samples. Raises MissingExtraError."""
    if not samples:
        return {}
    answers = [one.answer.text.strip() for one in samples]
    expected = [one.expected.strip() for one in samples]
    return {name: METRICS[name](answers, expected) for name in names}
