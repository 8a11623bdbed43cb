"""TrainPlan -> a finished run: trains, keeps the best, writes adapter, recipe and report."""

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

from mergeforge.core.sizes import format_size
from mergeforge.errors import BudgetError, OutputError
from mergeforge.tensors.budget import resident_memory
from mergeforge.train import requirements
from mergeforge.train.distributed import is_main
from mergeforge.train.html_report import write_report
from mergeforge.train.plan import TrainPlan
from mergeforge.train.post_training import write_recipe
from mergeforge.train.resume import Resume, run_manifest, start
from mergeforge.train.run_folder import FINISHED, INTERRUPTED, RunFolder

if TYPE_CHECKING:
    from mergeforge.train.loop.context import MetricCallback, TrainingContext
    from mergeforge.train.loop.hf_trainer import StopSignal, TrainingOutcome
    from mergeforge.train.loop.samples import SampleGenerator


@dataclass(frozen=True)
class Trained:
    """A run that has come to its end, or was interrupted; losses in nats a token, memory in bytes."""

    folder: RunFolder
    steps: int
    loss: float | None
    validation_loss: float | None
    best_step: int | None
    interrupted: bool
    seconds: float
    peak_memory: int

    @property
    def result(self) -> Path:
        """The adapter's folder; the model's, where all of it was trained."""
        return self.folder.model if self.folder.model.exists() else self.folder.adapter


def train(plan: TrainPlan, resume: Resume | None = None, listeners: Sequence[MetricCallback] = ()) -> Trained:
    """Train as planned; goes on from the newest checkpoint where an earlier run of the same settings stopped.

    Ctrl-C ends the step, writes a checkpoint and returns with `interrupted`. Raises OutputError when the folder holds
    a finished run or one with other settings or data, BudgetError when the device's memory runs out twice.
    """
    with requirements.silence_libraries(), plan.folder.lock() if is_main() else contextlib.nullcontext():
        plan, checkpoint = start(plan, resume or Resume())
        return _train(plan, checkpoint, listeners)


def trained_before(plan: TrainPlan) -> Trained | None:
    """The finished run that lies in the plan's folder, if its settings and data are the plan's."""
    facts = plan.folder.manifest() or {}
    if facts.get("state") != FINISHED or (facts["fingerprint"], facts["data"]) != (
        plan.settings.fingerprint,
        plan.data.fingerprint,
    ):
        return None
    return _trained(plan.folder, facts)


def _trained(folder: RunFolder, facts: Mapping[str, Any]) -> Trained:
    return Trained(
        folder,
        facts["step"],
        facts["loss"],
        facts.get("validation_loss"),
        facts["best_step"],
        facts["interrupted"],
        facts["seconds"],
        facts["peak_memory"],
    )


def _train(plan: TrainPlan, checkpoint: Path | None, listeners: Sequence[MetricCallback]) -> Trained:
    from mergeforge.train.loop.samples import SampleGenerator
    from mergeforge.train.loop.setup import make_context

    started = time.monotonic()
    shutil.rmtree(plan.folder.partial, ignore_errors=True)
    job, notes = make_context(plan, listeners)
    for note in notes:
        job.report({"note": note})
    if job.device.startswith("cuda"):
        _probe(job, plan)
    samples = SampleGenerator(plan, job)
    if checkpoint is None and is_main():
        plan.folder.record_samples(samples.take())
    with _stoppable() as stop:
        outcome = _steps(plan, job, checkpoint, stop)
    facts = run_manifest(plan, INTERRUPTED if outcome.interrupted else FINISHED) | asdict(outcome) | {"notes": notes}
    facts |= {"loss": _last_loss(plan.folder)}
    if is_main() and not outcome.interrupted:
        facts |= _finish(plan, job, outcome, samples)
    facts |= {"seconds": round(time.monotonic() - started, 3), "peak_memory": _peak(job)}
    if is_main():
        plan.folder.record(facts)
        write_report(plan.folder)
    return _trained(plan.folder, facts)


