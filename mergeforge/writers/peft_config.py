"""adapter_config.json of an adapter whose every scale is 1, and that changes no module but its own.

PEFT finds modules by the ends of their names and ranks by regular expressions
(peft/tuners/tuners_utils.py, check_target_module_exists; peft/utils/other.py, get_pattern_key), so
short names are written only where no untouched module has the same end.
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
    """The config for modules with their ranks; alpha is the rank, so that the scale is 1.

    `tensors`: names of all of the model's tensors. `saved`: modules that the adapter holds whole.
    `biases`: it holds trained biases too.
    """
    rank = max(ranks.values(), default=1)
    others = rank_pattern(ranks, rank)
    return {
        "alpha_pattern": others,
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
        "rank_pattern": dict(others),
        "revision": revision,
        "target_modules": target_modules(ranks, _modules(tensors)),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }


def task_type(config: Mapping[str, Any]) -> str | None:
    """PEFT's task of a model, by its architecture; None where it is not clear."""
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith("ForConditionalGeneration") for name in names) and config.get("is_encoder_decoder"):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in TASKS.items() for name in names if name.endswith(end)), None)


def target_modules(changed: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Names by which PEFT finds the changed modules and no others: short ones where they are exact.

    A regular expression where even a full name is the end of another module's.
    """
    changed, modules = set(changed), {*modules, *changed}
    ends: dict[str, set[str]] = {}
    for module in modules:
        ends.setdefault(module.rpartition(".")[2], set()).add(module)
    found: set[str] = set()
    for last, mine in ends.items():
        found |= {last} if mine <= changed else mine & changed
    full = [name for name in found if "." in name]
    if any(module.endswith(f".{name}") for name in full for module in ends[name.rpartition(".")[2]]):
        return "|".join(re.escape(name) for name in sorted(changed))
    return sorted(found)


def rank_pattern(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """PEFT's patterns for the modules whose rank is not the usual one; anchored where they would match others."""
    names = sorted(name for name, rank in ranks.items() if rank != usual)
    return {_pattern(name, ranks): ranks[name] for name in names}


def _pattern(name: str, ranks: Mapping[str, int]) -> str:
    tail = name.rpartition(".")[2]
    others = (other for other in ranks if other != name and other.endswith(tail))
    alone = not any(re.match(rf"(.*\.)?({name})$", other) for other in others)
    return name if alone and re.escape(name) == name.replace(".", r"\.") else f"^{re.escape(name)}"


def _modules(tensors: Iterable[str]) -> set[str]:
    """Every module that the tensors' names imply, outer ones too."""
    found: set[str] = set()
    for name in tensors:
        while (name := name.rpartition(".")[0]) and name not in found:
            found.add(name)
    return found
