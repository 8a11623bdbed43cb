"""The losses of the preference objectives, from the log-probabilities of answers. Values equal TRL's.

A log ratio is log p(answer) under the model minus log p(answer) under the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO's loss of each pair, from log ratios (arXiv 2305.18290, equation 7)."""
    return -logsigmoid(beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO's loss of each pair, from log ratios per token (arXiv 2310.12036, equation 17)."""
    return torch.square(chosen - rejected - 1 / (2 * beta))


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """ORPO's loss of each pair without its likelihood term, from log-probabilities per token (arXiv 2403.07691)."""
    return -beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO's loss of each pair, from log-probabilities per token (arXiv 2405.14734, equation 6)."""
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def kto(log_ratios: Tensor, is_desirable: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """KTO's loss of each answer (arXiv 2402.01306, equation 7). `weights`: of desirable and undesirable answers."""
    sign = torch.where(is_desirable, 1.0, -1.0)
    weight = torch.where(is_desirable, *weights)
    return weight * (1 - torch.sigmoid(sign * beta * (log_ratios - kl)))


def _log_odds(log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)); p is kept below 1, where both are infinite."""
    log_probs = log_probs.clamp(max=-1e-6)
    return log_probs - torch.log(-torch.expm1(log_probs))
