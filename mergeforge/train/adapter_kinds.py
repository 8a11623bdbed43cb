"""Kinds of adapters besides LoRA that can be trained, and that the merge engine folds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergeforge.errors import RecipeError, did_you_mean
from mergeforge.recipe.schema import ReportProblem

ADAPTER_KINDS = {  # name -> PEFT's class of settings
    "boft": "BOFTConfig",
    "c3a": "C3AConfig",
    "deft": "DeftConfig",
    "delora": "DeloraConfig",
    "fourierft": "FourierFTConfig",
    "glora": "GloraConfig",
    "gralora": "GraloraConfig",
    "hira": "HiraConfig",
    "hra": "HRAConfig",
    "ia3": "IA3Config",
    "ln_tuning": "LNTuningConfig",
    "loha": "LoHaConfig",
    "lokr": "LoKrConfig",
    "miss": "MissConfig",
    "oft": "OFTConfig",
    "osf": "OSFConfig",
    "peanut": "PeanutConfig",
    "psoft": "PsoftConfig",
    "pvera": "PveraConfig",
    "randlora": "RandLoraConfig",
    "road": "RoadConfig",
    "shira": "ShiraConfig",
    "supertuning": "SupertuningConfig",
    "tinylora": "TinyLoraConfig",
    "unilora": "UniLoraConfig",
    "vblora": "VBLoRAConfig",
    "vera": "VeraConfig",
    "waveft": "WaveFTConfig",
}
READ_WEIGHTS = ("shira",)  # kinds that PEFT makes from the values of the weights: the plan cannot try them
NORMS = "ln_tuning"  # the kind that trains norms instead of linear modules
OWN_FIELDS = ("target_modules", "layers_to_transform", "task_type", "peft_type", "base_model_name_or_path", "revision")


@dataclass(frozen=True)
class AdapterOptions:
    """An adapter that is not a LoRA. `options`: fields of PEFT's class of settings."""

    type: str
    options: Mapping[str, Any] = field(default_factory=dict)


FOLDABLE_OPTIONS = {("boft", "boft_n_butterfly_factor"): 1}  # the values that merging supports


def check_adapter(values: Mapping[str, Any], report: ReportProblem) -> None:
    """Report what does not go with `adapter` in the checked values of train.yaml."""
    if not values.get("adapter"):
        return
    adapter = values["adapter"]
    kind = adapter if isinstance(adapter, str) else adapter.get("type")
    if values.get("lora"):
        report(("lora",), f"'adapter' replaces LoRA by {kind}", "remove 'lora'; 'adapter' has targets and layers")
    if values.get("method", "qlora") != "lora":
        report(("adapter",), f"{kind} is trained on a base in 16 or 32 bit", "set method: lora")
    if (values.get("tokens") or {}).get("add"):
        report(("tokens", "add"), f"{kind} does not train the rows of new tokens", "use lora instead of 'adapter'")


def check_options(adapter: AdapterOptions) -> None:
    """Raise RecipeError for an option that PEFT's class of settings does not have."""
    import peft

    name = ADAPTER_KINDS[adapter.type]
    config = getattr(peft, name, None)
    if config is None:
        raise RecipeError(f"this version of PEFT has no {name}", hint="pip install -U peft")
    known = {field.name for field in dataclasses.fields(config)} - set(OWN_FIELDS)
    for option, value in adapter.options.items():
        allowed = FOLDABLE_OPTIONS.get((adapter.type, option), value)
        if value != allowed:
            raise RecipeError(f"{option}: {value} cannot be merged", hint=f"set {option}: {allowed}")
        if option not in known:
            hint = did_you_mean(option, known) or f"it has {', '.join(sorted(known))}"
            raise RecipeError(f"adapter: {adapter.type} has no option '{option}'", hint=hint)
