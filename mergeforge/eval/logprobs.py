"""Log-probabilities of scored tokens by a transformers model, without the logits of a whole batch in memory.

The body of the model runs once over a batch of rows, sorted by length and padded on the right, where no token of a
causal model sees the padding. Only the hidden states before a scored token are kept. The model's own forward then
turns a few of them at a time into logits: its body is temporarily replaced by one that returns them, so scales, soft
caps and biases of the head apply as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergeforge.data import IGNORE_INDEX
from mergeforge.errors import SourceError
from mergeforge.eval.backend import ScoredRow, TokenRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

MAX_LOGITS = 1 << 24  # at a time: 64 MiB in float32
MAX_TOKENS = {"cpu": 2048, "cuda": 16384}  # per batch, padding included
MAX_ROWS = {"cpu": 8, "cuda": 32}


def length_batches(lengths: Sequence[int], rows: int, tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, the longest first, so that running out of memory happens at once."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        last = batches[-1] if batches else []
        if last and len(last) < rows and (len(last) + 1) * lengths[last[0]] <= tokens:
            last.append(index)
        else:
            batches.append([index])
    return batches


def score_rows(
    model: Any, rows: Sequence[TokenRow], *, batch: int | None, device: str, vocabulary: int | None = None
) -> Iterator[tuple[int, ScoredRow]]:
    """(index, score) of every row, the longest first.

    vocabulary: only token ids below it are possible (None: all of the model's). A batch that does not fit on the GPU is
    halved. Raises SourceError for tokens outside the vocabulary.
    """
    _check_tokens(rows, vocabulary or model.get_input_embeddings().weight.shape[0])
    kind = device.partition(":")[0]
    max_rows = batch or MAX_ROWS.get(kind, MAX_ROWS["cpu"])
    max_tokens = 1 << 40 if batch else MAX_TOKENS.get(kind, MAX_TOKENS["cpu"])
    waiting = length_batches([len(row.tokens) for row in rows], max_rows, max_tokens)[::-1]
    while waiting:
        indices = waiting.pop()
        scores = _try_score(model, [rows[index] for index in indices], device, vocabulary)
        if scores is not None:
            yield from zip(indices, scores, strict=True)
        else:
            half = (len(indices) + 1) // 2
            waiting += [indices[half:], indices[:half]]


def chunk_logits(model: Any, tokens: Sequence[int], first: int, device: str) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] after the tokens from position `first` on; the last token has none after it."""
    import torch

    inputs = {"input_ids": torch.tensor([list(tokens)], device=device), "use_cache": False}
    positions = torch.arange(first, len(tokens) - 1, device=device)
    with torch.no_grad():
        parts = [part.float().cpu() for _, part in _logits(model, inputs, torch.zeros_like(positions), positions, 64)]
    logits: NDArray[np.float32] = torch.cat(parts).numpy()
    return logits


def _check_tokens(rows: Sequence[TokenRow], vocabulary: int) -> None:
    largest = max((int(row.tokens.max()) for row in rows if len(row.tokens)), default=0)
    if largest >= vocabulary:
        text = f"the rows hold token {largest}, but the model has only {vocabulary} tokens"
        raise SourceError(text, hint="make the rows with the model's own tokenizer")


def _try_score(model: Any, rows: Sequence[TokenRow], device: str, vocabulary: int | None) -> list[ScoredRow] | None:
    """The rows' scores; None if memory runs out and there is more than one row."""
    import torch

    try:
        return _score(model, rows, device, vocabulary)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()
    return None


def _score(model: Any, rows: Sequence[TokenRow], device: str, vocabulary: int | None) -> list[ScoredRow]:
    import torch

    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for index, row in enumerate(rows):
        count = len(row.tokens)
        tokens[index, :count] = torch.from_numpy(row.tokens.astype("int64"))
        labels[index, :count] = torch.from_numpy(row.labels.astype("int64"))
        mask[index, :count] = 1
    row_index, position = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    targets = labels[row_index, position + 1].to(device)
    inputs = {"input_ids": tokens.to(device), "use_cache": False}
    if not bool(mask.all()):
        inputs["attention_mask"] = mask.to(device)
    with torch.no_grad():  # not inference_mode: buffers that a model creates now may be trained with later
        logprobs, hits = _logprobs(model, inputs, row_index.to(device), position.to(device), targets, vocabulary)
    return _sum_by_row(len(rows), row_index, logprobs.cpu().double(), hits.cpu())


def _sum_by_row(rows: int, row_index: Tensor, logprobs: Tensor, hits: Tensor) -> list[ScoredRow]:
    import torch

    nll = torch.zeros(rows, dtype=torch.double).index_add_(0, row_index, -logprobs)
    count = torch.bincount(row_index, minlength=rows)
    correct = torch.zeros(rows, dtype=torch.long).index_add_(0, row_index, hits.long())
    return [ScoredRow(*sums) for sums in zip(nll.tolist(), count.tolist(), correct.tolist(), strict=True)]


def _logprobs(
    model: Any, inputs: dict[str, Any], row_index: Tensor, position: Tensor, targets: Tensor, vocabulary: int | None
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target token, and whether it is the most likely one."""
    import torch

    if not len(targets):
        return torch.zeros(0), torch.zeros(0)
    step = max(1, MAX_LOGITS // model.get_input_embeddings().weight.shape[0])
    logprobs, hits = [], []
    for start, chunk in _logits(model, inputs, row_index, position, step):
        logits = chunk[:, :vocabulary].float()
        target = targets[start : start + len(logits)]
        target_logits = logits.gather(1, target[:, None])[:, 0]
        logprobs.append(target_logits - logits.logsumexp(-1))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(logprobs), torch.cat(hits)


def _logits(
    model: Any, inputs: dict[str, Any], row_index: Tensor, position: Tensor, step: int
) -> Iterator[tuple[int, Tensor]]:
    """(start, logits [n, vocabulary]) of the given positions, `step` at a time."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    output = _run_body(model, body, inputs)
    if output is None or getattr(output, "last_hidden_state", None) is None:
        yield 0, model(**inputs).logits[row_index, position]
        return
    hidden = output.last_hidden_state[row_index, position]
    for start in range(0, len(hidden), step):
        chunk = hidden[None, start : start + step]
        with _body_returning(body, output, chunk) as calls:
            dummy = inputs["input_ids"].new_zeros(chunk.shape[:2])
            logits = model(input_ids=dummy, use_cache=False).logits
        if not calls:  # this model's forward bypasses its body
            yield 0, model(**inputs).logits[row_index, position]
            return
        yield start, logits[0]


def _run_body(model: Any, body: Any, inputs: dict[str, Any]) -> Any:
    """What the body returns within the model's own forward, which computes the logits of one token only.

    None if there is no body.
    """
    if body is None or body is model:
        return None
    outputs: list[Any] = []
    hook = body.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    try:
        model(**inputs, logits_to_keep=inputs["input_ids"].new_zeros(1))  # for 1, Gemma 4 shortens the hidden states
    except TypeError:
        return None  # a forward without logits_to_keep
    finally:
        hook.remove()
    return outputs[0] if len(outputs) == 1 else None


@contextmanager
def _body_returning(body: Any, output: Any, hidden: Tensor) -> Iterator[list[bool]]:
    """Make the body return these hidden states; the list records its calls."""
    calls: list[bool] = []
    previous = body.__dict__.get("forward")  # accelerate puts its own there

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(True)
        output.last_hidden_state = hidden
        return output

    body.forward = forward
    try:
        yield calls
    finally:
        del body.forward
        if previous is not None:
            body.forward = previous
