"""A Hub token, and what was never to be run: in no file, no message, no traceback, no argument, whatever goes wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.faults.hubs import REPO, Talks
from support.faults.tally import Tally
from support.faults.warm import Warm

from mergeforge.operations.synthetic_models import SHAPES, write_adapter, write_model

TOKEN = "hf_CANARYqQ7xV2nM4kL9pR3sT8wZ5bY1cD6fG0h"


def spoken(folder: Path, said: str) -> list[str]:
    """Where the token stands: names of files, or `said`."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    return found + (["said"] if TOKEN in said else [])


@pytest.mark.faults
@pytest.mark.parametrize("name", ["publish", "download", "stream", "ship"])
def test_the_token_is_printed_nowhere(talks: Talks, tmp_path: Path, tally: Tally, name: str) -> None:
    """With a token that works, one that does not, and a Hub that fails at any request; verbose, too."""
    talk, hub = talks[name], talks.hub
    arguments = [one for one in talk.scenario.arguments if one != "-q"] + (["-v"] if name != "publish" else [])
    for number in range(0, talk.requests + 1, 3):
        for code in (401, 500):
            folder = talks.begin(talk, tmp_path)
            hub.token = TOKEN if number or code == 500 else "hf_another"
            hub.act = lambda at, stage, path, number=number, code=code: (  # type: ignore[misc]
                {"kind": "status", "code": code} if number and at >= number else None
            )
            env = {"HF_TOKEN": TOKEN, "HF_DEBUG": "1"}
            ended = talks.warm.run(arguments, folder, hasty=True, env=env)
            hub.settle()
            told = (
                ended.out
                + ended.err
                + "".join(hub.read(REPO, one).decode(errors="replace") for one in published(talks))
            )
            with tally.run():
                assert "Traceback" not in ended.err
                assert not spoken(folder, told) and not spoken(talks.home, "")
            shutil.rmtree(folder)
    hub.token = "hf_faketoken"


def published(talks: Talks) -> list[str]:
    return talks.hub.listing(REPO) if ("model", REPO) in talks.hub.repos else []


@pytest.mark.faults
def test_the_token_is_sent_only_to_the_hub(talks: Talks, tmp_path: Path) -> None:
    """Large files lie on another host, which gets no token."""
    for name in ("download", "stream"):
        talks.begin(talks[name], tmp_path)
        talks.start(talks[name], tmp_path).wait()
        elsewhere = [one for one in talks.hub.log if one["path"].startswith("/cdn/")]
        assert elsewhere and not any(one["auth"] for one in elsewhere)


# --- what lies beside or in a model, and is code


class Evil:
    """What an unpickler that trusts does: here, make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A model and an adapter whose weights are pickles that do something, and code beside them."""
    mark = tmp_path / "PWNED"
    for name in ("model", "adapter"):
        folder = tmp_path / name
        if name == "model":
            write_model(folder, SHAPES["tiny"])
        else:
            write_adapter(folder, SHAPES["tiny"], str(tmp_path / "model"), rank=2)
        stem = "pytorch_model" if name == "model" else "adapter_model"
        next(folder.glob("*.safetensors")).unlink()
        torch.save({"x": Evil(mark)}, folder / f"{stem}.bin")
    write_model(tmp_path / "base", SHAPES["tiny"])
    code = f"import os; os.mkdir({str(mark)!r})\n"
    for name in ("model", "base", "adapter"):
        for file in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
            (tmp_path / name / file).write_text(code)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        auto = {"AutoConfig": "configuration_evil.E", "AutoModelForCausalLM": "modeling_evil.E"}
        path.write_text(json.dumps(config | {"auto_map": auto}))
    (tmp_path / "base" / "training_args.bin").write_bytes(pickle.dumps(Evil(mark)))
    return mark


COMMANDS = {
    "merge": ["run", "model.yaml", "--out", "out"],
    "merge, pickles allowed": ["run", "model.yaml", "--out", "out", "--allow-pickle"],
    "fold": ["run", "adapter.yaml", "--out", "out"],
    "fold, pickles allowed": ["run", "adapter.yaml", "--out", "out", "--allow-pickle"],
    "code beside weights": ["run", "base.yaml", "--out", "out"],
    "gguf": ["gguf", "model", "--type", "f16"],
    "gguf, pickles allowed": ["gguf", "model", "--type", "f16", "--allow-pickle"],
    "inspect": ["inspect", "model"],
    "inspect a pickle": ["inspect", "model/pytorch_model.bin"],
    "diff": ["diff", "model", "base"],
    "extract": ["extract-lora", "model", "--base", "base", "--out", "out", "--allow-pickle"],
    "train": ["train", "train.yaml", "-q"],
    "train on a base with code": ["train", "train.yaml", "-q", "--set", "model=base"],
    "eval": ["eval", "model", "--data", "rows.jsonl"],
    "chat": ["chat", "model", "--prompt", "hi"],
}


@pytest.mark.faults
@pytest.mark.parametrize("name", COMMANDS)
def test_no_code_of_a_model_is_run(warm: Warm, evil: Path, name: str) -> None:
    folder = evil.parent
    for one in ("model", "base"):
        recipe = {"merge_method": "passthrough", "models": [one]}
        (folder / f"{one}.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "adapter.yaml").write_text(yaml.safe_dump({"base_model": "base", "adapters": ["adapter"]}))
    rows = [{"prompt": f"{at}", "response": "yes"} for at in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"model": "model", "data": "rows.jsonl", "method": "lora", "epochs": 1, "output": "run"}
    (folder / "train.yaml").write_text(yaml.safe_dump(training))
    ended = warm.run(COMMANDS[name], folder)
    assert not evil.exists(), ended
    assert "Traceback" not in ended.err, ended
    assert not list(folder.glob("out/*.py"))


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.mkdir('PWNED') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x.__init__.__globals__.os.mkdir('PWNED') }}{% endfor %}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir('PWNED') }}",
]


@pytest.mark.faults
@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_reach_the_system(warm: Warm, tmp_path: Path, template: str) -> None:
    """transformers renders it in Jinja's sandbox."""
    write_model(tmp_path / "base", SHAPES["tiny"])
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    for command in (
        ["data", "preview", "rows.jsonl", "--model", "base"],
        ["chat", "base", "--prompt", "hi", "--max-tokens", "1"],
        ["run", "recipe.yaml", "--out", "out"],
    ):
        (tmp_path / "recipe.yaml").write_text("merge_method: passthrough\nmodels: [base]\noutput: {gguf: f16}\n")
        ended = warm.run(command, tmp_path)
        assert not (tmp_path / "PWNED").exists()
        assert "Traceback" not in ended.err and "root:" not in ended.out, ended
        assert command[0] != "data" or "rejects it" in ended.out, ended


@pytest.mark.faults
def test_a_link_that_leads_out_of_the_folder_is_not_published(talks: Talks, tmp_path: Path) -> None:
    talks.begin(talks["publish"], tmp_path)
    secret, folder = tmp_path / "secret", tmp_path / "model"
    secret.write_text("mine")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").symlink_to(secret)
    ended = talks.warm.run(["publish", str(folder), REPO], tmp_path)
    assert ended.code == 3 and "leads out" in ended.err
    assert published(talks) == []
