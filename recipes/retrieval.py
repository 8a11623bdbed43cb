#!/usr/bin/env python3
"""Answer questions from your own documents: passages are stored in ChromaDB and found by the model's own embeddings.

    pip install -e ".[train]" chromadb
    python recipes/retrieval.py add MODEL notes/*.md --store notes.db
    python recipes/retrieval.py ask MODEL "Which fee applies to loan 17?" --store notes.db

MODEL is a merged folder, an adapter or a Hub repo. Nothing leaves this machine: a passage's embedding is the mean of
MODEL's last hidden states and comes from no service. An embedding model finds passages better: --embedder FOLDER.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chromadb
import torch
from chromadb.config import Settings

from mergeforge.eval import Sampling, open_model

WORDS = 120  # words in a passage
SHARED = 20  # words that neighboring passages share, so that each sentence is whole in one of them
PROMPT = "Answer from these notes, or say that they do not answer it.\n\n{notes}\n\nQuestion: {question}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["add", "ask"])
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", help="files to add, or one question")
    parser.add_argument("--store", default="passages.db")
    parser.add_argument("--embedder", help="another model for the embeddings")
    parser.add_argument("--passages", type=int, default=3, help="number of passages given to the model")
    parser.add_argument("--max-tokens", type=int, default=256)
    given = parser.parse_args(arguments)
    model = open_model(given.model)
    embedder = open_model(given.embedder) if given.embedder else model
    client = chromadb.PersistentClient(given.store, Settings(anonymized_telemetry=False))
    passages = client.get_or_create_collection("passages", metadata={"hnsw:space": "cosine"}, embedding_function=None)
    if given.what == "add":
        for path in given.texts:
            print(f"{path}: {add(passages, embedder, Path(path))} passages")
        return
    found = near(passages, embedder, given.texts[0], given.passages)
    for place, text in found:
        print(f"[{place}] {text[:100]}")
    asked = PROMPT.format(notes="\n\n".join(text for _, text in found), question=given.texts[0])
    answer = model.chat([{"role": "user", "content": asked}], Sampling(temperature=0.0, max_tokens=given.max_tokens))
    print(answer.text)


def add(passages: Any, embedder: Any, path: Path) -> int:
    """Replace the stored passages of a file; returns their number."""
    passages.delete(where={"file": str(path)})
    texts = list(cut(path.read_text(encoding="utf-8")))
    if texts:
        places = [f"{path}#{at}" for at in range(len(texts))]
        facts = [{"file": str(path)} for _ in texts]
        passages.add(places, documents=texts, metadatas=facts, embeddings=[embedding(embedder, text) for text in texts])
    return len(texts)


def cut(text: str) -> Iterator[str]:
    """Split a text into passages of WORDS words."""
    words = text.split()
    for start in range(0, max(len(words) - SHARED, 1), WORDS - SHARED):
        if some := words[start : start + WORDS]:
            yield " ".join(some)


def near(passages: Any, embedder: Any, question: str, count: int) -> list[tuple[str, str]]:
    """The nearest passages, each with its id."""
    found = passages.query(query_embeddings=[embedding(embedder, question)], n_results=count)
    return list(zip(found["ids"][0], found["documents"][0], strict=True))


@torch.inference_mode()
def embedding(answerer: Any, text: str) -> list[float]:
    """The mean of the last hidden states, normalized to length 1."""
    model = answerer.loaded.model
    tokens = answerer.tokenizer(text, return_tensors="pt", truncation=True, max_length=answerer.context)
    hidden = model.base_model(input_ids=tokens["input_ids"].to(model.device)).last_hidden_state[0].float()
    return torch.nn.functional.normalize(hidden.mean(0), dim=0).tolist()


if __name__ == "__main__":
    main()
