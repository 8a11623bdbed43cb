"""The model card (README.md) of a trained adapter: base, data, settings, losses, and how to use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mergeforge.train.objectives import SFT
from mergeforge.train.plan import TrainPlan

UNSCALED = ("from peft import AutoPeftModelForCausalLM", "", 'model = AutoPeftModelForCausalLM.from_pretrained(".")')
SCALED = (  # with config.json: the base alone would not scale its positions
    "from peft import PeftConfig, PeftModel",
    "from transformers import AutoConfig, AutoModelForCausalLM",
    "",
    'base, config = PeftConfig.from_pretrained(".").base_model_name_or_path, AutoConfig.from_pretrained(".")',
    'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, config=config), ".")',
)


def adapter_card(plan: TrainPlan, entries: Mapping[str, Any]) -> str:
    """The card's text. entries: the losses and steps of run.json."""
    front = yaml.safe_dump(_front_matter(plan), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n".join(_body(plan, entries)) + "\n"


def _front_matter(plan: TrainPlan) -> dict[str, Any]:
    """What the Hub reads. A local base has no name there, so it is left out."""
    base = {} if Path(plan.base).exists() else {"base_model": plan.base, "base_model_relation": "adapter"}
    datasets = [path.removeprefix("hf://").partition(":")[0] for path in _sources(plan) if path.startswith("hf://")]
    facts: dict[str, Any] = {"library_name": "peft", "pipeline_tag": "text-generation", **base}
    facts |= {"datasets": datasets} if datasets else {}
    return facts | {"tags": [plan.settings.adapter.type if plan.settings.adapter else "lora", "mergeforge"]}


def _body(plan: TrainPlan, entries: Mapping[str, Any]) -> Iterator[str]:
    base, settings, resolved = _base_name(plan), plan.settings, plan.resolved
    lora, counts = resolved.setup.lora, plan.data.counts
    yield f"# {plan.folder.root.resolve().name}"
    yield ""
    kind = settings.adapter.type if settings.adapter else "DoRA" if lora.dora else "LoRA"
    how = settings.method if settings.objective == SFT else f"{settings.method}, {settings.objective}"
    yield f"A {kind} adapter ({how}) for {base}, trained with mergeforge."
    yield ""
    yield "| | |"
    yield "|---|---|"
    rows = {
        "Base model": f"{base}{f' at {plan.revision}' if plan.revision else ''}",
        "Data": f"{', '.join(map(_name, _sources(plan)))}: {counts.used:,} rows, {counts.trained:,} trained tokens",
        "Chat template": plan.data.template_name or "none: plain text",
        "LoRA": "" if settings.adapter else f"rank {lora.r}, alpha {lora.alpha or 2 * (lora.r or 0):g}",
        "Steps": f"{entries['step']} of {settings.batch_size} rows, at most {resolved.setup.seq_len} tokens each",
        "Positions": _positions(plan),
        "Learning rate": f"{resolved.lr:g}, {settings.schedule}",
        "Optimizer": resolved.setup.optimizer,
        "Training loss": _number(entries.get("loss")),
        "Validation loss": _number(entries.get("validation_loss")),
    }
    yield from (f"| {name} | {text} |" for name, text in rows.items() if text)
    yield ""
    yield "## Use"
    yield ""
    yield "Fold it into its base, and write a GGUF file in the same pass:"
    yield ""
    yield "```sh"
    named = "" if Path(plan.base).exists() else f" --base {base}"
    if lora.init == "loftq":
        yield "mergeforge run merge.yaml   # with base_numerics: dequant_nf4, the base that LoftQ starts from"
    else:
        yield f"mergeforge merge{named} --adapter . --out merged --gguf q4_k_m"
    yield "```"
    yield ""
    yield "Or load it with PEFT:"
    yield ""
    yield "```python"
    yield from SCALED if plan.scaled_config else UNSCALED
    yield "```"


def _positions(plan: TrainPlan) -> str:
    """How the base's positions are scaled; "" if they are not."""
    scaling = plan.settings.rope_scaling
    return f"{plan.stats.max_positions}, scaled ({scaling.type}; see config.json)" if scaling else ""


def _base_name(plan: TrainPlan) -> str:
    if plan.settings.model.startswith("sample:"):
        return plan.settings.model
    return Path(plan.base).name if Path(plan.base).exists() else plan.base


def _sources(plan: TrainPlan) -> list[str]:
    return [source.path for source in plan.settings.data.sources]


def _name(path: str) -> str:
    """A source as a card may show it: no local folders."""
    return path if path.startswith(("hf://", "sample:")) else Path(path).name


def _number(loss: Any) -> str:
    return f"{loss:.4f} nats per token" if isinstance(loss, float) else ""
