"""Where a run starts: from the beginning, or from a checkpoint of the same run. Other settings or data are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mergeforge.errors import OutputError, RecipeError, SourceError
from mergeforge.train import environment
from mergeforge.train.plan import TrainPlan
from mergeforge.train.run_folder import FINISHED, RUNNING, RunFolder


@dataclass(frozen=True)
class Resume:
    """Where to start. `how`: auto (the newest checkpoint), never, or a checkpoint's path.

    `extend_epochs`: epochs to add to a finished run. `overwrite`: whether a finished run may be discarded.
    """

    how: str = "auto"
    extend_epochs: float = 0.0
    overwrite: bool = False


def refuse_finished(folder: RunFolder, resume: Resume) -> None:
    """Raise OutputError if the folder holds a finished run that is neither to be extended nor replaced."""
    manifest = folder.manifest()
    if manifest is not None and manifest.get("state") == FINISHED and not (resume.overwrite or resume.extend_epochs):
        hint = "--extend-epochs N trains it further, --overwrite replaces it, or choose another output"
        raise OutputError(f"{folder.root} already holds a finished run", hint=hint)


def start(plan: TrainPlan, resume: Resume) -> tuple[TrainPlan, Path | None]:
    """The plan, with the resolved settings of the run that is resumed, and the checkpoint to resume from, if any.

    Raises OutputError for a finished run, and for one that began with other settings or data.
    """
    folder, manifest = plan.folder, plan.folder.manifest()
    check_resume(folder, resume)
    refuse_finished(folder, resume)
    finished = manifest is not None and manifest.get("state") == FINISHED
    if manifest is None or resume.how == "never" or (finished and resume.overwrite):
        if environment.is_main():
            folder.clear()
            folder.record(run_manifest(plan, RUNNING))
        return plan, None
    if resume.extend_epochs and plan.settings.max_steps:
        raise RecipeError("a run with max_steps cannot be extended by epochs", hint="remove max_steps")
    _check_unchanged(plan, manifest)
    checkpoint = _checkpoint(folder, resume)
    before = manifest["choices"]
    plan = replace(plan, resolved=plan.resolved.from_manifest(before, float(before["epochs"]) + resume.extend_epochs))
    if environment.is_main():
        folder.record(run_manifest(plan, RUNNING))
        folder.cut_metrics(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    return plan, checkpoint


def run_manifest(plan: TrainPlan, state: str) -> dict[str, Any]:
    """The part of run.json that is known before training."""
    return {
        "state": state,
        "settings": plan.settings.raw,
        "fingerprint": plan.settings.fingerprint,
        "base": plan.base,
        "revision": plan.revision,
        "data": plan.data.fingerprint,
        "counts": asdict(plan.data.counts),
        "template": plan.data.template_name,
        "choices": asdict(plan.resolved),
        "versions": environment.versions(),
    }


def check_resume(folder: RunFolder, resume: Resume) -> None:
    """Raise SourceError for the path of a checkpoint that is not one, or where there is no run to resume."""
    if resume.how in ("auto", "never"):
        return
    hint = f"give a folder in {folder.checkpoints}/, or --resume auto"
    if not (Path(resume.how) / "trainer_state.json").is_file():
        raise SourceError(f"{resume.how} is not a checkpoint", hint=hint)
    if folder.manifest() is None:
        raise SourceError(f"{folder.root} holds no run to resume", hint="give the run's folder with --out")


def _checkpoint(folder: RunFolder, resume: Resume) -> Path | None:
    if resume.how != "auto":
        return Path(resume.how)
    steps = folder.steps()
    return folder.checkpoint(steps[-1]) if steps else None


def _check_unchanged(plan: TrainPlan, manifest: Mapping[str, Any]) -> None:
    before, now = manifest.get("settings") or {}, plan.settings.raw
    hint = "restore it to resume, or start over with --resume never"
    if manifest.get("fingerprint") != plan.settings.fingerprint:
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        text = f"{plan.folder.root} began with other settings: {', '.join(changed) or 'unknown'}"
        raise OutputError(text, hint=hint)
    if manifest.get("data") != plan.data.fingerprint:
        raise OutputError(f"the data has changed since {plan.folder.root} began", hint=hint)
