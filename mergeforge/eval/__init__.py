"""Evaluation: how well models predict answers, what they answer, and which of them is better.

Two backends share one protocol (backend.py): transformers (a folder, Hub repo or PEFT adapter, in its own dtype or NF4)
and llama.cpp (a GGUF file).
"""

from mergeforge.eval.backend import Answer, ModelBackend, PromptTooLong, ScoredRow, TokenRow
from mergeforge.eval.bootstrap import ConfidenceInterval
from mergeforge.eval.compare import Comparison, compare
from mergeforge.eval.evaluate import Evaluation, RowResult, Sample, evaluate
from mergeforge.eval.open_model import open_model
from mergeforge.eval.sampling import GREEDY, PRESETS, Sampling, preset, with_setting
from mergeforge.eval.smoke_test import SmokeResult, agreement, smoke
from mergeforge.eval.transformers_backend import TransformersModel

__all__ = [
    "GREEDY",
    "PRESETS",
    "Answer",
    "Comparison",
    "ConfidenceInterval",
    "Evaluation",
    "ModelBackend",
    "PromptTooLong",
    "RowResult",
    "Sample",
    "Sampling",
    "ScoredRow",
    "SmokeResult",
    "TokenRow",
    "TransformersModel",
    "agreement",
    "compare",
    "evaluate",
    "open_model",
    "preset",
    "smoke",
    "with_setting",
]
