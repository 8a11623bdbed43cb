"""The client of the process in which llama.cpp scores rows (llama_logprobs.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.errors import SourceError
from mergeforge.tensors.budget import cpu_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ScoringProcess:
    """A process that scores rows of at most `context` tokens with a GGUF file. Raises SourceError."""

    def __init__(self, path: Path, context: int) -> None:
        self._path = path
        command = [sys.executable, "-m", "mergeforge.eval.llama_logprobs"]
        pipe = subprocess.PIPE
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # until close
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True)
        try:
            self._request({"path": str(path), "context": context, "threads": cpu_count()})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def score(self, tokens: Sequence[int], scored: Sequence[int]) -> tuple[float, int]:
        """(negative log-likelihood in nats, top-1 hits) of the tokens at the positions `scored`."""
        nll, correct = self._request({"tokens": list(tokens), "scored": list(scored)})
        return float(nll), int(correct)

    def logits(self, tokens: Sequence[int], first: int) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary] after the tokens from position `first` on; the last token has none after it."""
        import numpy as np

        with tempfile.NamedTemporaryFile() as file:
            shape = self._request({"tokens": list(tokens), "first": first, "logits": file.name})
            return np.fromfile(file.name, np.float32).reshape(shape)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text by llama.cpp's tokenizer; nothing is added, and special tokens are recognized."""
        return list(self._request({"text": text})["tokens"])

    def _request(self, request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has reported why, or it is gone
        line = self._process.stdout.readline()
        if not line:
            raise SourceError(f"llama.cpp cannot run {self._path}: {self._failure()}")
        response = json.loads(line)
        if isinstance(response, dict) and "error" in response:
            raise SourceError(str(response["error"]))
        return response

    def _failure(self) -> str:
        """The last line on stderr, or the exit code."""
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read()[-10_000:].splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"the process ended with exit code {code} and no message"
