"""Run: carries every tile of a plan from disk to disk.

Each worker is one thread that takes tiles off a list: it reads the rows of all inputs, computes
them block by block, and writes them at their place in the output. The main thread gathers what is
finished, makes it durable every two seconds, and only then notes it in the journal.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergeforge.core.checksums import strip_checksums
from mergeforge.core.tensor_info import Tile
from mergeforge.errors import MergeforgeError, SourceError, out_of_memory
from mergeforge.execute.compute import compute_tiles
from mergeforge.execute.journal import FinishedTile
from mergeforge.execute.model_card import model_card
from mergeforge.execute.receipt import receipt
from mergeforge.execute.streaming_upload import StreamingUpload, open_streaming_upload
from mergeforge.execute.workspace import CARD, RECEIPT, RECIPE, Workspace
from mergeforge.gguf.modelfile import modelfile
from mergeforge.io.disk import DiskFile, InputFile, WriteBehind
from mergeforge.io.file_layout import OutputFiles
from mergeforge.lora import combine
from mergeforge.planner import Batch, Plan, TensorPlan
from mergeforge.tensors.budget import Worker, one_torch_thread, steady_malloc
from mergeforge.writers.encoder import ByteRange, TensorEncoder, chunk_ranges, coalesce_ranges
from mergeforge.writers.safetensors import index

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

SYNC_SECONDS = 2.0


def run(
    plan: Plan, *, fresh: bool = False, overwrite: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Iterator[Tile]:
    """Do the merge, yielding each tile when it is written (or was, by an interrupted run).

    `tell` hears of each file that is sent to the Hub, where the recipe streams them there.

    Goes on by itself where an interrupted run of the same merge stopped. Raises OutputError when
    OUT holds something else, BudgetError when the disk is full, SourceError when an input is bad;
    what was finished by then stays for the next run.
    """
    started = time.monotonic()
    workspace = Workspace(plan, fresh=fresh, overwrite=overwrite)
    try:
        shipment = open_streaming_upload(plan, workspace, tell) if plan.streams else None
        if workspace.journal.commit is None or (shipment and shipment.lost):
            yield from _run_batches(plan, workspace, shipment)
            sides = _aux_files(plan) | _combined_adapter(plan, workspace)
            sides[RECEIPT] = receipt(plan, workspace.journal, sides, time.monotonic() - started)
            workspace.write_aux_files(sides)
        if shipment:
            shipment.publish()
        workspace.commit()
    finally:
        workspace.close()
        for file in _input_files(plan):
            file.close()


def merge(plan: Plan, *, fresh: bool = False, overwrite: bool = False) -> Path:
    """Do the merge and return the output folder."""
    deque(run(plan, fresh=fresh, overwrite=overwrite), maxlen=0)
    return plan.out


def _input_files(plan: Plan) -> list[InputFile]:
    found = {id(file): file for table in plan.inputs.checkpoints for file in table.files}
    return list(found.values())


def _aux_files(plan: Plan) -> dict[str, bytes | Path]:
    sides: dict[str, bytes | Path] = {}
    sides |= {name: file if isinstance(file, Path) else file.read_bytes() for name, file in plan.aux_files.items()}
    if plan.config is not None:
        sides["config.json"] = (json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n").encode()
    shards = index(plan.checkpoint, plan.tensors)
    if shards is not None:
        sides["model.safetensors.index.json"] = shards
    sides[CARD] = model_card(plan).encode()
    if plan.ggufs:
        first = plan.ggufs[0]
        sides["Modelfile"] = modelfile(next(iter(first.layout.files)), first.keys).encode()
    sides[RECIPE] = plan.recipe.to_yaml().encode()
    return sides


def _combined_adapter(plan: Plan, workspace: Workspace) -> dict[str, bytes | Path]:
    """Join the adapters into one: in a folder beside the model, or alone."""
    if plan.combination is None:
        return {}
    place = "adapter/" if plan.files else ""
    folder = workspace.folder / place
    folder.mkdir(exist_ok=True)
    combine.write_joined(plan.combination, folder)
    return {f"{place}{name}": folder / name for name in combine.FILES}


@dataclass(frozen=True)
class TileTask:
    """Tiles that one worker carries without a break: one, or all of a piece that learns."""

    piece: TensorPlan
    tiles: tuple[Tile, ...]


def _run_batches(plan: Plan, workspace: Workspace, shipment: StreamingUpload | None) -> Iterator[Tile]:
    idle: list[Worker] = []  # from batch to batch: what threads free, malloc does not give to other threads
    with one_torch_thread(plan.needs_torch):  # and whatever the caller had, afterwards
        for batch in plan.batches:
            yield from _run_batch(plan, batch, workspace, frozenset(shipment.sent if shipment else ()), idle)
            if shipment:
                for name in batch.finished:
                    shipment.upload(name)


def _run_batch(plan: Plan, batch: Batch, workspace: Workspace, sent: Set[str], idle: list[Worker]) -> Iterator[Tile]:
    """Carry the tiles of a batch; files that were `sent` are not here, and not written again."""
    files = OutputFiles(workspace.folder, {name: plan.files[name] for name in batch.files if name not in sent})
    try:
        files.open()
        yield from WorkerPool(plan, batch, workspace, files, idle).finished()
    finally:
        files.close()


class WorkerPool:
    """The workers, their list of jobs, and what they have finished."""

    def __init__(self, plan: Plan, batch: Batch, workspace: Workspace, files: OutputFiles, idle: list[Worker]) -> None:
        self.plan = plan
        self.idle = idle
        self.journal = workspace.journal
        self.files = files
        self.jobs = deque(_tile_tasks(batch))
        self.results: queue.Queue[FinishedTile | BaseException | None] = queue.Queue()
        self.stop = threading.Event()
        self.waiting: list[FinishedTile] = []
        self.strip_rows = {piece.info.name: piece.chunk_rows for piece in plan.tensor_plans}
        self.inputs = _input_files(plan)
        self.failed = False

    def finished(self) -> Iterator[Tile]:
        """Run the workers; yield tiles as they finish, and make them durable now and then."""
        steady_malloc()
        threads = [threading.Thread(target=self._work, name=f"worker-{at}") for at in range(self.plan.budget.threads)]
        try:
            for thread in threads:
                thread.start()
            yield from self._gather(len(threads))
        except BaseException:
            self.stop.set()
            for file in self.inputs:
                if not isinstance(file, DiskFile):
                    file.close()  # ends waits for the network
            for thread in threads:
                if thread.ident is not None:  # else the system let no more of them start
                    thread.join()
            self._save_finished()
            raise
        for thread in threads:
            thread.join()
        self._flush_finished()
        self.files.sync()  # headers, and tiles that were found damaged and written again
        self._check_inputs()

    def _gather(self, working: int) -> Iterator[Tile]:
        settled = time.monotonic()
        while working:
            try:
                result = self.results.get(timeout=SYNC_SECONDS if self.waiting else None)
            except queue.Empty:
                result = None
                working += 1
            if result is None:
                working -= 1
            elif isinstance(result, BaseException):
                raise result
            else:
                self.waiting.append(result)
                yield result.tile
            if time.monotonic() - settled > SYNC_SECONDS:
                self._flush_finished()
                settled = time.monotonic()

    def _save_finished(self) -> None:
        """After an error or interruption: keep what was finished, as far as the disk lets us."""
        if self.failed:
            return  # bytes that could not be synced once are lost, whatever a second fsync says
        while not self.results.empty():
            result = self.results.get()
            if isinstance(result, FinishedTile):
                self.waiting.append(result)
        with contextlib.suppress(MergeforgeError):
            self._flush_finished()

    def _flush_finished(self) -> None:
        """Make finished tiles durable, then note them in the journal."""
        fresh = [
            one
            for one in self.waiting
            if self.journal.is_finished(one.tile, self.strip_rows[one.tile.name]) != one.checksums
        ]
        if fresh:
            try:
                self.files.sync()
                self._check_inputs()
                self.journal.record(fresh)
            except MergeforgeError:
                self.failed = True
                raise
        self.waiting.clear()

    def _check_inputs(self) -> None:
        """What was computed from a file that has changed must not be kept. Raises SourceError."""
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

        torch.set_num_threads(1)  # parallelism belongs to the tiles
        with torch.inference_mode():
            worker = self._worker()
            with torch.cuda.stream(worker.stream):
                self._drain(worker)

    def _drain(self, worker: Worker) -> None:
        """Do what jobs there are."""
        while not self.stop.is_set() and self.jobs:
            self._process(worker)
        self.idle.append(worker)

    def _worker(self) -> Worker:
        """One that an earlier batch has done with, or a new one."""
        try:
            worker = self.idle.pop()
        except IndexError:
            return Worker(
                self.plan.budget.device, max((piece.staging_nbytes for piece in self.plan.tensor_plans), default=0)
            )
        worker.write_behind = WriteBehind()  # the files that it wrote are closed
        return worker

    def _process(self, worker: Worker) -> None:
        try:
            job = self.jobs.popleft()
        except IndexError:
            return  # another worker took the last one
        held = [self._verify_existing(tile, job.piece, worker) for tile in job.tiles]
        if all(held):
            for done in held:
                self.results.put(done)
            return
        try:
            for tile, encoded, measured in compute_tiles(
                job.piece, job.tiles, worker, allow_nonfinite=self.plan.allow_nonfinite
            ):
                sums = {one.key: self._write(one, tile, raw, worker) for one, raw in encoded}
                self.results.put(FinishedTile(tile, sums, astuple(measured) if measured else ()))
                if self.stop.is_set():
                    return
        except ArithmeticError as error:
            raise SourceError(f"{job.piece.info.name}: {error}") from None
        except (MemoryError, RuntimeError) as error:
            if told := out_of_memory(error, job.piece.info.name):
                raise told from error
            raise

    def _write(self, outlet: TensorEncoder, tile: Tile, raw: Bytes, worker: Worker) -> tuple[str, ...]:
        """Write an encoded tile where it belongs; the checksums of its strips."""
        if outlet.file not in self.files.files:
            return _checksums(outlet, tile, raw)
        at = 0
        for offset, nbytes in coalesce_ranges(_byte_ranges(outlet, tile)):
            self.files.write(outlet.file, raw[at : at + nbytes], offset, worker.write_behind)
            at += nbytes
        return _checksums(outlet, tile, raw)

    def _verify_existing(self, tile: Tile, piece: TensorPlan, worker: Worker) -> FinishedTile | None:
        """A tile that an interrupted run wrote and that the disk still holds, or None."""
        checksums = self.journal.is_finished(tile, piece.chunk_rows)
        if checksums is None:
            return None
        for outlet in (one for one in piece.encoders if one.file in self.files.files):
            worker.clear()
            if _checksums(outlet, tile, self._read(outlet, tile, worker)) != checksums[outlet.key]:
                return None
        return FinishedTile(tile, checksums)

    def _read(self, outlet: TensorEncoder, tile: Tile, worker: Worker) -> Bytes:
        """A tile's bytes from the file, as they were encoded."""
        runs = list(coalesce_ranges(_byte_ranges(outlet, tile)))
        raw, at = worker.allocate(sum(nbytes for _, nbytes in runs)), 0
        for offset, nbytes in runs:
            self.files.read(outlet.file, raw[at : at + nbytes].data, offset)
            at += nbytes
        return raw


def _byte_ranges(outlet: TensorEncoder, tile: Tile) -> Iterator[ByteRange]:
    for strip in chunk_ranges(tile.start, tile.stop, outlet):
        yield from outlet.byte_ranges(*strip)


def _checksums(outlet: TensorEncoder, tile: Tile, raw: Bytes) -> tuple[str, ...]:
    return strip_checksums(raw, [outlet.chunk_nbytes(*strip) for strip in chunk_ranges(tile.start, tile.stop, outlet)])


def _tile_tasks(batch: Batch) -> Iterator[TileTask]:
    for piece in batch.tensor_plans:
        if piece.needs_stats:
            yield TileTask(piece, piece.tiles)
        else:
            yield from (TileTask(piece, (tile,)) for tile in piece.tiles)
