"""From rows to a GGUF file, through the command line: what was learnt is what comes out, in every form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.training_runs import values
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergeforge.cli import run_command
from mergeforge.data import load_tokenizer
from mergeforge.eval import open_model
from mergeforge.operations.synthetic_models import ModelShape, write_model
from mergeforge.train.plan import TINY_STD, make_plan

TOKENS = ("<output>", "</output>")


def write_settings(settings: dict[str, Any], **changed: Any) -> str:
    Path("train.yaml").write_text(yaml.safe_dump(settings | changed))
    return "train.yaml"


def loss(folder: str | Path, plan: Any, **options: Any) -> float:
    """Of the validation rows, by mergeforge eval's own scoring."""
    assert plan.data.validation is not None
    rows = [plan.data.validation[at] for at in range(len(plan.data.validation))]
    scores = [score for _, score in open_model(str(folder), device="cpu", **options).score_rows(rows)]
    return sum(one.nll for one in scores) / sum(one.tokens for one in scores)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab", [277, 320], ids=["grown", "roomy"])
def test_rows_to_gguf(tied: bool, vocab: int, settings: dict[str, Any], here: Path) -> None:
    shape = ModelShape(
        128, 384, 2, 4, 4, vocab, tied=tied
    )  # 256 blocks of 64 in a matrix: bitsandbytes' CPU kernel fails for less
    base = write_model(here / "base", shape, std=TINY_STD)
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    for row in rows:
        row["response"] = f"<output>{row['response']}</output>"
    Path(settings["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = {"merge": {"base_numerics": "dequant_nf4", "dtype": "float32"}, "gguf": ["f32"]}
    changed = {"model": str(base), "method": "qlora", "tokens": {"add": list(TOKENS)}, "after": after, "val": 8}
    config = write_settings(settings, **changed, epochs=6, lr=1e-2)
    assert run_command(["train", config, "-q"]) == 0
    run, merged = here / "run", here / "run" / "merged"
    plan = make_plan(config)

    facts = json.loads((run / "run.json").read_text())
    assert values(run / "metrics.jsonl", "loss")[-1] < values(run / "metrics.jsonl", "loss")[0] / 2
    trained = facts["validation_loss"]
    assert loss(merged, plan) == pytest.approx(trained, abs=1e-3)
    assert loss(run / "adapter", plan, quantise="nf4") == pytest.approx(trained, abs=1e-3)
    assert loss(merged / "merged-F32.gguf", plan) == pytest.approx(trained, abs=5e-3)
    assert abs(loss(run / "adapter", plan) - trained) < 0.2  # on the original base: another model

    before, now = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    new = list(load_tokenizer(str(run / "adapter")).convert_tokens_to_ids(list(TOKENS)))
    old = [row for row in range(vocab) if row not in new]
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        assert now[name][old].equal(before[name][old].float()), name
        assert len(now[name]) >= 279 and not now[name][new[0]].equal(now[name][new[1]])
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == new
    assert json.loads((merged / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_adapter_is_pefts(settings: dict[str, Any], here: Path) -> None:
    """PEFT and transformers load it without us, and give the loss that the run ended with."""
    config = write_settings(settings, val=8, dtype="fp32")
    assert run_command(["train", config, "-q"]) == 0
    plan = make_plan(config)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, here / "run" / "adapter").eval()
    total, count = 0.0, 0
    for row in (plan.data.validation[at] for at in range(len(plan.data.validation or ()))):
        tokens, labels = (torch.from_numpy(np.array(one)).long() for one in (row.tokens, row.labels))
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    facts = json.loads((here / "run" / "run.json").read_text())
    assert total / count == pytest.approx(facts["validation_loss"], rel=1e-5)


def test_merge_yaml_merges(settings: dict[str, Any], here: Path) -> None:
    assert run_command(["train", write_settings(settings), "-q"]) == 0
    assert run_command(["run", "run/merge.yaml", "-q"]) == 0
    assert run_command(["verify", "run/merged", "--deep"]) == 0


def test_killed_at_any_time_it_goes_on(settings: dict[str, Any], here: Path) -> None:
    """kill -9 again and again; the end is that of a run that nobody touched."""
    changed = {"epochs": 3, "save": {"every": 2}, "method": "qlora"}
    config = write_settings(settings, **changed)
    assert run_command(["train", config, "-q", "--out", "whole"]) == 0
    command = [sys.executable, "-m", "mergeforge", "train", config, "-q", "--out", "killed"]
    killed = 0
    for step in (3, 17):
        running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while running.poll() is None and not steps_done(Path("killed"), step):
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        killed += running.wait() == -signal.SIGKILL
    assert run_command(["train", config, "-q", "--out", "killed"]) == 0
    assert killed == 2
    one, two = (load_file(here / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(one[name].equal(two[name]) for name in one)
    assert not list((here / "killed" / "checkpoints").glob(".*"))


def steps_done(run: Path, step: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def test_ctrl_c_is_130_and_the_same_command_goes_on(settings: dict[str, Any], here: Path) -> None:
    config = write_settings(settings, epochs=30)
    command = [sys.executable, "-m", "mergeforge", "train", config, "-q"]
    running = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    while not steps_done(here / "run", 5):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130 and "interrupted after step" in said
    facts = json.loads((here / "run" / "run.json").read_text())
    assert facts["state"] == "interrupted" and (here / "run" / "checkpoints" / f"step-{facts['step']}").is_dir()


def test_two_processes_train_as_one(settings: dict[str, Any], here: Path) -> None:
    """torchrun with gloo: the same rows a step, half of them on each process."""
    config = write_settings(settings, val=8, batch={"size": 8, "micro": 4}, save={"best": False})
    assert run_command(["train", config, "-q", "--out", "one", "--set", "batch.micro=8"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mergeforge"]
    done = subprocess.run([*command, "train", config, "-q", "--out", "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("loss", "eval_loss"):
        one, two = (values(here / name / "metrics.jsonl", key) for name in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-4), key
    adapters = [load_file(here / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(adapters[0][name], adapters[1][name], atol=1e-5) for name in adapters[0])
