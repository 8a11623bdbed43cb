"""train.yaml: the values it takes, and the errors for mistakes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergeforge.errors import RecipeError
from mergeforge.train.keys import json_schema
from mergeforge.train.settings import read

MISTAKES = [
    ("model: m\ndata: d\nlr: fast", "line 3, column 1: 'lr' must be a number of at least 0, not 'fast'"),
    ("model: m\ndata: d\nlora: {rank: 8}", "line 3, column 8: unknown key 'rank'"),
    ("model: m", "needs the key 'data'"),
    ("model: m\ndata: d\nmethod: full\nlora: {r: 8}", "line 4, column 1: full training has no adapter"),
    ("model: m\ndata: d\nlora: {init: pissa}", "pissa needs the base in 16 bit"),
    ("model: m\ndata: d\nearly_stop: {patience: 2}", "early_stop needs validation data"),
    ("model: m\ndata: d\nwarmup: 1.5", "'warmup' must be a fraction below 1 or a whole number of steps"),
    ("model: m\ndata: d\noptimizer: adam", "'optimizer' cannot be 'adam'"),
    ("model: m\ndata: d\nval: 2.5", "'val' cannot be 2.5"),
    ("model: m\ndata: d\nmethod: full\nafter: {merge: true}", "there is nothing to merge"),
    ("model: m\ndata: d\nloop: simple\ntrack: [tensorboard]", "the simple loop writes metrics.jsonl only"),
    ("model: m\ndata: d\n---\nmodel: n\ndata: d", "more than one YAML document"),
    ("model: m\ndata: d\nlearning_rate: 1\nlr: 2", "line 3, column 1: 'learning_rate' repeats 'lr'"),
    ("model: m\ndata: d\nadapter: lora\nmethod: full", "line 3, column 1: 'adapter' repeats 'method'"),
    ("model: m\ndata: d\nadapter: {type: lora}", "line 3, column 11: 'adapter' is for kinds besides LoRA"),
    ("model: m\ndata: d\nload_in_4bit: true", "'load_in_4bit' is a key of another trainer"),
    ("model: m\ndata: d\ngradient_accumulation_steps: 4", "needs micro_batch_size"),
    ("model: m\ndata: d\nlora_r: zero", "line 3, column 1: 'r' must be"),
    ("model: m\ndata: d\nlora: 3\nlora_r: 4", "line 3, column 1: 'lora' must be a mapping"),
    ("model: m\ndata: d\nval: 4\neval_steps: 0.1", "line 4, column 1: 'eval_steps' below 1 is a fraction of the run"),
    ("model: m\ndata: d\nval: 4\nearly_stop: {threshold: 1}", "'early_stop' needs the key 'patience'"),
    ("model: m\ndata: d\nseed: 4294967296", "line 3, column 1: 'seed' must be below 4294967296"),
    ("model: m\ndata: d\nlora: {targets: 'q_proj('}", "line 3, column 8: 'q_proj(' is not a valid regular expression"),
    ("model: m\ndata: d\nmicro_batch_size: 2\ngradient_accumulation_steps: true", "needs micro_batch_size"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_are_reported_with_line_and_column(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        read(path)
    assert message in str(error.value)


def test_auto_is_none_and_other_keys_have_defaults(tmp_path: Path) -> None:
    settings = read({"model": "m", "data": ["a.jsonl", {"path": "b.csv"}], "lr": "auto", "lora": {"r": "auto"}})
    assert settings.lr is None and settings.lora.r is None
    assert settings.method == "qlora" and settings.batch_size == 16
    assert [source.path for source in settings.data.sources] == ["a.jsonl", "b.csv"]


def test_overrides_are_typed() -> None:
    settings = read({"model": "m", "data": "d"}, ("lora.r=8", "lr=1e-3", "after.gguf=[q8_0]", "output=x"))
    assert (settings.lora.r, settings.lr) == (8, 1e-3)
    assert (settings.after.gguf, settings.output) == (("q8_0",), Path("x"))
    assert settings.after.merge is not None  # GGUF needs a merged model


def test_the_fingerprint_covers_what_determines_the_weights() -> None:
    plain = {"model": "m", "data": "d"}
    elsewhere = plain | {"output": "elsewhere", "after": {"gguf": "q8_0"}, "epochs": 5}
    assert read(plain).fingerprint == read(elsewhere).fingerprint != read(plain | {"seed": 1}).fingerprint


def test_dora_is_lora_with_a_flag() -> None:
    settings = read({"model": "m", "data": "d", "method": "dora", "lora": {"r": 8}})
    assert settings.lora.dora and settings.lora.r == 8


def test_every_key_is_in_the_schema_and_in_the_settings() -> None:
    keys: dict[str, Any] = json_schema()["properties"]
    fields = {*read({"model": "m", "data": "d"}).__dataclass_fields__}
    named_otherwise = {"tokens", "batch", "val", "template", "system", "loss_on", "too_long"}
    assert set(keys) - named_otherwise <= fields


def test_keys_of_other_trainers_are_read_as_ours(tmp_path: Path) -> None:
    """transformers', PEFT's and axolotl's names give the settings of train.yaml's own names."""
    theirs = {"base_model": "m", "dataset": "d.jsonl", "learning_rate": 1e-4, "num_train_epochs": 2, "lora_r": 8}
    theirs |= {"lora_alpha": 16, "micro_batch_size": 2, "gradient_accumulation_steps": 8, "sample_packing": True}
    theirs |= {"sequence_len": 512, "optim": "adamw_torch", "lr_scheduler_type": "cosine", "output_dir": "out"}
    ours = {"model": "m", "data": "d.jsonl", "lr": 1e-4, "epochs": 2, "lora": {"r": 8, "alpha": 16}, "pack": True}
    ours |= {"batch": {"micro": 2, "size": 16}, "seq_len": 512, "optimizer": "adamw", "schedule": "cosine"}
    ours |= {"output": "out"}
    assert read(theirs) == read(ours)
    assert read(ours | {"adapter": "lora"}) == read(ours | {"method": "lora"}) == read(ours, ["adapter=lora"])
    assert read(ours, ["learning_rate=0.5", "lora_r=2"]) == read(ours, ["lr=0.5", "lora.r=2"])
    assert read(ours | {"report_to": "none"}).track == read(ours, ["report_to=none"]).track == ()
    with pytest.raises(RecipeError, match="'load_in_4bit' is a key of another trainer"):
        read(ours, ["load_in_4bit=true"])
