"""A GGUF file in a real llama.cpp engine: next-token log-probabilities, and chat.

The engine is xllamacpp, llama.cpp as a wheel on PyPI (extra `engine`). Files are checked in a process
of their own, because llama.cpp ends the process when it meets a model that it cannot run.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from mergeforge.errors import MissingExtraError, SourceError
from mergeforge.tensors.budget import cores

if TYPE_CHECKING:
    import numpy as np

PROBE = 16  # tokens of a prompt that log-probabilities are compared on
PROBES = 8  # such prompts; the first one on which the engine tells them counts
# Largest difference of a next-token log-probability from transformers in float32 that an encoding explains.
CLOSE = {"F32": 0.01, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.5}


class ContextError(SourceError):
    """A prompt does not fit in the engine's context."""


class Engine:
    """A loaded GGUF file. Raises SourceError when the engine refuses it, MissingExtraError without the engine."""

    def __init__(self, path: str | Path, *, context: int = 512) -> None:
        path = Path(path).expanduser()
        if not path.is_file() or path.suffix != ".gguf":
            raise SourceError(f"{path} is not a GGUF file", hint="`mergeforge gguf MODEL --type q4_k_m` writes one")
        xllamacpp = _imported()
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.warmup = False
        settings.verbosity = -1
        settings.force_pure_content_parser = True  # an answer is what the model writes, thoughts and calls and all
        settings.cpuparams.n_threads = cores()
        try:
            self._server = xllamacpp.Server(settings)
        except Exception as error:  # whatever llama.cpp says of it
            raise SourceError(f"llama.cpp does not load {path}: {error}") from None

    def logprobs(self, tokens: Sequence[int], vocabulary: int) -> list[float] | None:
        """Log-probabilities of each token of the vocabulary after `tokens` (ids).

        None where the likeliest one ends the text: then llama.cpp tells none.
        """
        asked = {"prompt": list(tokens), "n_predict": 1, "temperature": 0, "n_probs": vocabulary, "cache_prompt": False}
        told = _checked(self._server.handle_completions(asked))["choices"][0]["logprobs"]
        if not told:
            return None
        found = [-math.inf] * vocabulary
        for one in told["content"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def text(self, prompt: str | Sequence[int], tokens: int) -> str:
        """The likeliest continuation of a prompt (text or ids)."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        reply = self._server.handle_completions({"prompt": given, "n_predict": tokens, "temperature": 0})
        return str(_checked(reply)["choices"][0]["text"])

    def stream(self, asked: Mapping[str, Any], *, chat: bool = False) -> Generator[Any, None, None]:
        """The chunks of a completion as they come; closing the iterator ends it.

        The engine works in a thread of its own, so that Ctrl-C reaches the caller. Raises ContextError, SourceError.
        """
        chunks: SimpleQueue[Any] = SimpleQueue()
        ended = threading.Event()
        handle = self._server.handle_chat_completions if chat else self._server.handle_completions

        def take(chunk: Any) -> bool:
            chunks.put(chunk)
            return ended.is_set()

        def ask() -> None:
            try:
                handle({**asked, "stream": True}, take)
            except Exception as error:  # whatever llama.cpp says of it
                chunks.put({"error": str(error)})
            finally:
                chunks.put(None)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        try:
            while (chunk := chunks.get()) is not None:
                yield from (_checked(one) for one in (chunk if isinstance(chunk, list) else [chunk]))
        finally:
            ended.set()
            thread.join()


@dataclass(frozen=True)
class Closeness:
    """How near a GGUF's next-token distribution is to that of transformers in float32.

    `largest`: max |difference of log-probabilities| over tokens of at least 1e-4; `divergence`:
    KL(transformers, engine) in nats; `same_first`: both find the same token likeliest.
    """

    file: str
    label: str
    largest: float
    divergence: float
    same_first: bool

    @property
    def ok(self) -> bool:
        return self.largest <= CLOSE.get(self.label, math.inf) and math.isfinite(self.divergence)


def compare_with_transformers(folder: Path, files: Mapping[str, str]) -> list[Closeness]:
    """Load a merged folder with transformers and each GGUF (name -> label) with the engine, and compare.

    Raises MissingExtraError without transformers or the engine.
    """
    import numpy as np
    import torch

    transformers = _imported("transformers", "train")
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = np.random.default_rng(0).integers(0, min(vocabulary, 1000), (PROBES, PROBE))
    with torch.inference_mode():
        logits = [model(torch.from_numpy(prompt)[None]).logits[0, -1] for prompt in prompts]
    expected = [one.double().log_softmax(-1).numpy() for one in logits]
    return [_closeness(folder / name, label, prompts.tolist(), expected) for name, label in files.items()]


def _closeness(path: Path, label: str, prompts: list[list[int]], expected: list[np.ndarray]) -> Closeness:
    import numpy as np

    at, told = _logprobs_apart(path, prompts, len(expected[0]))
    wanted, found = expected[at], np.array(told)
    likely = wanted > math.log(1e-4)
    difference = np.abs(found - wanted)[likely].max()
    divergence = float((np.exp(wanted) * (wanted - found)).sum())
    return Closeness(path.name, label, float(difference), divergence, int(found.argmax()) == int(wanted.argmax()))


_APART = """
import json, sys
from mergeforge.engine import Engine
path, prompts, vocabulary = json.load(sys.stdin)
engine = Engine(path)
for at, prompt in enumerate(prompts):
    found = engine.logprobs(prompt, vocabulary)
    if found:
        print(json.dumps([at, found]))
        break
"""


def _logprobs_apart(path: Path, prompts: list[list[int]], vocabulary: int) -> tuple[int, list[float]]:
    """The first prompt whose log-probabilities the engine tells, and these; from another process."""
    _imported()
    asked = json.dumps([str(path), prompts, vocabulary])
    done = subprocess.run([sys.executable, "-c", _APART], input=asked, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise SourceError(f"llama.cpp does not run {path}; it says: {said[-1][:300]}")
    at, found = json.loads(done.stdout.splitlines()[-1])
    return at, found


def _checked(reply: Any) -> Any:
    if isinstance(reply, Mapping) and ("error" in reply or reply.get("code")):
        inner = reply.get("error") or reply
        if isinstance(inner, Mapping) and inner.get("type") == "exceed_context_size_error":
            raise ContextError(str(inner.get("message")))
        raise SourceError(f"the engine failed: {inner.get('message') if isinstance(inner, Mapping) else inner}")
    return reply


def _imported(name: str = "xllamacpp", extra: str = "engine") -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(f"this needs {name}", hint=f"pip install 'mergeforge[{extra}]'") from None
