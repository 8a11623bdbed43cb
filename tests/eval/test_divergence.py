"""KL divergence of a GGUF file from its model: against torch on the logits of transformers, and its limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.gguf_models import TEXT, Tiny, make

import mergeforge
from mergeforge.cli import run_command
from mergeforge.errors import SourceError
from mergeforge.eval import open_model
from mergeforge.eval.divergence import compare_distributions

CHUNK = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(Tiny("llama", "llama", {"head_dim": 32}), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("gguf")
    written = mergeforge.convert_to_gguf(folder, types=["f32", "q8_0", "q3_k_s"], out=out, device="cpu")
    return {path.stem.rpartition("-")[2]: path for path in written}


def test_two_models_against_torch(folder: Path, files: dict[str, Path]) -> None:
    """The divergence of Q3_K_S from F32, against torch's kl_div on the same logits; perplexities, against its loss."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax

    model, reference = open_model(files["Q3_K_S"]), open_model(str(folder), device="cpu")
    result = compare_distributions(model, reference, TEXT, context=CHUNK)
    tokens = model.text_tokens(TEXT)
    chunks = [tokens[at : at + CHUNK] for at in range(0, len(tokens) - CHUNK + 1, CHUNK)]
    if model.first_token is not None:
        chunks = [[model.first_token, *chunk[1:]] for chunk in chunks]
    first = CHUNK // 2
    targets = torch.tensor([token for chunk in chunks for token in chunk[first + 1 :]])
    pair = [np.concatenate(list(one.logits(chunks, first))) for one in (model, reference)]
    own, other = (torch.from_numpy(logits).double() for logits in pair)
    wanted = kl_div(log_softmax(own, -1), log_softmax(other, -1), log_target=True, reduction="none").sum(-1)
    assert result.tokens == len(targets) == len(chunks) * (first - 1)
    assert np.allclose(result.divergences, wanted, atol=1e-9)
    assert result.perplexity == pytest.approx(float(cross_entropy(own, targets).exp()))
    assert result.reference_perplexity == pytest.approx(float(cross_entropy(other, targets).exp()))
    assert result.agreement == pytest.approx(float((own.argmax(-1) == other.argmax(-1)).double().mean()))
    assert result.kl_divergence > 1e-4 and result.quantile(1) == result.divergences.max()


def test_the_engine_and_transformers_have_the_same_logits(folder: Path, files: dict[str, Path]) -> None:
    result = compare_distributions(open_model(files["F32"]), open_model(str(folder), device="cpu"), TEXT, context=CHUNK)
    assert result.kl_divergence < 1e-6 and result.agreement == 1 and result.ratio == pytest.approx(1, abs=1e-4)


def test_a_table_of_several_files(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    names = [str(files[name]) for name in ("Q8_0", "Q3_K_S")]
    command = ["eval", *names, "--against", str(files["F32"]), "--data", str(text), "--chunk", str(CHUNK)]
    assert run_command(command) == 0
    assert "KL divergence" in capsys.readouterr().out
    assert run_command([*command, "--json", "--limit", "2"]) == 0
    small, large = json.loads(capsys.readouterr().out)
    assert small["kl_divergence"] < large["kl_divergence"] and small["tokens"] == 2 * (CHUNK // 2 - 1)


def test_what_cannot_be_compared_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    other = make(Tiny("other", "llama", {}, tokenizer="glm"), tmp_path / "other")  # another tokenizer
    model = open_model(files["F32"])
    with pytest.raises(SourceError, match="cut the text into different tokens"):
        compare_distributions(model, open_model(str(other), device="cpu"), TEXT, context=CHUNK)
    with pytest.raises(SourceError, match="fewer than one chunk of 512"):
        compare_distributions(model, model, "Short.")


def test_options_that_need_each_other(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["eval", str(files["F32"]), "--against", "m"]) == 2
    assert "--data FILE.txt" in capsys.readouterr().err
    assert run_command(["eval", str(files["F32"]), "--against", "m", "--data", "t", "--smoke"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert run_command(["eval", str(files["F32"]), "--chunk", "64"]) == 2
    assert "--chunk needs --against" in capsys.readouterr().err
    assert run_command(["eval", str(files["F32"]), "--against", "m", "--data", "nowhere.txt"]) == 3
    assert "nowhere.txt cannot be read" in capsys.readouterr().err
