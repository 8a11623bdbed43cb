"""What an unknown command or option suggests: a near spelling or a known equivalent, and nothing else."""

from __future__ import annotations

import pytest

from mergeforge.cli import COMMANDS, run_command
from mergeforge.cli._suggestions import COMMANDS as EQUIVALENTS
from mergeforge.errors import nearest_name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu"], "did you mean 'run'?"),
        (["verfy"], "did you mean 'verify'?"),
        (["extractlora"], "did you mean 'extract-lora'?"),
        (["mergekit-yaml", "config.yml", "out"], "did you mean 'run'?"),
        (["quantize"], "did you mean 'gguf'?"),
        (["finetune"], "did you mean 'train'?"),
        (["mergekit-moe"], "no mixture of experts yet"),
        (["recipe.yaml"], "did you mean 'mergeforge run recipe.yaml'?"),
        (["frobnicate"], "`mergeforge --help` lists the commands"),
        (["run", "r", "--read-to-gp"], "did you mean --read-to-gpu?"),
        (["run", "r", "--outt", "x"], "did you mean --out?"),
        (["run", "r", "--output", "x"], "did you mean --out?"),
        (["gguf", "m", "--outtype", "q8_0"], "did you mean --type?"),
        (["run", "r", "--hub-to-stream"], "`mergeforge run --help` lists the options"),
    ],
)
def test_an_unknown_name_suggests_what_was_meant(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 2
    assert message in capsys.readouterr().err


def test_equivalents_of_commands_exist() -> None:
    for name, meant in EQUIVALENTS.items():
        assert name not in COMMANDS
        assert meant.startswith("--") or meant.split()[0] in COMMANDS


@pytest.mark.parametrize(
    ("word", "known", "nearest"),
    [
        ("modles", ["modules", "models"], "models"),
        ("base_modle", ["base_model", "models"], "base_model"),
        ("BaseModel", ["base_model"], "base_model"),
        ("q4km", ["q4_k_s", "q4_k_m"], "q4_k_m"),
        ("seed", ["random_seed", "name"], "random_seed"),
        ("dare", ["dare_ties", "dare_linear"], ""),
        ("path", ["base_model", "rules"], ""),
        ("scale", ["slices", "name"], ""),
        ("to", ["t", "tol"], ""),
    ],
)
def test_near_spellings(word: str, known: list[str], nearest: str) -> None:
    assert nearest_name(word, known) == nearest
