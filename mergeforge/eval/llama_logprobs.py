"""Log-probabilities of given tokens in llama.cpp, in a process of its own, at the speed of reading a prompt.

xllamacpp's server tells the probabilities of tokens that it draws, not of those that it is given, so this calls
llama.cpp's C interface (include/llama.h) inside the same wheel. Of its structures only what has stood since 2023 is
used: the first four fields of llama_context_params, and llama_batch; the rest stays as llama.cpp fills it, in blocks
that are larger than it needs. The sizes that the context tells afterwards show whether the layout was right. A model
that llama.cpp cannot run ends the process, which is why it is not ours.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BATCH = 512  # tokens that are computed together
_VOID, _INT, _INTS = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)


class _Block(ctypes.Structure):
    """A structure that llama.cpp fills; it needs a few hundred bytes."""

    _fields_ = (("head", ctypes.c_uint32 * 4), ("rest", ctypes.c_uint64 * 254))


class _Batch(ctypes.Structure):
    """llama_batch: arrays of tokens, positions, sequences, and which of them want logits."""

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
_silent = _LOG(lambda level, message, data: None)
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


class Unsupported(Exception):
    """This llama.cpp is not what is expected, or does not take the file."""


class LlamaScores:
    """A GGUF file in llama.cpp, with room for rows of `context` tokens. Raises Unsupported."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        self._library = _library()
        self._model = self._library.llama_model_load_from_file(
            path.encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise Unsupported(f"llama.cpp does not load {path}")
        parameters = self._library.llama_context_default_params()
        rounded = max(BATCH, -(-context // 256) * 256)
        parameters.head[:] = (rounded, BATCH, BATCH, 1)
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise Unsupported(f"llama.cpp makes no context of {rounded} tokens for {path}")
        asked = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")
        sizes = [getattr(self._library, f"llama_{name}")(self._context) for name in asked]
        if sizes != [rounded, BATCH, BATCH, 1]:
            raise Unsupported(f"this llama.cpp lays its parameters out differently: {sizes}")
        self._library.llama_set_n_threads(self._context, threads, threads)
        self._vocab = self._library.llama_model_get_vocab(self._model)
        self._vocabulary = int(self._library.llama_vocab_n_tokens(self._vocab))
        self._batch = self._library.llama_batch_init(BATCH, 0, 1)

    def score(self, tokens: Sequence[int], counted: Sequence[int]) -> tuple[float, int]:
        """(negative log-likelihood, how many were the likeliest) of the tokens at the places `counted`.

        Raises Unsupported when llama.cpp refuses the row.
        """
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        before = {at - 1 for at in counted if at > 0}
        nll, correct = 0.0, 0
        for start in range(0, max(before, default=-1) + 1, BATCH):
            stop = min(start + BATCH, max(before) + 1)
            self._decode(tokens[start:stop], start, before)
            for at in (at for at in range(start, stop) if at in before):
                logprob, likeliest = _logprob(self._logits(at - start), tokens[at + 1])
                nll, correct = nll - logprob, correct + likeliest
        return nll, correct

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, without any that are added; special ones are recognised."""
        data = text.encode()
        room = (_INT * (len(data) + 16))()
        count = self._library.llama_tokenize(self._vocab, data, len(data), room, len(room), False, True)
        return list(room[:count])

    def _decode(self, tokens: Sequence[int], start: int, before: set[int]) -> None:
        self._batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            if not 0 <= token < self._vocabulary:
                raise Unsupported(f"token {token} is not in the file's vocabulary of {self._vocabulary}")
            self._batch.token[at], self._batch.pos[at] = token, start + at
            self._batch.n_seq_id[at], self._batch.seq_id[at][0] = 1, 0
            self._batch.logits[at] = start + at in before
        done = self._library.llama_decode(self._context, self._batch)
        if done:
            raise Unsupported(f"llama.cpp failed on a row of {start + len(tokens)} tokens ({done})")

    def _logits(self, at: int) -> NDArray[np.float32]:
        import numpy as np

        return np.ctypeslib.as_array(self._library.llama_get_logits_ith(self._context, at), (self._vocabulary,))


def _logprob(logits: NDArray[np.float32], token: int) -> tuple[float, int]:
    import numpy as np

    largest = float(logits.max())
    total = float(np.exp(logits - np.float32(largest), dtype=np.float64).sum())
    return float(logits[token]) - largest - float(np.log(total)), int(int(logits.argmax()) == token)


def _library() -> ctypes.CDLL:
    """xllamacpp's shared library with the signatures of what is used."""
    import xllamacpp

    found = sorted(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    if not found:
        raise Unsupported("this xllamacpp has no shared library whose functions can be called")
    library = ctypes.CDLL(str(found[0]))
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise Unsupported(f"this xllamacpp does not show llama.cpp's functions: {error}") from None
    library.llama_log_set(_silent, None)
    library.llama_backend_init()
    return library


def answers(lines: Iterator[str]) -> Iterator[Any]:
    """What each line of JSON asks for: the first opens the file, others are rows or texts."""
    opened = json.loads(next(lines))
    llama = LlamaScores(opened["path"], opened["context"], opened["threads"])
    yield {"ready": True}
    for line in lines:
        asked = json.loads(line)
        if "text" in asked:
            yield {"tokens": llama.tokens(asked["text"])}
        else:
            yield llama.score(asked["tokens"], asked["counted"])


def main() -> None:
    """Answer the lines of stdin on stdout."""
    try:
        for answer in answers(iter(sys.stdin)):
            print(json.dumps(answer), flush=True)
    except Unsupported as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
