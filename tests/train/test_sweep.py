"""`mergeforge train sweep`: values, ranking, pruning, resuming, sharing, and mistakes in sweep.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergeforge.cli import run_command
from mergeforge.errors import OutputError, RecipeError
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.sweep import run_sweep
from mergeforge.train.sweep_settings import SweepSettings, read_sweep

optuna = pytest.importorskip("optuna")
Settings = dict[str, Any]


class Killed(BaseException):
    """Ends a process' work without any cleanup of its own."""


@pytest.fixture
def sweep(settings: Settings) -> Settings:
    """A sweep of three runs of three steps over a learning rate that matters."""
    train = settings | {"val": 8, "max_steps": 3, "eval": {"every": 2, "max_tokens": 1}}
    del train["output"], train["lr"]
    search = {"lr": {"low": 1e-6, "high": 1e-1, "log": True}, "lora.r": [2, 4]}
    return {"train": train, "search": search, "trials": 3, "output": "sweep"}


def read(sweep: Settings, **changes: Any) -> SweepSettings:
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep | changes, sort_keys=False))
    return read_sweep(Path("sweep.yaml"))


def test_the_best_run_is_kept_and_merged(sweep: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    read(sweep)
    assert run_command(["train", "sweep", "sweep.yaml", "--then", "merge", "--json", "--device", "cpu"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    losses = [trial["loss"] for trial in result["trials"] if trial["state"] == "complete"]
    assert len(result["trials"]) == 3 and losses == sorted(losses) and "trial 3 of 3: lr " in err
    best = Path(result["best"]["folder"])
    manifest = json.loads((best / "run.json").read_text())
    assert manifest["validation_loss"] == losses[0] and manifest["settings"]["lr"] == result["best"]["values"]["lr"]
    assert json.loads((best / "adapter" / "adapter_config.json").read_text())["r"] in (2, 4)
    assert (best / "merged" / "model.safetensors").is_file() and result["followed"]["merged"]
    others = [path for path in Path("sweep").glob("trial-*") if path.name != best.name]
    assert len(others) == 2 and not any((path / "adapter").exists() for path in others)
    page = Path(result["report"]).read_text()
    assert "<th>rank<th>trial<th>validation loss<th>lr<th>lora.r" in page and "log10(lr)" in page


def test_a_killed_sweep_resumes_its_trial(sweep: Settings) -> None:
    settings = read(sweep, trials=2)
    seen: list[float] = []

    def kill(line: dict[str, Any]) -> None:
        if line.get("step") == 2 and "loss" in line:
            raise Killed

    with pytest.raises(Killed):
        run_sweep(settings, device="cpu", listeners=[kill])
    began = (RunFolder(Path("sweep/trial-000")).manifest() or {})["settings"]
    result = run_sweep(settings, device="cpu", listeners=[lambda line: seen.append(line.get("step", 0))])
    first = next(trial for trial in result.trials if trial.number == 0)
    assert len(result.trials) == 2 and first.values["lr"] == began["lr"]
    again = run_sweep(settings, device="cpu", on_trial=lambda trial: pytest.fail("there is nothing left to try"))
    assert again.trials == result.trials
    more = read(sweep, trials=3)
    assert len(run_sweep(more, device="cpu").trials) == 3


def test_a_trial_of_another_process_is_left_to_it(sweep: Settings) -> None:
    settings = read(sweep, trials=2)
    inner: list[int] = []

    def start_another(line: dict[str, Any]) -> None:
        if not inner and "loss" in line:
            inner.append(1)
            inner.extend(trial.number for trial in run_sweep(settings, device="cpu").trials)

    result = run_sweep(settings, device="cpu", listeners=[start_another])
    assert inner == [1, 1] and sorted(trial.number for trial in result.trials) == [0, 1]


def test_a_hopeless_trial_is_pruned(sweep: Settings) -> None:
    """After four trials whose validation losses no run can reach."""
    settings = read(sweep, trials=5, search={"lr": [1e-3, 1e-9]})
    settings.output.mkdir()
    study = optuna.create_study(study_name="sweep", storage=f"sqlite:///{settings.output}/study.db")
    choices = {"lr": optuna.distributions.CategoricalDistribution([1e-3, 1e-9])}
    losses = dict.fromkeys(range(10), 0.1)
    for _ in range(4):
        known = {"params": {"lr": 1e-3}, "distributions": choices, "intermediate_values": losses}
        study.add_trial(optuna.trial.create_trial(value=0.1, **known))
    last = run_sweep(settings, device="cpu").trials[-1]
    assert (last.number, last.state) == (4, "pruned") and last.loss is not None and last.loss > 0.1
    assert not (settings.output / "trial-004" / "adapter").exists()


def test_other_settings_are_refused_in_the_same_folder(sweep: Settings) -> None:
    run_sweep(read(sweep, trials=1), device="cpu")
    with pytest.raises(OutputError, match="other settings"):
        run_sweep(read(sweep, trials=1, search={"lr": [1e-3]}), device="cpu")


def test_a_run_that_fails_does_not_end_the_sweep(sweep: Settings) -> None:
    train = sweep["train"] | {"memory": {"budget": "300MB"}, "seq_len": 64}
    result = run_sweep(read(sweep, trials=1, train=train, search={"lr": [1e-3]}), device="cpu")
    assert result.trials[0].state == "failed" and "training needs about" in result.trials[0].why and result.best is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serach": {}}, "unknown key 'serach'"),
        ({"search": {}}, "'search' must map keys"),
        ({"search": {"lr": {"low": 1, "high": 0.1}}}, "low must be less than high"),
        ({"search": {"lr": {"low": 0, "high": 0.1, "log": True}}}, "above 0 with log"),
        ({"search": {"lr": []}}, "has no choices"),
        ({"search": {"learning": [1, 2]}}, "unknown key 'learning'"),
        ({"search": {"lora.rank": [1, 2]}}, "unknown key 'rank'"),
        ({"search": {"lora.r": [4, 0]}}, "would try settings with mistakes .lora.r: 0"),
        ({"trials": 0}, "trials"),
        ({"train": "nowhere.yaml"}, "there is no recipe"),
    ],
)
def test_mistakes_are_found_before_any_run(sweep: Settings, changes: Settings, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(sweep, **changes)


def test_validation_data_is_needed(sweep: Settings) -> None:
    train = {key: value for key, value in sweep["train"].items() if key != "val"}
    with pytest.raises(RecipeError, match="no validation data"):
        read(sweep, train=train)


def test_lists_are_choices_and_whole_limits_give_whole_numbers(sweep: Settings) -> None:
    ranges = {"lora.targets": ["all-linear", ["q_proj", "v_proj"]], "lora.r": {"low": 2, "high": 8, "step": 2}}
    targets, rank = read(sweep, search=ranges).ranges
    assert targets.decode(targets.encode(["q_proj", "v_proj"])) == ["q_proj", "v_proj"]
    assert rank.is_whole and rank.extremes() == (2, 8)
