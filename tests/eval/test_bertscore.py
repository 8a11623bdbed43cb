"""`--metrics bertscore`, compared with bert-score itself, on a tiny BERT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergeforge.cli import run_command
from mergeforge.errors import MissingExtraError, SourceError
from mergeforge.eval.text_metrics import bertscore, read_metrics

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ANSWERS, EXPECTED = ["hello you", "abc d", "one two three"], ["hello me", "zzz", "one two three"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of 32 positions, whose tokenizer knows letters only and states no maximal length."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, vocab_size=64, max_position_embeddings=32)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def test_the_score_is_that_of_bert_score(encoder: Path) -> None:
    bert_score = pytest.importorskip("bert_score")
    scorer = bert_score.BERTScorer(model_type=str(encoder), num_layers=2)
    scorer._tokenizer.model_max_length = 32
    _, _, f1 = scorer.score(ANSWERS, EXPECTED)
    assert bertscore(ANSWERS, EXPECTED, str(encoder)) == pytest.approx(100 * float(f1.mean()), abs=1e-3)
    assert bertscore(EXPECTED, EXPECTED, str(encoder)) == pytest.approx(100, abs=1e-3)
    bertscore(["a " * 100], ["b " * 100], str(encoder))  # longer than its positions


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("bert_score")
    with pytest.raises(SourceError, match="cannot load") as caught:
        bertscore(ANSWERS, EXPECTED, str(tmp_path / "nothing"))
    assert "bertscore_model" in caught.value.hint


def test_a_model_that_is_not_there_is_refused_before_the_evaluation(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is no model to evaluate either, which would be the later error."""
    pytest.importorskip("bert_score")
    options = ["--metrics", "bertscore", "--bertscore-model", str(tmp_path / "nothing")]
    assert run_command(["eval", str(tmp_path / "model"), "--data", "sample:chat", *options]) == 3
    assert "BERTScore cannot load" in capfd.readouterr().err


def test_without_the_package_the_hint_is_the_pip_command(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        import bert_score  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError) as caught:
            read_metrics("bertscore")
        assert caught.value.hint == 'pip install "bert-score>=0.3.13"'
        assert run_command(["eval", "model", "--data", "sample:chat", "--metrics", "bertscore"]) == 6
    else:
        assert read_metrics("bleu,bertscore") == ("bleu", "bertscore")
