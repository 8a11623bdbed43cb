"""What happens after training: merging the adapter into its base, GGUF files in the same pass, and publishing.

The adapter was trained on the NF4 form of the base, which `dequant_nf4` reproduces. The base's own weights are usually,
but not always, the better model; which of the two forms to merge on is decided by validation loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mergeforge.core.messages import OnMessage
from mergeforge.errors import RecipeError, SourceError
from mergeforge.io.disk import write_durably
from mergeforge.train.html_report import write_report
from mergeforge.train.plan import TrainPlan
from mergeforge.train.settings import MergeAfterTraining, PostTraining

STEPS = ("merge", "gguf", "publish")
NF4 = "dequant_nf4"
TOLERANCE = 1e-3  # nats per token by which the merge on the original base may be worse than the adapter


@dataclass(frozen=True)
class PostTrainingResult:
    """What was written. `losses`: validation losses in nats per token, of the adapter and by base_numerics."""

    merged: Path | None = None
    base_numerics: str = "original"
    ggufs: tuple[Path, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    published: str | None = None


def write_recipe(plan: TrainPlan) -> None:
    """Write merge.yaml: a recipe that folds the run's adapter into its base."""
    lines = ["# Folds this run's adapter into its base."]
    numerics = None
    if plan.settings.method == "qlora" and not plan.stored_transposed:
        numerics = NF4
        lines.append(
            "# dequant_nf4: the base as the adapter saw it; original: its own weights, often the better model."
        )
    text = yaml.safe_dump(_recipe(plan, numerics, plan.folder.merged, str), sort_keys=False)
    write_durably(plan.folder.recipe, ("\n".join(lines) + "\n" + text).encode())


def _recipe(plan: TrainPlan, numerics: str | None, out: Path, format_path: Callable[[Path], str]) -> dict[str, Any]:
    """The recipe that merges the adapter of the run's folder. `format_path`: writes an absolute path."""
    local = Path(plan.base)
    base = format_path(local.resolve()) if local.exists() else plan.base
    base = f"{base}@{plan.revision}" if plan.revision else base
    recipe: dict[str, Any] = {"base_model": base, "adapters": [format_path(plan.folder.adapter.resolve())]}
    recipe |= {} if numerics in (None, "original") else {"base_numerics": numerics}
    return recipe | {"output": {"path": format_path(out.resolve())}}


def _relative_to_here(path: Path) -> str:
    """A path below the current folder as a relative one: the model card shows the recipe, but no home folder."""
    here = Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def steps_from_names(after: PostTraining, names: str, *, trains_adapter: bool = True) -> PostTraining:
    """`--then merge,gguf,publish` on top of the file's `after`. Raises RecipeError for an unknown step."""
    steps = [name.strip() for name in names.split(",") if name.strip()]
    for step in steps:
        if step not in STEPS:
            raise RecipeError(f"there is no step {step!r} after training", hint=f"the steps are {', '.join(STEPS)}")
    if "publish" in steps and not after.publish:
        text = "--then publish needs the name of the repo"
        raise RecipeError(text, hint="add after: {publish: owner/name} to train.yaml")
    return replace(
        after,
        merge=after.merge or (MergeAfterTraining() if trains_adapter or "merge" in steps else None),
        gguf=(after.gguf or ("q4_k_m",)) if "gguf" in steps else after.gguf,
        publish=after.publish if "publish" in steps else None,
    )


