"""Whole runs: the two loops, validation, checkpoints, resuming, the ways to train."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_runs import adapter, lines, run, same

from mergeforge.errors import BudgetError, MergeforgeError, MissingExtraError, OutputError
from mergeforge.train.loop.memory_probe import probe_memory
from mergeforge.train.loop.setup import make_context
from mergeforge.train.plan import make_plan
from mergeforge.train.resume import Resume

Settings = dict[str, Any]


def interrupt_at(step: int) -> Any:
    """A listener that presses Ctrl-C when a step is done."""

    def listen(line: dict[str, Any]) -> None:
        if line.get("step") == step and "loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("pack", [False, True])
def test_both_loops_give_equal_losses(method: str, pack: bool, settings: Settings) -> None:
    changed: Settings = {"method": method, "pack": pack, "val": 4, "seq_len": 128}
    if method == "full":
        settings.pop("lora")
    one = run(settings, **changed)
    two = run(settings, **changed, loop="simple", output="simple")
    assert lines(one) == pytest.approx(lines(two), rel=1e-6)
    assert lines(one, "eval_loss") == pytest.approx(lines(two, "eval_loss"), rel=1e-6)
    assert lines(one, "lr") == pytest.approx(lines(two, "lr"))


def test_validating_changes_nothing(settings: Settings) -> None:
    changed: Settings = {"method": "qlora", "val": 4, "save": {"best": False}}
    often = run(settings, **changed, eval={"every": 1, "max_tokens": 4})
    never = run(settings, **changed, eval={"every": 1000, "max_tokens": 4}, output="never")
    assert len(lines(often, "eval_loss")) > len(lines(never, "eval_loss")) == 1
    assert same(adapter(often), adapter(never))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_run_goes_on_bit_for_bit(method: str, settings: Settings) -> None:
    changed: Settings = {"method": method, "epochs": 2, "val": 4, "save": {"every": 3, "best": False}}
    changed |= {} if method == "full" else {"lora": {"r": 4, "dropout": 0.1}}
    if method == "full":
        settings.pop("lora")
    whole = run(settings, **changed)
    broken = run(settings, listeners=[interrupt_at(4)], **changed, output="broken")
    assert broken.interrupted and broken.steps == 5 and not (broken.folder.root / "adapter").exists()
    again = run(settings, **changed, output="broken")
    assert lines(again) == lines(whole)
    if method == "full":
        one, two = ((one.folder.model / "model.safetensors").read_bytes() for one in (whole, again))
        assert one == two
    else:
        assert same(adapter(whole), adapter(again))


def test_a_finished_run_stays(settings: Settings) -> None:
    first = run(settings)
    with pytest.raises(OutputError, match="finished run"):
        run(settings)
    longer = run(settings, Resume(extend_epochs=1))
    assert longer.steps == 2 * first.steps and lines(longer)[: first.steps] == lines(first)[: first.steps]
    assert run(settings, Resume(overwrite=True)).steps == first.steps


def test_other_settings_or_data_do_not_go_on(settings: Settings) -> None:
    run(settings, listeners=[interrupt_at(2)])
    with pytest.raises(OutputError, match="other settings: lr"):
        run(settings, lr=1e-4)
    rows = Path(settings["data"])
    rows.write_text(rows.read_text().replace("Join red", "Join rad"))
    with pytest.raises(OutputError, match="the data is not"):
        run(settings)
    assert run(settings, Resume("never")).steps == 10


def test_the_best_step_is_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = itertools.chain([1] * 15, itertools.repeat(-1))  # from here on it learns to be wrong

    def turning(logits: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count
        return loss * next(sign) if logits.requires_grad else loss

    monkeypatch.setattr(torch, "turning", turning, raising=False)
    found = run(settings, val=8, eval={"every": 2, "max_tokens": 4}, epochs=2, loss="torch.turning", lr=1e-2)
    losses = lines(found, "eval_loss")
    assert min(losses) < losses[-1] and found.best_step < found.steps
    assert found.validation_loss == pytest.approx(min(losses), rel=1e-5)
    assert json.loads((found.folder.root / "run.json").read_text())["kept_step"] == found.best_step


def test_early_stop(settings: Settings) -> None:
    stop = {"early_stop": {"patience": 2}, "val": 8, "eval": {"every": 1, "max_tokens": 4}}
    found = run(settings, **stop, lr=0.3, epochs=4)
    assert found.steps < 32 and found.result.is_dir() and found.best_step == found.steps - 2


@pytest.mark.parametrize(
    "lora",
    [
        {"rslora": True},
        {"dora": True},
        {"targets": ["q_proj", "v_proj"]},
        {"targets": r".*\.layers\.1\..*_proj"},
        {"layers": [1]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"init": "pissa"},
        {"init": "olora"},
        {"init": "gaussian"},
    ],
    ids=str,
)
def test_kinds_of_lora_train(lora: Settings, settings: Settings) -> None:
    found = run(settings, lora={"r": 4, **lora})
    assert lines(found)[-1] < lines(found)[0]


def test_out_of_memory_halves_the_batch_and_goes_on(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter([False] * 12 + [True])

    def cramped(logits: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        if next(tries, False):
            raise torch.OutOfMemoryError("no room")
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count

    monkeypatch.setattr(torch, "cramped", cramped, raising=False)
    whole = run(settings, output="whole", save={"best": False})
    found = run(settings, loss="torch.cramped")
    assert lines(found) == pytest.approx(lines(whole), rel=1e-4)
    assert next(tries, None) is None


def test_out_of_memory_twice_is_a_budget_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(logits: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "full_of", full, raising=False)
    with pytest.raises(BudgetError, match="no room"):
        run(settings, loss="torch.full_of")


def test_a_loss_that_is_no_number_ends_the_run(settings: Settings) -> None:
    with pytest.raises(MergeforgeError, match=r"the loss of step \d+ is nan"):
        run(settings, lr=1e30, max_grad_norm=0, schedule="constant", warmup=0)


def test_a_run_leaves_what_it_promises(settings: Settings) -> None:
    found = run(settings, val=4)
    folder = found.folder
    assert {path.name for path in folder.root.iterdir()} >= {"run.json", "metrics.jsonl", "report.html", "adapter"}
    page = folder.report.read_text()
    assert page.count("<svg") == 6 and "http" not in page.replace("http://www.w3.org", "") and "<script" not in page
    facts = json.loads((folder.root / "run.json").read_text())
    assert facts["state"] == "finished" and facts["versions"]["peft"] and len(facts["samples"]) == 3
    names = {path.name for path in folder.adapter.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"}
    assert len(folder.steps()) == 2


def test_a_probe_leaves_nothing_behind(settings: Settings) -> None:
    job, _ = make_context(make_plan(settings, device="cpu"))
    state = torch.random.get_rng_state()
    assert probe_memory(job, 64) > 1e8
    assert torch.random.get_rng_state().equal(state) and all(one.grad is None for one in job.model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor"])
def test_optimizers_learn(optimizer: str, settings: Settings) -> None:
    found = run(settings, optimizer=optimizer, lr=1e-3)
    assert lines(found)[-1] < lines(found)[0]


def test_checkpointed_activations_and_the_precision_of_a_card(settings: Settings) -> None:
    plain = run(settings)
    again = run(settings, memory={"checkpointing": True}, output="again")
    assert lines(again) == pytest.approx(lines(plain), rel=1e-6)
    halves = run(settings, dtype="bf16", output="halves")
    assert lines(halves) == pytest.approx(lines(plain), rel=2e-2) and lines(halves) != lines(plain)
    assert {one.dtype for one in adapter(halves).values()} == {torch.float32}


def test_a_step_has_as_many_rows_packed_or_not(settings: Settings) -> None:
    """So rates and steps mean the same; one step on all rows has one loss."""
    changed: Settings = {"batch": {"size": 40, "micro": 4}, "lr": 1e-4}
    packed, apart = (run(settings, **changed, pack=pack, output=str(pack)) for pack in (True, False))
    assert packed.steps == apart.steps == 1
    assert lines(packed) == pytest.approx(lines(apart), rel=1e-5)


def test_metrics_go_to_tensorboard(settings: Settings, here: Path) -> None:
    pytest.importorskip("tensorboard")
    run(settings, track="tensorboard", max_steps=2)
    assert list(here.glob("run/**/events.out.tfevents.*"))


def test_what_is_missing_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError) as error:
        run(settings, track="mlflow")
    assert error.value.hint == "pip install mlflow"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError) as error:
        run(settings)
    assert error.value.hint == "pip install 'mergeforge[train]'" and error.value.exit_code == 6


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"lora": {"targets": ["no_such"]}},
            "the adapter does not fit the model: Target modules {'no_such'} not found",
        ),
        ({"loss": "nowhere.loss"}, "there is no loss nowhere.loss"),
        ({"dtype": "fp16"}, "cpu does not train in fp16"),
        ({"memory": {"budget": "100MB"}}, "training takes about .* and cpu has 100.0 MB"),
        ({"model": "nobody/nothing"}, "there is no local nobody/nothing"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl"),
        ({"val": 40}, "val: 40 of 40 different rows leaves none to train on"),
        ({"seq_len": 8}, "too long"),
        ({"seq_len": 4096}, "the model knows positions for 2048 tokens, not 4096"),
    ],
)
def test_bad_settings_are_said_so(changed: Settings, said: str, settings: Settings) -> None:
    with pytest.raises(MergeforgeError, match=f"(?s){said}"):
        run(settings, **changed)


def test_patience_is_counted_over_an_interruption(settings: Settings) -> None:
    changed: Settings = {"early_stop": {"patience": 3}, "val": 8, "eval": {"every": 1, "max_tokens": 4}, "lr": 0.3}
    whole = run(settings, **changed, epochs=4)
    broken = run(settings, listeners=[interrupt_at(whole.steps - 3)], **changed, epochs=4, output="broken")
    assert broken.interrupted
    again = run(settings, **changed, epochs=4, output="broken")
    assert again.steps == whole.steps and lines(again, "eval_loss") == lines(whole, "eval_loss")


def test_validation_and_checkpoints_only_at_the_end(settings: Settings) -> None:
    found = run(settings, val=4, eval={"every": 0, "max_tokens": 4}, save={"every": 0}, epochs=2)
    assert len(lines(found, "eval_loss")) == 1 and found.folder.steps() == [found.steps]