def _probe(job: TrainingContext, plan: TrainPlan) -> None:
    """Try the largest batch; with less memory than was estimated, half of it."""
    import torch

    from mergeforge.train.loop.memory_probe import probe_memory

    try:
        peak = probe_memory(job, plan.resolved.setup.seq_len)
    except torch.OutOfMemoryError as error:
        _halve_batch(job, error)
        return
    estimated = plan.resolved.estimate.total
    job.report({"note": f"a full batch takes {format_size(peak)}; {format_size(estimated)} was the estimate"})


def _steps(plan: TrainPlan, job: TrainingContext, checkpoint: Path | None, stop: StopSignal) -> TrainingOutcome:
    """The loop; when memory runs out, once more with half as many sequences in a pass, from the last step."""
    import torch

    from mergeforge.train.loop import hf_trainer, reference_loop

    if plan.settings.loop == "simple":
        if checkpoint is not None:
            raise OutputError("the simple loop cannot go on from a checkpoint", hint="loop: trainer, or --resume never")
        return reference_loop.train(job, stop)
    try:
        return hf_trainer.train(job, checkpoint, stop)
    except torch.OutOfMemoryError as error:
        _halve_batch(job, error)
    steps = plan.folder.steps()
    try:
        return hf_trainer.train(job, plan.folder.checkpoint(steps[-1]) if steps else None, stop)
    except torch.OutOfMemoryError as error:
        raise _memory_error(error) from None


def _halve_batch(job: TrainingContext, error: Exception) -> None:
    """Half as many sequences a pass, twice as many passes a step. Raises BudgetError where there is no half."""
    import torch

    micro = job.schedule.micro_batch // 2
    if not micro:
        raise _memory_error(error) from None
    job.schedule = replace(job.schedule, micro_batch=micro, accumulation_steps=job.schedule.accumulation_steps * 2)
    if job.device.startswith("cuda"):
        torch.cuda.empty_cache()
    text = f"memory ran out: {micro} sequence(s) a pass from here, and twice as many passes a step"
    job.report({"note": text})


def _memory_error(error: Exception) -> BudgetError:
    said = str(error).splitlines()[0]
    return BudgetError(
        f"the device's memory ran out: {said}", hint="a shorter seq_len, a lower lora.r, a smaller model"
    )


def _finish(
    plan: TrainPlan, job: TrainingContext, outcome: TrainingOutcome, samples: SampleGenerator
) -> dict[str, Any]:
    """Write what the run was for; the facts that only its end tells."""
    from mergeforge.train.loop.context import load_weights, save_model, validation_sums

    folder, facts = plan.folder, dict[str, Any]()
    best, wanted = outcome.best_step, plan.settings.save.best
    if best not in (None, outcome.step) and wanted is not False and folder.checkpoint(int(best or 0)).exists():
        load_weights(job, folder.checkpoint(int(best or 0)))
        facts["kept_step"] = best
    if job.validation is not None:
        total, count = validation_sums(job.model, job)
        facts["validation_loss"] = total / count
    result = folder.adapter if plan.settings.trains_adapter else folder.model
    work = result.with_name(f".{result.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    save_model(job, work)
    shutil.rmtree(result, ignore_errors=True)
    os.replace(work, result)
    if plan.settings.trains_adapter:
        write_recipe(plan)
    return facts | {"samples": _before_and_after(folder, samples.take())}


def _before_and_after(folder: RunFolder, after: Mapping[str, str]) -> list[dict[str, Any]]:
    before = folder.samples_before()
    return [{"prompt": prompt, "before": before.get(prompt), "after": text} for prompt, text in after.items()]


def _last_loss(folder: RunFolder) -> float | None:
    """The mean of the last ten steps."""
    losses = folder.metric_values("loss")[-10:]
    return sum(losses) / len(losses) if losses else None


@contextlib.contextmanager
def _stoppable() -> Iterator[StopSignal]:
    """The first Ctrl-C or SIGTERM asks to stop after this step, the second ends at once."""
    from mergeforge.train.loop.hf_trainer import StopSignal

    stop = StopSignal()

    def ask(number: int, frame: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    kept = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        kept = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _peak(job: TrainingContext) -> int:
    import torch

    if job.device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(job.device))
    return resident_memory()
