"""The model card: papers, base models, and commands that work as they stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT

import mergeforge
from mergeforge.hub.model_card import front_matter
from mergeforge.methods import METHODS
from mergeforge.methods.papers import PAPERS

WITHOUT_PAPER = {"fold", "passthrough", "slerp", "nearswap", "nuslerp", "multislerp", "karcher", "arcee_fusion"}
FOLD: dict[str, Any] = {"base_model": "base", "adapters": ["adapters/a"], "output": {"gguf": ["q8_0"]}}


def card(recipe: dict[str, Any], out: str | Path) -> str:
    return (mergeforge.merge(recipe, out=out, device="cpu") / "README.md").read_text()


def test_every_method_has_its_paper_or_none() -> None:
    """The table against the registered methods, and against the papers named in their source."""
    assert METHODS.keys() - PAPERS.keys() == WITHOUT_PAPER and PAPERS.keys() <= METHODS.keys()
    sources = "".join(
        path.read_text() for path in (ROOT / "mergeforge" / "methods").glob("*.py") if path.stem != "papers"
    )
    named = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", sources))
    assert {paper.arxiv for papers in PAPERS.values() for paper in papers} == named


def test_the_card_links_the_papers_of_its_methods(models: Path) -> None:
    ties = {"merge_method": "dare_ties", "base_model": "base", "models": ["tuned-a"], "parameters": {"weight": 1}}
    text = card(ties, "merged")
    assert "(https://arxiv.org/abs/2311.03099)" in text and "(https://arxiv.org/abs/2306.01708)" in text


@pytest.mark.parametrize(("named", "expected"), [("org/base", ["org/base"]), ("base", None), ("/home/me/base", None)])
def test_the_base_is_the_repo_that_the_adapter_names(models: Path, named: str, expected: list[str] | None) -> None:
    """base_model in the front matter, for a base model in a local folder."""
    path = Path("adapters/a/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    assert front_matter(card(FOLD, "merged")).get("base_model") == expected
    combined = {**FOLD, "output": {"safetensors": False, "adapter": True}}
    assert front_matter(card(combined, "combined")).get("base_model") == (expected and expected[0])


def test_commands_name_the_real_folder_and_quote_it(models: Path) -> None:
    """Each path in the card exists; the recipe has the folder that was written to, not its own output.path."""
    recipe = {**FOLD, "output": {**FOLD["output"], "path": "elsewhere"}}
    text = card(recipe, "my models/it's merged")
    shell = [shlex.split(line) for line in text.splitlines() if line.startswith(("vllm", "llama-server", "ollama"))]
    assert [words[0] for words in shell] == ["vllm", "llama-server", "ollama"]
    assert all(Path(words[-1] if words[0] != "ollama" else words[4]).exists() for words in shell)
    assert shell[2][:3] == ["ollama", "create", "it-s-merged"] and shell[2][-3:] == ["ollama", "run", "it-s-merged"]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code and code[1].count('from_pretrained("my models/it\'s merged"') == 2
    assert "`mergeforge verify 'my models/it'\"'\"'s merged'` checks them" in text
    written = yaml.safe_load(text.partition("```yaml\n")[2].removesuffix("```\n"))
    assert written["output"] == {"gguf": ["q8_0"], "path": "my models/it's merged"}


def test_an_absolute_folder_is_named_without_its_parents(models: Path) -> None:
    text = card(FOLD, models.absolute() / "merged")
    assert str(models.absolute()) not in text.partition("## Recipe")[0] and "vllm serve merged\n" in text
