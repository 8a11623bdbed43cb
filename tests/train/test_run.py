"""Whole runs: the two loops, validation, checkpoints, resuming, methods and optimizers."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_runs import adapter_tensors, have_same_adapter, interrupt_at, losses, run

from mergeforge.errors import BudgetError, MergeforgeError, MissingExtraError, OutputError, SourceError
from mergeforge.train.loop.setup import make_context, probe_memory
from mergeforge.train.plan import make_plan
from mergeforge.train.resume import Resume
from mergeforge.train.run import Trained

Settings = dict[str, Any]


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("pack", [False, True])
def test_both_loops_have_equal_losses(method: str, pack: bool, settings: Settings) -> None:
    changes: Settings = {"method": method, "pack": pack, "val": 4, "seq_len": 128}
    if method == "full":
        settings.pop("lora")
    trainer = run(settings, **changes)
    simple = run(settings, **changes, loop="simple", output="simple")
    assert losses(trainer) == pytest.approx(losses(simple), rel=1e-6)
    assert losses(trainer, "eval_loss") == pytest.approx(losses(simple, "eval_loss"), rel=1e-6)
    assert losses(trainer, "lr") == pytest.approx(losses(simple, "lr"))


def test_validation_does_not_change_the_result(settings: Settings) -> None:
    changes: Settings = {"method": "qlora", "val": 4, "save": {"best": False}}
    often = run(settings, **changes, eval={"every": 1, "max_tokens": 4})
    once = run(settings, **changes, eval={"every": 1000, "max_tokens": 4}, output="once")
    assert len(losses(often, "eval_loss")) > len(losses(once, "eval_loss")) == 1
    assert have_same_adapter(often, once)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_an_interrupted_run_resumes_bit_for_bit(method: str, settings: Settings) -> None:
    changes: Settings = {"method": method, "epochs": 2, "val": 4, "save": {"every": 3, "best": False}}
    changes |= {} if method == "full" else {"lora": {"r": 4, "dropout": 0.1}}
    if method == "full":
        settings.pop("lora")
    whole = run(settings, **changes)
    interrupted = run(settings, listeners=[interrupt_at(4)], **changes, output="interrupted")
    assert interrupted.interrupted and interrupted.steps == 5
    assert not (interrupted.folder.root / "adapter").exists()
    resumed = run(settings, **changes, output="interrupted")
    assert losses(resumed) == losses(whole)
    if method == "full":
        models = [(trained.folder.model / "model.safetensors").read_bytes() for trained in (whole, resumed)]
        assert models[0] == models[1]
    else:
        assert have_same_adapter(whole, resumed)


def test_a_finished_run_is_replaced_or_extended_only_on_request(settings: Settings) -> None:
    first = run(settings)
    with pytest.raises(OutputError, match="already holds a finished run"):
        run(settings)
    longer = run(settings, Resume(extend_epochs=1))
    assert longer.steps == 2 * first.steps and losses(longer)[: first.steps] == losses(first)[: first.steps]
    assert run(settings, Resume(overwrite=True)).steps == first.steps


def test_a_run_with_other_settings_or_data_is_not_resumed(settings: Settings) -> None:
    run(settings, listeners=[interrupt_at(2)])
    with pytest.raises(OutputError, match="began with other settings: lr"):
        run(settings, lr=1e-4)
    rows = Path(settings["data"])
    rows.write_text(rows.read_text().replace("Join red", "Join rad"))
    with pytest.raises(OutputError, match="the data has changed"):
        run(settings)
    assert run(settings, Resume("never")).steps == 10


def test_the_best_step_is_kept(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sign = itertools.chain([1] * 15, itertools.repeat(-1))  # after 15 passes the loss is maximized

    def reversing(logits: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count
        return loss * next(sign) if logits.requires_grad else loss

    monkeypatch.setattr(torch, "reversing", reversing, raising=False)
    trained = run(settings, val=8, eval={"every": 2, "max_tokens": 4}, epochs=2, loss="torch.reversing", lr=1e-2)
    validations = losses(trained, "eval_loss")
    assert min(validations) < validations[-1] and trained.best_step < trained.steps
    assert trained.validation_loss == pytest.approx(min(validations), rel=1e-5)
    assert json.loads((trained.folder.root / "run.json").read_text())["kept_step"] == trained.best_step


def test_early_stop(settings: Settings) -> None:
    changes: Settings = {"early_stop": {"patience": 2}, "val": 8, "eval": {"every": 1, "max_tokens": 4}}
    trained = run(settings, **changes, lr=0.3, epochs=4)
    assert trained.steps < 32 and trained.result.is_dir() and trained.best_step == trained.steps - 2


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
        {"init": "orthogonal"},
    ],
    ids=str,
)
def test_the_loss_falls_with_every_lora_option(lora: Settings, settings: Settings) -> None:
    trained = run(settings, lora={"r": 4, **lora})
    assert losses(trained)[-1] < losses(trained)[0]


def test_out_of_memory_halves_the_batch_and_resumes(
    settings: Settings, finished_run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = iter([False] * 12 + [True])

    def failing_once(logits: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        if next(fails, False):
            raise torch.OutOfMemoryError("no room")
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count

    monkeypatch.setattr(torch, "failing_once", failing_once, raising=False)
    trained = run(settings, loss="torch.failing_once")
    assert losses(trained) == pytest.approx(losses(finished_run), rel=1e-4)
    assert next(fails, None) is None


def test_out_of_memory_twice_is_a_budget_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(logits: torch.Tensor, labels: torch.Tensor, count: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "failing", failing, raising=False)
    with pytest.raises(BudgetError, match="the device ran out of memory: no room"):
        run(settings, loss="torch.failing")


def test_a_loss_that_is_nan_ends_the_run(settings: Settings) -> None:
    with pytest.raises(MergeforgeError, match=r"the loss of step \d+ is nan"):
        run(settings, lr=1e30, max_grad_norm=0, schedule="constant", warmup=0)


def test_a_run_writes_all_of_its_files(settings: Settings) -> None:
    folder = run(settings, val=4).folder
    assert {path.name for path in folder.root.iterdir()} >= {"run.json", "metrics.jsonl", "report.html", "adapter"}
    page = folder.report.read_text()
    assert page.count('role="img"') == 6 and "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    manifest = json.loads((folder.root / "run.json").read_text())
    assert manifest["state"] == "finished" and manifest["versions"]["peft"] and len(manifest["samples"]) == 3
    names = {path.name for path in folder.adapter.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"}
    assert len(folder.steps()) == 2


def test_the_memory_probe_leaves_no_trace(settings: Settings) -> None:
    context, _ = make_context(make_plan(settings, device="cpu"))
    state = torch.random.get_rng_state()
    assert probe_memory(context, 64) > 1e8
    assert torch.random.get_rng_state().equal(state)
    assert all(weight.grad is None for weight in context.model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor"])
def test_the_loss_falls_with_every_optimizer(optimizer: str, settings: Settings) -> None:
    trained = run(settings, optimizer=optimizer, lr=1e-3)
    assert losses(trained)[-1] < losses(trained)[0]


def test_checkpointed_activations_do_not_change_the_losses(settings: Settings, finished_run: Trained) -> None:
    checkpointed = run(settings, memory={"checkpointing": True})
    assert losses(checkpointed) == pytest.approx(losses(finished_run), rel=1e-6)


def test_bf16_changes_the_losses_slightly_and_the_adapter_stays_float32(
    settings: Settings, finished_run: Trained
) -> None:
    trained = run(settings, dtype="bf16")
    assert losses(trained) == pytest.approx(losses(finished_run), rel=2e-2)
    assert losses(trained) != losses(finished_run)
    assert {tensor.dtype for tensor in adapter_tensors(trained.folder.root).values()} == {torch.float32}


def test_a_step_has_the_same_rows_packed_or_not(settings: Settings) -> None:
    """So learning rates and steps mean the same; one step on all rows has one loss."""
    changes: Settings = {"batch": {"size": 40, "micro": 4}, "lr": 1e-4}
    packed, unpacked = (run(settings, **changes, pack=pack, output=str(pack)) for pack in (True, False))
    assert packed.steps == unpacked.steps == 1
    assert losses(packed) == pytest.approx(losses(unpacked), rel=1e-5)


def test_metrics_go_to_tensorboard(settings: Settings, here: Path) -> None:
    pytest.importorskip("tensorboard")
    run(settings, track="tensorboard", max_steps=2)
    assert list(here.glob("run/**/events.out.tfevents.*"))


def test_missing_packages_are_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match="track: mlflow is not installed") as error:
        run(settings, track="mlflow")
    assert error.value.hint == "pip install mlflow"
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="training needs peft") as error:
        run(settings)
    assert error.value.hint == ('pip install "transformers>=5.0" "peft>=0.19" "accelerate>=1.10"')
    assert error.value.exit_code == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"targets": ["no_such"]}}, "lora.targets: the model has no module 'no_such'"),
        ({"loss": "nowhere.loss"}, "there is no loss function nowhere.loss"),
        ({"dtype": "fp16"}, "training in fp16 does not work on cpu"),
        ({"memory": {"budget": "100MB"}}, "training needs about .* but cpu has 100.0 MB"),
        ({"model": "nobody/nothing"}, "there is no local nobody/nothing"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl"),
        ({"val": 40}, "val: 40 of 40 distinct rows leaves none to train on"),
        ({"seq_len": 8}, "too long"),
        ({"seq_len": 4096}, "seq_len: 4096 is more than the model's maximum of 2048 tokens"),
    ],
)
def test_settings_that_cannot_work_are_errors(changes: Settings, message: str, settings: Settings) -> None:
    with pytest.raises(MergeforgeError, match=f"(?s){message}"):
        run(settings, **changes)


def test_patience_counts_validations_from_before_an_interruption(settings: Settings) -> None:
    changes: Settings = {"early_stop": {"patience": 3}, "val": 8, "eval": {"every": 1, "max_tokens": 4}, "lr": 0.3}
    changes |= {"epochs": 4}
    whole = run(settings, **changes)
    interrupted = run(settings, listeners=[interrupt_at(whole.steps - 3)], **changes, output="interrupted")
    assert interrupted.interrupted
    resumed = run(settings, **changes, output="interrupted")
    assert resumed.steps == whole.steps and losses(resumed, "eval_loss") == losses(whole, "eval_loss")


def test_validates_and_saves_only_at_the_end(settings: Settings) -> None:
    trained = run(settings, val=4, eval={"every": 0, "max_tokens": 4}, save={"every": 0}, epochs=2)
    assert len(losses(trained, "eval_loss")) == 1 and trained.folder.steps() == [trained.steps]


def test_the_card_of_an_adapter_says_what_it_is(finished_run: Trained) -> None:
    card = (finished_run.result / "README.md").read_text()
    assert "A LoRA adapter (lora) for base" in card and "rows.jsonl: 40 rows" in card
    assert f"| Training loss | {finished_run.loss:.4f} nats per token |" in card
    assert "base_model:" not in card and str(finished_run.folder.root.parent) not in card, "no local folders"


def test_many_skipped_rows_are_refused_unless_allowed(settings: Settings, here: Path) -> None:
    """5 of 45 rows (11 %) cannot be used, then 4 of 44 (9 %)."""
    good = (here / "rows.jsonl").read_text()
    (here / "rows.jsonl").write_text(good + "{\n" * 5)
    with pytest.raises(SourceError, match=r"5 of 45 rows of .*rows.jsonl would not be trained on:\n.*not JSON"):
        make_plan(settings)
    assert len(make_plan(settings | {"allow_skips": True}).data.train) == 40
    (here / "rows.jsonl").write_text(good + "{\n" * 4)
    assert len(make_plan(settings).data.train) == 40
