"""mergekit-yaml's command line on `mergeforge run`: every option does the same, or says why nothing is needed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from support.paths import ROOT
from support.peers import peer_program

from mergeforge.cli import run_command
from mergeforge.cli._mergekit_flags import FLAGS
from mergeforge.cli.run import run

CONFIG = """
models:
  - model: base
  - {model: tuned-a, parameters: {weight: 1, density: 0.5}}
merge_method: dare_ties
base_model: base
"""


@pytest.fixture
def config(models: Path) -> str:
    (models / "config.yml").write_text(CONFIG)
    return "config.yml"


def weights(folder: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors")))


def test_out_is_an_argument_and_short_options_work(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", config, "one", "-q", "-j", "1"]) == 0
    assert run_command(["run", config, "-o", "two", "--num-threads", "2", "-q"]) == 0
    assert weights("one") == weights("two")
    assert run_command(["run", config, "one", "--out", "two"]) == 2
    assert "two output folders: one and --out two" in capsys.readouterr().err


def test_the_seed_and_the_shard_size_are_those_of_a_recipe(config: str) -> None:
    assert run_command(["run", config, "flags", "--random-seed", "7", "--out-shard-size", "200K", "-q"]) == 0
    sets = ["--set", "random_seed=7", "--set", "output.shard_size=200KB"]
    assert run_command(["run", config, "keys", *sets, "-q"]) == 0
    assert run_command(["run", config, "plain", "-q"]) == 0
    assert len(list(Path("flags").glob("model-*.safetensors"))) > 1
    assert weights("flags") == weights("keys") != weights("plain")


def test_crimes_are_a_mismatch_that_the_recipe_allows(config: str) -> None:
    assert run_command(["run", config, "out", "--allow-crimes", "-q"]) == 0
    assert yaml.safe_load(Path("out/mergeforge.yml").read_text())["allow_mismatch"] is True


def test_devices_and_pickles_are_those_of_our_options(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", config, "--no-cuda"]) == 0
    assert " on cpu" in capsys.readouterr().out
    assert run_command(["plan", config, "--cuda", "--device", "cpu"]) == 0
    code = run_command(["plan", config, "--gpu-rich"])
    text = capsys.readouterr()
    assert (code, "cuda" in text.err) == (2, True) or " on cuda" in text.out
    import torch

    torch.save(load_file("tuned-a/model.safetensors"), "tuned-a/pytorch_model.bin")
    Path("tuned-a/model.safetensors").unlink()
    assert run_command(["run", config, "out", "-q"]) == 3
    assert run_command(["run", config, "out", "-q", "--lazy-unpickle"]) == 0


def test_the_cache_folder_is_the_hubs(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    import os

    assert run_command(["plan", config, "-q", "--transformers-cache", "elsewhere"]) == 0
    assert os.environ["HF_HUB_CACHE"] == "elsewhere"


def test_truncated_embeddings_are_rows_mapped_by_token(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", config, "--unsafe-truncate-embeddings"]) == 0
    assert "tokenizer_source: base" in capsys.readouterr().err


def test_every_other_flag_says_in_a_line_why_nothing_is_needed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in FLAGS:
        if flag.note:
            assert run_command(["plan", config, f"--{flag.name}", *(["1"] if flag.metavar else [])]) == 0
            assert f"--{flag.name} does nothing: {flag.note}" in capsys.readouterr().err
        if flag.negated is not None and not flag.metavar and flag.name != "unsafe-truncate-embeddings":
            assert run_command(["plan", config, f"--no-{flag.name}"]) == 0
            assert (f"--no-{flag.name} does nothing" in capsys.readouterr().err) == bool(flag.negated)
    assert (
        run_command(["plan", config, "-q", *(f"--{flag.name}" for flag in FLAGS if flag.note and not flag.metavar)])
        == 0
    )
    assert not capsys.readouterr().err


def test_the_table_in_the_documentation_lists_every_flag() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    for flag in FLAGS:
        assert f"`--{flag.name}" in text, flag.name


@pytest.mark.peers
def test_every_option_of_mergekit_is_an_option_here() -> None:
    """mergekit-yaml's --help against the options of `run`."""
    shown = subprocess.run([peer_program("mergekit-yaml"), "--help"], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^  (-.*?)(?:   |$)", shown, re.MULTILINE)
    theirs = {option for line in lines for option in re.findall(r"--?[a-z][a-z-]*", line)} - {"--help"}
    ours = {name for param in run.params for name in (*param.opts, *param.secondary_opts)}
    assert "--allow-crimes" in theirs and theirs <= ours
    assert {"-v", "-j", "-o", "-q"} <= ours
