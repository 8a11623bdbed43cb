"""Extract the difference of two models as a PEFT LoRA adapter.

Folding the adapter into the base gives the tuned model back, up to the errors listed in the report next to it:
extraction.json has the rank and the error of every module, measured on the factors as written, and names every
change that the adapter does not contain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergeforge.adapters.peft.keys import KEY_PREFIX
from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.errors import SourceError
from mergeforge.io.disk import InputFile, write_durably
from mergeforge.lora.extract.pairing import all_tensors
from mergeforge.lora.extract.plan import FILES, REPORT, Extraction, plan_extraction
from mergeforge.lora.extract.report import (
    ExtractionReport,
    PairResult,
    adapter_card,
    make_report,
    report_json,
)
from mergeforge.lora.extract.workers import ExtractionWorkers
from mergeforge.tensors.worker import single_torch_thread
from mergeforge.writers.peft_adapter import Spool, SpooledTensor, staged_folder, write_peft_adapter
from mergeforge.writers.peft_config import lora_config, task_type

__all__ = [
    "Extraction",
    "ExtractionReport",
    "PairResult",
    "extract",
    "extract_lora",
    "make_report",
    "plan_extraction",
    "read_report",
]


def extract(plan: Extraction) -> Iterator[PairResult]:
    """Run the extraction; yields the result of each tensor as it is finished.

    OUT exists, complete, when the iterator ends; after an error or a kill it is unchanged.
    """
    with staged_folder(plan.out, FILES, overwrite=plan.overwrite) as work:
        spool = Spool(work)
        results: list[PairResult] = []
        try:
            with single_torch_thread():
                for result in ExtractionWorkers(plan, spool).run():
                    results.append(result)
                    yield result
            report = make_report(plan, results)
            _check_not_empty(report)
            for file in _input_files(plan):
                file.check_unchanged()
            write_peft_adapter(
                work, [*spool.tensors(), *_saved_tensors(report)], _adapter_config(report), adapter_card(report)
            )
            write_durably(work / REPORT, report_json(report))
        finally:
            spool.close()
            for file in _input_files(plan):
                file.close()


def extract_lora(tuned: str, base: str, out: str | Path, **options: Any) -> dict[str, Any]:
    """Plan and run an extraction; `options` are those of plan_extraction. Returns the report."""
    plan = plan_extraction(tuned, base, out, **options)
    deque(extract(plan), maxlen=0)
    return read_report(plan)


def _input_files(plan: Extraction) -> list[InputFile]:
    """All files that the extraction reads."""
    files = {id(file): file for checkpoint in (plan.base, plan.tuned) for file in checkpoint.files}
    return list(files.values())


def read_report(plan: Extraction) -> dict[str, Any]:
    """Read extraction.json of a finished extraction."""
    return read_json(plan.out / REPORT)


def _check_not_empty(report: ExtractionReport) -> None:
    """Raises SourceError if there is nothing to factor."""
    labels = report.plan.tuned.label, report.plan.base.label
    if not report.factored and not report.changed:
        raise SourceError(f"{labels[0]} and {labels[1]} are the same, so there is nothing to extract")
    if not report.factored:
        text = f"{labels[0]} and {labels[1]} do not differ in any weight that gets factors"
        raise SourceError(text, hint="run mergeforge diff to see where they differ")


def _saved_tensors(report: ExtractionReport) -> list[SpooledTensor]:
    """The tensors that are saved whole, as the tuned model stores them."""
    return [
        SpooledTensor(pair.tuned.info.renamed(f"{KEY_PREFIX}{key}"), pair.tuned.file, pair.tuned.offset)
        for key, pair in report.saved.items()
    ]


def _adapter_config(report: ExtractionReport) -> dict[str, Any]:
    plan = report.plan
    return lora_config(
        {result.pair.module: result.rank for result in report.factored},
        all_tensors(plan.base, [task.pair for task in plan.tasks]),
        plan.base_ref.path,
        saved=report.saved_modules,
        task=task_type(plan.tuned.config),
        revision=plan.base_ref.revision,
        fan_in_fan_out=any(result.pair.transposed and not result.pair.embedding for result in report.factored),
        biases=report.saves_biases,
    )
