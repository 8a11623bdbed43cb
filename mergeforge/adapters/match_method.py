"""Match the tensors of a PEFT method other than LoRA: one formula for each weight or bias that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from mergeforge.adapters.deltas import WeightDelta
from mergeforge.adapters.peft.kind import AdaptedModule, PeftMethod, Shape
from mergeforge.adapters.peft.module_order import module_order, targeted_modules
from mergeforge.adapters.peft_delta import PeftDelta
from mergeforge.adapters.resolve import TensorResolver
from mergeforge.checkpoints.model import ModelSource
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, HEADS
from mergeforge.core.messages import WarningText
from mergeforge.errors import SourceError, format_list
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.stored import StoredTensor


@dataclass
class MethodMatcher:
    """Makes the deltas of one adapter's method. `notes`: what the user should know about them."""

    label: str
    base: ModelSource
    config: Mapping[str, Any]
    method: PeftMethod
    resolver: TensorResolver
    deltas: list[tuple[str, WeightDelta]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def match(self, modules: dict[str, dict[str, StoredTensor]]) -> list[tuple[str, WeightDelta]]:
        """Take the method's own tensors out of `modules`; returns (tensor, delta) of weights and biases."""
        shared = modules.pop("", {})
        factors_by_module = {
            module: {role: roles.pop(role) for role in list(roles) if role.startswith(self.method.prefixes)}
            for module, roles in modules.items()
        }
        factors_by_module = {module: factors for module, factors in factors_by_module.items() if factors}
        targeted = self._targeted_modules() if shared and not factors_by_module else []
        factors_by_module |= {module: {} for module in targeted}
        if lacking := [module for module in targeted if not self.resolver.find(f"{module}.weight")]:
            text = f"{self.label}: its config targets {format_list(lacking)}, which {self.base.label} does not have"
            raise SourceError(text, hint="name the base that it was trained on; all targeted modules share its numbers")
        weights: dict[str, LazyTensor] = {}
        for module, factors in factors_by_module.items():
            with self.resolver.collecting_errors():
                stored = next(iter({**factors, **shared}.values()))
                weights[module] = self.resolver.target(self.resolver.require(f"{module}.weight", stored))
        sizes = [(shape[0], math.prod(shape[1:])) for shape in (weight.info.shape for weight in weights.values())]
        largest = (max((outputs for outputs, _ in sizes), default=0), max((inputs for _, inputs in sizes), default=0))
        ordered = cache(lambda: targeted or module_order(self.base.config, self.config, list(weights)))
        for module, weight in weights.items():
            factors = {**factors_by_module[module], **shared}
            shapes = {role: stored.info.shape for role, stored in factors.items()}

            def order(module: str = module) -> tuple[int, list[Shape]]:
                return ordered().index(module), [tuple(weights[name].info.shape) for name in ordered()]

            adapted = AdaptedModule(module, shapes, tuple(weight.info.shape), weight.info.dtype, largest, order)
            with self.resolver.collecting_errors():
                self._add_formulas(adapted, factors, weight)
        return self.deltas

    def _targeted_modules(self) -> list[str]:
        """The modules of a file that holds only what they share, from the config. Raises SourceError."""
        try:
            return targeted_modules(self.base.config, self.config)
        except (ValueError, re.error) as error:
            text = f"{self.label}: its file holds only tensors that its modules share, and which these are is not known"
            raise SourceError(f"{text}: {error}") from None

    def _add_formulas(
        self,
        adapted: AdaptedModule,
        factors: Mapping[str, StoredTensor],
        weight: LazyTensor,
    ) -> None:
        module = adapted.path
        transposed = self.base.config.get("model_type") in CONV1D_MODELS and len(weight.info.shape) == 2
        if transposed and module.rpartition(".")[2] not in (*HEADS, *EMBEDDINGS):
            raise SourceError(
                f"{self.label}: {module} is stored transposed (Conv1D), where {self.method.name} is not supported"
            )
        try:
            formulas = self.method.formulas(self.config, adapted)
        except ValueError as error:
            raise SourceError(f"{self.label}: {error}") from None
        except (KeyError, TypeError, ZeroDivisionError) as error:
            text = f"{self.label}: {module}: adapter_config.json has a missing or invalid value"
            raise SourceError(f"{text} ({type(error).__name__}: {error})") from None
        for leaf, formula in formulas.items():
            name = weight.info.name if leaf == "weight" else self.resolver.find(f"{module}.{leaf}")
            if not name and leaf == "bias" and "weight" in formulas:
                continue  # a layer without a bias
            if not name:
                self.resolver.refuse_unknown(next(iter(factors.values())), f"{module}.{leaf}")
            target = weight if leaf == "weight" else self.resolver.target(name)
            rows_per_output = target.info.shape[1] if len(target.info.shape) == 3 else 1
            if formula.statistic and len(weight.info.shape) != 2:
                raise SourceError(f"{self.label}: {self.method.name} of {module} is supported for linear layers only")
            if formula.warning:
                self.notes.append(WarningText(f"{self.label}: {formula.warning}"))
            beside = weight if leaf == "bias" else None
            bias = {"base_bias": self._stored_bias(module)} if formula.reads_bias else {}
            self.deltas.append((name, PeftDelta(formula, {**factors, **bias}, target, rows_per_output, beside)))

    def _stored_bias(self, module: str) -> StoredTensor:
        """The base's bias of a module. Raises SourceError if it has none, or computes it."""
        name = self.resolver.find(f"{module}.bias")
        bias = self.resolver.target(name) if name else None
        if not isinstance(bias, StoredTensor):
            raise SourceError(f"{self.label}: {self.method.name} of {module} needs a bias that the base stores")
        return bias
