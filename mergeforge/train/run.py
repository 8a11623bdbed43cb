"""Run a TrainPlan: train, keep the best step, write the adapter, the recipe and the report."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.file_names import MODEL_CARD
from mergeforge.core.sizes import format_size
from mergeforge.errors import BudgetError, OutputError, RecipeError
from mergeforge.io.disk import write_durably
from mergeforge.tensors.budget import resident_memory
from mergeforge.train.adapter_card import adapter_card
from mergeforge.train.environment import is_main, silence_libraries
from mergeforge.train.html_report import report_writer, write_report
from mergeforge.train.objectives import REWARD_METRICS
from mergeforge.train.plan import TrainPlan
from mergeforge.train.post_training import write_recipe
from mergeforge.train.preference_verdict import make_preference_verdict
from mergeforge.train.progress import TOTAL
from mergeforge.train.resume import Resume, run_manifest, start
from mergeforge.train.run_folder import FINISHED, INTERRUPTED, RUNNING, RunFolder
from mergeforge.train.verdict import Verdict, make_verdict, read_verdict

if TYPE_CHECKING:
    from mergeforge.train.loop.context import MetricCallback, TrainingContext
    from mergeforge.train.loop.hf_trainer import StopSignal, TrainingOutcome
    from mergeforge.train.loop.preference import RewardSums
    from mergeforge.train.loop.samples import SampleGenerator


@dataclass(frozen=True)
class Trained:
    """A run that finished or was interrupted. Losses are in nats per token, memory in bytes."""

    folder: RunFolder
    steps: int
    loss: float | None
    validation_loss: float | None
    best_step: int | None
    interrupted: bool
    seconds: float
    peak_memory: int
    stopped_early: bool = False
    verdict: Verdict | None = None

    @property
    def result(self) -> Path:
        """The folder of the adapter, or of the model after full training."""
        return self.folder.model if self.folder.model.exists() else self.folder.adapter


def train(plan: TrainPlan, resume: Resume | None = None, listeners: Sequence[MetricCallback] = ()) -> Trained:
    """Train as planned, or resume from the newest checkpoint of an earlier run with the same settings.

    `listeners` are called with every line of metrics. Ctrl-C finishes the step, writes a checkpoint and returns with
    `interrupted` set. Raises OutputError when the folder holds a finished run or one with other settings or data,
    and BudgetError when the device runs out of memory twice.
    """
    if plan.gpu:
        raise RecipeError(f"the plan is for {plan.gpu.label}, not for this machine", hint="plan without `gpu` to train")
    with silence_libraries(), plan.folder.lock() if is_main() else contextlib.nullcontext():
        plan, checkpoint = start(plan, resume or Resume())
        return _train(plan, checkpoint, listeners)


def trained_before(plan: TrainPlan) -> Trained | None:
    """The finished run in the plan's folder, if it has the plan's settings and data."""
    manifest = plan.folder.manifest() or {}
    if manifest.get("state") != FINISHED or (manifest["fingerprint"], manifest["data"]) != (
        plan.settings.fingerprint,
        plan.data.fingerprint,
    ):
        return None
    return _trained(plan.folder, manifest)


def _trained(folder: RunFolder, manifest: Mapping[str, Any]) -> Trained:
    return Trained(
        folder,
        manifest["step"],
        manifest["loss"],
        manifest.get("validation_loss"),
        manifest["best_step"],
        manifest["interrupted"],
        manifest["seconds"],
        manifest["peak_memory"],
        manifest.get("stopped_early", False),
        read_verdict(manifest.get("verdict")),
    )


def _train(plan: TrainPlan, checkpoint: Path | None, listeners: Sequence[MetricCallback]) -> Trained:
    from mergeforge.train.loop.row_scores import score_start
    from mergeforge.train.loop.samples import SKIPPED, SampleGenerator
    from mergeforge.train.loop.setup import make_context

    started = time.monotonic()
    shutil.rmtree(plan.folder.partial, ignore_errors=True)
    context, notes = make_context(plan, listeners)
    for note in notes:
        context.report({"note": note})
    if context.device.startswith("cuda"):
        _probe_memory(context, plan)
    context.report({TOTAL: context.schedule.total_steps})
    samples = SampleGenerator(plan, context)
    if samples.skipped:
        notes.append(SKIPPED)
        context.report({"note": SKIPPED})
    if checkpoint is None and is_main():
        plan.folder.record_samples(samples.generate())
        plan.folder.record_base_scores(score_start(plan, context))
    facts = _facts(context) | {"samples": _samples(plan.folder, samples)}
    if is_main():
        plan.folder.record(run_manifest(plan, RUNNING) | facts)
        context.callbacks.append(report_writer(plan.folder))
    with _stop_signal() as stop:
        outcome = _run_loop(plan, context, checkpoint, stop)
    manifest = run_manifest(plan, INTERRUPTED if outcome.interrupted else FINISHED)
    manifest |= facts | asdict(outcome) | {"notes": notes, "loss": _recent(plan.folder, "loss")}
    manifest |= {name: _recent(plan.folder, name) for name in REWARD_METRICS if context.preference}
    if is_main() and not outcome.interrupted:
        manifest |= _write_results(plan, context, outcome, samples)
    manifest |= {"seconds": round(time.monotonic() - started, 3), "peak_memory": _peak_memory(context)}
    if is_main():
        plan.folder.record(manifest)
        write_report(plan.folder)
    return _trained(plan.folder, manifest)


def _probe_memory(context: TrainingContext, plan: TrainPlan) -> None:
    """Try the largest batch, and halve the batch if it does not fit."""
    import torch

    from mergeforge.train.loop.setup import probe_memory

    try:
        peak = probe_memory(context, plan.resolved.setup.seq_len)
    except torch.OutOfMemoryError as error:
        _halve_batch(context, error)
        return
    estimate = plan.resolved.estimate.total
    context.report({"note": f"a full batch takes {format_size(peak)}; the estimate was {format_size(estimate)}"})


def _run_loop(plan: TrainPlan, context: TrainingContext, checkpoint: Path | None, stop: StopSignal) -> TrainingOutcome:
    """Run the loop. When memory runs out, resume once from the last step with half the micro-batch."""
    import torch

    from mergeforge.train.loop import hf_trainer, reference_loop

    if plan.settings.loop == "simple":
        if checkpoint is not None:
            hint = "set loop: trainer, or start over with --resume never"
            raise OutputError("the simple loop cannot resume from a checkpoint", hint=hint)
        return reference_loop.train(context, stop)
    try:
        return hf_trainer.train(context, checkpoint, stop)
    except torch.OutOfMemoryError as error:
        _halve_batch(context, error)
    steps = plan.folder.steps()
    try:
        return hf_trainer.train(context, plan.folder.checkpoint(steps[-1]) if steps else None, stop)
    except torch.OutOfMemoryError as error:
        raise _memory_error(error) from None


def _halve_batch(context: TrainingContext, error: Exception) -> None:
    """Halve the micro-batch and double the accumulation steps. Raises BudgetError for a micro-batch of 1."""
    import torch

    schedule = context.schedule
    micro_batch = schedule.micro_batch // 2
    if not micro_batch:
        raise _memory_error(error) from None
    context.schedule = replace(schedule, micro_batch=micro_batch, accumulation_steps=schedule.accumulation_steps * 2)
    if context.device.startswith("cuda"):
        torch.cuda.empty_cache()
    text = f"out of memory: continuing with a micro-batch of {micro_batch} and twice the gradient accumulation"
    context.report({"note": text})


def _memory_error(error: Exception) -> BudgetError:
    hint = "use a shorter seq_len, a lower lora.r or a smaller model"
    return BudgetError(f"the device ran out of memory: {str(error).splitlines()[0]}", hint=hint)


def _write_results(
    plan: TrainPlan, context: TrainingContext, outcome: TrainingOutcome, samples: SampleGenerator
) -> dict[str, Any]:
    """Write the adapter (or model) and its recipe; returns the entries of run.json that are known only at the end."""
    from mergeforge.train.loop.context import load_weights, save_model, validation_sums
    from mergeforge.train.loop.preference import RewardSums

    folder, entries = plan.folder, dict[str, Any]()
    best = outcome.best_step
    if best not in (None, outcome.step) and plan.settings.save.best is not False:
        checkpoint = folder.checkpoint(int(best or 0))
        if checkpoint.exists():
            load_weights(context, checkpoint)
            entries["kept_step"] = best
    rewards = RewardSums()
    if context.validation is not None:
        total, count = validation_sums(context.model, context, rewards=rewards)
        entries["validation_loss"] = total / count
        if context.preference:
            entries |= rewards.metrics("validation_") | {"validation_nll": rewards.nll}
    result = folder.adapter if plan.settings.trains_adapter else folder.model
    partial = result.with_name(f".{result.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(context, partial)
    if plan.settings.trains_adapter:
        card = adapter_card(plan, {"step": outcome.step, "loss": _recent(folder, "loss"), **entries})
        write_durably(partial / MODEL_CARD, card.encode())
    shutil.rmtree(result, ignore_errors=True)
    os.replace(partial, result)
    if plan.settings.trains_adapter:
        write_recipe(plan)
    entries["verdict"] = asdict(_verdict(plan, context, rewards, entries.get("kept_step", outcome.step)))
    return entries | {"samples": _samples(folder, samples, samples.generate())}


def _verdict(plan: TrainPlan, context: TrainingContext, rewards: RewardSums, kept_step: int) -> Verdict:
    from mergeforge.train.loop.row_scores import score_validation

    before, metrics = plan.folder.base_scores(), plan.folder.metric_lines()
    if context.preference is None:
        after, vocabulary = score_validation(plan, context), plan.stats.vocabulary
        return make_verdict(before, after, metrics, vocabulary=vocabulary, kept_step=kept_step)
    reward = rewards.metrics().get("reward_chosen")
    objective = context.preference.objective.name
    return make_preference_verdict(objective, before, rewards.rows, metrics, kept_step=kept_step, reward_chosen=reward)


def _facts(context: TrainingContext) -> dict[str, Any]:
    """Entries of run.json that are known once the model is loaded: parameters and the schedule."""
    parameters = list(context.model.parameters())
    schedule = context.schedule
    return {
        "parameters": {
            "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "all": context.base_model.num_parameters(),
        },
        "schedule": {
            "sequences in a step": schedule.micro_batch * schedule.accumulation_steps,
            "steps in all": schedule.total_steps,
            "warmup steps": schedule.warmup_steps,
        },
    }


def _samples(
    folder: RunFolder, samples: SampleGenerator, after: Mapping[str, str] | None = None
) -> list[dict[str, str | None]]:
    """The samples for the report, with the expected answer where the data has one."""
    before, answers = folder.samples_before(), dict(after or {})
    return [
        {
            "prompt": prompt,
            "expected": samples.expected.get(prompt),
            "before": before.get(prompt),
            "after": answers.get(prompt),
        }
        for prompt in before | answers
    ]


def _recent(folder: RunFolder, name: str) -> float | None:
    """The mean of a metric over the last ten steps."""
    values = folder.metric_values(name)[-10:]
    return sum(values) / len(values) if values else None


@contextlib.contextmanager
def _stop_signal() -> Iterator[StopSignal]:
    """A signal that the first Ctrl-C or SIGTERM sets: stop after this step. The second one raises KeyboardInterrupt."""
    from mergeforge.train.loop.hf_trainer import StopSignal

    stop = StopSignal()

    def request_stop(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    handlers = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _peak_memory(context: TrainingContext) -> int:
    import torch

    if context.device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(context.device))
    return resident_memory()
