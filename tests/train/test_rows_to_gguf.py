"""End to end, from rows to a GGUF file through the command line: every form has the loss that training ended with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from support.faults.warm import KILLED, Warm
from support.training_runs import adapter_tensors, metric_values
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergeforge.cli import run_command
from mergeforge.data import load_tokenizer
from mergeforge.eval import open_model
from mergeforge.operations.synthetic_models import ModelShape, write_model
from mergeforge.train.plan import TINY_STD, make_plan
from mergeforge.train.run import Trained

TOKENS = ("<output>", "</output>")


def write_settings(settings: dict[str, Any], **changes: Any) -> str:
    Path("train.yaml").write_text(yaml.safe_dump(settings | changes))
    return "train.yaml"


def read_manifest(run: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((run / "run.json").read_text())
    return manifest


def validation_loss(folder: str | Path, plan: Any, **options: Any) -> float:
    """The loss of the validation rows, by the scoring of `mergeforge eval`."""
    assert plan.data.validation is not None
    rows = [plan.data.validation[index] for index in range(len(plan.data.validation))]
    scores = [score for _, score in open_model(str(folder), device="cpu", **options).score_rows(rows)]
    return sum(score.nll for score in scores) / sum(score.tokens for score in scores)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("vocab", [277, 320], ids=["grown", "roomy"])
def test_every_form_has_the_loss_of_the_training(tied: bool, vocab: int, settings: dict[str, Any], here: Path) -> None:
    # bitsandbytes' CPU kernel fails for matrices of fewer than 256 blocks of 64
    base = write_model(here / "base", ModelShape(128, 384, 2, 4, 4, vocab, tied=tied), std=TINY_STD)
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    for row in rows:
        row["response"] = f"<output>{row['response']}</output>"
    Path(settings["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = {"merge": {"base_numerics": "dequant_nf4", "dtype": "float32"}, "gguf": ["f32"]}
    changes = {"model": str(base), "method": "qlora", "tokens": {"add": list(TOKENS)}, "after": after, "val": 8}
    config = write_settings(settings, **changes, epochs=6, lr=1e-2)
    assert run_command(["train", config, "-q"]) == 0
    run, merged = here / "run", here / "run" / "merged"
    plan = make_plan(config)

    losses = metric_values(run)
    assert losses[-1] < losses[0] / 2
    trained = read_manifest(run)["validation_loss"]
    assert validation_loss(merged, plan) == pytest.approx(trained, abs=1e-3)
    assert validation_loss(run / "adapter", plan, quantize="nf4") == pytest.approx(trained, abs=1e-3)
    assert validation_loss(merged / "merged-F32.gguf", plan) == pytest.approx(trained, abs=5e-3)
    assert abs(validation_loss(run / "adapter", plan) - trained) < 0.2  # on the original base: another model

    before, after_merge = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    new = list(load_tokenizer(str(run / "adapter")).convert_tokens_to_ids(list(TOKENS)))
    old = [row for row in range(vocab) if row not in new]
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        weight = after_merge[name]
        assert weight[old].equal(before[name][old].float()), name
        assert len(weight) >= 279 and not weight[new[0]].equal(weight[new[1]])
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == new
    assert json.loads((merged / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_peft_loads_the_adapter_and_gets_the_same_loss(settings: dict[str, Any], here: Path) -> None:
    config = write_settings(settings, val=8, dtype="fp32")
    assert run_command(["train", config, "-q"]) == 0
    plan = make_plan(config)
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, here / "run" / "adapter").eval()
    total, count = 0.0, 0
    for row in (plan.data.validation[index] for index in range(len(plan.data.validation or ()))):
        tokens, labels = (torch.from_numpy(np.array(values)).long() for values in (row.tokens, row.labels))
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    assert total / count == pytest.approx(read_manifest(here / "run")["validation_loss"], rel=1e-5)


def test_the_written_recipe_merges_the_adapter(finished_run: Trained, here: Path) -> None:
    assert run_command(["run", str(finished_run.folder.recipe), "-q", "--out", "merged"]) == 0
    assert run_command(["verify", "merged", "--deep"]) == 0


def test_resumes_after_kills_with_the_same_result(settings: dict[str, Any], here: Path, warm: Warm) -> None:
    """Killed with SIGKILL twice, the run ends in the adapter of an undisturbed one."""
    config = write_settings(settings, epochs=3, save={"every": 2}, method="qlora")
    assert run_command(["train", config, "-q", "--out", "whole"]) == 0
    command = ["train", config, "-q", "--out", "killed"]
    for step in (3, 17):
        child = warm.start(command)
        wait_for_step(Path("killed"), step)
        child.kill()
        assert child.wait().code == KILLED
    assert warm.run(command).code == 0
    whole, resumed = (adapter_tensors(here / name) for name in ("whole", "killed"))
    assert all(whole[name].equal(resumed[name]) for name in whole)
    assert not list((here / "killed" / "checkpoints").glob(".*"))


def wait_for_step(run: Path, step: int, seconds: float = 60) -> None:
    """Wait until the step is in the metrics of a run."""
    metrics, end = run / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.005)


def test_ctrl_c_exits_with_130_and_leaves_a_checkpoint(
    settings: dict[str, Any], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def press_ctrl_c() -> None:
        wait_for_step(here / "run", 5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    code = run_command(["train", write_settings(settings, epochs=30), "-q"])
    thread.join()
    manifest = read_manifest(here / "run")
    expected = f"Interrupted after step {manifest['step']}. Run the same command again to resume."
    assert code == 130 and expected in capfd.readouterr().err
    assert manifest["state"] == "interrupted"
    assert (here / "run" / "checkpoints" / f"step-{manifest['step']}").is_dir()


def test_two_processes_train_like_one(settings: dict[str, Any], here: Path) -> None:
    """torchrun with gloo: the same rows in each step, half of them on each process."""
    config = write_settings(settings, val=8, batch={"size": 8, "micro": 4}, save={"best": False})
    assert run_command(["train", config, "-q", "--out", "one", "--set", "batch.micro=8"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mergeforge"]
    done = subprocess.run([*command, "train", config, "-q", "--out", "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("loss", "eval_loss"):
        assert metric_values(here / "one", key) == pytest.approx(metric_values(here / "two", key), rel=1e-4), key
    one, two = (adapter_tensors(here / name) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
