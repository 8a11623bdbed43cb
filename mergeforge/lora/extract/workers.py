"""Worker threads that process one tensor pair at a time: factor its difference, or measure it."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.adapters.peft.keys import KEY_PREFIX
from mergeforge.core.low_rank_svd import Factors, squared_residual, svd_dense, svd_gram, svd_randomized
from mergeforge.core.tensor_info import torch_dtype
from mergeforge.errors import SourceError, out_of_memory
from mergeforge.lora.extract.difference import PairDifference, PairTask
from mergeforge.lora.extract.pairing import TensorPair
from mergeforge.lora.extract.plan import Extraction
from mergeforge.lora.extract.report import PairResult
from mergeforge.recipe import OUT_DTYPES
from mergeforge.tensors.worker import Worker, keep_freed_memory
from mergeforge.writers.peft_adapter import Spool

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ExtractionWorkers:
    """Threads that each take one pair at a time from a list."""

    plan: Extraction
    spool: Spool
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.tasks = list(reversed(self.plan.tasks))
        self.results: queue.Queue[PairResult | BaseException | None] = queue.Queue()

    def run(self) -> Iterator[PairResult]:
        keep_freed_memory()
        threads = [threading.Thread(target=self._work, name=f"worker-{at}") for at in range(self.plan.budget.threads)]
        try:
            for thread in threads:
                thread.start()
            working = len(threads)
            while working:
                result = self.results.get()
                if isinstance(result, BaseException):
                    raise result
                working -= result is None
                if result is not None:
                    yield result
        finally:
            self.stop.set()
            for thread in threads:
                if thread.ident is not None:  # None if the system could not start it
                    thread.join()

    def _work(self) -> None:
        import torch

        try:
            torch.set_num_threads(1)
            with torch.inference_mode():
                worker = Worker(
                    self.plan.budget.device, max((task.staging_nbytes for task in self.plan.tasks), default=0)
                )
                with torch.cuda.stream(worker.stream):
                    while not self.stop.is_set() and self.tasks:
                        self._run_next(worker)
            self.results.put(None)
        except BaseException as error:
            self.results.put(error)

    def _run_next(self, worker: Worker) -> None:
        try:
            task = self.tasks.pop()
        except IndexError:
            return
        try:
            self.results.put(_process(task, self.plan, worker, self.spool))
        except (MemoryError, RuntimeError) as error:
            if budget_error := out_of_memory(error, task.pair.name):
                raise budget_error from error
            raise


def _process(task: PairTask, plan: Extraction, worker: Worker, spool: Spool) -> PairResult:
    """Factor the difference of a pair, or measure it."""
    pair, difference = task.pair, PairDifference(task, worker)
    if task.method:
        return _factor(difference, plan, spool)
    if pair.is_resized or pair.is_left_out:
        return PairResult(pair, None, None)
    if not (pair.base.info.is_float and pair.tuned.info.is_float):
        return PairResult(pair, 0.0 if difference.is_same() else None, None)
    norm, base_norm = difference.norms()
    _check_finite(norm, pair)
    return PairResult(pair, norm, base_norm)


def _check_finite(value: float, pair: TensorPair) -> None:
    if not math.isfinite(value):
        hint = f"leave {pair.name} out with --exclude"
        raise SourceError(f"{pair.name} has infinite or NaN values in one of the models", hint=hint)


def _factor(difference: PairDifference, plan: Extraction, spool: Spool) -> PairResult:
    pair = difference.task.pair
    factors = _compute_factors(difference, plan)
    _check_finite(factors.squared_norm, pair)
    if not factors.rank:
        return PairResult(pair, 0.0, None)
    if pair.tied:
        hint = "use --embeddings save, which saves both as they are in the tuned model"
        raise SourceError(
            f"{pair.name} is both embedding and output head, so factors of it would be ambiguous", hint=hint
        )
    dtype = torch_dtype(OUT_DTYPES[plan.dtype])
    left, right = factors.left.to(dtype), factors.right.to(dtype)
    residual = squared_residual(difference.last_scan, left.float(), right.float())
    _spool_factors(pair, left, right, spool)
    error = math.sqrt(residual / factors.squared_norm)
    norm = math.sqrt(factors.squared_norm)
    return PairResult(pair, norm, None, factors.rank, difference.task.method, factors.energy, error)


def _compute_factors(difference: PairDifference, plan: Extraction) -> Factors:
    """Factor the difference. Passes use the same blocks whether it is in memory or not, so the factors are equal."""
    task, rank, energy = difference.task, plan.target.rank, plan.target.energy
    if task.in_memory:
        difference.load_matrix()
    rows, columns = difference.shape
    if task.method == "exact" and rows < columns:
        assert difference.matrix is not None
        return svd_dense(difference.matrix, rank, energy)
    if task.method == "exact":
        return svd_gram(difference.scan, (rows, columns), rank, energy)
    assert rank is not None
    name, device = task.pair.name, plan.budget.device
    return svd_randomized(difference.scan, (rows, columns), rank, energy, seed=name, device=device)


def _spool_factors(pair: TensorPair, left: Tensor, right: Tensor, spool: Spool) -> None:
    """Spool the factors under PEFT's keys. For a weight stored (in, out), A = L^T and B = R^T."""
    a, b = (left.t(), right.t()) if pair.transposed else (right, left)
    kind, leaf = ("lora_embedding_", "") if pair.embedding else ("lora_", ".weight")
    spool.add(f"{KEY_PREFIX}{pair.module}.{kind}A{leaf}", a)
    spool.add(f"{KEY_PREFIX}{pair.module}.{kind}B{leaf}", b)
