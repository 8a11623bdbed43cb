"""Scores of the back ends against transformers' own loss, and against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_models import random_rows

from mergeforge import eval
from mergeforge.eval import Row
from mergeforge.eval import logprobs as scoring


def losses(model: object, rows: list[Row]) -> list[float]:
    """Sum of negative log-likelihoods of each row, alone, from transformers' logits in float64."""
    found = []
    for row in rows:
        tokens, labels = torch.from_numpy(row.tokens).long(), torch.from_numpy(row.labels).long()
        with torch.no_grad():
            logprobs = model(tokens[None]).logits[0].double().log_softmax(-1)  # type: ignore[operator]
        at = torch.nonzero(labels[1:] >= 0)[:, 0]
        found.append(-logprobs[at, labels[1:][at]].sum().item())
    return found


def test_a_model_scores_as_transformers(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    rows = random_rows()
    wanted = losses(AutoModelForCausalLM.from_pretrained(base), rows)
    found = eval.evaluate(str(base), rows)
    assert [row.nll for row in found.rows] == pytest.approx(wanted, rel=1e-6)
    assert found.nll == pytest.approx(sum(wanted) / found.tokens, rel=1e-6)


def test_the_mean_is_the_loss_that_transformers_tells(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    (row,) = random_rows(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens, labels = (torch.from_numpy(one).long()[None] for one in (row.tokens, row.labels))
    with torch.no_grad():
        loss = model(tokens, labels=labels).loss.item()
    assert eval.evaluate(str(base), [row]).nll == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 12])
def test_batches_and_chunks_of_the_head_change_nothing(base: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows()
    model = eval.open_model(str(base))
    wanted = eval.evaluate(model, rows, batch=1).rows
    monkeypatch.setattr(scoring, "LOGITS", 7 * 320)
    found = eval.evaluate(model, rows, batch=batch).rows
    assert [row.nll for row in found] == pytest.approx([row.nll for row in wanted], rel=1e-6)
    assert [row.correct for row in found] == [row.correct for row in wanted]


def test_logits_are_never_held_whole(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = eval.open_model(str(base))
    assert isinstance(model, eval.TorchModel)
    sizes: list[int] = []
    head = model.loaded.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[0] * output.shape[1]))
    monkeypatch.setattr(scoring, "LOGITS", 5 * 320)
    eval.evaluate(model, random_rows())
    assert max(sizes) <= 12  # one token a row, then five at a time


def test_accuracy_counts_the_likeliest_tokens(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(base), random_rows()
    for row in rows[:3]:  # what the model itself would say, at one place
        with torch.no_grad():
            row.labels[-1] = row.tokens[-1] = (
                model(torch.from_numpy(row.tokens[:-1]).long()[None]).logits[0, -1].argmax()
            )
    assert [row.correct for row in eval.evaluate(str(base), rows[:3]).rows] == [1, 1, 1]


def test_an_adapter_scores_as_peft_and_its_base_without(base: Path, adapter: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    rows = random_rows()
    plain = losses(AutoModelForCausalLM.from_pretrained(base), rows)
    with pytest.warns(FutureWarning):  # peft asks transformers in a way that goes away
        wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    model = eval.open_model(str(adapter))
    assert isinstance(model, eval.TorchModel) and model.kind == "adapter"
    found = [row.nll for row in eval.evaluate(model, rows).rows]
    assert found == pytest.approx(losses(wrapped, rows), rel=1e-6)
    assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 0.1, "the adapter does something"
    assert [row.nll for row in eval.evaluate(model.base(), rows).rows] == pytest.approx(plain, rel=1e-6)
    again = [row.nll for row in eval.evaluate(model, rows).rows]
    assert again == found, "and it is back afterwards"
    alone = eval.open_model(str(adapter), adapter=False)
    assert [row.nll for row in eval.evaluate(alone, rows).rows] == pytest.approx(plain, rel=1e-6)


def test_scores_of_adapter_and_base_may_be_taken_in_turns(adapter: Path) -> None:
    rows = random_rows()
    model = eval.open_model(str(adapter))
    assert isinstance(model, eval.TorchModel)
    wanted = dict(model.scores(rows, batch=2)), dict(model.base().scores(rows, batch=2))
    pairs = list(zip(model.scores(rows, batch=2), model.base().scores(rows, batch=2), strict=True))
    assert (dict(one for one, _ in pairs), dict(two for _, two in pairs)) == wanted


def test_adapter_merged_folder_and_gguf_have_the_same_loss(adapter: Path, merged: Path) -> None:
    pytest.importorskip("xllamacpp")
    rows = random_rows()
    wanted = eval.evaluate(str(adapter), rows)
    folder = eval.evaluate(str(merged), rows)
    assert folder.nll == pytest.approx(wanted.nll, abs=1e-5)
    for name, bound in (("m-F32.gguf", 2e-4), ("m-F16.gguf", 1e-3)):
        found = eval.evaluate(str(merged / name), rows)
        assert found.nll == pytest.approx(wanted.nll, abs=bound)
        assert abs(found.accuracy - wanted.accuracy) < 0.02 and found.tokens == wanted.tokens


def test_a_row_longer_than_llama_cpp_takes_at_once(base: Path, merged: Path) -> None:
    pytest.importorskip("xllamacpp")
    rows = random_rows(3, 1400, seed=1)
    assert max(len(row.tokens) for row in rows) > 1024
    wanted = eval.evaluate(str(merged), rows)
    assert eval.evaluate(str(merged / "m-F32.gguf"), rows).nll == pytest.approx(wanted.nll, abs=2e-4)


def test_four_bits_stay_what_they_are(base: Path, adapter: Path) -> None:
    """Scoring and answering repack nothing (bitsandbytes does on some processors): the same scores before and after."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    rows = random_rows(4)
    model = eval.open_model(str(adapter), quantise="nf4")
    assert isinstance(model, eval.TorchModel)
    linears = [one for one in model.loaded.model.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    packed = [one.weight.data.clone() for one in linears]
    before = eval.evaluate(model, rows).rows
    model.reply([{"role": "user", "content": "the hen"}], eval.Sampling(4, 0))
    assert eval.evaluate(model, rows).rows == before
    assert len(linears) == 28 and all(torch.equal(a.weight.data, b) for a, b in zip(linears, packed, strict=True))
    plain = eval.evaluate(model.base(), rows).nll
    assert plain == pytest.approx(eval.evaluate(base, rows, quantise="nf4").nll, rel=1e-6)
