"""adapter_config.json of an adapter in which every scale is 1; PEFT applies it to exactly its own modules.

PEFT finds modules by the ends of their names and ranks by regular expressions (peft/tuners/tuners_utils.py,
check_target_module_exists; peft/utils/other.py, get_pattern_key). So a short name is written only if no other module
ends with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_config(
    ranks: Mapping[str, int],
    tensors: Iterable[str],
    base: str,
    *,
    saved: Sequence[str] = (),
    task: str | None = None,
    revision: str | None = None,
    fan_in_fan_out: bool = False,
    biases: bool = False,
) -> dict[str, Any]:
    """The config for modules with these ranks; alpha is the rank, so that the scale is 1.

    `tensors`: names of all tensors of the model. `saved`: modules that the adapter stores in full (modules_to_save).
    `biases`: the adapter contains trained biases.
    """
    rank = max(ranks.values(), default=1)
    other_ranks = rank_pattern(ranks, rank)
    return {
        "alpha_pattern": other_ranks,
        "base_model_name_or_path": base,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(other_ranks),
        "revision": revision,
        "target_modules": target_modules(ranks, _modules(tensors)),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type for a model's architecture; None if it is unknown."""
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith("ForConditionalGeneration") for name in names) and config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return next((task for suffix, task in TASKS.items() for name in names if name.endswith(suffix)), None)


def target_modules(changed: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Names by which PEFT finds exactly the changed modules: short names where they are unambiguous.

    A regular expression if even a full name is the end of another module's name.
    """
    changed, modules = set(changed), {*modules, *changed}
    by_last_part: dict[str, set[str]] = {}
    for module in modules:
        by_last_part.setdefault(module.rpartition(".")[2], set()).add(module)
    targets: set[str] = set()
    for last_part, same_end in by_last_part.items():
        targets |= {last_part} if same_end <= changed else same_end & changed
    full_names = [name for name in targets if "." in name]
    if any(module.endswith(f".{name}") for name in full_names for module in by_last_part[name.rpartition(".")[2]]):
        return "|".join(re.escape(name) for name in sorted(changed))
    return sorted(targets)


def rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """PEFT's patterns for the modules with another rank than `usual`; anchored if they would match other modules."""
    names = sorted(name for name, rank in ranks.items() if rank != usual)
    return {_pattern(name, ranks): ranks[name] for name in names}


def _pattern(name: str, ranks: Mapping[str, int]) -> str:
    tail = name.rpartition(".")[2]
    same_tail = (module for module in ranks if module != name and module.endswith(tail))
    unique = not any(re.match(rf"(.*\.)?({name})$", module) for module in same_tail)
    return name if unique and re.escape(name) == name.replace(".", r"\.") else f"^{re.escape(name)}"


def _modules(tensors: Iterable[str]) -> set[str]:
    """Every module in the tensors' names, including the outer ones."""
    modules: set[str] = set()
    for name in tensors:
        while (name := name.rpartition(".")[0]) and name not in modules:
            modules.add(name)
    return modules
