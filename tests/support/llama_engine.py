"""llama.cpp's tokenizer from the xllamacpp wheel: loads the vocabulary of a GGUF file without weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import pytest

from mergeforge.gguf.key_values import Value, encode_key_values, string, u32


class _Parameters(ctypes.Structure):
    """llama_model_params (include/llama.h)."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("devices", "buffers")),
        *((name, ctypes.c_int32) for name in ("layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, ctypes.c_void_p) for name in ("tensor_split", "progress", "progress_data", "overrides")),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check", "extra", "no_host", "no_alloc", "load_mtp")),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SILENT = _LOG(lambda level, message, data: None)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    package = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("*.so"))))
    library.llama_model_default_params.restype = _Parameters
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_model_free.argtypes = [ctypes.c_void_p]
    pointers = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32]
    library.llama_tokenize.argtypes = [*pointers, ctypes.c_bool, ctypes.c_bool]
    library.llama_log_set(_SILENT, None)
    library.llama_backend_init()
    return library


def write_vocabulary(path: Path, keys: Mapping[str, Value]) -> None:
    """Write a GGUF file with a vocabulary and no tensors."""
    all_keys = {"general.architecture": string("llama"), "llama.block_count": u32(1), **keys}
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + len(all_keys).to_bytes(8, "little")
    data = head + encode_key_values(all_keys)
    path.write_bytes(data + bytes(-len(data) % 32))


def tokenize(path: Path, texts: Iterable[str], *, special: bool = True) -> list[list[int]]:
    """The ids of each text, with the added tokens if `special`; special tokens written in a text become single ids."""
    library = _library()
    parameters = library.llama_model_default_params()
    parameters.vocab_only = True
    model = library.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp cannot load {path}"
    vocab = library.llama_model_get_vocab(model)
    token_ids = []
    for text in texts:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = library.llama_tokenize(vocab, data, len(data), ids, len(ids), special, True)
        assert count >= 0
        token_ids.append(list(ids[:count]))
    library.llama_model_free(model)
    return token_ids
