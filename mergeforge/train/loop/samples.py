"""Samples: what the model answers to the same prompts before and after."""

from __future__ import annotations

from mergeforge.eval.load_transformers import LoadedModel
from mergeforge.eval.prompts import prompt_tokens
from mergeforge.eval.sampling import Sampling
from mergeforge.eval.transformers_backend import TransformersModel
from mergeforge.train.loop.chunked_loss import IGNORE_INDEX
from mergeforge.train.loop.collate import SequenceStore
from mergeforge.train.loop.context import TrainingContext
from mergeforge.train.plan import TrainPlan

COUNT = 3  # prompts that are taken from the data where the settings give none


class SampleGenerator:
    """Prompts, from the settings or the data, and the model that answers them greedily."""

    def __init__(self, plan: TrainPlan, job: TrainingContext) -> None:
        self._plan = plan
        self._job = job
        own = plan.settings.eval.samples
        self._prompts = self._asked(own) if own else self._from_data(plan.data.validation or plan.data.train)

    def take(self) -> dict[str, str]:
        """Prompt -> answer. Leaves the model as it was, and draws no random number."""
        wanted, model = self._plan.settings.eval, self._job.inner
        sampling = Sampling(temperature=0.0, max_tokens=wanted.max_tokens, stop=wanted.stop)
        training, cache = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        loaded = LoadedModel(model, self._plan.tokenizer, None, 0, self._job.device, self._plan.base)
        answerer = TransformersModel(self._plan.base, loaded, self._plan.data.template)
        try:
            return {text: answerer.generate(tokens, sampling).text for text, tokens in self._prompts.items()}
        finally:
            model.config.use_cache = cache
            model.train(training)

    def _asked(self, texts: tuple[str, ...]) -> dict[str, list[int]]:
        tokenizer, template = self._plan.tokenizer, self._plan.data.template
        messages = {text: [{"role": "user", "content": text}] for text in texts}
        return {text: list(prompt_tokens(tokenizer, one, template)) for text, one in messages.items()}

    def _from_data(self, store: SequenceStore) -> dict[str, list[int]]:
        """What stands before the first trained token of the first rows."""
        found: dict[str, list[int]] = {}
        for at in range(min(COUNT, len(store))):
            row = store[at]
            first = int((row.labels != IGNORE_INDEX).argmax())
            tokens = row.tokens[:first].tolist()
            if tokens:
                found[str(self._plan.tokenizer.decode(tokens, skip_special_tokens=True)).strip()] = tokens
        return found
