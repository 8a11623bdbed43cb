"""Creates the small models of the tests, and rows of random tokens."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeforge.data import Example
from mergeforge.data.chat_templates import PLAIN
from mergeforge.eval import TokenRow
from mergeforge.eval.smoke_test import PROMPTS

# What the taught model answers to the smoke test's prompts: with multi-byte characters and a stop string.
ANSWERS = ("Hello, née Ünal 😀!", "4", "red, green, blue</output> and more", "The sea is wide.")


def make_adapter(base: Path, folder: Path, *, std: float = 0.05, **settings: Any) -> Path:
    """A LoRA adapter by PEFT with both factors random; B has the standard deviation `std`."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated call of transformers
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**(options | settings)))
    torch.manual_seed(0)
    for name, tensor in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=std)
    wrapped.save_pretrained(folder)
    return folder


def teach(base: Path, folder: Path) -> None:
    """Train all weights on the answers until the loss is below 0.05."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        before = tokenizer.encode(f"User: {prompt}\nAssistant:")
        rows.append((before, before + tokenizer.encode(f" {answer}") + [tokenizer.eos_token_id]))
    length = max(len(whole) for _, whole in rows)
    tokens = torch.tensor([whole + [258] * (length - len(whole)) for _, whole in rows])
    labels = torch.tensor(
        [[-100] * len(before) + whole[len(before) :] + [-100] * (length - len(whole)) for before, whole in rows]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: more threads are far slower on a busy machine
    for _ in range(200):
        loss = model(tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    torch.set_num_threads(threads)
    assert loss < 0.05
    model.save_pretrained(folder)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)


def random_rows(count: int = 12, longest: int = 90, seed: int = 0) -> list[TokenRow]:
    """Rows of random tokens; the second half of each is scored."""
    random = np.random.default_rng(seed)
    rows: list[TokenRow] = []
    for length in random.integers(4, longest, count):
        tokens = random.integers(0, 256, length).astype(np.int32)
        labels = tokens.copy()
        labels[: length // 2] = -100
        rows.append(Example(tokens, labels))
    return rows
