"""Prepares training data: the rows of all sources become token stores on disk.

The stores are reused while rows, settings and tokenizer stay the same.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.core.messages import WarningText, warnings_in, without_warnings
from mergeforge.data.counts import DataStats, stats_from_dict
from mergeforge.data.fingerprint import data_fingerprint
from mergeforge.data.pipeline import HELD_OUT, OnProgress, TokenizePipeline
from mergeforge.data.render import Renderer, make_renderer
from mergeforge.data.settings import PREFERENCE_FORMATS, DataSettings, DataSource
from mergeforge.data.source_reader import Decision, merge_decisions
from mergeforge.data.split import validation_mask
from mergeforge.data.token_store import TokenStore, TokenStoreWriter
from mergeforge.data.tokenizers import load_warnings
from mergeforge.errors import SourceError
from mergeforge.io.disk import disk_error, sync_folder, write_durably

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = "facts.json"  # written last: a folder with it is complete
_STALE_SECONDS = 86400.0  # an unfinished folder older than this is abandoned


@dataclass(frozen=True)
class Prepared:
    """Data ready to train on. `template`: the Jinja that was used; `folder`: where the stores are.

    `fingerprint`: of rows, settings, tokenizer and template; equal fingerprints mean equal tokens. `notes`: facts about
    the data that the user should know.
    """

    train: TokenStore
    validation: TokenStore | None
    counts: DataStats
    decisions: tuple[Decision, ...]
    template: str
    template_name: str
    fingerprint: str
    folder: Path
    notes: tuple[str, ...] = ()


def prepare(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    extra_key: str = "",
    on_progress: OnProgress | None = None,
) -> Prepared:
    """Read, split, render and mask all rows into stores inside `folder`, or reuse the stores there.

    extra_key: text that also enters the fingerprint. Raises SourceError if almost nothing can be trained on.
    """
    renderer = make_renderer(settings, tokenizer)
    fingerprint = data_fingerprint(settings, validation_source(settings), renderer, extra_key)
    target = folder / fingerprint[:16]
    if not (target / FACTS).is_file():
        _write_atomically(settings, renderer, fingerprint, target, on_progress or (lambda rows: None))
    prepared = open_prepared(target)
    return replace(prepared, notes=(*load_warnings(tokenizer), *prepared.notes))


def open_prepared(folder: Path) -> Prepared:
    """Open a folder that `prepare` wrote. Raises SourceError."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder} holds no prepared data: {error}") from None
    validation = TokenStore.open(folder, "validation") if (folder / "validation.index").is_file() else None
    return Prepared(
        train=TokenStore.open(folder, "train"),
        validation=validation,
        counts=stats_from_dict(facts["counts"]),
        decisions=tuple(
            Decision(**{**decision, "files": tuple(decision["files"]), "unused": tuple(decision["unused"])})
            for decision in facts["decisions"]
        ),
        template=facts["template"],
        template_name=facts["template_name"],
        fingerprint=facts["fingerprint"],
        folder=folder,
        notes=(*map(WarningText, facts["warnings"]), *facts["notes"]),
    )


def validation_source(settings: DataSettings) -> tuple[DataSource, ...]:
    """The held-out source, if `val` is the path of other data."""
    format = next((source.format for source in settings.sources if source.format in PREFERENCE_FORMATS), "auto")
    return (DataSource(settings.validation, format),) if isinstance(settings.validation, str) else ()


def _write_atomically(
    settings: DataSettings, renderer: Renderer, fingerprint: str, target: Path, on_progress: OnProgress
) -> None:
    """Write the stores beside their folder, then rename: they are complete or absent."""
    temporary = _temporary_folder(target)
    try:
        facts = _write(settings, renderer, temporary, on_progress)
        facts |= {"fingerprint": fingerprint}
        write_durably(temporary / FACTS, json.dumps(facts, indent=1).encode())
        sync_folder(temporary)
        if target.exists() and not (target / FACTS).exists():
            shutil.rmtree(target)
        try:
            os.rename(temporary, target)
        except OSError:  # another process was faster
            if not (target / FACTS).is_file():
                raise
        sync_folder(target.parent)
    except OSError as error:
        raise disk_error(error, str(target)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_folder(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob("*.part"):
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise disk_error(error, str(target.parent)) from error


def _write(settings: DataSettings, renderer: Renderer, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Write the stores into a folder and return the facts about them."""
    writer = TokenStoreWriter(folder)
    pipeline = TokenizePipeline(settings, renderer, writer, on_progress)
    try:
        for source in settings.sources:
            pipeline.add(source, source.path)
        train_examples = writer.count
        for source in validation_source(settings):
            pipeline.add(source, f"{HELD_OUT}{source.path}")
    finally:
        writer.close()
    notes = [*pipeline.notes(), *_write_split(settings, writer, train_examples)]
    return {
        "counts": pipeline.counts().as_dict(),
        "decisions": [asdict(decision) for decision in merge_decisions(pipeline.formats)],
        "template": renderer.template.jinja if pipeline.conversations else "",
        "template_name": renderer.template.name if pipeline.conversations else "",
        "notes": without_warnings(notes),
        "warnings": warnings_in(notes),
    }


def _write_split(settings: DataSettings, writer: TokenStoreWriter, train_examples: int) -> list[str]:
    """Write the indices `train` and `validation`; examples from `train_examples` on are separate validation data.

    Returns notes.
    """
    import numpy as np

    keys, notes = writer.keys(), []
    held_out = np.arange(writer.count) >= train_examples
    if isinstance(settings.validation, int | float):
        held_out = validation_mask(keys, settings.validation)
    train = ~held_out
    if isinstance(settings.validation, str):
        train &= ~np.isin(keys, keys[held_out])
        if shared := int((~held_out).sum() - train.sum()):
            notes.append(f"{shared} examples are also in the validation data; they are not trained on")
    if not train.any():
        raise SourceError("every row is also in the validation data: none is left to train on")
    writer.write_index("train", np.flatnonzero(train))
    if held_out.any():
        writer.write_index("validation", np.flatnonzero(held_out))
    return notes
