"""A GGUF file as a Hugging Face folder, compared with the folder that the file was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergeforge
from mergeforge.errors import SourceError
from mergeforge.gguf.reader import read_gguf
from mergeforge.gguf.vocab.to_tokenizer_json import write_tokenizer_files
from mergeforge.operations.synthetic_models import ModelShape, write_model
from mergeforge.operations.unpack_gguf import unpack_gguf

SHAPE = ModelShape(64, 160, 3, 4, 2, 320)
TEXT = "Hello, world!  It's 12345 o'clock.\n\n\tdéjà vu - naïve; 你好, мир 😀 <s>tag</s> x=a[0]+1"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and the one made from its GGUF file in bf16."""
    root = tmp_path_factory.mktemp("unpack")
    shape = ModelShape(**{**SHAPE.__dict__, "tied": request.param})
    base = write_model(root / "base", shape)
    config = json.loads((base / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    mergeforge.convert_to_gguf(base, "bf16", out=root / "file.gguf")
    return base, unpack_gguf(root / "file.gguf", root / "unpacked")


def test_weights_and_config_are_those_of_the_original(folders: tuple[Path, Path]) -> None:
    expected, tensors = (load_file(folder / "model.safetensors") for folder in folders)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in expected)
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[1] == configs[0]


def test_the_tokenizer_is_that_of_the_original(folders: tuple[Path, Path]) -> None:
    original, tokenizer = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    assert tokenizer(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert tokenizer.get_vocab() == original.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(tokenizer, name) == getattr(original, name)


def test_transformers_computes_the_same_logits(folders: tuple[Path, Path]) -> None:
    tokens = torch.arange(1, 20)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in folders]
    assert logits[0].equal(logits[1])


def test_other_architectures_and_vocabularies_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = folders[0].parent / "file.gguf"
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(
        file.read_bytes().replace(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00lamma")
    )
    with pytest.raises(SourceError, match="not a plain Llama model"):
        unpack_gguf(broken, tmp_path / "out")
    header = read_gguf(file)
    keys = dict(header.keys)
    del keys["tokenizer.ggml.model"]
    with pytest.raises(SourceError, match="can be made from a vocabulary"):
        write_tokenizer_files(type(header)(keys, header.tensors, header.hashes), tmp_path)
