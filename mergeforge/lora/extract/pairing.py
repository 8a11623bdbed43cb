"""Which tensor of the tuned model belongs to which of the base, and what an adapter can do about it.

Only headers are read. A linear layer's weight gets factors; embeddings and the output head are a
choice; norms, biases, convolutions and routers can only be held whole; fused experts not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergeforge.adapters.peft.keys import find_tensor
from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, is_head, tied_head
from mergeforge.errors import RecipeError, SourceError, listing
from mergeforge.tensors.stored import StoredTensor

POSITIONS = ("wpe", "embed_positions", "position_embeddings", "token_type_embeddings")
ROUTERS = ("gate", "router")  # of experts: parameters of a module that is no linear layer
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|position_ids)$")
# The name under which a model with a head holds the headless one, for checkpoints saved without it.
PREFIXES = {"gpt2": "transformer", "bloom": "transformer", "falcon": "transformer", "gpt_neox": "gpt_neox"}
LEFT_OUT = "left out by --include or --exclude"
HEADED = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Pair:
    """A tensor of both models. `way`: "factor", "save", or why the adapter does not hold it.

    `module` is its path in the model that PEFT wraps; `embedding`: it is looked up by its rows.
    `transposed`: the weight is stored (in, out). `tied`: it is the output head too, in both models.
    """

    module: str
    leaf: str
    base: StoredTensor
    tuned: StoredTensor
    way: str
    embedding: bool = False
    transposed: bool = False
    tied: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.leaf}"

    @property
    def is_left_out(self) -> bool:
        """By its name, so it is not even looked at."""
        return self.way == LEFT_OUT

    @property
    def is_resized(self) -> bool:
        return self.base.info.shape != self.tuned.info.shape


@dataclass(frozen=True)
class Choice:
    """What the user asked for; `embeddings` is lora, save or skip, the patterns are found in names."""

    embeddings: str = "save"
    save_rest: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"{pattern!r} is no regular expression: {error}") from None

    def takes(self, name: str) -> bool:
        if any(re.search(pattern, name) for pattern in self.exclude):
            return False
        return not self.include or any(re.search(pattern, name) for pattern in self.include)


def pair_up(base: Checkpoint, tuned: Checkpoint, choice: Choice) -> list[Pair]:
    """A pair for every tensor. Raises SourceError where the two are not one architecture."""
    pairs = [_pair(*pair, base, choice) for pair in _matched(base, tuned)]
    tied = bool(tied_head(base)) and bool(tied_head(tuned))
    for pair in pairs:
        _check_shape(pair, base, tuned)
    if tied:
        pairs = [replace(pair, tied=_is_tied(pair, base)) for pair in pairs]
        pairs += [_head_of(pair, base) for pair in pairs if pair.tied and pair.way == "save"]
    return pairs


def all_tensors(base: Checkpoint, pairs: Sequence[Pair]) -> list[str]:
    """The names of the model's tensors as PEFT sees them; a tied head is one of them."""
    names = [pair.name for pair in pairs]
    tied = tied_head(base)
    return [*names, tied[0]] if tied else names


def _matched(base: Checkpoint, tuned: Checkpoint) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    """(module path, base's, tuned's) of every tensor; a head that one model ties stands for its embedding."""
    left = {name: stored for name, stored in base.tensors.items() if not BUFFERS.search(name)}
    ties = tied_head(base), tied_head(tuned)
    both = bool(ties[0] and ties[1])
    missing = []
    for name, stored in tuned.tensors.items():
        if BUFFERS.search(name) or (both and is_head(name)):
            continue
        found = name if name in left else _other_name(name, left)
        if found:
            yield _path(max(name, found, key=len), tuned), left.pop(found), stored
        elif is_head(name) and ties[0]:
            yield _path(name, tuned), base.tensors[ties[0][1]], stored
        else:
            missing.append(name)
    for name, stored in list(left.items()):
        if is_head(name) and ties[1]:
            del left[name]
            if not both:
                yield _path(name, base), stored, tuned.tensors[ties[1][1]]
    _refuse_missing(base, tuned, missing, list(left))


def _other_name(name: str, names: Mapping[str, StoredTensor]) -> str:
    found = find_tensor(name, names)
    return found[0] if len(found) == 1 else ""


def _refuse_missing(base: Checkpoint, tuned: Checkpoint, missing: Sequence[str], left: Sequence[str]) -> None:
    hint = "is it the model that the other was made from?"
    if missing:
        raise SourceError(f"{base.label} lacks {listing(missing)}, which {tuned.label} holds", hint=hint)
    if left:
        raise SourceError(f"{tuned.label} lacks {listing(left)}, which {base.label} holds", hint=hint)


def _path(name: str, model: Checkpoint) -> str:
    """The tensor's path in a model with its head, for checkpoints that were saved without one."""
    prefix = PREFIXES.get(str(model.config.get("model_type")), "")
    headed = any(str(one).endswith(HEADED) for one in model.config.get("architectures") or ())
    headless = prefix and not any(one.startswith(f"{prefix}.") for one in model.tensors)
    return f"{prefix}.{name}" if headed and headless and not is_head(name) and not name.startswith(prefix) else name


def _pair(name: str, base: StoredTensor, tuned: StoredTensor, model: Checkpoint, choice: Choice) -> Pair:
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    head, embedding = is_head(name), last in (*EMBEDDINGS, *POSITIONS)
    is_matrix = leaf == "weight" and len(tuned.info.shape) == 2 and tuned.info.numel > 0
    conv1d = model.config.get("model_type") in CONV1D_MODELS and not head and not embedding
    if not choice.takes(name):
        way = LEFT_OUT
    elif is_matrix and (head or embedding):
        way = {"lora": "factor", "save": "save", "skip": "left out by --embeddings skip"}[choice.embeddings]
    elif is_matrix and last not in ROUTERS:
        way = "factor"
    elif leaf in ("weight", "bias"):
        way = "save" if choice.save_rest else "no weight of a linear layer: --save-rest holds it whole"
    else:
        way = "a fused or unusual parameter: no adapter of this kind can hold it"
    transposed = way == "factor" and (embedding or conv1d)
    return Pair(module, leaf, base, tuned, way, embedding and is_matrix, transposed)


def _check_shape(pair: Pair, base: Checkpoint, tuned: Checkpoint) -> None:
    for stored, label in ((pair.base, base.label), (pair.tuned, tuned.label)):
        if not stored.info.is_float and pair.way in ("factor", "save"):
            hint = "take the 16-bit versions of both models"
            raise SourceError(f"{label}: {stored.info.name} is {stored.info.dtype}: quantised", hint=hint)
    if not pair.is_resized:
        return
    shapes = list(pair.base.info.shape), list(pair.tuned.info.shape)
    text = f"{pair.name} is {shapes[0]} in {base.label} and {shapes[1]} in {tuned.label}"
    grown = (pair.embedding or is_head(pair.name)) and shapes[0][1:] == shapes[1][1:]
    if not grown:
        raise SourceError(text, hint="the two are not one architecture")
    if pair.way != "save":
        raise SourceError(f"{text}: the vocabulary was resized", hint="--embeddings save holds it whole")


def _is_tied(pair: Pair, base: Checkpoint) -> bool:
    tied = tied_head(base)
    return tied is not None and pair.base.info.name == tied[1]


def _head_of(pair: Pair, base: Checkpoint) -> Pair:
    """The tied head as a module of its own: PEFT's merge unties what it holds whole."""
    tied = tied_head(base)
    assert tied is not None
    return Pair(tied[0].rpartition(".")[0], "weight", pair.base, pair.tuned, "save")
