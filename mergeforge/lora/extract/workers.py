"""Workers that take one pair of tensors at a time: factor it, or say how far the two are apart."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeforge.core.low_rank_svd import Factors, exact, exact_held, randomised, residual
from mergeforge.core.tensor_info import torch_dtype
from mergeforge.errors import SourceError, out_of_memory
from mergeforge.lora.extract.difference import Difference, Job
from mergeforge.lora.extract.pairing import Pair
from mergeforge.lora.extract.plan import Extraction
from mergeforge.lora.extract.report import PREFIX, Found
from mergeforge.recipe import OUT_DTYPES
from mergeforge.tensors.budget import Worker, steady_malloc
from mergeforge.writers.peft_adapter import Spool

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Crew:
    """Workers that each take one pair at a time off a list."""

    plan: Extraction
    spool: Spool
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.jobs = list(reversed(self.plan.jobs))
        self.results: queue.Queue[Found | BaseException | None] = queue.Queue()

    def found(self) -> Iterator[Found]:
        steady_malloc()
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
                if thread.ident is not None:  # else the system let no more of them start
                    thread.join()

    def _work(self) -> None:
        import torch

        try:
            torch.set_num_threads(1)
            with torch.inference_mode():
                worker = Worker(self.plan.budget.device, max((job.staging for job in self.plan.jobs), default=0))
                with torch.cuda.stream(worker.stream):
                    while not self.stop.is_set() and self.jobs:
                        self._do(worker)
            self.results.put(None)
        except BaseException as error:
            self.results.put(error)

    def _do(self, worker: Worker) -> None:
        try:
            job = self.jobs.pop()
        except IndexError:
            return
        try:
            self.results.put(_done(job, self.plan, worker, self.spool))
        except (MemoryError, RuntimeError) as error:
            if told := out_of_memory(error, job.pair.name):
                raise told from error
            raise


def _done(job: Job, plan: Extraction, worker: Worker, spool: Spool) -> Found:
    """Factor a pair, or say how far its two tensors are apart."""
    pair, difference = job.pair, Difference(job, worker)
    if job.method:
        return _factored(difference, plan, spool)
    if pair.is_resized or pair.is_left_out:
        return Found(pair, None, None)
    if not (pair.base.info.is_float and pair.tuned.info.is_float):
        return Found(pair, 0.0 if difference.is_same() else None, None)
    norm, base_norm = difference.norms()
    _check_finite(norm, pair)
    return Found(pair, norm, base_norm)


def _check_finite(square: float, pair: Pair) -> None:
    if not math.isfinite(square):
        hint = f"--exclude '{pair.name}' leaves it out"
        raise SourceError(f"{pair.name} holds infinite or NaN values in one of the models", hint=hint)


def _factored(difference: Difference, plan: Extraction, spool: Spool) -> Found:
    pair = difference.job.pair
    factors = _factors(difference, plan)
    _check_finite(factors.square, pair)
    if not factors.rank:
        return Found(pair, 0.0, None)
    if pair.tied:
        hint = "--embeddings save keeps both as the tuned model has them"
        raise SourceError(f"{pair.name} is input and output at once: factors of it mean two things", hint=hint)
    dtype = torch_dtype(OUT_DTYPES[plan.dtype])
    left, right = factors.left.to(dtype), factors.right.to(dtype)
    left_over = residual(difference.last_look, left.float(), right.float())
    _spool(pair, left, right, spool)
    error = math.sqrt(left_over / factors.square)
    norm = math.sqrt(factors.square)
    return Found(pair, norm, None, factors.rank, difference.job.method, factors.energy, error)


def _factors(difference: Difference, plan: Extraction) -> Factors:
    """By looks of the same blocks whether it is held or not, so the factors are the same; a wide one is held."""
    job, rank, energy = difference.job, plan.wanted.rank, plan.wanted.energy
    if job.held:
        difference.hold()
    rows, columns = difference.shape
    if job.method == "exact" and rows < columns:
        assert difference.matrix is not None
        return exact_held(difference.matrix, rank, energy)
    if job.method == "exact":
        return exact(difference.look, (rows, columns), rank, energy)
    assert rank is not None
    name, device = job.pair.name, plan.budget.device
    return randomised(difference.look, (rows, columns), rank, energy, seed=name, device=device)


def _spool(pair: Pair, left: Tensor, right: Tensor, spool: Spool) -> None:
    """Under PEFT's keys: a weight stored (in, out) has A = L^T and B = R^T."""
    a, b = (left.t(), right.t()) if pair.transposed else (right, left)
    kind, leaf = ("lora_embedding_", "") if pair.embedding else ("lora_", ".weight")
    spool.add(f"{PREFIX}{pair.module}.{kind}A{leaf}", a)
    spool.add(f"{PREFIX}{pair.module}.{kind}B{leaf}", b)
