"""`benchmarks/training.py peers`: LoRA training on the CPU against transformers' Trainer with PEFT, in one run.

Both train the same adapter (rank 8 on all linear layers, float32) on the same rows, one row a step; the first steps are
not counted. The rows are the prose of Python's documentation in pieces of TOKENS tokens. `mergeforge train` runs as a
user starts it, with its defaults for the rest: beside its steps it starts up, checks, answers a sample and saves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import PYTHON, table

TOKENS, STEPS, SKIPPED, ROUNDS = 256, 24, 2, 3
TRAINER = """
import json, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

base, data, out, steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
texts = [json.loads(line)["text"] for line in open(data)]
rows = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in rows]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print(f"step {state.global_step} of {steps}", file=sys.stderr, flush=True)


options = TrainingArguments(out, per_device_train_batch_size=1, max_steps=int(steps), learning_rate=2e-4, report_to=[],
                            save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True)
trainer = Trainer(model, options, train_dataset=rows, callbacks=[Clock()])
trainer.train()
model.save_pretrained(out)
"""
STEP = re.compile(r"\bstep (\d+) of")


@dataclass(frozen=True)
class Trained:
    """One run: seconds of a step (median), of all steps, and of the process; its peak resident memory in bytes."""

    step: float
    steps: float
    whole: float
    peak: int


def peers(base: Path, folder: Path) -> str:
    """The table. base: a model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    count = write_rows(base, data)
    commands = {"mergeforge": ours(base, data, folder), "Trainer + PEFT": theirs(base, data, folder)}
    found: dict[str, list[Trained]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            found[name].append(timed(command, folder))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    rows = []
    for name, runs in found.items():
        step, whole, steps = (statistics.median(values) for values in zip(*map(times_of, runs), strict=True))
        peak = statistics.median(run.peak for run in runs)
        rows.append([name, f"{count / step:.0f}", f"{peak / 1e9:.2f} GB", f"{whole:.0f} s", f"{whole / steps:.2f}x"])
    speed, memory = (float(rows[0][1]) / float(rows[1][1]), float(rows[0][2][:-3]) / float(rows[1][2][:-3]))
    head = ["", "tokens/s", "peak memory", "whole command", "of its steps"]
    return f"{table(head, rows)}\n\nspeed {speed:.2f}x, memory {memory:.2f}x, {count} tokens a step, {STEPS} steps"


def times_of(run: Trained) -> tuple[float, float, float]:
    return run.step, run.whole, run.steps


def write_rows(base: Path, data: Path) -> int:
    """Write a row for each step; returns the tokens of a row, with the one that ends it."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    pieces, start = [], 0
    while len(pieces) < STEPS:  # pieces whose text has the same number of tokens again
        text = tokenizer.decode(tokens[start : start + TOKENS - 1])
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == TOKENS - 1:
            pieces.append(text)
        start += TOKENS
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in pieces), encoding="utf-8")
    return TOKENS


def ours(base: Path, data: Path, folder: Path) -> list[str]:
    settings = folder / "train.yaml"
    lines = [f"model: {base}", f"data: {data}", f"output: {folder / 'run'}", "method: lora", "lora: {r: 8, alpha: 16}"]
    lines += [f"seq_len: {TOKENS}", "batch: {size: 1}", f"max_steps: {STEPS}", "lr: 2e-4", "val: 0"]
    settings.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [PYTHON, "-m", "mergeforge", "train", str(settings), "--device", "cpu"]


def theirs(base: Path, data: Path, folder: Path) -> list[str]:
    return [PYTHON, "-c", TRAINER, str(base), str(data), str(folder / "run"), str(STEPS)]


def timed(command: Sequence[str], folder: Path) -> Trained:
    """Run a training; the times of its steps are in metrics.jsonl, or those of the lines that report them."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    started, times = time.perf_counter(), {}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if match := STEP.search(line):
            times.setdefault(int(match[1]), time.perf_counter())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{''.join(lines[-20:])}")
    whole = time.perf_counter() - started
    spans = [times[step] - times[step - 1] for step in times if step - 1 in times]
    if (metrics := folder / "run" / "metrics.jsonl").is_file():
        facts = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        spans = [TOKENS / fact["tokens_per_second"] for fact in facts if "tokens_per_second" in fact]
    step = statistics.median(spans[SKIPPED:])
    return Trained(step, step * STEPS, whole, usage.ru_maxrss * 1024)
