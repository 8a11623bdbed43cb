"""A sweep: many runs of one train.yaml with other values, chosen by Optuna, the best one kept.

The study is an SQLite file in the sweep's folder. Processes that are started with the same sweep.yaml (one for each
GPU, or on machines that share the folder) share the study and take trials from it in turn. A trial whose process was
killed is resumed by the next one, from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mergeforge.errors import MergeforgeError, OutputError, RecipeError
from mergeforge.eval.backend import require
from mergeforge.io.disk import write_durably
from mergeforge.train.keys import SEEDS
from mergeforge.train.plan import make_plan
from mergeforge.train.run import Trained, train, trained_before
from mergeforge.train.run_folder import RunFolder
from mergeforge.train.sweep_report import write_sweep_report
from mergeforge.train.sweep_settings import SearchRange, SweepSettings

if TYPE_CHECKING:
    from optuna import Study, Trial

    from mergeforge.train.loop.context import MetricCallback

STUDY = "sweep"
STARTUP_TRIALS, WARMUP = 4, 2  # trials before any is pruned; tenths of a run before it is
TENTHS = 10  # the steps of pruning: runs of different length are compared at the same tenth
COMPLETE, PRUNED, FAILED = "complete", "pruned", "failed"
OnTrial = Callable[["TrialResult"], object]


@dataclass(frozen=True)
class TrialResult:
    """A finished trial. `loss`: its validation loss, of a pruned one the last; `why`: of one that failed."""

    number: int  # from 1
    state: str
    values: Mapping[str, Any]
    loss: float | None
    folder: Path
    why: str = ""


@dataclass(frozen=True)
class SweepResult:
    """All finished trials, the best first, and where the best run is. `best` None: no trial is complete."""

    trials: tuple[TrialResult, ...]
    report: Path
    best: TrialResult | None = None
    best_settings: Path | None = None  # a train.yaml
    interrupted: bool = False


def run_sweep(
    sweep: SweepSettings, *, device: str = "auto", on_trial: OnTrial = lambda result: None, listeners: Any = ()
) -> SweepResult:
    """Run trials until the study has as many as the settings ask for. Ctrl-C ends it; the same call resumes it.

    Raises OutputError where the folder holds another sweep, MissingExtraError without optuna, and the RecipeError of a
    trial if none was complete before it: then the settings are to blame, not the trial's values.
    """
    study = open_study(sweep)
    while True:
        with next_trial(study, sweep) as trial:
            if trial is None:
                break
            if not _run_trial(study, trial, sweep, device, listeners):
                return _result(study, sweep, interrupted=True)
            with _locked(sweep.output / ".lock"):
                _keep_best(study, sweep)
                result = _result(study, sweep)
            on_trial(next(each for each in result.trials if each.number == trial.number + 1))
    return _result(study, sweep)


def open_study(sweep: SweepSettings) -> Study:
    """The study in the sweep's folder, or a new one. Raises OutputError for a file that holds another."""
    optuna = require("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.output.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS, WARMUP) if sweep.prune else optuna.pruners.NopPruner()
    path = sweep.output / "study.db"
    with _locked(sweep.output / ".lock"):
        storage = f"sqlite:///{path}"
        try:
            study: Study = optuna.create_study(study_name=STUDY, storage=storage, pruner=pruner, load_if_exists=True)
        except Exception as error:  # of optuna, sqlalchemy and sqlite3
            reason = str(error).splitlines()[0]
            raise OutputError(f"{path} holds no study of a sweep: {reason}", hint="choose another output") from None
        _check_unchanged(study, sweep)
    return study


def _check_unchanged(study: Study, sweep: SweepSettings) -> None:
    """Raise OutputError for a study that began with other settings, or that no sweep began."""
    text = yaml.safe_dump(_plain({"train": sweep.train, "search": [vars(each) for each in sweep.ranges]}))
    before = study.user_attrs.get("settings", "" if study.get_trials(deepcopy=False) else text)
    if before != text:
        hint = "restore sweep.yaml to resume it, or choose another output"
        raise OutputError(f"{sweep.output} holds a sweep with other settings", hint=hint)
    study.set_user_attr("settings", text)


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML gives them back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@contextlib.contextmanager
def next_trial(study: Study, sweep: SweepSettings) -> Iterator[Trial | None]:
    """A trial that this process alone works on: one that another process left, or a new one. None: all are done."""
    with contextlib.ExitStack() as stack:
        with _locked(sweep.output / ".lock"):
            trial = _abandoned(study, sweep, stack)
            if trial is None and (count := len(study.get_trials(deepcopy=False))) < sweep.trials:
                # seeded by the trial, because every process has a sampler of its own
                study.sampler = require("optuna").samplers.TPESampler(seed=(sweep.seed + count) % SEEDS)
                trial = study.ask()
                stack.enter_context(_locked(_lock_file(sweep, trial.number)))
        yield trial


def _abandoned(study: Study, sweep: SweepSettings, stack: contextlib.ExitStack) -> Trial | None:
    """A running trial whose lock nobody holds; takes the lock."""
    optuna = require("optuna")
    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    for trial in running:
        try:
            stack.enter_context(_locked(_lock_file(sweep, trial.number), wait=False))
        except BlockingIOError:
            continue
        resumed: Trial = optuna.trial.Trial(study, trial._trial_id)
        return resumed
    return None


def _lock_file(sweep: SweepSettings, number: int) -> Path:
    return sweep.output / f".{trial_folder(sweep, number).name}.lock"


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file. Raises BlockingIOError if another process has it and `wait` is false."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def _run_trial(study: Study, trial: Trial, sweep: SweepSettings, device: str, listeners: Any) -> bool:
    """Train with the trial's values and tell the study; False if the training was interrupted."""
    optuna = require("optuna")
    values = {each.key: each.decode(_suggest(trial, each)) for each in sweep.ranges}
    try:
        plan = make_plan(sweep.run_settings(values, trial_folder(sweep, trial.number)), device=device)
        total = plan.schedule(len(plan.packs(packed=plan.resolved.pack))).total_steps
        trained = trained_before(plan) or train(plan, listeners=[*listeners, _pruning_listener(trial, total)])
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return True
    except MergeforgeError as error:
        trial.set_user_attr("why", str(error).splitlines()[0])
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if isinstance(error, RecipeError) and not _has_complete(study):
            raise
        return True
    if trained.interrupted:
        return False
    _tell(study, trial, trained)
    return True


def _has_complete(study: Study) -> bool:
    return any(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False))


