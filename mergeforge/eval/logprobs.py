"""Log-probabilities of counted tokens by a transformers model, without ever holding the logits of a batch.

The body runs once over a batch of rows, sorted by length and padded at the right, where no token of a causal model
sees the padding. Of its hidden states only those before a counted token are kept. The model's own forward then makes
logits of a few of them at a time: its body is replaced meanwhile by one that hands these out, so scales, soft caps
and biases of the head are as the model has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergeforge.errors import SourceError
from mergeforge.eval.backend import UNTRAINED, Row, RowScore

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = 1 << 24  # logits at a time: 64 MiB in float32
TOKENS = {"cpu": 2048, "cuda": 16384}  # of a batch, padding included
ROWS = {"cpu": 8, "cuda": 32}


def batches(lengths: Sequence[int], rows: int, tokens: int) -> list[list[int]]:
    """Indices in batches of like length, the longest first, so that what does not fit fails at once."""
    found: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        last = found[-1] if found else []
        if last and len(last) < rows and (len(last) + 1) * lengths[last[0]] <= tokens:
            last.append(at)
        else:
            found.append([at])
    return found


def scores(
    model: Any, rows: Sequence[Row], *, batch: int | None, device: str, vocabulary: int | None = None
) -> Iterator[tuple[int, RowScore]]:
    """(index, score) of every row, the longest first.

    `vocabulary`: only so many tokens can come (None: all that the model has). A batch that does not fit on the card
    is halved. Raises SourceError for tokens that the model has not.
    """
    _check_tokens(rows, vocabulary or model.get_input_embeddings().weight.shape[0])
    kind = device.partition(":")[0]
    most = batch or ROWS.get(kind, ROWS["cpu"])
    tokens = 1 << 40 if batch else TOKENS.get(kind, TOKENS["cpu"])
    waiting = batches([len(row.tokens) for row in rows], most, tokens)[::-1]
    while waiting:
        some = waiting.pop()
        found = _attempt(model, [rows[at] for at in some], device, vocabulary)
        if found is not None:
            yield from zip(some, found, strict=True)
        else:
            half = (len(some) + 1) // 2
            waiting += [some[half:], some[:half]]


def _check_tokens(rows: Sequence[Row], vocabulary: int) -> None:
    largest = max((int(row.tokens.max()) for row in rows if len(row.tokens)), default=0)
    if largest >= vocabulary:
        text = f"the rows hold token {largest}, and the model knows {vocabulary} of them"
        raise SourceError(text, hint="rows must be made with the model's own tokenizer")


def _attempt(model: Any, rows: Sequence[Row], device: str, vocabulary: int | None) -> list[RowScore] | None:
    """The rows' scores; None where memory runs out and there are fewer rows to try."""
    import torch

    try:
        return _score(model, rows, device, vocabulary)
    except torch.cuda.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()
    return None


def _score(model: Any, rows: Sequence[Row], device: str, vocabulary: int | None) -> list[RowScore]:
    import torch

    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), UNTRAINED, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for at, row in enumerate(rows):
        count = len(row.tokens)
        tokens[at, :count] = torch.from_numpy(row.tokens.astype("int64"))
        labels[at, :count] = torch.from_numpy(row.labels.astype("int64"))
        mask[at, :count] = 1
    owner, place = torch.nonzero(labels[:, 1:] != UNTRAINED, as_tuple=True)
    wanted = labels[owner, place + 1].to(device)
    given = {"input_ids": tokens.to(device), "use_cache": False}
    if not bool(mask.all()):
        given["attention_mask"] = mask.to(device)
    with torch.no_grad():  # not inference_mode: buffers that a model makes now may be trained with later
        found, right = _logprobs(model, given, owner.to(device), place.to(device), wanted, vocabulary)
    return _by_row(len(rows), owner, found.cpu().double(), right.cpu())


def _by_row(rows: int, owner: Tensor, logprobs: Tensor, right: Tensor) -> list[RowScore]:
    import torch

    nll = torch.zeros(rows, dtype=torch.double).index_add_(0, owner, -logprobs)
    count = torch.bincount(owner, minlength=rows)
    correct = torch.zeros(rows, dtype=torch.long).index_add_(0, owner, right.long())
    return [RowScore(*one) for one in zip(nll.tolist(), count.tolist(), correct.tolist(), strict=True)]


def _logprobs(
    model: Any, given: dict[str, Any], owner: Tensor, place: Tensor, wanted: Tensor, vocabulary: int | None
) -> tuple[Tensor, Tensor]:
    """The log-probability of each wanted token, and whether it was the likeliest."""
    import torch

    if not len(wanted):
        return torch.zeros(0), torch.zeros(0)
    size = model.get_input_embeddings().weight.shape[0]
    step = max(1, LOGITS // size)
    parts = []
    for start, logits in _logits(model, given, owner, place, step):
        known = logits[:, :vocabulary].float()
        label = wanted[start : start + len(known)]
        chosen = known.gather(1, label[:, None])[:, 0]
        parts.append((chosen - known.logsumexp(-1), known.argmax(-1) == label))
    return torch.cat([one for one, _ in parts]), torch.cat([two for _, two in parts])


def _logits(model: Any, given: dict[str, Any], owner: Tensor, place: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    """(start, logits [n, vocabulary]) of the places, `step` at a time."""
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    kept = _run_body(model, body, given)
    if kept is None or getattr(kept, "last_hidden_state", None) is None:
        yield 0, model(**given).logits[owner, place]
        return
    hidden = kept.last_hidden_state[owner, place]
    for start in range(0, len(hidden), step):
        part = hidden[None, start : start + step]
        with _handing_out(body, kept, part) as asked:
            dummy = given["input_ids"].new_zeros(part.shape[:2])
            logits = model(input_ids=dummy, use_cache=False).logits
        if not asked:  # this model's forward goes around its body
            yield 0, model(**given).logits[owner, place]
            return
        yield start, logits[0]


def _run_body(model: Any, body: Any, given: dict[str, Any]) -> Any:
    """What the body returns inside the model's own forward, with the logits of one token only; None without one."""
    if body is None or body is model:
        return None
    kept: list[Any] = []
    hook = body.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        model(**given, logits_to_keep=1)
    except TypeError:
        return None  # a forward that keeps all logits
    finally:
        hook.remove()
    return kept[0] if len(kept) == 1 else None


@contextmanager
def _handing_out(body: Any, output: Any, hidden: Tensor) -> Iterator[list[bool]]:
    """Make the body return these hidden states; the list is filled when it is asked."""
    asked: list[bool] = []
    before = body.__dict__.get("forward")  # accelerate puts its own there

    def forward(*arguments: Any, **settings: Any) -> Any:
        asked.append(True)
        output.last_hidden_state = hidden
        return output

    body.forward = forward
    try:
        yield asked
    finally:
        del body.forward
        if before is not None:
            body.forward = before
