"""SampleGenerator: the model's answers to the same prompts before and after training."""

from __future__ import annotations

from mergeforge.eval.backend import prompt_tokens
from mergeforge.eval.dataset import scored_spans
from mergeforge.eval.load_transformers import LoadedModel
from mergeforge.eval.sampling import Sampling
from mergeforge.eval.transformers_backend import TransformersModel
from mergeforge.train.loop.chunked_loss import IGNORE_INDEX
from mergeforge.train.loop.collate import SequenceStore
from mergeforge.train.loop.context import TrainingContext
from mergeforge.train.plan import TrainPlan

DEFAULT_COUNT = 3  # prompts taken from the data when the settings name none
SLOW_ON_CPU = 50_000_000  # parameters from which a CPU takes longer for these answers than for a few steps
SKIPPED = "no sample answers, because they take long on a CPU; eval: {samples: [PROMPT]} asks for them"


class SampleGenerator:
    """Prompts, from the settings or the data, and the model that answers them greedily.

    skipped: whether there are none, because nobody asked for them and the device is slow.
    """

    def __init__(self, plan: TrainPlan, context: TrainingContext) -> None:
        self._plan = plan
        self._context = context
        self.expected: dict[str, str] = {}  # prompt -> the data's answer, for prompts from the data
        texts = plan.settings.eval.samples
        self.skipped = not texts and context.device == "cpu" and plan.stats.parameters > SLOW_ON_CPU
        self._prompts: dict[str, list[int]] = {}
        if texts:
            self._prompts = self._tokenize(texts)
        elif not self.skipped:
            self._prompts = self._from_data(plan.data.validation or plan.data.train)

    def generate(self) -> dict[str, str]:
        """Prompt -> answer. Leaves the model as it was, and draws no random number."""
        settings, model = self._plan.settings.eval, self._context.base_model
        sampling = Sampling(temperature=0.0, max_tokens=settings.max_tokens, stop=settings.stop)
        training, cache = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        loaded = LoadedModel(model, self._plan.tokenizer, None, 0, self._context.device, self._plan.base)
        backend = TransformersModel(self._plan.base, loaded, self._plan.data.template)
        try:
            return {text: backend.generate(tokens, sampling).text for text, tokens in self._prompts.items()}
        finally:
            model.config.use_cache = cache
            model.train(training)

    def _tokenize(self, texts: tuple[str, ...]) -> dict[str, list[int]]:
        tokenizer, template = self._plan.tokenizer, self._plan.data.template
        messages = {text: [{"role": "user", "content": text}] for text in texts}
        return {text: list(prompt_tokens(tokenizer, message, template)) for text, message in messages.items()}

    def _from_data(self, store: SequenceStore) -> dict[str, list[int]]:
        """The tokens before the first trained token of the first rows."""
        prompts: dict[str, list[int]] = {}
        for index in range(min(DEFAULT_COUNT, len(store))):
            row = store[index]
            first_trained = int((row.labels != IGNORE_INDEX).argmax())
            tokens = row.tokens[:first_trained].tolist()
            if tokens:
                text = str(self._plan.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
                prompts[text] = tokens
                _, stop = scored_spans(row)[0]
                answer = self._plan.tokenizer.decode(row.tokens[first_trained:stop].tolist(), skip_special_tokens=True)
                self.expected[text] = str(answer).strip()
        return prompts
