"""Log-probabilities of given tokens in llama.cpp, in a process of its own, at the speed of reading a prompt.

xllamacpp's server reports the probabilities of tokens that it generates, not of those in the prompt, so this calls
llama.cpp's C interface (include/llama.h) inside the same wheel. It relies only on parts of the structures that have not
changed since 2023: the first four fields of llama_context_params, and llama_batch. The rest stays as llama.cpp fills
it, in blocks larger than necessary. The sizes that the context reports afterwards show whether the layout was right. A
model that llama.cpp cannot run ends the process, hence the separate process.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCH = 512  # tokens computed together
_VOID, _INT, _INTS = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)


class _Block(ctypes.Structure):
    """A structure that llama.cpp fills. It takes a few hundred bytes; this has room for 2 KiB."""

    _fields_ = (("head", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint64 * 254))


class _Batch(ctypes.Structure):
    """llama_batch: arrays of tokens, positions, sequences, and flags for the tokens whose logits are wanted."""

    _fields_ = (
        ("n_tokens", _INT),
        ("token", _INTS),
        ("embd", _VOID),
        ("pos", _INTS),
        ("n_seq_id", _INTS),
        ("seq_id", ctypes.POINTER(_INTS)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _VOID)
_ERROR = 4  # ggml_log_level
_errors: list[str] = []  # what llama.cpp logs as errors: the first line says why it refuses a file


def _keep_error(level: int, message: bytes, data: Any) -> None:
    if level == _ERROR:
        _errors.append(message.decode(errors="replace").strip())


_log = _LOG(_keep_error)


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LOG, _VOID]),
    "llama_model_default_params": (_Block, []),
    "llama_context_default_params": (_Block, []),
    "llama_model_load_from_file": (_VOID, [ctypes.c_char_p, _Block]),
    "llama_init_from_model": (_VOID, [_VOID, _Block]),
    "llama_model_get_vocab": (_VOID, [_VOID]),
    "llama_vocab_n_tokens": (_INT, [_VOID]),
    "llama_n_ctx": (ctypes.c_uint32, [_VOID]),
    "llama_n_batch": (ctypes.c_uint32, [_VOID]),
    "llama_n_ubatch": (ctypes.c_uint32, [_VOID]),
    "llama_n_seq_max": (ctypes.c_uint32, [_VOID]),
    "llama_set_n_threads": (None, [_VOID, _INT, _INT]),
    "llama_batch_init": (_Batch, [_INT, _INT, _INT]),
    "llama_get_memory": (_VOID, [_VOID]),
    "llama_memory_clear": (None, [_VOID, ctypes.c_bool]),
    "llama_decode": (_INT, [_VOID, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [_VOID, _INT]),
    "llama_tokenize": (_INT, [_VOID, ctypes.c_char_p, _INT, _INTS, _INT, ctypes.c_bool, ctypes.c_bool]),
}


class UnsupportedLlama(Exception):
    """This llama.cpp has another interface than expected, or refuses the file."""


class LlamaScorer:
    """A GGUF file in llama.cpp, with a context of `context` tokens. Raises UnsupportedLlama."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        self._library = _library()
        self._model = self._library.llama_model_load_from_file(
            path.encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise UnsupportedLlama(f"llama.cpp cannot load {path}: {'; '.join(_errors[:1])}")
        parameters = self._library.llama_context_default_params()
        rounded = max(BATCH, -(-context // 256) * 256)
        parameters.head[:] = (rounded, BATCH, BATCH, 1)
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise UnsupportedLlama(f"llama.cpp cannot create a context of {rounded} tokens for {path}")
        fields = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")
        sizes = [getattr(self._library, f"llama_{name}")(self._context) for name in fields]
        if sizes != [rounded, BATCH, BATCH, 1]:
            raise UnsupportedLlama(f"this llama.cpp has another layout of llama_context_params: {sizes}")
        self._library.llama_set_n_threads(self._context, threads, threads)
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self._vocabulary = int(self._library.llama_vocab_n_tokens(self._vocab))
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)

    def score(self, tokens: Sequence[int], scored: Sequence[int]) -> tuple[float, int]:
        """(negative log-likelihood, top-1 hits) of the tokens at the positions `scored`.

        Raises UnsupportedLlama if llama.cpp refuses the row.
        """
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        before = {position - 1 for position in scored if position > 0}
        nll, correct = 0.0, 0
        for start in range(0, max(before, default=-1) + 1, BATCH):
            stop = min(start + BATCH, max(before) + 1)
            self._decode(tokens[start:stop], start, before)
            for position in sorted(before.intersection(range(start, stop))):
                logprob, hit = _logprob(self._logits(position - start), tokens[position + 1])
                nll, correct = nll - logprob, correct + hit
        return nll, correct

    def write_logits(self, tokens: Sequence[int], first: int, path: str) -> tuple[int, int]:
        """Write the logits after the tokens from position `first` on, as rows of float32; returns their shape.

        The last token has none after it. Raises UnsupportedLlama if llama.cpp refuses the tokens.
        """
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        wanted = set(range(first, len(tokens) - 1))
        with open(path, "wb") as file:
            for start in range(0, len(tokens) - 1, BATCH):
                stop = min(start + BATCH, len(tokens) - 1)
                self._decode(tokens[start:stop], start, wanted)
                for position in sorted(wanted.intersection(range(start, stop))):
                    file.write(self._logits(position - start).tobytes())
        return len(wanted), self._vocabulary

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text; nothing is added, and special tokens are recognized."""
        data = text.encode()
        buffer = (_INT * (len(data) + 16))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), False, True)
        return list(buffer[:count])

    def _decode(self, tokens: Sequence[int], start: int, before: set[int]) -> None:
        self._batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            if not 0 <= token < self._vocabulary:
                raise UnsupportedLlama(f"token {token} is not in the file's vocabulary of {self._vocabulary}")
            self._batch.token[index], self._batch.pos[index] = token, start + index
            self._batch.n_seq_id[index], self._batch.seq_id[index][0] = 1, 0
            self._batch.logits[index] = start + index in before
        status = self._library.llama_decode(self._context, self._batch)
        if status:
            raise UnsupportedLlama(f"llama_decode failed on a row of {start + len(tokens)} tokens (status {status})")

    def _logits(self, index: int) -> NDArray[np.float32]:
        import numpy as np

        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, index), (self._vocabulary,))


def _logprob(logits: NDArray[np.float32], token: int) -> tuple[float, int]:
    import numpy as np

    largest = float(logits.max())
    total = float(np.exp(logits - np.float32(largest), dtype=np.float64).sum())
    return float(logits[token]) - largest - float(np.log(total)), int(int(logits.argmax()) == token)


def _library() -> ctypes.CDLL:
    """xllamacpp's shared library, with the signatures of the functions used here."""
    import xllamacpp

    libraries = sorted(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    if not libraries:
        raise UnsupportedLlama("this xllamacpp has no shared library with callable functions")
    library = ctypes.CDLL(str(libraries[0]))
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise UnsupportedLlama(f"this xllamacpp does not export llama.cpp's functions: {error}") from None
    library.llama_log_set(_log, None)
    library.llama_backend_init()
    return library


def respond(lines: Iterator[str]) -> Iterator[Any]:
    """The response to each line of JSON: the first opens the file, the others are rows or texts."""
    options = json.loads(next(lines))
    scorer = LlamaScorer(options["path"], options["context"], options["threads"])
    yield {"ready": True}
    for line in lines:
        request = json.loads(line)
        if "text" in request:
            yield {"tokens": scorer.tokens(request["text"])}
        elif "logits" in request:
            yield scorer.write_logits(request["tokens"], request["first"], request["logits"])
        else:
            yield scorer.score(request["tokens"], request["scored"])


def main() -> None:
    """Respond on stdout to the lines of stdin. What llama.cpp itself prints there goes to stderr."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        os.environ["GGML_NO_BACKTRACE"] = "1"  # a failed assertion would start a debugger
        try:
            for response in respond(iter(sys.stdin)):
                print(json.dumps(response), file=output, flush=True)
        except UnsupportedLlama as error:
            print(json.dumps({"error": str(error)}), file=output, flush=True)


if __name__ == "__main__":
    main()
