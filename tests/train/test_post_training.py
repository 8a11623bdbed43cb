"""What `mergeforge train` does after training, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fake_hub import FakeHub
from support.faults.warm import Warm

from mergeforge.cli import run_command
from mergeforge.errors import SourceError
from mergeforge.train.run_folder import newest_run


def write(settings: dict[str, Any], **changes: Any) -> str:
    Path("train.yaml").write_text(yaml.safe_dump(settings | changes))
    return "train.yaml"


def test_the_plan_shows_memory_time_and_cost(settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", write(settings, val=4), "--plan", "--price-per-hour", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    rows = ("40 of 40 rows", "4 of them for validation")
    for text in (*rows, "activations", "optimizer", "time     about", "at 2 an hour"):
        assert text in err, text
    assert json.loads(out)["parameters"] == 133440
    assert not Path("run/adapter").exists()


def test_then_uses_the_newest_finished_run(settings: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match="no finished run"):
        newest_run()
    config = write(settings, output="runs/one", val=4)
    assert run_command(["train", config]) == 0
    err = capfd.readouterr().err
    assert "step 1 of 9: loss" in err and "validation loss" in err and "next: mergeforge run" in err
    assert run_command(["train", "--then", "merge,gguf", "--json", "-q"]) == 0
    result = json.loads(capfd.readouterr().out)["followed"]
    assert result["base_numerics"] == "original" and set(result["losses"]) == {"adapter", "original"}
    assert result["ggufs"] == ["runs/one/merged/merged-Q4_K_M.gguf"] and Path(result["ggufs"][0]).is_file()
    assert "validation loss by form" in Path("runs/one/report.html").read_text()


def test_a_run_is_published(settings: dict[str, Any], here: Path, warm: Warm, fake_hub: FakeHub) -> None:
    ended = warm.run(["train", write(settings, after={"publish": "me/joined"}), "-q"])
    assert ended.code == 0, ended.err
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(fake_hub.listing("me/joined"))
    card = fake_hub.read("me/joined", "README.md").decode()
    assert "- run/adapter" in card and str(here) not in card


def test_a_missing_token_is_reported_before_training(settings: dict[str, Any], warm: Warm) -> None:
    command = ["train", write(settings, after={"publish": "me/joined"}), "-q"]
    ended = warm.run(command, env={"HF_TOKEN": ""})
    assert ended.code == 1 and "token" in ended.err.lower() and not Path("run/adapter").exists()


@pytest.mark.parametrize("arguments", [[], ["train.yaml", "--then", "bake"], ["train.yaml", "--then", "publish"]])
def test_arguments_that_cannot_work_are_refused(arguments: list[str], settings: dict[str, Any]) -> None:
    write(settings)
    assert run_command(["train", *arguments]) == 2
    assert not Path("run/adapter").exists()


def test_auto_merges_on_the_base_that_validates_better(settings: dict[str, Any], here: Path) -> None:
    """QLoRA trained on the NF4 form of the base: at this size the original base does worse with the adapter."""
    after = {"merge": {"path": "out"}}
    assert run_command(["train", write(settings, method="qlora", val=8, epochs=6, lr=1e-2, after=after), "-q"]) == 0
    losses = json.loads((here / "run" / "run.json").read_text())["followed"]["losses"]
    numerics = yaml.safe_load(Path("out/mergeforge.yml").read_text()).get("base_numerics", "original")
    expected = "original" if losses["original"] <= losses["adapter"] + 1e-3 else "dequant_nf4"
    assert numerics == expected and (expected == "original" or expected in losses)


def test_trains_a_base_and_data_from_the_hub(
    settings: dict[str, Any], warm: Warm, fake_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The plan downloads no weights; adapter and recipe name the repo at its commit, and no local path."""
    base, rows = Path(settings["model"]), Path(settings["data"])
    fake_hub.add_repo("org/base")
    fake_hub.add_repo("org/rows", type="dataset")
    sha = fake_hub.push("org/base", {path.name: path.read_bytes() for path in base.iterdir()})
    fake_hub.push("org/rows", {"train.jsonl": rows.read_bytes()}, type="dataset")
    command = ["train", write(settings, model="org/base", data="hf://org/rows", output="run"), "-q"]
    planned = warm.run([*command, "--plan"])
    assert planned.code == 0, planned.err
    assert not list(tmp_path_factory.getbasetemp().glob("hub-home*/**/model.safetensors"))
    trained = warm.run(command)
    assert trained.code == 0, trained.err
    config = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", sha)
    assert yaml.safe_load(Path("run/merge.yaml").read_text())["base_model"] == f"org/base@{sha}"
