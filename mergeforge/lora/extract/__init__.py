"""Extract: the difference of two models as a PEFT LoRA adapter.

Folding the adapter into the base gives the tuned model back, but for what the report beside it
says: extraction.json holds, for every module, the rank and the error that the factors leave, as
measured on what was written, and names every change that the adapter does not hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergeforge.checkpoints.checkpoint import read_json
from mergeforge.errors import SourceError
from mergeforge.io.disk import InputFile, write_durably
from mergeforge.lora.extract.pairing import all_tensors
from mergeforge.lora.extract.plan import FILES, REPORT, Extraction, plan_extraction
from mergeforge.lora.extract.report import PREFIX, Found, Report, adapter_card, make_report, report_json
from mergeforge.lora.extract.workers import Crew
from mergeforge.tensors.budget import one_torch_thread
from mergeforge.writers.peft_adapter import Spool, SpooledTensor, new_folder, write_adapter
from mergeforge.writers.peft_config import lora_config, task_type

__all__ = ["Extraction", "Found", "Report", "extract", "extract_lora", "make_report", "plan_extraction", "read_report"]


def extract(plan: Extraction) -> Iterator[Found]:
    """Carry it out; yields what was found of each tensor as it is done.

    OUT is there, and whole, when the iterator ends; after an error or a kill it is as it was.
    """
    with new_folder(plan.out, FILES, overwrite=plan.overwrite) as work:
        spool = Spool(work)
        found: list[Found] = []
        try:
            with one_torch_thread():
                for one in Crew(plan, spool).found():
                    found.append(one)
                    yield one
            report = make_report(plan, found)
            _check_any(report)
            for file in _files(plan):
                file.check_unchanged()
            write_adapter(work, [*spool.parts(), *_whole_parts(report)], _config(report), adapter_card(report))
            write_durably(work / REPORT, report_json(report))
        finally:
            spool.close()
            for file in _files(plan):
                file.close()


def extract_lora(tuned: str, base: str, out: str | Path, **options: Any) -> dict[str, Any]:
    """Extract in one call; `options` are those of plan_extraction. Returns the report."""
    plan = plan_extraction(tuned, base, out, **options)
    deque(extract(plan), maxlen=0)
    return read_report(plan)


def _files(plan: Extraction) -> list[InputFile]:
    """Every file that is read."""
    found = {id(file): file for table in (plan.base, plan.tuned) for file in table.files}
    return list(found.values())


def read_report(plan: Extraction) -> dict[str, Any]:
    """extraction.json of a finished extraction."""
    return read_json(plan.out / REPORT)


def _check_any(report: Report) -> None:
    """Raises SourceError where no weight that can get factors differs."""
    names = report.plan.tuned.label, report.plan.base.label
    if not report.factored and not report.changed:
        raise SourceError(f"{names[0]} and {names[1]} are the same: nothing to extract")
    if not report.factored:
        text = f"{names[0]} and {names[1]} differ in no weight that gets factors"
        raise SourceError(text, hint="mergeforge diff shows where they differ")


def _whole_parts(report: Report) -> list[SpooledTensor]:
    """The tensors that are held whole, as the tuned model stores them."""
    return [
        SpooledTensor(pair.tuned.info.renamed(f"{PREFIX}{key}"), pair.tuned.file, pair.tuned.offset)
        for key, pair in report.saved.items()
    ]


def _config(report: Report) -> dict[str, Any]:
    plan = report.plan
    return lora_config(
        {one.pair.module: one.rank for one in report.factored},
        all_tensors(plan.base, [job.pair for job in plan.jobs]),
        plan.base_ref.path,
        saved=report.saved_modules,
        task=task_type(plan.tuned.config),
        revision=plan.base_ref.revision,
        fan_in_fan_out=any(one.pair.transposed and not one.pair.embedding for one in report.factored),
        biases=report.saves_biases,
    )
