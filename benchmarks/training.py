#!/usr/bin/env python3
"""What training takes: memory at load, of the loss, and on a card of 8 GB against the estimate.

    python benchmarks/training.py load [--dir DIR] [--shape 1.1b]    host memory while a base is read into 4 bit
    python benchmarks/training.py loss                               logits held whole, and in chunks
    python benchmarks/training.py card [--dir DIR] [--cap 8]         QLoRA of real shapes with random weights (CUDA)

Memory is this process's anonymous memory (what a file is mapped into may be dropped at any time and does not count),
on a card torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import machine, table

from mergeforge.operations.synthetic_models import SHAPES, ModelShape, write_model

REAL = {  # tokens of a row that shall fit 8 GB
    "mistral-7b": (ModelShape(4096, 14336, 32, 32, 8, 32000), 2048),
    "llama-3.1-8b": (ModelShape(4096, 14336, 32, 32, 8, 128256), 1024),
    "qwen2.5-7b": (ModelShape(3584, 18944, 28, 28, 4, 152064), 1024),
}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["load", "loss", "card", "one-card"])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()) / "mergeforge-training")
    parser.add_argument("--shape", default="1.1b")
    parser.add_argument("--cap", type=float, default=8, help="the card's memory in GB")
    given = parser.parse_args()
    print(f"{machine()}\n", flush=True)
    {"load": load, "loss": loss, "card": card, "one-card": one_card}[given.what](given)


def load(given: argparse.Namespace) -> None:
    """The peak while loading, over what the quantised model takes in the end. The bar: 1 GB."""
    from mergeforge.train.loop.load_base import LoadOptions, load_base
    from mergeforge.train.requirements import silence_libraries

    folder = given.dir / given.shape
    if not (folder / "config.json").exists():
        write_model(folder, SHAPES[given.shape])
    with peak() as found, silence_libraries():
        before = anonymous()
        model = load_base(LoadOptions(str(folder), "bf16", "cpu", quantize=True))
    held = sum(one.numel() * one.element_size() for one in model.parameters())
    row = [given.shape, *(f"{size / 1e6:.0f}" for size in (before, held, found[0], found[0] - held))]
    print(table(["shape", "libraries MB", "quantised MB", "peak MB", "peak less quantised MB"], [row]))


def loss(given: argparse.Namespace) -> None:
    """Forward and backward of lm_head and loss: 4096 tokens, half of them trained on, 64,000 words."""
    rows = []
    for name, chunk in (("whole", 0), ("chunks of 1024", 1024), ("chunks of 256", 256)):
        found = apart(lambda chunk=chunk: _head(chunk))
        rows.append([name, f"{found[0]:.1f}", f"{found[1]:.0f}"])
    print(table(["logits", "seconds", "peak MB over before"], rows))


def _head(chunk: int) -> tuple[float, float]:
    from mergeforge.train.loop.chunked_loss import IGNORE_INDEX, _in_chunks, _summed_loss

    torch.manual_seed(0)
    head = torch.nn.Linear(512, 64_000, bias=False)
    hidden = torch.randn(4096, 512, requires_grad=True)
    labels = torch.randint(0, 64_000, (4096,))
    labels[::2] = IGNORE_INDEX
    trained = labels != IGNORE_INDEX
    before = anonymous()
    with peak() as found:
        started = time.perf_counter()
        total = _in_chunks(hidden[trained], labels[trained], head, chunk) if chunk else _summed_loss(head(hidden), labels)
        total.backward()
        seconds = time.perf_counter() - started
    return seconds, (found[0] - before) / 1e6


def card(given: argparse.Namespace) -> None:
    """Each shape in a process of its own, with the card's memory capped."""
    rows = []
    for name in REAL:
        command = [
            sys.executable,
            __file__,
            "one-card",
            "--shape",
            name,
            "--dir",
            str(given.dir),
            "--cap",
            str(given.cap),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(name)]
        rows.append(
            lines[0].split("\t") if lines else [name, "-", "-", "-", "-", done.stderr[-300:].replace("\n", " ")]
        )
        print("\t".join(rows[-1]), flush=True)
    head = ["shape", "tokens", "estimate GB", "peak GB", "peak / estimate", "tokens/s"]
    print(f"\n{torch.cuda.get_device_name(0)}, capped to {given.cap:g} GB\n\n{table(head, rows)}")


def one_card(given: argparse.Namespace) -> None:
    from mergeforge.train import make_plan, train

    shape, tokens = REAL[given.shape]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, given.cap * 1e9 / total))
    folder, run = given.dir / given.shape, given.dir / f"{given.shape}-run"
    if not (folder / "config.json").exists():
        write_model(folder, shape)
    shutil.rmtree(run, ignore_errors=True)
    text = [{"text": "".join(chr(97 + (at * at + row) % 26) for at in range(tokens - 2))} for row in range(16)]
    settings: dict[str, Any] = {
        "model": str(folder),
        "data": "rows",
        "seq_len": tokens,
        "pack": False,
        "output": str(run),
    }
    settings |= {"max_steps": STEPS, "batch": {"size": 2}, "memory": {"budget": f"{given.cap * 0.93:.3f}GB"}}
    from mergeforge.data import DataSource
    from mergeforge.train.settings import read

    wanted = read(settings)
    wanted = replace(wanted, data=replace(wanted.data, sources=(DataSource("rows", rows=tuple(text)),)))
    plan = make_plan(wanted, device="cuda")
    speeds: list[float] = []
    trained = train(plan, listeners=[lambda line: speeds.append(line.get("tokens_per_second", 0.0))])
    estimate, found = plan.choices.estimate.total, trained.peak_memory
    numbers = [
        str(tokens),
        f"{estimate / 1e9:.2f}",
        f"{found / 1e9:.2f}",
        f"{found / estimate:.2f}",
        f"{max(speeds):.0f}",
    ]
    print("\t".join([given.shape, *numbers]))
    shutil.rmtree(folder)


def apart(work: Callable[[], Any]) -> Any:
    """The result of some work in a forked process, whose memory is its own."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(work()))
    process.start()
    found = receive.recv()
    process.join()
    return found


def anonymous() -> int:
    """This process's memory that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most anonymous memory meanwhile, looked at every 5 ms."""
    found, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found[0] = max(found[0], anonymous())


if __name__ == "__main__":
    main()
