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
from mergeforge.train.sweep import next_trial, open_study, run_sweep
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
    began = (RunFolder(Path("sweep/trial-001")).manifest() or {})["settings"]
    result = run_sweep(settings, device="cpu", listeners=[lambda line: seen.append(line.get("step", 0))])
    first = next(trial for trial in result.trials if trial.number == 1)
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
    assert inner == [1, 2] and sorted(trial.number for trial in result.trials) == [1, 2]


def test_processes_that_start_together_draw_different_values(sweep: Settings) -> None:
    settings = read(sweep)
    first, second = (open_study(settings) for _ in range(2))
    with next_trial(first, settings) as one, next_trial(second, settings) as two:
        assert one is not None and two is not None and (one.number, two.number) == (0, 1)
        rates = [trial.suggest_float("lr", 1e-6, 1e-1, log=True) for trial in (one, two)]
    assert rates[0] != rates[1]


def test_a_hopeless_trial_is_pruned(sweep: Settings) -> None:
    """After four trials whose validation losses no run can reach."""
    settings = read(sweep, trials=5, search={"lr": [1e-3, 1e-9]})
    study = open_study(settings)
    choices = {"lr": optuna.distributions.CategoricalDistribution([1e-3, 1e-9])}
    losses = dict.fromkeys(range(10), 0.1)
    for _ in range(4):
        known = {"params": {"lr": 1e-3}, "distributions": choices, "intermediate_values": losses}
        study.add_trial(optuna.trial.create_trial(value=0.1, **known))
    last = run_sweep(settings, device="cpu").trials[-1]
    assert (last.number, last.state) == (5, "pruned") and last.loss is not None and last.loss > 0.1
    assert not (settings.output / "trial-005" / "adapter").exists()


def test_other_settings_are_refused_in_the_same_folder(sweep: Settings) -> None:
    run_sweep(read(sweep, trials=1), device="cpu")
    with pytest.raises(OutputError, match="other settings"):
        run_sweep(read(sweep, trials=1, search={"lr": [1e-3]}), device="cpu")


def test_a_study_that_no_sweep_began_is_refused(sweep: Settings) -> None:
    settings = read(sweep, trials=1)
    settings.output.mkdir()
    database = settings.output / "study.db"
    database.write_text("not a database" * 100)
    with pytest.raises(OutputError, match=r"study\.db holds no study of a sweep"):
        run_sweep(settings, device="cpu")
    database.unlink()
    study = optuna.create_study(study_name="sweep", storage=f"sqlite:///{database}")
    study.add_trial(optuna.trial.create_trial(value=0.1))
    with pytest.raises(OutputError, match="other settings"):
        run_sweep(settings, device="cpu")


def test_a_run_that_fails_does_not_end_the_sweep(sweep: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    train = sweep["train"] | {"memory": {"budget": "300MB"}, "seq_len": 64}
    settings = read(sweep, trials=2, train=train, search={"lr": [1e-3]})
    result = run_sweep(settings, device="cpu")
    assert [trial.state for trial in result.trials] == ["failed", "failed"] and result.best is None
    assert "training needs about" in result.trials[0].why
    assert run_command(["train", "sweep", "sweep.yaml", "--device", "cpu"]) == 1
    assert "no trial was completed: see sweep/report.html" in capfd.readouterr().err


def test_a_mistake_in_the_settings_ends_the_sweep_unless_a_trial_was_complete(sweep: Settings) -> None:
    """Layer 7 does not exist. A trial that cannot be planned is not tried again."""
    settings = read(sweep, trials=1, search={"lora.layers": [[7]]})
    with pytest.raises(RecipeError, match="no layer 7"):
        run_sweep(settings, device="cpu")
    assert [trial.state for trial in run_sweep(settings, device="cpu").trials] == ["failed"]
    choices = {"lora.layers": optuna.distributions.CategoricalDistribution(["[7]"])}
    complete = optuna.trial.create_trial(value=0.1, params={"lora.layers": "[7]"}, distributions=choices)
    open_study(settings).add_trial(complete)
    more = run_sweep(read(sweep, trials=3, search={"lora.layers": [[7]]}), device="cpu")
    assert [trial.state for trial in more.trials] == ["complete", "failed", "failed"]


@pytest.mark.parametrize(
    ("options", "message"), [(["--then", "mrege"], "no step 'mrege'"), (["--memory", "much"], "'much' is not a size")]
)
def test_mistakes_in_options_are_found_before_any_run(
    sweep: Settings, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    read(sweep)
    assert run_command(["train", "sweep", "sweep.yaml", *options]) == 2
    assert message in capfd.readouterr().err and not Path("sweep").exists()


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
        ({"search": {"output": ["a", "b"]}}, "a folder of its own"),
        ({"search": {"preference.beta": [0.1, 0.2]}}, "runs with another preference have losses"),
        ({"search": {"base_model": ["a", "b"]}}, "runs with another model have losses"),
        ({"search": {"lora.r": [4, 0]}}, "would try settings with mistakes .lora.r: 0"),
        ({"trials": 0}, "trials"),
        ({"train": "nowhere.yaml"}, "there is no recipe"),
    ],
)
def test_mistakes_are_found_before_any_run(sweep: Settings, changes: Settings, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read(sweep, **changes)


def test_a_second_document_is_refused(sweep: Settings) -> None:
    read(sweep)
    with Path("sweep.yaml").open("a") as file:
        file.write("---\ntrials: 5\n")
    with pytest.raises(RecipeError, match="more than one YAML document"):
        read_sweep(Path("sweep.yaml"))


def test_validation_data_is_needed(sweep: Settings) -> None:
    train = {key: value for key, value in sweep["train"].items() if key != "val"}
    with pytest.raises(RecipeError, match="no validation data"):
        read(sweep, train=train)


def test_lists_are_choices_and_whole_limits_give_whole_numbers(sweep: Settings) -> None:
    ranges = {"lora.targets": ["all-linear", ["q_proj", "v_proj"]], "lora.r": {"low": 2, "high": 8, "step": 2}}
    targets, rank = read(sweep, search=ranges).ranges
    assert targets.decode(targets.encode(["q_proj", "v_proj"])) == ["q_proj", "v_proj"]
    assert rank.is_whole and rank.extremes() == (2, 8)