def run_post_training(
    plan: TrainPlan, after: PostTraining, *, memory: str | None = None, on_message: OnMessage = lambda line: None
) -> PostTrainingResult:
    """Merge, write GGUF files and publish, as `after` says. Raises what merging and publishing raise."""
    merge = after.merge
    if merge is None:
        return _finish_model(plan, after, memory, on_message)
    out = Path(merge.path) if merge.path else plan.folder.merged
    is_measured = merge.evaluate and plan.data.validation is not None
    losses = {"adapter": _adapter_loss(plan)} if is_measured else {}
    numerics = _first_numerics(plan, merge)
    _merge(plan, after, numerics, out, memory)
    if is_measured:
        losses[numerics] = merged_loss(plan, out)
        on_message(f"validation loss: adapter {losses['adapter']:.4f}, merged on {numerics} {losses[numerics]:.4f}")
        is_worse = losses[numerics] > losses["adapter"] + TOLERANCE
        if merge.base_numerics == "auto" and plan.settings.method == "qlora" and is_worse:
            on_message("the merge on the original base is worse: merging again on the NF4 form that the adapter saw")
            if _merge_on_nf4(plan, after, out, memory, on_message):
                numerics = NF4
                losses[NF4] = merged_loss(plan, out)
                on_message(f"validation loss: merged on {NF4} {losses[NF4]:.4f}")
    published = _publish(out, after.publish, on_message) if after.publish else None
    result = PostTrainingResult(out, numerics, tuple(sorted(out.glob("*.gguf"))), losses, published)
    plan.folder.record((plan.folder.manifest() or {}) | {"followed": asdict(result)})
    write_report(plan.folder)
    return result


def _finish_model(
    plan: TrainPlan, after: PostTraining, memory: str | None, on_message: OnMessage
) -> PostTrainingResult:
    """Write the GGUF files of a fully trained model beside its weights, and publish it."""
    from mergeforge.operations.convert_gguf import convert, plan_conversion
    from mergeforge.planner import Options

    if not after.any_step:
        return PostTrainingResult()
    ggufs: tuple[Path, ...] = ()
    if after.gguf:
        options = Options(memory=memory, device=plan.resolved.device)
        folder = str(plan.folder.model)
        conversion = plan_conversion(folder, after.gguf, folder, {}, options, overwrite=True)
        for _ in convert(conversion, overwrite=True):
            pass
        ggufs = tuple(conversion.files)
    published = _publish(plan.folder.model, after.publish, on_message) if after.publish else None
    result = PostTrainingResult(ggufs=ggufs, published=published)
    plan.folder.record((plan.folder.manifest() or {}) | {"followed": asdict(result)})
    return result


def _adapter_loss(plan: TrainPlan) -> float:
    """The validation loss that the run ended with, in nats per token of the answers."""
    manifest = plan.folder.manifest() or {}
    return float(manifest.get("validation_nll", manifest.get("validation_loss", float("nan"))))


def _merge_on_nf4(plan: TrainPlan, after: PostTraining, out: Path, memory: str | None, on_message: OnMessage) -> bool:
    """Merge on the NF4 form of the base; False where that form cannot be reproduced."""
    try:
        _merge(plan, after, NF4, out, memory)
    except SourceError as error:  # raised by the plan, before anything is written
        on_message(f"keeping the merge on the original base: {error}")
        return False
    return True


def _first_numerics(plan: TrainPlan, merge: MergeAfterTraining) -> str:
    if plan.settings.lora.init == "loftq" and merge.base_numerics == "auto":
        return NF4  # the adapter holds what the NF4 form lost: on the original base it would count twice
    if plan.settings.method != "qlora" or merge.base_numerics == "auto":
        return "original"
    return merge.base_numerics


def _merge(plan: TrainPlan, after: PostTraining, numerics: str, out: Path, memory: str | None) -> None:
    """Fold the adapter into its base and write the GGUF files in the same pass."""
    from mergeforge.execute import executor
    from mergeforge.planner import make_plan as plan_merge

    recipe = _recipe(plan, numerics, out, _relative_to_here)
    if after.gguf:
        recipe["output"]["gguf"] = list(after.gguf)
    if after.merge and after.merge.dtype:
        recipe["out_dtype"] = after.merge.dtype
    executor.run_plan(plan_merge(recipe, memory=memory, device=plan.resolved.device), overwrite=True)


def merged_loss(plan: TrainPlan, folder: Path) -> float:
    """The validation loss of a merged model, in nats per token, measured on the run's device."""
    from mergeforge.eval import evaluate

    assert plan.data.validation is not None
    return evaluate(str(folder), plan.data.validation, device=plan.resolved.device).nll


def _publish(folder: Path, target: Mapping[str, Any], on_message: OnMessage) -> str:
    from mergeforge.hub.publish import plan_publication, publish

    options = {"private": target.get("private", True), "revision": target.get("revision", "main")}
    for uploaded in publish(plan_publication(folder, target["repo"], **options)):
        on_message(f"published {uploaded}")
    return str(target["repo"])
