"""PreferenceTraining: the passes of a preference objective over a batch, its loss, and the rewards of the answers.

The reference model is the model with its adapter switched off, so there is no second model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergeforge.train.loop import preference_loss
from mergeforge.train.loop.chunked_loss import IGNORE_INDEX
from mergeforge.train.loop.preference_batch import Answers, collate_answers
from mergeforge.train.objectives import KTO, Objective, PreferenceOptions

MODEL_INPUTS = ("input_ids", "position_ids", "labels", "segments")
MISMATCHED = "mismatched_"


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answers of a batch and their lengths. `reference` is 0 without a reference model.

    `likelihood`: the mean log-probability of all tokens of the chosen sequences, prompts too (ORPO).
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    likelihood: Tensor | None = None

    @property
    def log_ratios(self) -> Tensor:
        return self.policy - self.reference


class RewardSums:
    """Sums over answers that margin and accuracy follow from, and over validation answers also their likelihood.

    `rows`: margin and agreement of each row of data that this process has seen since the last `clear`.
    """

    NAMES = ("chosen", "chosen_count", "rejected", "rejected_count", "correct", "compared", "nll", "tokens")

    def __init__(self) -> None:
        self.values = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self.rows: list[tuple[float, float]] = []

    def add(self, **sums: Tensor | int) -> None:
        self.values += torch.tensor([float(sums.get(name, 0)) for name in self.NAMES], dtype=torch.float64)

    def add_rows(self, margins: Tensor, agrees: Tensor) -> None:
        """Keep the margin of each row, and whether its rewards agree with the data."""
        self.rows += zip(margins.tolist(), agrees.float().tolist(), strict=True)

    def clear(self) -> None:
        self.values = torch.zeros_like(self.values)
        self.rows = []

    def __getitem__(self, name: str) -> float:
        return float(self.values[self.NAMES.index(name)])

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """The mean rewards, their difference (margin), and how often the reward agrees with the data (accuracy)."""
        means = {
            f"reward_{name}": self[name] / self[f"{name}_count"]
            for name in ("chosen", "rejected")
            if self[f"{name}_count"]
        }
        metrics = means | {"margin": means["reward_chosen"] - means["reward_rejected"]} if len(means) == 2 else means
        metrics |= {"accuracy": self["correct"] / self["compared"]} if self["compared"] else {}
        return {prefix + name: value for name, value in metrics.items()}

    @property
    def nll(self) -> float:
        """Nats per token of all answers."""
        return self["nll"] / max(self["tokens"], 1)


@dataclass(frozen=True)
class PreferenceTraining:
    """One run's objective. `packed`: whether all answers of a sequence stay in it."""

    objective: Objective
    options: PreferenceOptions
    packed: bool
    pad: int

    @property
    def beta(self) -> float:
        return self.objective.beta if self.options.beta is None else self.options.beta

    @property
    def gamma(self) -> float:
        return (self.objective.gamma or 0.0) if self.options.gamma is None else self.options.gamma

    def collate(self, sequences: Sequence[Answers]) -> dict[str, Tensor]:
        """The batch of these sequences."""
        return collate_answers(
            sequences,
            pad=self.pad,
            packed=self.packed,
            prompts=self.objective.name == "orpo",
            mismatched=self.objective.name == KTO,
        )

    def count(self, batch: Mapping[str, Tensor]) -> int:
        """Rows of data in a batch, over which the loss is averaged."""
        return len(batch["preferences"]) // self.objective.answers

    def loss(self, model: nn.Module, adapted: Any, batch: Mapping[str, Tensor], rewards: RewardSums) -> Tensor:
        """The summed loss of the rows of a batch; adds to `rewards`.

        `model`: what takes the gradient, perhaps wrapped for several devices; `adapted`: the same without a wrapper.
        """
        kl = self._kl(model, adapted, batch) if self.objective.name == KTO else None
        scores = self._scores(model, adapted, batch)
        with torch.autocast(scores.policy.device.type, enabled=False):
            rewards.add(nll=-scores.policy.detach().sum(), tokens=scores.tokens.sum())
            if kl is not None:
                return self._kto(scores, batch["preferences"] > 0, kl, rewards)
            return self._pairs(scores, rewards)

    def _pairs(self, scores: Scores, rewards: RewardSums) -> Tensor:
        name, beta = self.objective.name, self.beta
        per_token = name in ("ipo", "orpo", "simpo")
        values = scores.log_ratios / scores.tokens if per_token else scores.log_ratios
        chosen, rejected = values[0::2], values[1::2]
        reward = beta * (scores.log_ratios if self.objective.reference else values).detach()
        _add_pairs(reward[0::2], reward[1::2], rewards)
        if name == "dpo":
            return preference_loss.dpo(chosen, rejected, beta).sum()
        if name == "ipo":
            return preference_loss.ipo(chosen, rejected, beta).sum()
        if name == "simpo":
            return preference_loss.simpo(chosen, rejected, beta, self.gamma).sum()
        assert scores.likelihood is not None
        return preference_loss.orpo(chosen, rejected, beta).sum() - scores.likelihood * len(chosen)

    def _kto(self, scores: Scores, is_desirable: Tensor, kl: Tensor, rewards: RewardSums) -> Tensor:
        weights = (self.options.desirable_weight, self.options.undesirable_weight)
        ratios = scores.log_ratios.detach()
        reward = self.beta * ratios
        agrees = torch.where(is_desirable, ratios > kl, ratios < kl)
        rewards.add_rows(torch.where(is_desirable, reward, -reward), agrees)
        rewards.add(
            chosen=reward[is_desirable].sum(),
            chosen_count=is_desirable.sum(),
            rejected=reward[~is_desirable].sum(),
            rejected_count=(~is_desirable).sum(),
            correct=agrees.sum(),
            compared=len(ratios),
        )
        return preference_loss.kto(scores.log_ratios, is_desirable, kl, self.beta, weights).sum()

    def _scores(self, model: nn.Module, adapted: Any, batch: Mapping[str, Tensor]) -> Scores:
        count = len(batch["preferences"])
        is_orpo = self.objective.name == "orpo"
        inputs = {name: batch[name] for name in MODEL_INPUTS} | {"segment_count": 2 * count if is_orpo else count}
        sums = model(**inputs)["log_probs"].float()
        lengths = _segment_lengths(batch, 2 * count)
        likelihood = None
        if is_orpo:
            is_chosen = (batch["preferences"] > 0).repeat(2)
            likelihood = sums[is_chosen].sum() / lengths[is_chosen].sum()
        reference = torch.zeros_like(sums[:count])
        if self.objective.reference:
            with reference_model(adapted):
                reference = adapted(**inputs)["log_probs"].float()
        return Scores(sums[:count], reference, lengths[:count], likelihood)

    def _kl(self, model: nn.Module, adapted: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """KTO's estimate of the divergence from the reference: the mean log ratio of prompts with others' answers.

        In training over all devices; in validation, where they have different numbers of batches, over this one's.
        """
        trains = torch.is_grad_enabled()
        inputs: dict[str, Any] = {name: batch[MISMATCHED + name] for name in MODEL_INPUTS}
        inputs |= {"segment_count": len(batch["preferences"])}
        with torch.no_grad():
            policy = model(**inputs)["log_probs"].float()
        with reference_model(adapted):
            reference = adapted(**inputs)["log_probs"].float()
        kl: Tensor = (policy - reference).mean()
        if trains and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(kl)
            kl = kl / torch.distributed.get_world_size()
        return kl.clamp(min=0)


@contextmanager
def reference_model(adapted: Any) -> Iterator[None]:
    """Switch the adapter and dropout off, and compute without gradients."""
    training = adapted.training
    adapted.eval()
    try:
        with torch.no_grad(), adapted.disable_adapter():
            yield
    finally:
        adapted.train(training)


def disable_dropout(model: nn.Module) -> None:
    """Set dropout of the base model to 0: noise in the comparison with the reference is not a preference."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _add_pairs(chosen: Tensor, rejected: Tensor, rewards: RewardSums) -> None:
    count = len(chosen)
    rewards.add_rows(chosen - rejected, chosen > rejected)
    rewards.add(
        chosen=chosen.sum(),
        chosen_count=count,
        rejected=rejected.sum(),
        rejected_count=count,
        correct=(chosen > rejected).sum(),
        compared=count,
    )


def _segment_lengths(batch: Mapping[str, Tensor], count: int) -> Tensor:
    """Tokens with a label in each segment."""
    segments = batch["segments"][batch["labels"] != IGNORE_INDEX]
    return torch.bincount(segments, minlength=count).to(batch["labels"].device)
