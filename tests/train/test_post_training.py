"""What follows training, and what the command tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fake_hub import FakeHub

from mergeforge.cli import run_command
from mergeforge.errors import SourceError
from mergeforge.train.run_folder import newest_run


def write(settings: dict[str, Any], **changed: Any) -> str:
    Path("train.yaml").write_text(yaml.safe_dump(settings | changed))
    return "train.yaml"


def test_the_plan_tells_memory_time_and_cost(settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", write(settings, val=4), "--plan", "--price-per-hour", "2", "--json"]) == 0
    out, told = capfd.readouterr()
    for part in (
        "40 of 40 rows",
        "4 of them for validation",
        "activations",
        "optimizer",
        "time     about",
        "at 2 an hour",
    ):
        assert part in told, part
    assert json.loads(out)["parameters"] == 133440
    assert not Path("run/adapter").exists()


def test_then_goes_on_from_the_newest_run(settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match="no finished run"):
        newest_run()
    config = write(settings, output="runs/one", val=4)
    assert run_command(["train", config]) == 0
    told = capfd.readouterr().err
    assert "step 1 of 9: loss" in told and "validation loss" in told and "next: mergeforge run" in told
    assert run_command(["train", "--then", "merge,gguf", "--json", "-q"]) == 0
    made = json.loads(capfd.readouterr().out)["followed"]
    assert made["base_numerics"] == "original" and set(made["losses"]) == {"adapter", "original"}
    assert made["ggufs"] == ["runs/one/merged/merged-Q4_K_M.gguf"] and Path(made["ggufs"][0]).is_file()
    assert "validation loss by form" in Path("runs/one/report.html").read_text()


def test_a_run_is_published(settings: dict[str, Any], here: Path) -> None:
    with FakeHub() as hub:
        env = {**os.environ, **hub.env(), "HF_HOME": str(here / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mergeforge", "train", write(settings, after={"publish": "me/joined"}), "-q"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(hub.listing("me/joined"))
        card = hub.read("me/joined", "README.md").decode()
    assert "- run/adapter" in card and str(here) not in card


def test_a_hub_that_lets_nobody_in_is_told_before_training(settings: dict[str, Any], here: Path) -> None:
    env = {name: value for name, value in os.environ.items() if "TOKEN" not in name} | {"HF_HOME": str(here / "home")}
    with FakeHub() as hub:
        env |= {name: value for name, value in hub.env().items() if name != "HF_TOKEN"}
        command = [sys.executable, "-m", "mergeforge", "train", write(settings, after={"publish": "me/joined"}), "-q"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "token" in done.stderr.lower() and not Path("run/adapter").exists()


@pytest.mark.parametrize("arguments", [[], ["train.yaml", "--then", "bake"], ["train.yaml", "--then", "publish"]])
def test_what_makes_no_sense_is_refused(arguments: list[str], settings: dict[str, Any]) -> None:
    write(settings)
    assert run_command(["train", *arguments]) == 2
    assert not Path("run/adapter").exists()


def test_auto_takes_the_numerics_that_do_better(settings: dict[str, Any], here: Path) -> None:
    """QLoRA learnt on the NF4 form of the base: at this size the original base does worse with it."""
    after = {"merge": {"path": "out"}}
    assert run_command(["train", write(settings, method="qlora", val=8, epochs=6, lr=1e-2, after=after), "-q"]) == 0
    losses = json.loads((here / "run" / "run.json").read_text())["followed"]["losses"]
    used = yaml.safe_load(Path("out/mergeforge.yml").read_text()).get("base_numerics", "original")
    kept = "original" if losses["original"] <= losses["adapter"] + 1e-3 else "dequant_nf4"
    assert used == kept and (kept == "original" or kept in losses)


def test_a_base_and_data_of_the_hub(settings: dict[str, Any], here: Path) -> None:
    """The plan downloads no weights; adapter and recipe name the repo, at its commit, and no path of this machine."""
    base, rows = Path(settings["model"]), Path(settings["data"])
    with FakeHub() as hub:
        hub.add_repo("org/base")
        hub.add_repo("org/rows", type="dataset")
        sha = hub.push("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
        hub.push("org/rows", {"train.jsonl": rows.read_bytes()}, type="dataset")
        config = write(settings, model="org/base", data="hf://org/rows", output="run")
        env = {**os.environ, **hub.env(), "HF_HOME": str(here / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mergeforge", "train", config, "-q"]
        planned = subprocess.run([*command, "--plan"], env=env, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
        assert not list((here / "home").rglob("model.safetensors"))
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", sha)
    assert yaml.safe_load(Path("run/merge.yaml").read_text())["base_model"] == f"org/base@{sha}"
