"""Evaluation: how well models predict answers, what they answer, and which of them is better.

Back ends behind one protocol (answerer.py): transformers (a folder, Hub repo or PEFT adapter, in its own dtype or
NF4) and llama.cpp (a GGUF file).
"""

from mergeforge.evaluating.answerer import Answer, Answerer, Row, RowScore, TooLong
from mergeforge.evaluating.bootstrap import Interval
from mergeforge.evaluating.comparison import Comparison, compare
from mergeforge.evaluating.evaluation import Evaluation, RowResult, Sample, evaluate
from mergeforge.evaluating.opening import open_model
from mergeforge.evaluating.sampling import GREEDY, PRESETS, Sampling, preset, with_setting
from mergeforge.evaluating.smoke import Smoke, agreement, smoke
from mergeforge.evaluating.torch_model import TorchModel

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
