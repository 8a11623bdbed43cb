"""Run a plan: take every tile from disk to disk with a pool of worker threads.

Each worker takes tiles off a list: it reads the rows of all inputs, computes them block by block, and writes them at
their offset in the output. The main thread collects finished tiles, syncs the files every two seconds, and only then
records the tiles in the journal.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Set
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.core.checksums import chunk_checksums
from mergeforge.core.file_names import MODEL_CARD, RECEIPT, RECIPE
from mergeforge.core.messages import OnMessage, WarningText
from mergeforge.core.tensor_info import Tile
from mergeforge.errors import MergeforgeError, SourceError, out_of_memory, strict_error
from mergeforge.execute.compute import compute_tiles
from mergeforge.execute.journal import FinishedTile, Journal
from mergeforge.execute.model_card import model_card
from mergeforge.execute.receipt import receipt
from mergeforge.execute.result_warnings import result_warnings
from mergeforge.execute.streaming_upload import StreamingUpload, open_streaming_upload
from mergeforge.execute.workspace import Workspace
from mergeforge.gguf.modelfile import MODELFILE, modelfile
from mergeforge.io.disk import DiskFile, InputFile, WriteBehind
from mergeforge.io.file_layout import OutputFiles
from mergeforge.lora import combine
from mergeforge.planner import Batch, Plan, TensorPlan
from mergeforge.tensors.worker import Worker, keep_freed_memory, single_torch_thread
from mergeforge.writers.encoder import ByteRange, TensorEncoder, chunk_ranges, coalesce_ranges
from mergeforge.writers.safetensors import INDEX, index_content

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

SYNC_SECONDS = 2.0


def run_tiles(
    plan: Plan, *, fresh: bool = False, overwrite: bool = False, on_message: OnMessage = lambda _: None
) -> Iterator[Tile]:
    """Run the merge, yielding each tile when it is written (or found written by an interrupted run).

    Resumes an interrupted run of the same merge. `on_message` is called with a warning, and for each file that is
    uploaded to the Hub if the recipe streams them there. Raises OutputError if OUT holds something else, BudgetError if
    the disk is full and SourceError if an input is bad; what is finished by then is kept for the next run.
    """
    started = time.monotonic()
    workspace = Workspace(plan, fresh=fresh, overwrite=overwrite)
    try:
        if workspace.replaces_edited_card and workspace.journal.commit is None:
            _warn_of_edited_card(plan, on_message)
        upload = open_streaming_upload(plan, workspace, on_message) if plan.streams else None
        if workspace.journal.commit is None or (upload and upload.missing_remotely):
            yield from _run_batches(plan, workspace, upload)
            plan = _with_result_warnings(plan, workspace.journal)
            aux_files = _aux_files(plan) | _combined_adapter(plan, workspace)
            aux_files[RECEIPT] = receipt(plan, workspace.journal, aux_files, time.monotonic() - started)
            workspace.write_aux_files(aux_files)
        if upload:
            upload.publish()
        workspace.commit()
    finally:
        workspace.close()
        for file in _input_files(plan):
            file.close()


def _warn_of_edited_card(plan: Plan, on_message: OnMessage) -> None:
    warning = WarningText(f"{plan.out / MODEL_CARD} was edited, and is replaced by a new model card")
    if plan.strict:
        raise strict_error([warning])
    on_message(warning)


def _with_result_warnings(plan: Plan, journal: Journal) -> Plan:
    """The plan with warnings about the result, for the receipt and the card. Raises SourceError if it is strict."""
    warnings = result_warnings(plan, journal)
    if plan.strict and warnings:
        raise strict_error(warnings)
    return replace(plan, notes=(*plan.notes, *warnings))


def run_plan(plan: Plan, *, fresh: bool = False, overwrite: bool = False) -> Path:
    """Run the merge and return the output folder."""
    deque(run_tiles(plan, fresh=fresh, overwrite=overwrite), maxlen=0)
    return plan.out


def _input_files(plan: Plan) -> list[InputFile]:
    files = {id(file): file for checkpoint in plan.inputs.checkpoints for file in checkpoint.files}
    return list(files.values())


def _aux_files(plan: Plan) -> dict[str, bytes | Path]:
    """The files next to the weights: name -> content, or a file to copy."""
    files: dict[str, bytes | Path] = {}
    files |= {name: file if isinstance(file, Path) else file.read_bytes() for name, file in plan.aux_files.items()}
    if plan.config is not None:
        files["config.json"] = (json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n").encode()
    shard_index = index_content(plan.checkpoint, plan.tensors)
    if shard_index is not None:
        files[INDEX] = shard_index
    files[MODEL_CARD] = model_card(plan).encode()
    if plan.gguf_models:
        first, *others = plan.gguf_names
        files[MODELFILE] = modelfile(first, plan.gguf_models[0].keys, others, plan.mmproj_names).encode()
    files[RECIPE] = plan.recipe.to_yaml().encode()
    return files


def _combined_adapter(plan: Plan, workspace: Workspace) -> dict[str, bytes | Path]:
    """Combine the adapters into one: in a folder next to the model, or alone."""
    if plan.combination is None:
        return {}
    prefix = "adapter/" if plan.files else ""
    folder = workspace.folder / prefix
    folder.mkdir(exist_ok=True)
    combine.write_combined(plan.combination, folder)
    return {f"{prefix}{name}": folder / name for name in combine.FILES}


@dataclass(frozen=True)
class TileTask:
    """Tiles that one worker computes in one go: a single tile, or all tiles of a tensor that needs statistics."""

    plan: TensorPlan
    tiles: tuple[Tile, ...]


def _run_batches(plan: Plan, workspace: Workspace, upload: StreamingUpload | None) -> Iterator[Tile]:
    idle: list[Worker] = []  # reused from batch to batch: malloc gives memory freed by one thread to no other
    with single_torch_thread(plan.needs_torch):  # restores the caller's setting afterwards
        for batch in plan.batches:
            yield from _run_batch(plan, batch, workspace, frozenset(upload.uploaded if upload else ()), idle)
            if upload:
                for name in batch.finished:
                    upload.upload(name)


def _run_batch(
    plan: Plan, batch: Batch, workspace: Workspace, uploaded: Set[str], idle: list[Worker]
) -> Iterator[Tile]:
    """Run the tiles of a batch; files that are already uploaded are not on disk and not written again."""
    files = OutputFiles(workspace.folder, {name: plan.files[name] for name in batch.files if name not in uploaded})
    try:
        files.open()
        yield from WorkerPool(plan, batch, workspace, files, idle).finished()
    finally:
        files.close()


class WorkerPool:
    """The workers, their list of tasks, and the tiles that they have finished."""

    def __init__(self, plan: Plan, batch: Batch, workspace: Workspace, files: OutputFiles, idle: list[Worker]) -> None:
        self.plan = plan
        self.idle = idle
        self.journal = workspace.journal
        self.files = files
        self.tasks = deque(_tile_tasks(batch))
        self.results: queue.Queue[FinishedTile | BaseException | None] = queue.Queue()
        self.stop = threading.Event()
        self.unflushed: list[FinishedTile] = []
        self.chunk_rows = {tensor_plan.info.name: tensor_plan.chunk_rows for tensor_plan in plan.tensor_plans}
        self.inputs = _input_files(plan)
        self.failed = False

    def finished(self) -> Iterator[Tile]:
        """Run the workers; yield tiles as they finish, and flush them every SYNC_SECONDS."""
        keep_freed_memory()
        count = self.plan.budget.threads
        threads = [threading.Thread(target=self._work, name=f"worker-{number}") for number in range(count)]
        try:
            for thread in threads:
                thread.start()
            yield from self._collect(len(threads))
        except BaseException:
            self.stop.set()
            for file in self.inputs:
                if not isinstance(file, DiskFile):
                    file.close()  # interrupts waits for the network
            for thread in threads:
                if thread.ident is not None:  # otherwise the system refused to start it
                    thread.join()
            self._save_finished()
            raise
        for thread in threads:
            thread.join()
        self._flush_finished()
        self.files.sync()  # headers, and tiles that were found damaged and written again
        self._check_inputs()

    def _collect(self, working: int) -> Iterator[Tile]:
        flushed = time.monotonic()
        while working:
            try:
                result = self.results.get(timeout=SYNC_SECONDS if self.unflushed else None)
            except queue.Empty:
                result = None
                working += 1
            if result is None:
                working -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                self.unflushed.append(result)
                yield result.tile
            if time.monotonic() - flushed > SYNC_SECONDS:
                self._flush_finished()
                flushed = time.monotonic()

    def _save_finished(self) -> None:
        """After an error or interruption: keep what was finished, if the disk allows it."""
        if self.failed:
            return  # bytes that failed to sync once are lost, whatever a second fsync reports
        while not self.results.empty():
            result = self.results.get()
            if isinstance(result, FinishedTile):
                self.unflushed.append(result)
        with contextlib.suppress(MergeforgeError):
            self._flush_finished()

    def _flush_finished(self) -> None:
        """Make finished tiles durable, then record them in the journal."""
        new = [
            finished
            for finished in self.unflushed
            if self.journal.is_finished(finished.tile, self.chunk_rows[finished.tile.name]) != finished.checksums
        ]
        if new:
            try:
                self.files.sync()
                self._check_inputs()
                self.journal.record(new)
            except MergeforgeError:
                self.failed = True
                raise
        self.unflushed.clear()

    def _check_inputs(self) -> None:
        """Refuse to keep what was computed from a file that has changed. Raises SourceError."""
        for file in self.inputs:
            file.check_unchanged()

    def _work(self) -> None:
        try:
            if self.plan.needs_torch:
                self._work_in_torch()
            else:
                self._drain(self._worker())
            self.results.put(None)
        except BaseException as error:
            self.results.put(error)

    def _work_in_torch(self) -> None:
        import torch

        torch.set_num_threads(1)  # the parallelism comes from the tiles
        with torch.inference_mode():
            worker = self._worker()
            with torch.cuda.stream(worker.stream):
                self._drain(worker)

    def _drain(self, worker: Worker) -> None:
        """Process tasks until there are none left."""
        while not self.stop.is_set() and self.tasks:
            self._process(worker)
        self.idle.append(worker)

    def _worker(self) -> Worker:
        """A worker from an earlier batch, or a new one."""
        try:
            worker = self.idle.pop()
        except IndexError:
            staging_nbytes = max((tensor_plan.staging_nbytes for tensor_plan in self.plan.tensor_plans), default=0)
            return Worker(self.plan.budget.device, staging_nbytes)
        worker.write_behind = WriteBehind()  # the files that it wrote are closed
        return worker

    def _process(self, worker: Worker) -> None:
        try:
            task = self.tasks.popleft()
        except IndexError:
            return  # another worker took the last one
        existing = [self._verify_existing(tile, task.plan, worker) for tile in task.tiles]
        if all(existing):
            for finished in existing:
                self.results.put(finished)
            return
        try:
            for tile, encoded, change in compute_tiles(
                task.plan, task.tiles, worker, allow_nonfinite=self.plan.allow_nonfinite
            ):
                checksums = {encoder.key: self._write(encoder, tile, raw, worker) for encoder, raw in encoded}
                self.results.put(FinishedTile(tile, checksums, astuple(change) if change else ()))
                if self.stop.is_set():
                    return
        except ArithmeticError as error:
            raise SourceError(f"{task.plan.info.name}: {error}") from None
        except (MemoryError, RuntimeError) as error:
            if budget_error := out_of_memory(error, task.plan.info.name):
                raise budget_error from error
            raise

    def _write(self, encoder: TensorEncoder, tile: Tile, raw: Bytes, worker: Worker) -> tuple[str, ...]:
        """Write an encoded tile at its offsets; returns the checksums of its chunks."""
        if encoder.file not in self.files.files:
            return _checksums(encoder, tile, raw)
        done = 0
        for offset, nbytes in coalesce_ranges(_byte_ranges(encoder, tile)):
            self.files.write(encoder.file, raw[done : done + nbytes], offset, worker.write_behind)
            done += nbytes
        return _checksums(encoder, tile, raw)

    def _verify_existing(self, tile: Tile, tensor_plan: TensorPlan, worker: Worker) -> FinishedTile | None:
        """A tile that an interrupted run wrote and that is intact on the disk, or None."""
        checksums = self.journal.is_finished(tile, tensor_plan.chunk_rows)
        if checksums is None:
            return None
        for encoder in (encoder for encoder in tensor_plan.encoders if encoder.file in self.files.files):
            worker.clear()
            if _checksums(encoder, tile, self._read(encoder, tile, worker)) != checksums[encoder.key]:
                return None
        return FinishedTile(tile, checksums)

    def _read(self, encoder: TensorEncoder, tile: Tile, worker: Worker) -> Bytes:
        """A tile's bytes from the file, in the order in which they were encoded."""
        ranges = list(coalesce_ranges(_byte_ranges(encoder, tile)))
        raw, done = worker.allocate(sum(nbytes for _, nbytes in ranges)), 0
        for offset, nbytes in ranges:
            self.files.read(encoder.file, raw[done : done + nbytes].data, offset)
            done += nbytes
        return raw


def _byte_ranges(encoder: TensorEncoder, tile: Tile) -> Iterator[ByteRange]:
    for chunk in chunk_ranges(tile.start, tile.stop, encoder):
        yield from encoder.byte_ranges(*chunk)


def _checksums(encoder: TensorEncoder, tile: Tile, raw: Bytes) -> tuple[str, ...]:
    sizes = [encoder.chunk_nbytes(*chunk) for chunk in chunk_ranges(tile.start, tile.stop, encoder)]
    return chunk_checksums(raw, sizes)


def _tile_tasks(batch: Batch) -> Iterator[TileTask]:
    for tensor_plan in batch.tensor_plans:
        if tensor_plan.needs_stats:
            yield TileTask(tensor_plan, tensor_plan.tiles)
        else:
            yield from (TileTask(tensor_plan, (tile,)) for tile in tensor_plan.tiles)
