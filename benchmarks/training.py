#!/usr/bin/env python3
"""What training takes: host memory while loading, memory of the loss, and an 8 GB GPU against the estimate.

    python benchmarks/training.py load [--dir DIR] [--shape 1.1b]    host memory while a base is loaded in 4 bit
    python benchmarks/training.py loss                               all logits at once, and in chunks
    python benchmarks/training.py peers --base FOLDER [--dir DIR]    LoRA against transformers' Trainer with PEFT
    python benchmarks/training.py gpu [--dir DIR] [--cap 8]          QLoRA of real shapes with random weights (CUDA)

Memory on the host is this process's anonymous memory (mapped files do not count, because the kernel may drop them); on
a GPU it is torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import machine, table

from mergeforge.operations.synthetic_models import SHAPES, ModelShape, write_model

REAL = {  # shape, and tokens per row that should fit into 8 GB
    "mistral-7b": (ModelShape(4096, 14336, 32, 32, 8, 32000), 2048),
    "llama-3.1-8b": (ModelShape(4096, 14336, 32, 32, 8, 128256), 1024),
    "qwen2.5-7b": (ModelShape(3584, 18944, 28, 28, 4, 152064), 1024),
}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "loss", "peers", "gpu", "one-shape"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "mergeforge-training")
    parser.add_argument("--base", type=Path, help="a model's folder, such as that of `mergeforge demo --real`")
    parser.add_argument("--shape", default="1.1b")
    parser.add_argument("--cap", type=float, default=8, help="GPU memory to use, in GB")
    arguments = parser.parse_args()
    print(f"{machine()}\n", flush=True)
    {"load": load, "loss": loss, "peers": against_trainer, "gpu": gpu, "one-shape": one_shape}[arguments.what](
        arguments
    )


def against_trainer(arguments: argparse.Namespace) -> None:
    """Speed, memory and the time of the whole command, against transformers' Trainer with PEFT."""
    from training_peers import peers

    if arguments.base is None:
        raise SystemExit("name a model's folder: --base FOLDER")
    print(peers(arguments.base, arguments.dir / "peers"))


def load(arguments: argparse.Namespace) -> None:
    """The peak while loading, minus the size of the quantized model. The limit is 1 GB."""
    from mergeforge.train.environment import silence_libraries
    from mergeforge.train.loop.load_base import LoadOptions, load_base

    folder = arguments.dir / arguments.shape
    if not (folder / "config.json").exists():
        write_model(folder, SHAPES[arguments.shape])
    with watch_memory() as memory, silence_libraries():
        before = anonymous()
        model = load_base(LoadOptions(str(folder), "bf16", "cpu", quantize=True))
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    row = [arguments.shape, *(f"{nbytes / 1e6:.0f}" for nbytes in (before, size, memory.peak, memory.peak - size))]
    print(table(["shape", "libraries MB", "quantized MB", "peak MB", "peak minus quantized MB"], [row]))


def loss(arguments: argparse.Namespace) -> None:
    """Forward and backward of lm_head and loss: 4096 tokens, half of them trained on, a vocabulary of 64,000."""
    rows = []
    for name, chunk in (("all at once", 0), ("chunks of 1024", 1024), ("chunks of 256", 256)):
        seconds, peak = in_own_process(lambda chunk=chunk: _loss(chunk))
        rows.append([name, f"{seconds:.1f}", f"{peak:.0f}"])
    print(table(["logits", "seconds", "additional peak MB"], rows))


def _loss(chunk: int) -> tuple[float, float]:
    from mergeforge.train.loop.chunked_loss import IGNORE_INDEX, summed_loss, summed_loss_in_chunks

    torch.manual_seed(0)
    head = torch.nn.Linear(512, 64_000, bias=False)
    hidden = torch.randn(4096, 512, requires_grad=True)
    labels = torch.randint(0, 64_000, (4096,))
    labels[::2] = IGNORE_INDEX
    is_trained = labels != IGNORE_INDEX
    before = anonymous()
    with watch_memory() as memory:
        started = time.perf_counter()
        if chunk:
            total = summed_loss_in_chunks(hidden[is_trained], labels[is_trained], head, chunk)
        else:
            total = summed_loss(head(hidden), labels)
        total.backward()
        seconds = time.perf_counter() - started
    return seconds, (memory.peak - before) / 1e6


def gpu(arguments: argparse.Namespace) -> None:
    """Each shape in a process of its own, with the GPU's memory capped."""
    rows = []
    for name in REAL:
        command = [sys.executable, __file__, "one-shape", "--shape", name, "--dir", str(arguments.dir)]
        done = subprocess.run([*command, "--cap", str(arguments.cap)], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(name)]
        error = done.stderr[-300:].replace("\n", " ")
        rows.append(lines[0].split("\t") if lines else [name, "-", "-", "-", "-", error])
        print("\t".join(rows[-1]), flush=True)
    columns = ["shape", "tokens", "estimate GB", "peak GB", "peak / estimate", "tokens/s"]
    print(f"\n{torch.cuda.get_device_name(0)}, capped to {arguments.cap:g} GB\n\n{table(columns, rows)}")


def one_shape(arguments: argparse.Namespace) -> None:
    from mergeforge.data import DataSource
    from mergeforge.train import make_plan, train
    from mergeforge.train.settings import read

    shape, tokens = REAL[arguments.shape]
    memory = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.cap * 1e9 / memory))
    folder, run = arguments.dir / arguments.shape, arguments.dir / f"{arguments.shape}-run"
    if not (folder / "config.json").exists():
        write_model(folder, shape)
    shutil.rmtree(run, ignore_errors=True)
    values: dict[str, Any] = {"model": str(folder), "data": "rows", "seq_len": tokens, "pack": False}
    values |= {"output": str(run), "max_steps": STEPS, "batch": {"size": 2}}
    settings = read(values | {"memory": {"budget": f"{arguments.cap * 0.93:.3f}GB"}})
    rows = [{"text": "".join(chr(97 + (at * at + row) % 26) for at in range(tokens - 2))} for row in range(16)]
    data = replace(settings.data, sources=(DataSource("rows", rows=tuple(rows)),))
    plan = make_plan(replace(settings, data=data), device="cuda")
    speeds: list[float] = []
    trained = train(plan, listeners=[lambda line: speeds.append(line.get("tokens_per_second", 0.0))])
    estimate, peak = plan.resolved.estimate.total, trained.peak_memory
    numbers = [f"{estimate / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / estimate:.2f}", f"{max(speeds):.0f}"]
    print("\t".join([arguments.shape, str(tokens), *numbers]))
    shutil.rmtree(folder)


def in_own_process(work: Callable[[], Any]) -> Any:
    """The result of a function in a forked process, whose memory is its own."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(work()))
    process.start()
    result = receive.recv()
    process.join()
    return result


def anonymous() -> int:
    """This process's anonymous memory in bytes."""
    line = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert line is not None
    return int(line[1]) * 1024


@dataclass
class Memory:
    peak: int


@contextmanager
def watch_memory() -> Iterator[Memory]:
    """The peak of the anonymous memory inside the block, sampled every 5 ms."""
    memory, done = Memory(anonymous()), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            memory.peak = max(memory.peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()
        memory.peak = max(memory.peak, anonymous())


if __name__ == "__main__":
    main()
