"""Pair the tensors of the tuned model with those of the base, and decide how an adapter can store their difference.

Only headers are read. The weight of a linear layer gets factors; for embeddings and the output head the user
chooses; norms, biases, convolutions and routers can only be saved whole; fused experts cannot be stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mergeforge.adapters.peft.keys import find_tensor
from mergeforge.checkpoints.checkpoint import Checkpoint
from mergeforge.checkpoints.names import CONV1D_MODELS, EMBEDDINGS, is_head
from mergeforge.checkpoints.ties import tied_head
from mergeforge.errors import RecipeError, SourceError, format_list
from mergeforge.tensors.stored import StoredTensor

POSITION_EMBEDDINGS = ("wpe", "embed_positions", "position_embeddings", "token_type_embeddings")
ROUTERS = ("gate", "router")  # of experts: parameters of a module that is not a linear layer
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias|position_ids)$")
# The attribute of a model with a head that holds the model without one, for checkpoints saved without the prefix.
HEADLESS_PREFIXES = {"gpt2": "transformer", "bloom": "transformer", "falcon": "transformer", "gpt_neox": "gpt_neox"}
LEFT_OUT = "left out by --include or --exclude"
CLASSES_WITH_HEAD = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class TensorPair:
    """A tensor of both models. `treatment`: "factor", "save", or why the adapter does not store it.

    `module`: its path in the model that PEFT wraps. `embedding`: it is an embedding table. `transposed`: the
    weight is stored (in, out). `tied`: it is also the output head, in both models.
    """

    module: str
    parameter: str
    base: StoredTensor
    tuned: StoredTensor
    treatment: str
    embedding: bool = False
    transposed: bool = False
    tied: bool = False

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"

    @property
    def is_left_out(self) -> bool:
        """Excluded by name, so it is not read at all."""
        return self.treatment == LEFT_OUT

    @property
    def is_resized(self) -> bool:
        return self.base.info.shape != self.tuned.info.shape


@dataclass(frozen=True)
class TensorFilter:
    """Which tensors to extract, and how. `embeddings`: lora, save or skip; patterns match anywhere in a name."""

    embeddings: str = "save"
    save_rest: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.include, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"{pattern!r} is not a regular expression: {error}") from None

    def includes(self, name: str) -> bool:
        if any(re.search(pattern, name) for pattern in self.exclude):
            return False
        return not self.include or any(re.search(pattern, name) for pattern in self.include)


def pair_tensors(base: Checkpoint, tuned: Checkpoint, tensor_filter: TensorFilter) -> list[TensorPair]:
    """Pair all tensors. Raises SourceError if the two models have different architectures."""
    pairs = [_pair(*pair, base, tensor_filter) for pair in _matching_tensors(base, tuned)]
    tied = bool(tied_head(base)) and bool(tied_head(tuned))
    for pair in pairs:
        _check_shape(pair, base, tuned)
    if tied:
        pairs = [replace(pair, tied=_is_tied(pair, base)) for pair in pairs]
        pairs += [_tied_head_pair(pair, base) for pair in pairs if pair.tied and pair.treatment == "save"]
    return pairs


def all_tensors(base: Checkpoint, pairs: Sequence[TensorPair]) -> list[str]:
    """The names of the model's tensors as PEFT sees them, including a tied head."""
    names = [pair.name for pair in pairs]
    tied = tied_head(base)
    return [*names, tied[0]] if tied else names


def _matching_tensors(base: Checkpoint, tuned: Checkpoint) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    """(path, base's, tuned's) of every tensor; a head that one model ties is paired with that model's embedding."""
    unmatched = {name: stored for name, stored in base.tensors.items() if not BUFFERS.search(name)}
    tied = tied_head(base), tied_head(tuned)
    both_tied = bool(tied[0] and tied[1])
    missing = []
    for name, stored in tuned.tensors.items():
        if BUFFERS.search(name) or (both_tied and is_head(name)):
            continue
        base_name = name if name in unmatched else _other_name(name, unmatched)
        if base_name:
            yield _path(max(name, base_name, key=len), tuned), unmatched.pop(base_name), stored
        elif is_head(name) and tied[0]:
            yield _path(name, tuned), base.tensors[tied[0][1]], stored
        else:
            missing.append(name)
    for name, stored in list(unmatched.items()):
        if is_head(name) and tied[1]:
            del unmatched[name]
            if not both_tied:
                yield _path(name, base), stored, tuned.tensors[tied[1][1]]
    _check_none_missing(base, tuned, missing, list(unmatched))


