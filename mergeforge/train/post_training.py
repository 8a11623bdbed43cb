"""What follows training: the adapter is folded into its base, GGUF files come out of the same pass, all is published.

Which numerics the base has for the fold is decided by measuring: the adapter was trained on the NF4 form of the base
(`dequant_nf4` reproduces it), while the base's own weights are usually, but not always, the better model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mergeforge.errors import RecipeError, SourceError
from mergeforge.io.disk import write_durably
from mergeforge.train.html_report import write_report
from mergeforge.train.plan import TrainPlan
from mergeforge.train.settings import MergeAfterTraining, PostTraining

STEPS = ("merge", "gguf", "publish")
NF4 = "dequant_nf4"
CLOSE = 1e-3  # nats a token: the original base is kept when it is worse by less
OnMessage = Callable[[str], object]


@dataclass(frozen=True)
class PostTrainingResult:
    """What was made. `losses`: of the validation data, in nats a token, by what was measured."""

    merged: Path | None = None
    base_numerics: str = "original"
    ggufs: tuple[Path, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    published: str | None = None


def write_recipe(plan: TrainPlan) -> None:
    """merge.yaml: a recipe that folds the run's adapter into its base."""
    lines = ["# Folds this run's adapter into its base."]
    numerics = None
    if plan.settings.method == "qlora" and not plan.stored_transposed:
        numerics = NF4
        lines.append(
            "# dequant_nf4: the base as the adapter saw it; original: its own weights, often the better model."
        )
    text = yaml.safe_dump(merge_recipe(plan, numerics, plan.folder.merged, str), sort_keys=False)
    write_durably(plan.folder.recipe, ("\n".join(lines) + "\n" + text).encode())


def merge_recipe(plan: TrainPlan, numerics: str | None, out: Path, spell: Callable[[Path], str]) -> dict[str, Any]:
    """A recipe with the adapter as it lies in the run's folder. `spell`: how an absolute path is written."""
    local = Path(plan.base)
    base = spell(local.resolve()) if local.exists() else plan.base
    base = f"{base}@{plan.revision}" if plan.revision else base
    recipe: dict[str, Any] = {"base_model": base, "adapters": [spell(plan.folder.adapter.resolve())]}
    recipe |= {} if numerics in (None, "original") else {"base_numerics": numerics}
    return recipe | {"output": {"path": spell(out.resolve())}}


def _relative_to_here(path: Path) -> str:
    """A path below the current folder as such: the model card shows the recipe, and not where a home lies."""
    here = Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def steps_from_names(after: PostTraining, steps: str) -> PostTraining:
    """`--then merge,gguf,publish` on top of the file's `after`. Raises RecipeError for a step that is not known."""
    asked = [one.strip() for one in steps.split(",") if one.strip()]
    for one in asked:
        if one not in STEPS:
            raise RecipeError(f"--then {one}: it is {', '.join(STEPS)}")
    if "publish" in asked and not after.publish:
        raise RecipeError("--then publish: where to?", hint="after: {publish: owner/name} in train.yaml")
    return replace(
        after,
        merge=after.merge or MergeAfterTraining(),
        gguf=(after.gguf or ("q4_k_m",)) if "gguf" in asked else after.gguf,
        publish=after.publish if "publish" in asked else None,
    )


def run_post_training(
    plan: TrainPlan, after: PostTraining, *, memory: str | None = None, tell: OnMessage = lambda line: None
) -> PostTrainingResult:
    """Merge, write GGUF, publish, as `after` says. Raises what merging and publishing raise."""
    wanted = after.merge
    if wanted is None:
        return PostTrainingResult()
    out = Path(wanted.path) if wanted.path else plan.folder.merged
    measured = wanted.evaluate and plan.data.validation is not None
    losses = {"adapter": _adapter_loss(plan)} if measured else {}
    numerics = _first_numerics(plan, wanted)
    _merge(plan, after, wanted, numerics, out, memory)
    if measured:
        losses[numerics] = merged_loss(plan, out)
        tell(f"validation loss: adapter {losses['adapter']:.4f}, merged on {numerics} {losses[numerics]:.4f}")
        worse = losses[numerics] > losses["adapter"] + CLOSE
        if wanted.base_numerics == "auto" and plan.settings.method == "qlora" and worse:
            tell("the merge on the original base is worse: once more on the base as the adapter saw it")
            numerics = NF4 if _evaluate_again(plan, after, wanted, out, memory, tell) else numerics
            if numerics == NF4:
                losses[NF4] = merged_loss(plan, out)
                tell(f"validation loss: merged on {NF4} {losses[NF4]:.4f}")
    published = _publish(out, after.publish, tell) if after.publish else None
    made = PostTrainingResult(out, numerics, tuple(sorted(out.glob("*.gguf"))), losses, published)
    plan.folder.record((plan.folder.manifest() or {}) | {"followed": asdict(made)})
    write_report(plan.folder)
    return made


def _adapter_loss(plan: TrainPlan) -> float:
    """The validation loss that the run ended with."""
    return float((plan.folder.manifest() or {}).get("validation_loss", float("nan")))


def _evaluate_again(
    plan: TrainPlan, after: PostTraining, wanted: MergeAfterTraining, out: Path, memory: str | None, tell: OnMessage
) -> bool:
    """Merge on the NF4 form of the base; False where the model has none that could be told."""
    try:
        _merge(plan, after, wanted, NF4, out, memory)
    except SourceError as error:  # found while planning: the merge that is there stays
        tell(f"it stays: {error}")
        return False
    return True


def _first_numerics(plan: TrainPlan, wanted: MergeAfterTraining) -> str:
    if plan.settings.method != "qlora" or wanted.base_numerics == "auto":
        return "original"
    return wanted.base_numerics


def _merge(
    plan: TrainPlan, after: PostTraining, wanted: MergeAfterTraining, numerics: str, out: Path, memory: str | None
) -> None:
    """Fold the adapter and write GGUF files in the same pass."""
    from mergeforge.execute import executor
    from mergeforge.planner import make_plan as plan_merge

    recipe = merge_recipe(plan, numerics, out, _relative_to_here)
    if after.gguf:
        recipe["output"]["gguf"] = list(after.gguf)
    if wanted.dtype:
        recipe["out_dtype"] = wanted.dtype
    executor.run_plan(plan_merge(recipe, memory=memory, device=plan.resolved.device), overwrite=True)


def merged_loss(plan: TrainPlan, folder: Path) -> float:
    """The validation loss of a merged folder, in nats a token, on the run's device."""
    from mergeforge.eval import evaluate

    assert plan.data.validation is not None
    return evaluate(str(folder), plan.data.validation, device=plan.resolved.device).nll


def _publish(folder: Path, wanted: Mapping[str, Any], tell: OnMessage) -> str:
    from mergeforge.hub.publish import plan_publication, publish

    options = {"private": wanted.get("private", True), "revision": wanted.get("revision", "main")}
    for done in publish(plan_publication(folder, wanted["repo"], **options)):
        tell(f"published {done}")
    return str(wanted["repo"])
