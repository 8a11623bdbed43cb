"""Runs a GGUF file in llama.cpp: next-token log-probabilities, completions and chat.

llama.cpp comes from PyPI as the wheel xllamacpp. Files are checked in a separate process, because llama.cpp exits the
process if it cannot run a model.
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

from mergeforge.errors import MissingExtraError, SourceError, pip_install
from mergeforge.tensors.budget import cpu_count

if TYPE_CHECKING:
    import numpy as np

PROMPT_TOKENS = 16  # length of the prompts whose log-probabilities are compared
PROMPTS = 8  # such prompts; the first one for which the engine returns log-probabilities is used
# Largest difference of a next-token log-probability from transformers in float32 that rounding to a type can explain.
TOLERANCES = {"F32": 0.01, "F16": 0.02, "BF16": 0.1, "Q8_0": 0.5}


class ContextError(SourceError):
    """A prompt does not fit into the engine's context window."""


class Engine:
    """A loaded GGUF file. Raises SourceError if the engine cannot load it, MissingExtraError if it is not installed."""

    def __init__(self, path: str | Path, *, context: int = 512) -> None:
        path = Path(path).expanduser()
        if not path.is_file() or path.suffix != ".gguf":
            raise SourceError(
                f"{path} is not a GGUF file", hint="create one with `mergeforge gguf MODEL --type q4_k_m`"
            )
        xllamacpp = _import_package()
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.warmup = False
        settings.verbosity = -1
        settings.force_pure_content_parser = (
            True  # return the text as the model writes it, with thoughts and tool calls
        )
        settings.cpuparams.n_threads = cpu_count()
        try:
            self._server = xllamacpp.Server(settings)
        except Exception as error:  # llama.cpp raises exceptions of many kinds
            raise SourceError(f"llama.cpp cannot load {path}: {error}", hint="write the file again") from None

    def logprobs(self, tokens: Sequence[int], vocab_size: int) -> list[float] | None:
        """Log-probabilities of every token of the vocabulary after `tokens` (ids).

        None if the most likely token ends the text, because llama.cpp then returns none.
        """
        request = {
            "prompt": list(tokens),
            "n_predict": 1,
            "temperature": 0,
            "n_probs": vocab_size,
            "cache_prompt": False,
        }
        reply = _without_error(self._server.handle_completions(request))["choices"][0]["logprobs"]
        if not reply:
            return None
        logprobs = [-math.inf] * vocab_size
        for token in reply["content"][0]["top_logprobs"]:
            logprobs[token["id"]] = token["logprob"]
        return logprobs

    def complete(self, prompt: str | Sequence[int], tokens: int) -> str:
        """The most likely continuation of a prompt (text or ids)."""
        text_or_ids = prompt if isinstance(prompt, str) else list(prompt)
        reply = self._server.handle_completions({"prompt": text_or_ids, "n_predict": tokens, "temperature": 0})
        return str(_without_error(reply)["choices"][0]["text"])

    def stream(self, request: Mapping[str, Any], *, chat: bool = False) -> Generator[Any, None, None]:
        """Yield the chunks of a completion as they arrive; closing the iterator stops it.

        The engine runs in a separate thread, so that Ctrl-C reaches the caller. Raises ContextError, SourceError.
        """
        chunks: SimpleQueue[Any] = SimpleQueue()
        ended = threading.Event()
        handle = self._server.handle_chat_completions if chat else self._server.handle_completions

        def on_chunk(chunk: Any) -> bool:
            chunks.put(chunk)
            return ended.is_set()

        def run() -> None:
            try:
                handle({**request, "stream": True}, on_chunk)
            except Exception as error:  # llama.cpp raises exceptions of many kinds
                chunks.put({"error": str(error)})
            finally:
                chunks.put(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (chunk := chunks.get()) is not None:
                yield from (_without_error(item) for item in (chunk if isinstance(chunk, list) else [chunk]))
        finally:
            ended.set()
            thread.join()


@dataclass(frozen=True)
class EngineComparison:
    """How close a GGUF's next-token distribution is to that of transformers in float32.

    `max_difference`: largest |difference of log-probabilities| over tokens with a probability of at least 1e-4;
    `kl_divergence`: KL(transformers, engine) in nats; `same_top_token`: both rank the same token first.
    """

    file: str
    label: str
    max_difference: float
    kl_divergence: float
    same_top_token: bool

    @property
    def ok(self) -> bool:
        return self.max_difference <= TOLERANCES.get(self.label, math.inf) and math.isfinite(self.kl_divergence)


def compare_with_transformers(folder: Path, files: Mapping[str, str]) -> list[EngineComparison]:
    """Load a merged folder with transformers and each GGUF (name -> label) in llama.cpp, and compare.

    Raises MissingExtraError if transformers or xllamacpp is not installed.
    """
    import numpy as np
    import torch

    transformers = _import_package("transformers")
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False).eval()
    vocab_size = model.get_input_embeddings().weight.shape[0]
    prompts = np.random.default_rng(0).integers(0, min(vocab_size, 1000), (PROMPTS, PROMPT_TOKENS))
    with torch.inference_mode():
        logits = [model(torch.from_numpy(prompt)[None]).logits[0, -1] for prompt in prompts]
    expected = [row.double().log_softmax(-1).numpy() for row in logits]
    return [_compare_file(folder / name, label, prompts.tolist(), expected) for name, label in files.items()]


def _compare_file(path: Path, label: str, prompts: list[list[int]], expected: list[np.ndarray]) -> EngineComparison:
    import numpy as np

    index, logprobs = _logprobs_in_subprocess(path, prompts, len(expected[0]))
    theirs, ours = expected[index], np.array(logprobs)
    likely = theirs > math.log(1e-4)
    difference = float(np.abs(ours - theirs)[likely].max())
    divergence = float((np.exp(theirs) * (theirs - ours)).sum())
    return EngineComparison(path.name, label, difference, divergence, int(ours.argmax()) == int(theirs.argmax()))


_LOGPROBS_SCRIPT = """
import json, sys
from mergeforge.gguf.llama_cpp import Engine
path, prompts, vocab_size = json.load(sys.stdin)
engine = Engine(path)
for index, prompt in enumerate(prompts):
    logprobs = engine.logprobs(prompt, vocab_size)
    if logprobs:
        print(json.dumps([index, logprobs]))
        break
"""


def _logprobs_in_subprocess(path: Path, prompts: list[list[int]], vocab_size: int) -> tuple[int, list[float]]:
    """(index, log-probabilities) of the first prompt for which the engine returns them."""
    _import_package()
    request = json.dumps([str(path), prompts, vocab_size])
    done = subprocess.run([sys.executable, "-c", _LOGPROBS_SCRIPT], input=request, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["(no output)"]
        raise SourceError(f"llama.cpp cannot run {path}: {lines[-1][:300]}", hint="write the file again")
    index, logprobs = json.loads(done.stdout.splitlines()[-1])
    return index, logprobs


def _without_error(reply: Any) -> Any:
    if isinstance(reply, Mapping) and ("error" in reply or reply.get("code")):
        inner = reply.get("error") or reply
        if isinstance(inner, Mapping) and inner.get("type") == "exceed_context_size_error":
            raise ContextError(str(inner.get("message")))
        raise SourceError(f"llama.cpp failed: {inner.get('message') if isinstance(inner, Mapping) else inner}")
    return reply


def _import_package(name: str = "xllamacpp") -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtraError(f"this needs {name}", hint=pip_install(name)) from None
