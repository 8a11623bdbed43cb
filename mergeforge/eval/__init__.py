"""Evaluation: how well models predict answers, what they answer, and which of them is better.

Back ends behind one protocol (answerer.py): transformers (a folder, Hub repo or PEFT adapter, in its own dtype or
NF4) and llama.cpp (a GGUF file).
"""

from mergeforge.eval.backend import Answer, Answerer, Row, RowScore, TooLong
from mergeforge.eval.bootstrap import Interval
from mergeforge.eval.compare import Comparison, compare
from mergeforge.eval.evaluate import Evaluation, RowResult, Sample, evaluate
from mergeforge.eval.open_model import open_model
from mergeforge.eval.sampling import GREEDY, PRESETS, Sampling, preset, with_setting
from mergeforge.eval.smoke_test import Smoke, agreement, smoke
from mergeforge.eval.transformers_backend import TorchModel

__all__ = [
    "GREEDY",
    "PRESETS",
    "Answer",
    "Answerer",
    "Comparison",
    "Evaluation",
    "Interval",
    "Row",
    "RowResult",
    "RowScore",
    "Sample",
    "Sampling",
    "Smoke",
    "TooLong",
    "TorchModel",
    "agreement",
    "compare",
    "evaluate",
    "open_model",
    "preset",
    "smoke",
    "with_setting",
]
