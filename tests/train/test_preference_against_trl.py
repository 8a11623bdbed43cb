"""The preference objectives against TRL's own trainers, on the same tokens, weights and order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_runs import losses, run

from mergeforge.train.loop.collate import EpochShuffler
from mergeforge.train.loop.context import TrainingContext
from mergeforge.train.loop.preference import RewardSums
from mergeforge.train.loop.preference_batch import AnswerTokens
from mergeforge.train.loop.setup import make_context
from mergeforge.train.plan import TrainPlan, make_plan

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own

Settings = dict[str, Any]


def prepared(plan: TrainPlan) -> tuple[TrainingContext, Any]:
    """A run's context, and a fresh copy of its base with an equal adapter."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    context, _ = make_context(plan)
    base = AutoModelForCausalLM.from_pretrained(plan.base, dtype=torch.float32)
    model = get_peft_model(base, context.model.peft_config["default"])
    own = dict(context.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own[name])
    return context, model


def trl_rows(context: TrainingContext) -> list[dict[str, Any]]:
    """The rows of the store as TRL's tokenized columns."""
    rows = []
    for index in range(len(context.train)):
        answers: list[AnswerTokens] = context.train[index]
        row: dict[str, Any] = {"prompt_ids": answers[0].tokens[: answers[0].prompt].tolist()}
        completions = [answer.tokens[answer.prompt :].tolist() for answer in answers]
        if len(answers) == 2:
            row |= {"chosen_ids": completions[0], "rejected_ids": completions[1]}
        else:
            row |= {"completion_ids": completions[0], "label": answers[0].preference > 0}
        rows.append(row)
    return rows


def in_order(rows: list[dict[str, Any]], epochs: int, seed: int) -> list[dict[str, Any]]:
    """The rows in the order in which a run reads them."""
    sampler, ordered = EpochShuffler(len(rows), seed), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        ordered += [rows[index] for index in sampler]
    return ordered


def trl_arguments(folder: Path, plan: TrainPlan, context: TrainingContext) -> dict[str, Any]:
    schedule = context.schedule
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": schedule.micro_batch,
        "gradient_accumulation_steps": schedule.accumulation_steps,
        "max_steps": schedule.total_steps,
        "learning_rate": context.lr,
        "lr_scheduler_type": plan.settings.schedule,
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "disable_tqdm": True,
    }


def trl_curve(trainer_class: Any, config: Any, model: Any, plan: TrainPlan, rows: list[dict[str, Any]]) -> Any:
    class Tokenized(trainer_class):
        """TRL's trainer on rows that are tokenized already."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            if "label" not in dataset.column_names:
                return dataset
            ids, size = dataset["completion_ids"], config.per_device_train_batch_size  # as TRL pairs them
            batches = [ids[start : start + size] for start in range(0, len(ids), size)]
            rotated = [other for batch in batches for other in [batch[-1], *batch[:-1]]]
            return dataset.add_column("KL_completion_ids", rotated)

    trainer = Tokenized(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=plan.tokenizer
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("objective", ["dpo", "ipo"])
def test_the_curve_of_pairs_equals_trl(objective: str, preferences: Settings, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    settings = preferences | {"objective": objective, "epochs": 2}
    plan = make_plan(settings | {"output": str(tmp_path / "copy")}, device="cpu")
    context, model = prepared(plan)
    kind = {"dpo": "sigmoid", "ipo": "ipo"}[objective]
    config = DPOConfig(**trl_arguments(tmp_path, plan, context), loss_type=kind, beta=0.1)
    curve = trl_curve(DPOTrainer, config, model, plan, in_order(trl_rows(context), 2, 0))
    trained = run(settings)
    assert len(curve) == 20
    assert losses(trained) == pytest.approx([line["loss"] for line in curve], rel=1e-4)
    assert losses(trained, "margin") == pytest.approx([line["rewards/margins"] for line in curve], abs=1e-4)
    assert losses(trained, "accuracy") == pytest.approx([line["rewards/accuracies"] for line in curve])


def test_the_curve_of_labels_equals_trl(labels: Settings, tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    settings = labels | {"epochs": 2, "batch": {"size": 8, "micro": 4}}
    settings["preference"] = {"desirable_weight": 1.0, "undesirable_weight": 1.5}
    plan = make_plan(settings | {"output": str(tmp_path / "copy")}, device="cpu")
    context, model = prepared(plan)
    config = KTOConfig(**trl_arguments(tmp_path, plan, context), beta=0.1, undesirable_weight=1.5)
    curve = trl_curve(KTOTrainer, config, model, plan, in_order(trl_rows(context), 2, 0))
    assert losses(run(settings)) == pytest.approx([line["loss"] for line in curve], rel=1e-4)


@pytest.mark.parametrize("objective", ["orpo", "simpo"])
@pytest.mark.parametrize("pack", [False, True])
def test_losses_without_a_reference_equal_trl(
    objective: str, pack: bool, preferences: Settings, tmp_path: Path
) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    plan = make_plan(preferences | {"objective": objective, "pack": pack, "seq_len": 512}, device="cpu")
    context, model = prepared(plan)
    arguments = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 512}
    text = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    options: dict[str, Any] = {"model": model, "train_dataset": text, "processing_class": plan.tokenizer}
    if objective == "orpo":
        trainer = ORPOTrainer(args=ORPOConfig(**arguments, beta=0.1), **options)
    else:
        simpo = CPOConfig(**arguments, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0)
        trainer = CPOTrainer(args=simpo, **options)
    sequences = [context.train[index] for index in range(len(context.train))][:2]
    assert context.preference is not None
    batch = context.preference.collate(sequences)
    with torch.no_grad():
        loss = context.loss(context.model, batch, context.loss_count(batch), RewardSums())
        expected, _ = trainer.get_batch_loss_metrics(model, trl_batch([a for rows in sequences for a in rows]))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def trl_batch(answers: list[AnswerTokens]) -> dict[str, torch.Tensor]:
    """Padded tensors as TRL's trainers without a reference collate them."""
    batch = {}
    for name, kind in (("chosen", 1), ("rejected", -1)):
        rows = [answer for answer in answers if answer.preference == kind]
        pad = torch.nn.utils.rnn.pad_sequence
        batch[f"{name}_input_ids"] = pad([row.tokens.long() for row in rows], True, 0)
        batch[f"{name}_attention_mask"] = pad([torch.ones_like(row.tokens).long() for row in rows], True, 0)
        batch[f"{name}_labels"] = pad([row.labels.long() for row in rows], True, -100)
    return batch
