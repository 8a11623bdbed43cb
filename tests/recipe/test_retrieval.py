"""recipes/retrieval.py with the real ChromaDB, offline."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.paths import RECIPES

NOTES = {"fees.md": "The fee for a loan is two per cent. " * 40, "birds.md": "Swallows fly south in autumn. " * 40}


@pytest.mark.filterwarnings("ignore")
def test_passages_are_found_and_asked_with(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("chromadb", reason="pip install chromadb")
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    import retrieval

    for name, text in NOTES.items():
        Path(name).write_text(text)
    retrieval.main(["add", "base", *NOTES])
    retrieval.main(["add", "base", "fees.md"])  # again: its passages are replaced
    assert capsys.readouterr().out.count("passages\n") == 3
    retrieval.main(["ask", "base", "The fee for a loan is two per cent.", "--passages", "2", "--max-tokens", "4"])
    told = capsys.readouterr().out
    assert told.count("[fees.md#") == 2 and "[birds.md" not in told


def test_a_text_is_cut_with_words_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("chromadb", reason="pip install chromadb")
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    import retrieval

    words = [str(at) for at in range(250)]
    found = [one.split() for one in retrieval.cut(" ".join(words))]
    assert [one[0] for one in found] == ["0", "100", "200"] and found[-1][-1] == "249"
    assert found[0][-20:] == found[1][:20] and list(retrieval.cut("")) == []