def _tell(study: Study, trial: Trial, trained: Trained) -> None:
    assert trained.validation_loss is not None
    trial.set_user_attr("steps", trained.steps)
    trial.set_user_attr("seconds", trained.seconds)
    study.tell(trial, trained.validation_loss)


def _suggest(trial: Trial, search_range: SearchRange) -> Any:
    """The trial's value; one that is resumed keeps its own."""
    key = search_range.key
    if search_range.choices:
        return trial.suggest_categorical(key, [search_range.encode(choice) for choice in search_range.choices])
    if search_range.is_whole:
        low, high, step = int(search_range.low), int(search_range.high), int(search_range.step or 1)
        return trial.suggest_int(key, low, high, step=step, log=search_range.log)
    return trial.suggest_float(key, search_range.low, search_range.high, step=search_range.step, log=search_range.log)


def _pruning_listener(trial: Trial, total_steps: int) -> MetricCallback:
    """A listener that reports validation losses to the study and raises TrialPruned for a hopeless run."""
    optuna = require("optuna")

    def listen(line: Mapping[str, Any]) -> None:
        if "eval_loss" not in line or line["step"] >= total_steps:
            return
        trial.report(line["eval_loss"], int(TENTHS * line["step"] / total_steps))
        if trial.should_prune():
            raise optuna.TrialPruned

    return listen


def trial_folder(sweep: SweepSettings, number: int) -> Path:
    """The folder of a trial's run. `number`: Optuna's, from 0."""
    return sweep.output / f"trial-{number + 1:03}"


def _keep_best(study: Study, sweep: SweepSettings) -> None:
    """Delete the weights of every finished trial but the best one, and write best.yaml."""
    results = _ranked(study, sweep)
    for result in results[1:] if results and results[0].state == COMPLETE else results:
        folder = RunFolder(result.folder)
        for path in (folder.adapter, folder.model, folder.checkpoints, folder.data, folder.base):
            shutil.rmtree(path, ignore_errors=True)
        folder.recipe.unlink(missing_ok=True)
    if results and results[0].state == COMPLETE:
        settings = sweep.run_settings(results[0].values, results[0].folder)
        text = f"# The best run of the sweep: trial {results[0].number}, validation loss {results[0].loss:.4f}.\n"
        text += yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)
        write_durably(sweep.output / "best.yaml", text.encode())


def _ranked(study: Study, sweep: SweepSettings) -> list[TrialResult]:
    """The finished trials: complete ones by loss, then pruned ones by loss, then failed ones."""
    ranges = {each.key: each for each in sweep.ranges}
    states = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED}
    results = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name not in states:
            continue
        values = {key: ranges[key].decode(value) for key, value in trial.params.items()}
        last = list(trial.intermediate_values.values())[-1:]
        loss = trial.value if trial.value is not None else last[0] if last else None
        folder, why = trial_folder(sweep, trial.number), trial.user_attrs.get("why", "")
        results.append(TrialResult(trial.number + 1, states[trial.state.name], values, loss, folder, why))
    order = list(states.values())
    return sorted(results, key=lambda result: (order.index(result.state), result.loss or 0.0, result.number))


def _result(study: Study, sweep: SweepSettings, *, interrupted: bool = False) -> SweepResult:
    """The state of the sweep; also writes its report."""
    results = _ranked(study, sweep)
    report = sweep.output / "report.html"
    write_sweep_report(report, sweep, results)
    best = results[0] if results and results[0].state == COMPLETE else None
    settings = sweep.output / "best.yaml" if best else None
    return SweepResult(tuple(results), report, best, settings, interrupted)
