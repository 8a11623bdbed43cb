"""Scores of the backends, compared with transformers' own loss and with each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_models import random_rows

from mergeforge import eval
from mergeforge.eval import TokenRow, logprobs


def losses(model: object, rows: list[TokenRow]) -> list[float]:
    """Sum of negative log-likelihoods of each row, alone, from transformers' logits in float64."""
    nlls = []
    for row in rows:
        tokens, labels = torch.from_numpy(row.tokens).long(), torch.from_numpy(row.labels).long()
        with torch.no_grad():
            logprobs = model(tokens[None]).logits[0].double().log_softmax(-1)  # type: ignore[operator]
        at = torch.nonzero(labels[1:] >= 0)[:, 0]
        nlls.append(-logprobs[at, labels[1:][at]].sum().item())
    return nlls


def test_model_scores_equal_transformers(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = random_rows()
    expected = losses(AutoModelForCausalLM.from_pretrained(base), rows)
    evaluation = eval.evaluate(str(base), rows)
    assert [row.nll for row in evaluation.rows] == pytest.approx(expected, rel=1e-6)
    assert evaluation.nll == pytest.approx(sum(expected) / evaluation.tokens, rel=1e-6)


def test_mean_nll_is_the_loss_of_transformers(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    (row,) = random_rows(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens, labels = (torch.from_numpy(one).long()[None] for one in (row.tokens, row.labels))
    with torch.no_grad():
        loss = model(tokens, labels=labels).loss.item()
    assert eval.evaluate(str(base), [row]).nll == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 12])
def test_batches_and_chunked_head_change_nothing(base: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows()
    model = eval.open_model(str(base))
    expected = eval.evaluate(model, rows, batch=1).rows
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 7 * 320)
    evaluation = eval.evaluate(model, rows, batch=batch).rows
    assert [row.nll for row in evaluation] == pytest.approx([row.nll for row in expected], rel=1e-6)
    assert [row.correct for row in evaluation] == [row.correct for row in expected]


def test_logits_are_never_all_in_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = eval.open_model(str(base))
    assert isinstance(model, eval.TransformersModel)
    sizes: list[int] = []
    head = model.loaded.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[0] * output.shape[1]))
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 5 * 320)
    eval.evaluate(model, random_rows())
    assert max(sizes) <= 12  # one token per row, then five at a time


def test_accuracy_counts_top_1_hits(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(base), random_rows()
    for row in rows[:3]:  # what the model itself predicts, at one position
        with torch.no_grad():
            row.labels[-1] = row.tokens[-1] = (
                model(torch.from_numpy(row.tokens[:-1]).long()[None]).logits[0, -1].argmax()
            )
    assert [row.correct for row in eval.evaluate(str(base), rows[:3]).rows] == [1, 1, 1]


def test_adapter_scores_equal_peft_and_its_base_transformers(base: Path, adapter: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    rows = random_rows()
    plain = losses(AutoModelForCausalLM.from_pretrained(base), rows)
    with pytest.warns(FutureWarning):  # peft uses a deprecated call of transformers
        wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model = eval.open_model(str(adapter))
    assert isinstance(model, eval.TransformersModel) and model.kind == "adapter"
    nlls = [row.nll for row in eval.evaluate(model, rows).rows]
    assert nlls == pytest.approx(losses(wrapped, rows), rel=1e-6)
    assert max(abs(a - b) for a, b in zip(nlls, plain, strict=True)) > 0.1, "the adapter has an effect"
    assert [row.nll for row in eval.evaluate(model.base(), rows).rows] == pytest.approx(plain, rel=1e-6)
    again = [row.nll for row in eval.evaluate(model, rows).rows]
    assert again == nlls, "the adapter is enabled again"
    alone = eval.open_model(str(adapter), adapter=False)
    assert [row.nll for row in eval.evaluate(alone, rows).rows] == pytest.approx(plain, rel=1e-6)


def test_scores_of_adapter_and_base_can_be_interleaved(adapter: Path) -> None:
    rows = random_rows()
    model = eval.open_model(str(adapter))
    assert isinstance(model, eval.TransformersModel)
    expected = dict(model.score_rows(rows, batch=2)), dict(model.base().score_rows(rows, batch=2))
    pairs = list(zip(model.score_rows(rows, batch=2), model.base().score_rows(rows, batch=2), strict=True))
    assert (dict(one for one, _ in pairs), dict(two for _, two in pairs)) == expected


def test_adapter_merged_folder_and_gguf_have_the_same_loss(adapter: Path, merged: Path) -> None:
    pytest.importorskip("xllamacpp")
    rows = random_rows()
    expected = eval.evaluate(str(adapter), rows)
    folder = eval.evaluate(str(merged), rows)
    assert folder.nll == pytest.approx(expected.nll, abs=1e-5)
    for name, bound in (("m-F32.gguf", 2e-4), ("m-F16.gguf", 1e-3)):
        evaluation = eval.evaluate(str(merged / name), rows)
        assert evaluation.nll == pytest.approx(expected.nll, abs=bound)
        assert abs(evaluation.accuracy - expected.accuracy) < 0.02 and evaluation.tokens == expected.tokens


def test_row_longer_than_one_llama_cpp_batch(base: Path, merged: Path) -> None:
    pytest.importorskip("xllamacpp")
    rows = random_rows(3, 1400, seed=1)
    assert max(len(row.tokens) for row in rows) > 1024
    expected = eval.evaluate(str(merged), rows)
    assert eval.evaluate(str(merged / "m-F32.gguf"), rows).nll == pytest.approx(expected.nll, abs=2e-4)


def test_scoring_does_not_repack_4_bit_weights(base: Path, adapter: Path) -> None:
    """bitsandbytes repacks on some processors; weights and scores must be the same after scoring and answering."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows = random_rows(4)
    model = eval.open_model(str(adapter), quantize="nf4")
    assert isinstance(model, eval.TransformersModel)
    linears = [one for one in model.loaded.model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    packed = [one.weight.data.clone() for one in linears]
    before = eval.evaluate(model, rows).rows
    model.chat([{"role": "user", "content": "the hen"}], eval.Sampling(4, 0))
    assert eval.evaluate(model, rows).rows == before
    assert len(linears) == 28 and all(torch.equal(a.weight.data, b) for a, b in zip(linears, packed, strict=True))
    plain = eval.evaluate(model.base(), rows).nll
    assert plain == pytest.approx(eval.evaluate(base, rows, quantize="nf4").nll, rel=1e-6)
