"""QuickTrainer: training in three lines of Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.train.plan import TrainPlan, make_plan
from mergeforge.train.post_training import PostTrainingResult, run_post_training
from mergeforge.train.progress import ProgressLines
from mergeforge.train.resume import Resume
from mergeforge.train.run import Trained, train
from mergeforge.train.settings import MergeAfterTraining, PostTraining, read

if TYPE_CHECKING:
    from mergeforge.train.loop.context import MetricCallback

Rows = Sequence[Mapping[str, Any]]


class QuickTrainer:
    """A training run from a model and data.

        mergeforge.QuickTrainer("org/model", "sample:chat").train()

    `data`: a path, `sample:NAME`, `hf://owner/name`, or a list of rows. Other keywords are keys of train.yaml.
    """

    def __init__(self, model: str | Path, data: str | Path | Rows, *, device: str = "auto", **settings: Any) -> None:
        name = str(data) if isinstance(data, str | Path) else "rows"
        output = f"runs/{Path(str(model).rpartition(':')[2]).name}-{Path(name.rpartition(':')[2]).stem}"
        rows = name if isinstance(data, str | Path) else list(data)
        self.settings = read({"model": str(model), "data": rows, "output": output} | settings)
        self.device = device
        self._plan: TrainPlan | None = None
        self._trained: Trained | None = None

    def plan(self) -> TrainPlan:
        """The plan of the run. Reads the data, and the model's configuration and tokenizer."""
        self._plan = self._plan or make_plan(self.settings, device=self.device)
        return self._plan

    def train(
        self,
        *,
        resume: str = "auto",
        overwrite: bool = False,
        listeners: Sequence[MetricCallback] = (),
        progress: bool = True,
    ) -> Trained:
        """Train, or resume an earlier run. The adapter is in the result's `.result` folder.

        progress: print losses on stderr.
        """
        plan = self.plan()
        total = plan.schedule(len(plan.packs(packed=plan.resolved.pack))).total_steps
        shown = (ProgressLines(total),) if progress else ()
        self._trained = train(plan, Resume(resume, overwrite=overwrite), (*shown, *listeners))
        return self._trained

    def merge(
        self, *, gguf: Sequence[str] = (), base_numerics: str = "auto", memory: str | None = None
    ) -> PostTrainingResult:
        """Fold the trained adapter into its base, and write GGUF files in the same pass. Trains first where needed."""
        if self._trained is None:
            self.train()
        return run_post_training(
            self.plan(), PostTraining(MergeAfterTraining(base_numerics=base_numerics), tuple(gguf)), memory=memory
        )
