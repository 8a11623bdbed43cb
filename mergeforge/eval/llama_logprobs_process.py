"""The process in which llama.cpp scores rows (llama_scores.py), seen from here."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergeforge.errors import SourceError
from mergeforge.tensors.budget import cores


class ScoringProcess:
    """A GGUF file that scores rows of at most `context` tokens, until it is closed. Raises SourceError."""

    def __init__(self, path: Path, context: int) -> None:
        self._path = path
        command = [sys.executable, "-m", "mergeforge.eval.llama_logprobs"]
        pipe = subprocess.PIPE
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # until close
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True)
        try:
            self._ask({"path": str(path), "context": context, "threads": cores()})
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def score(self, tokens: Sequence[int], counted: Sequence[int]) -> tuple[float, int]:
        """(negative log-likelihood in nats, how many were the likeliest) of the tokens at the places `counted`."""
        nll, correct = self._ask({"tokens": list(tokens), "counted": list(counted)})
        return float(nll), int(correct)

    def tokens(self, text: str) -> list[int]:
        """The text's tokens by llama.cpp's own tokenizer; nothing is added, special ones are recognised."""
        return list(self._ask({"text": text})["tokens"])

    def _ask(self, asked: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has said why, or it is gone
        said = self._process.stdout.readline()
        if not said:
            raise SourceError(f"llama.cpp does not run {self._path}; it says: {self._last_words()}")
        answer = json.loads(said)
        if isinstance(answer, dict) and "error" in answer:
            raise SourceError(str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        said = [line.strip() for line in self._stderr.read()[-10_000:].splitlines() if line.strip()]
        return said[-1][:300] if said else f"nothing, but ended with {code}"