def _other_name(name: str, names: Mapping[str, StoredTensor]) -> str:
    candidates = find_tensor(name, names)
    return candidates[0] if len(candidates) == 1 else ""


def _check_none_missing(base: Checkpoint, tuned: Checkpoint, missing: Sequence[str], unmatched: Sequence[str]) -> None:
    hint = "is it the model that the other one was trained from?"
    if missing:
        raise SourceError(f"{base.label} has no {format_list(missing)}, but {tuned.label} has", hint=hint)
    if unmatched:
        raise SourceError(f"{tuned.label} has no {format_list(unmatched)}, but {base.label} has", hint=hint)


def _path(name: str, model: Checkpoint) -> str:
    """The tensor's path in a model with a head, also for checkpoints that were saved without its prefix."""
    prefix = HEADLESS_PREFIXES.get(str(model.config.get("model_type")), "")
    has_head = any(
        str(class_name).endswith(CLASSES_WITH_HEAD) for class_name in model.config.get("architectures") or ()
    )
    lacks_prefix = prefix and not any(tensor_name.startswith(f"{prefix}.") for tensor_name in model.tensors)
    needs_prefix = has_head and lacks_prefix and not is_head(name) and not name.startswith(prefix)
    return f"{prefix}.{name}" if needs_prefix else name


def _pair(
    name: str, base: StoredTensor, tuned: StoredTensor, model: Checkpoint, tensor_filter: TensorFilter
) -> TensorPair:
    module, _, parameter = name.rpartition(".")
    last = module.rpartition(".")[2]
    head, embedding = is_head(name), last in (*EMBEDDINGS, *POSITION_EMBEDDINGS)
    is_matrix = parameter == "weight" and len(tuned.info.shape) == 2 and tuned.info.numel > 0
    conv1d = model.config.get("model_type") in CONV1D_MODELS and not head and not embedding
    if not tensor_filter.includes(name):
        treatment = LEFT_OUT
    elif is_matrix and (head or embedding):
        by_option = {"lora": "factor", "save": "save", "skip": "left out by --embeddings skip"}
        treatment = by_option[tensor_filter.embeddings]
    elif is_matrix and last not in ROUTERS:
        treatment = "factor"
    elif parameter in ("weight", "bias"):
        treatment = (
            "save" if tensor_filter.save_rest else "not the weight of a linear layer; --save-rest saves it whole"
        )
    else:
        treatment = "a fused or unusual parameter, which a LoRA adapter cannot store"
    transposed = treatment == "factor" and (embedding or conv1d)
    return TensorPair(module, parameter, base, tuned, treatment, embedding and is_matrix, transposed)


def _check_shape(pair: TensorPair, base: Checkpoint, tuned: Checkpoint) -> None:
    for stored, label in ((pair.base, base.label), (pair.tuned, tuned.label)):
        if not stored.info.is_float and pair.treatment in ("factor", "save"):
            text = f"{label}: {stored.info.name} is quantized ({stored.info.dtype})"
            raise SourceError(text, hint="use the 16-bit versions of both models")
    if not pair.is_resized:
        return
    shapes = list(pair.base.info.shape), list(pair.tuned.info.shape)
    text = f"{pair.name} is {shapes[0]} in {base.label} and {shapes[1]} in {tuned.label}"
    is_resized_vocabulary = (pair.embedding or is_head(pair.name)) and shapes[0][1:] == shapes[1][1:]
    if not is_resized_vocabulary:
        raise SourceError(text, hint="the two models have different architectures")
    if pair.treatment != "save":
        raise SourceError(f"{text}: the vocabulary was resized", hint="use --embeddings save, which saves it whole")


def _is_tied(pair: TensorPair, base: Checkpoint) -> bool:
    tied = tied_head(base)
    return tied is not None and pair.base.info.name == tied[1]


def _tied_head_pair(pair: TensorPair, base: Checkpoint) -> TensorPair:
    """The tied head as a separate module: PEFT's merge unties modules that are saved whole."""
    tied = tied_head(base)
    assert tied is not None
    return TensorPair(tied[0].rpartition(".")[0], "weight", pair.base, pair.tuned, "save")
