"""Every mistake of a recipe at once, each with its line and column."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from mergeforge.core.messages import WarningText
from mergeforge.errors import Problem, RecipeError
from mergeforge.gguf.file_types import FILE_TYPES
from mergeforge.methods import METHODS
from mergeforge.recipe import ModelRef, read
from mergeforge.recipe.equivalents import METHOD_PARAMETERS
from mergeforge.recipe.yaml_reader import MAX_FILE_NBYTES

SLICED = "merge_method: linear\nslices: [{sources: "
GOOD = "merge_method: linear\nmodels:\n- {model: org/a, parameters: {weight: 1}}\n"


def problems_of(text: str | bytes, folder: Path) -> tuple[Problem, ...]:
    """The mistakes of a recipe file, in the order of the file."""
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        read(path, METHODS, gguf_types=FILE_TYPES)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    for problem in caught.value.problems:
        assert str(problem) in str(caught.value)
    return caught.value.problems


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = """\
merge_methd: ties
merge_method: tie
base_model: [org/base]
models:
  - model: org/a
    paramters: {weight: 0.5}
  - mdoel: org/b
  - model: org/c
    parameters: heavy
dtype: bfloat61
random_seed: -1
output: {pth: out, shard_size: large, safetensors: 1}
"""
    problems = problems_of(text, tmp_path)
    assert [(problem.line, problem.column, problem.message, problem.hint) for problem in problems] == [
        (1, 1, "unknown key 'merge_methd'", "did you mean 'merge_method'?"),
        (2, 1, "unknown merge method 'tie'", "did you mean 'ties'?"),
        (3, 1, "'base_model' must be a string, not a list", ""),
        (6, 5, "unknown key 'paramters'", "did you mean 'parameters'?"),
        (7, 5, "'models' needs the key 'model'", ""),
        (7, 5, "unknown key 'mdoel'", "did you mean 'model'?"),
        (9, 5, "'parameters' must be a mapping, not 'heavy'", "write 'name: value' lines under it"),
        (10, 1, "'dtype' cannot be 'bfloat61'", "did you mean 'bfloat16'?"),
        (11, 1, "'random_seed' must be a whole number of at least 0, not -1", ""),
        (12, 10, "unknown key 'pth'", "did you mean 'path'?"),
        (12, 20, "'shard_size': 'large' is not a size; write 5GB, 800MB or 2GiB", ""),
        (12, 39, "'safetensors' must be true or false, not 1", ""),
    ]


@pytest.mark.parametrize(
    ("text", "line", "column", "message", "hint"),
    [
        ("{}", 1, 1, "nothing to merge", "give models"),
        ("5", 1, 1, "the recipe must be a mapping, not 5", "key: value"),
        ("- a", 1, 1, "the recipe must be a mapping, not a list", ""),
        ("---\n", 2, 1, "the recipe must be a mapping, not null", ""),
        ("models: []\nmerge_method: linear", 1, 1, "'models' is an empty list", "- "),
        ("models: org/a\nmerge_method: linear", 1, 1, "'models' must be a list, not 'org/a'", "- "),
        ("models: [~]\nmerge_method: linear", 1, 10, "'models' must be a string, not null", ""),
        ("models: [{model: ~}]\nmerge_method: linear", 1, 10, "needs the key 'model'", ""),
        ("models: [{model: ''}]\nmerge_method: linear", 1, 11, "'model' must be a string, not ''", ""),
        ("models: [a, b]", 1, 1, "merge_method is missing", "nothing but adapters"),
        ("base_model: b\nadapters: [a]\nmerge_method: fild", 3, 1, "unknown merge method", "did you mean 'fold'?"),
        ("base_model: b\nadapters: [a]\nmerge_method: zzz", 3, 1, "unknown merge method 'zzz'", "known: "),
        ("merge_method: linear\nmodels: [m]\nadapters: [a]", 3, 1, "need a base_model", "trained on"),
        ("merge_method: ties\nmodels: [a]", 1, 1, "ties needs a base_model", "fine-tuned from"),
        ("merge_method: slerp\nmodels: [a]\nparameters: {t: 1}", 1, 1, "slerp needs a base_model", "one of the two"),
        (GOOD + "- {model: org/a, parameters: {weight: 1}}", 4, 3, "'org/a' is listed twice", "add up its weights"),
        (GOOD + "parameters: {normalise: true}", 4, 14, "linear has no parameter 'normalise'", "'normalize'?"),
        (GOOD + "parameters: {qqq: true}", 4, 14, "linear has no parameter 'qqq'", "linear takes: "),
        (GOOD + "- {model: b, parameters: {weight: true}}", 4, 27, "'weight' must be a number, not true", ""),
        (GOOD + "- {model: b, parameters: {weight: heavy}}", 4, 27, "must be a number, true or false, not 'heavy'", ""),
        (GOOD + "- {model: b, parameters: {weight: []}}", 4, 27, "'weight' is an empty list", "at least one"),
        (
            GOOD + "- {model: b, parameters: {weight: [1, []]}}",
            4,
            39,
            "must be a number, true or false, not a list",
            "",
        ),
        (GOOD + "- {model: b, parameters: {weight: [1, {value: 1}]}}", 4, 27, "mixes numbers and filters", ""),
        (GOOD + "- {model: b, parameters: {weight: {valeu: 1}}}", 4, 36, "unknown key 'valeu'", "'value'?"),
        (
            GOOD + "- {model: b, parameters: {weight: {filter: 3, value: 1}}}",
            4,
            36,
            "a filter must be a string, not 3",
            "",
        ),
        (GOOD + "- {model: b, parameters: {weight: [{value: []}]}}", 4, 37, "'weight' is an empty list", ""),
        (GOOD + "- {model: b, parameters: {weight: [{value: ~}]}}", 4, 37, "number, true or false, not null", ""),
        (GOOD + "- {model: b, parameters: {weight: .nan}}", 4, 27, "must be a finite number, not nan", ""),
        (GOOD + "- {model: b, parameters: {weight: -.inf}}", 4, 27, "must be a finite number, not -inf", ""),
        (GOOD + "- {model: b, parameters: {weight: 1e400}}", 4, 27, "must be a finite number, not inf", ""),
        (GOOD + f"- {{model: b, parameters: {{weight: 1{'0' * 400}}}}}", 4, 27, "must be a number", ""),
        (GOOD + "- {model: b, parameters: {weight: !!int x}}", 4, 35, "'x' is not a valid value for the tag", ""),
        (GOOD + "- {model: b, parameters: {weight: 0b_}}", 4, 35, "'0b_' is not a valid value for the tag", ""),
        (GOOD + f"- {{model: b, parameters: {{weight: {'9' * 5000}}}}}", 4, 35, "is not a valid value for the tag", ""),
        (GOOD + "parameters: {normalize: maybe}", 4, 14, "must be a number, true or false, not 'maybe'", ""),
        (GOOD + "parameters: {normalize: 2}", 4, 14, "'normalize' must be true or false, not 2", ""),
        (GOOD + "parameters: {normalize: 1, normalize: 2}", 4, 28, "duplicate key 'normalize'", ""),
        (GOOD + "merge_method: ties", 4, 1, "duplicate key 'merge_method'", ""),
        (GOOD + "? [a]\n: b", 4, 3, "a key must be a plain string", ""),
        (GOOD + "2026-01-01: b", 4, 1, "a key must be a plain string", ""),
        (GOOD + "<<: 5", 4, 5, "'<<' takes a mapping", ""),
        (GOOD + "name: !!python/object/apply:os.system ['touch PWNED']", 4, 7, "the tag tag:yaml.org,2002:python", ""),
        (GOOD + "name: !!python/name:os.system", 4, 7, "is not allowed", ""),
        (GOOD + "name: !!binary aGk=", 4, 7, "is not allowed", ""),
        (GOOD + "name: !!set {a}", 4, 7, "is not allowed", ""),
        (GOOD + "name: !mine {a: b}", 4, 7, "the tag !mine is not allowed", ""),
        (GOOD + "---\na: b", 5, 1, "unknown key 'a'", "known keys"),
        (
            GOOD + "---\n" + GOOD,
            1,
            1,
            "this document has no name",
            "only one document, the final result, may omit its name",
        ),
        ("name: x\n" + GOOD + "---\nname: x\n" + GOOD + "---\n" + GOOD, 6, 1, "two documents are named 'x'", ""),
        (
            "name: x\n" + GOOD + "output: {path: y}\n---\n" + GOOD,
            5,
            1,
            "only the final document may have an output",
            "",
        ),
        (GOOD + "a: [1, 2", 4, 9, "invalid YAML", ""),
        (GOOD + "a: &x [*x]", 4, 4, "an alias contains itself", ""),
        (GOOD + "a: &x {b: *x}", 4, 4, "an alias contains itself", ""),
        (GOOD + "a: *nowhere", 4, 4, "undefined alias", ""),
        (GOOD + 'a: "\\ud800"', 4, 4, "surrogate", ""),
        (GOOD + "a: " + "[" * 40 + "]" * 40, 4, 35, "nested more than 32 levels deep", ""),
        (GOOD + "a: " + "[" * 5000, 4, 35, "nested more than 32 levels deep", ""),
        (GOOD + "a: " + "{a: " * 5000, 4, 128, "nested more than 32 levels deep", ""),
        (GOOD + "slices: []", 4, 1, "'slices' is an empty list", ""),
        (
            GOOD + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
            4,
            1,
            "both models and slices",
            "one of them",
        ),
        (GOOD + "modules: {a: b}", 4, 11, "'a' must be a mapping, not 'b'", ""),
        (SLICED + "[{model: a}]", 2, 21, "'sources' needs the key 'layer_range'", ""),
        (SLICED + "[{model: a, layer_range: [8, 4]}]", 2, 32, "'layer_range' [8, 4] selects no layers", "[first layer"),
        (SLICED + "[{model: a, layer_range: [-1, 4]}]", 2, 32, "'layer_range' [-1, 4] selects no layers", ""),
        (SLICED + "[{model: a, layer_range: 4}]", 2, 32, "must be two whole numbers, not 4", ""),
        (SLICED + "[{model: a, layer_range: [0, 1.5]}]", 2, 32, "must be two whole numbers, not [0, 1.5]", ""),
        (
            SLICED + "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]",
            *(2, 11, "the sources of this slice have different numbers of layers: 2, 3", "same length"),
        ),
        (
            SLICED + "[{model: a, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]",
            *(2, 54, "'a' is listed twice", ""),
        ),
        (
            SLICED + "[{model: a, layer_range: [0, 2], parameters: {wieght: 1}}]",
            2,
            66,
            "no parameter 'wieght'",
            "weight",
        ),
        (
            GOOD + "- {model: b, adapters: [{adapter: c, weight: 1}], parameters: {weight: 1}}\nrules:\n"
            "- {match: x, models: [{model: b, adapters: [{adapter: c, weight: 2}]}]}",
            *(6, 23, "the adapters of 'b+c' have different weights here than above", ""),
        ),
        (GOOD + "rules: [{match: '('}]", 4, 10, "'(' is not a valid regular expression", "a literal dot"),
        (GOOD + "rules: [{match: a, use: base, drop: true}]", 4, 9, "a rule can have only one of use, drop", ""),
        (GOOD + "rules: [{match: a}]", 4, 9, "this rule changes nothing", ""),
        (
            GOOD + "rules: [{match: a, use: org/a, parameters: {weight: 1}}]",
            *(4, 9, "a rule with 'use' takes no parameters or models", ""),
        ),
        (GOOD + "rules: [{match: a, merge_method: tise}]", 4, 20, "unknown merge method 'tise'", "'ties'?"),
        (GOOD + "rules: [{match: a, merge_method: slerp}]", 4, 20, "slerp needs a base_model", ""),
        (GOOD + "rules: [{match: a, parameters: {tt: 1}}]", 4, 33, "linear has no parameter 'tt'", ""),
        (
            GOOD + "tokenizer: {source: union}\ntokenizer_source: base",
            5,
            1,
            "both tokenizer_source and tokenizer",
            "one of",
        ),
        (GOOD + "tokenizer: {pad_to_multiple_of: 0}", 4, 13, "must be a whole number of at least 1, not 0", ""),
        (GOOD + "tokenizer: {tokens: {x: {source: {kind: zreo}}}}", 4, 35, "'kind' cannot be 'zreo'", "'zero'?"),
        (
            GOOD + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            *(4, 26, "takes exactly one of token and token_id", ""),
        ),
        (GOOD + "tokenizer: {tokens: {x: {force: true}}}", 4, 22, "'force' needs a source", ""),
        (GOOD + "output: {gguf: [q9_0]}", 4, 17, "unknown GGUF type 'q9_0'", "did you mean 'q"),
        (GOOD + "output: {gguf: [q8_0, q8_0]}", 4, 23, "two GGUF files of type q8_0", "list each type once"),
        (GOOD + "output: {gguf: {pure: true}}", 4, 10, "'gguf' needs the key 'type'", ""),
        (GOOD + "output: {gguf: q8_0, gguf_from: bf16}", 4, 22, "'gguf_from' cannot be 'bf16'", "float32"),
        (GOOD + "output: {safetensors: false}", 4, 10, "nothing would be written", "output.gguf"),
        (GOOD + "output: {adapter: {rank: 8}}", 4, 10, "there are no adapters to combine", "extract-lora"),
        (GOOD + "output: {adapter: {rnak: 8}}", 4, 20, "unknown key 'rnak'", "'rank'?"),
        (GOOD + "output: {publish: {}}", 4, 10, "'publish' needs the key 'repo'", ""),
        (GOOD + "output: {safetensors: false}", 4, 10, "nothing would be written", ""),
        (GOOD + "output: {shard_size: 0}", 4, 10, "a size must be at least one byte", ""),
        (GOOD + "output: {path: 5}", 4, 10, "'path' must be a string, not 5", "quote it"),
        (GOOD + "random_seed: true", 4, 1, "'random_seed' must be a whole number of at least 0, not true", ""),
        (GOOD + "random_seed: 1.5", 4, 1, "'random_seed' must be a whole number", ""),
        ("base_model: +a\nadapters: [b]", 1, 1, "'+a' is not a model reference", "path[@revision][+adapter]"),
        ("base_model: b\nadapters: [a+c]", 2, 12, "'a+c' names more than one adapter", "separately"),
        ("base_model: b\nadapters: [{weight: 1}]", 2, 12, "'adapters' needs the key 'adapter'", ""),
        ("base_model: b\nadapters: [{adapter: a, weigth: 1}]", 2, 25, "unknown key 'weigth'", "'weight'?"),
        ("base_model: b\nadapters: [{adapter: a, weight: true}]", 2, 25, "'weight' must be a number, not true", ""),
        (
            "base_model: b\nadapters: [{adapter: a, weight: 1, parameters: {weight: 1}}]",
            *(2, 25, "'weight' is also among the parameters", "keep one"),
        ),
        (
            "base_model: b\nadapters: [{adapter: a, parameters: {weight: true}}]",
            2,
            38,
            "must be a number, not true",
            "",
        ),
        (GOOD + "- {model: b, weight: true}", 4, 14, "'weight' must be a number, not true", ""),
        (GOOD + "- {model: b, weight: 1, parameters: {weight: 1}}", 4, 14, "also among the parameters", "keep one"),
        (GOOD + "- {model: b, adapters: [{adapter: c, weight: true}], parameters: {weight: 1}}", 4, 38, "a number", ""),
        (
            GOOD + "- {model: b, adapters: [{adapter: c, parameters: {x: 1}}], parameters: {weight: 1}}",
            *(4, 38, "takes only a weight", "top-level 'adapters'"),
        ),
    ],
)
def test_single_mistake_has_line_column_and_hint(
    tmp_path: Path, text: str, line: int, column: int, message: str, hint: str
) -> None:
    text = text + "}]" if text.startswith(SLICED) else text
    problems = problems_of(text, tmp_path)
    matching = [problem for problem in problems if message in problem.message]
    assert matching, f"not reported; instead: {list(map(str, problems))}"
    assert (matching[0].line, matching[0].column) == (line, column)
    assert hint in matching[0].hint


PLACED = """\
merge_method: {method}
base_model: org/base
models:
  - {{model: org/a, parameters: {{{first}}}}}
  - {{model: org/b, {second}}}
parameters: {{{shared}}}
"""


@pytest.mark.parametrize(
    ("method", "first", "second", "shared", "warning"),
    [
        (
            *("sce", "weight: 1", "weight: 2", ""),
            "'weight' has no effect: sce takes only select_topk, int8_mask (models.0.parameters.weight in line 4, "
            "models.1.weight in line 5)",
        ),
        *(
            (method, "weight: 1", "", "", f"'weight' has no effect: {method} takes only ")
            for method in ("ram", "ramplus_tl", "model_stock", "karcher")
        ),
        (
            *("linear", "weight: 1, density: 5", "weight: 1", ""),
            "'density' has no effect: linear takes only weight, normalize (models.0.parameters.density in line 4)",
        ),
        (
            *("linear", "weight: 1", "weight: 1", "embed_slerp: true"),
            "'embed_slerp' has no effect: linear takes only weight, normalize (parameters.embed_slerp in line 6)",
        ),
        ("sce", "", "", "normalize: true", "'normalize' has no effect: sce takes only "),
        (
            *("task_arithmetic", "weight: 1, lambda: 1", "weight: 1", ""),
            "'lambda' of a single input has no effect: in task_arithmetic it is one value for the whole merge, in the "
            "top-level 'parameters' (models.0.parameters.lambda in line 4)",
        ),
        *(
            (method, "weight: 1", "", "t: 1", f"'weight' has no effect: {method} takes only ")
            for method in ("slerp", "nearswap")
        ),
        ("arcee_fusion", "weight: 1", "", "", "'weight' has no effect: arcee_fusion takes no parameters"),
    ],
)
def test_a_parameter_without_effect_is_a_warning_that_names_its_place(
    tmp_path: Path, method: str, first: str, second: str, shared: str, warning: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(PLACED.format(method=method, first=first, second=second, shared=shared))
    (found,) = read(path, METHODS).notes
    assert isinstance(found, WarningText)
    assert found.startswith(warning)


def test_parameters_of_the_base_model_among_the_models_are_a_warning() -> None:
    models = [{"model": "b", "parameters": {"weight": 1}}, {"model": "a", "parameters": {"weight": 1}}]
    ties = read({"merge_method": "ties", "base_model": "b", "models": models}, METHODS)
    assert ties.notes == (
        "'weight' of the base model has no effect: ties takes it for the other models (models.0.parameters.weight)",
    )
    assert not read({"merge_method": "linear", "base_model": "b", "models": models}, METHODS).notes


def test_keys_that_mergekit_reads_and_never_uses_are_warnings() -> None:
    model = {"model": {"path": "a"}, "override_architecture": "LlamaForCausalLM"}
    slices = [{"sources": [{"model": model, "layer_range": [0, 2]}], "residual_weight": 0.5}]
    warnings = read({"merge_method": "passthrough", "slices": slices}, METHODS).notes
    assert [warning.split(":")[0] for warning in warnings] == [
        "'override_architecture' has no effect",
        "'residual_weight' has no effect",
    ]


def test_weight_and_density_may_stand_on_an_entry_or_among_its_parameters() -> None:
    weight, density = 0.4, [0.5, 1]
    forms: list[dict[str, Any]] = [
        {"weight": weight, "density": density},
        {"parameters": {"weight": weight, "density": density}},
        {"weight": weight, "parameters": {"density": density}},
    ]
    for form in forms:
        recipe = read({"merge_method": "ties", "base_model": "b", "models": [{"model": "a", **form}]}, METHODS)
        assert recipe.models[0].parameters == {"weight": weight, "density": density}
        recipe = read({"merge_method": "ties", "base_model": "b", "adapters": [{"adapter": "a", **form}]}, METHODS)
        assert (recipe.adapters[0].weight, recipe.adapters[0].parameters) == (weight, {"density": density})


@pytest.mark.parametrize(
    ("recipe", "key", "hint"),
    [
        ("modles: [a]", "modles", "did you mean 'models'?"),
        ("path: out", "path", "did you mean 'output: {path: ...}'?"),
        ("shard_size: 5GB", "shard_size", "did you mean 'output: {shard_size: ...}'?"),
        ("loras: [a]", "loras", "did you mean 'adapters'?"),
        ("quantize: q4_k_m", "quantize", "did you mean 'output: {gguf: ...}'?"),
        ("t: 0.5", "t", "did you mean 'parameters: {t: ...}'?"),
        ("seed: 1", "seed", "did you mean 'random_seed'?"),
        ("adapters: [{adapter: a, scale: 1}]", "scale", "did you mean 'weight'?"),
        ("adapters: [{path: a}]", "path", "did you mean 'adapter'?"),
        ("base_model: a\nzzzz: 1", "zzzz", "known keys: "),
    ],
)
def test_only_near_spellings_and_known_equivalents_are_suggested(
    tmp_path: Path, recipe: str, key: str, hint: str
) -> None:
    problems = [problem for problem in problems_of(recipe, tmp_path) if problem.message == f"unknown key '{key}'"]
    assert [problem.hint[: len(hint)] for problem in problems] == [hint]


def test_every_parameter_of_a_method_is_placed_by_the_hint_of_an_unknown_key() -> None:
    used = {name for method in METHODS for name in METHODS[method].parameters}
    assert used <= set(METHOD_PARAMETERS)


def test_known_keys_are_listed_once(tmp_path: Path) -> None:
    problems = problems_of("zzz: 1\nyyy: 2\nxxx: 3\n", tmp_path)
    assert [bool(problem.hint) for problem in problems if "unknown key" in problem.message] == [True, False, False]


def test_a_mixture_of_experts_config_is_named() -> None:
    with pytest.raises(RecipeError, match="mixture of experts") as caught:
        read({"base_model": "b", "gate_mode": "hidden", "experts": [{"source_model": "a"}]}, METHODS)
    assert "mergeforge moe" in caught.value.hint
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("density", ["0", "-0.1", "1.5", "[0.5, 0]", "{filter: mlp, value: 2}", ".nan"])
def test_density_must_be_in_0_to_1(tmp_path: Path, density: str) -> None:
    start = "merge_method: ties\nbase_model: b\nmodels:\n- {model: a, parameters: {weight: 1, density: "
    problems = problems_of(start + density + "}}", tmp_path)
    assert [(problem.line, problem.message.split(", not")[0]) for problem in problems] == [
        (4, "'density' must be in (0, 1]")
    ]
    (tmp_path / "good.yaml").write_text(start + "1}}")
    read(tmp_path / "good.yaml", METHODS)


@pytest.mark.parametrize("code", ["0b_", "0x_", "1:", "!!bool maybe", "!!float x", "!!timestamp x", "="])
def test_odd_scalars_are_reported_as_mistakes(tmp_path: Path, code: str) -> None:
    problems_of(GOOD + f"dtype: {code}", tmp_path)


@pytest.mark.parametrize(
    "text", ['a: "\\UFFFFFFFF"', "%YAML " + "1" * 5000 + ".1\n---\na: b", "a: \x07", "\ufeff\ufeffa"]
)
def test_text_that_breaks_pyyaml_is_reported(tmp_path: Path, text: str) -> None:
    problems_of(text, tmp_path)


def test_alias_bomb_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    started = time.monotonic()
    (problem,) = problems_of("\n".join(lines), tmp_path)
    assert "more than 100,000 values once aliases are expanded" in problem.message
    assert problem.line
    assert time.monotonic() - started < 10


def test_files_that_are_not_recipes(tmp_path: Path) -> None:
    for content, message in (
        (b"", "is empty"),
        (b"# a comment\n", "is empty"),
        (b"merge_method: \xff\xfe", "is not UTF-8"),
        (GOOD.encode("utf-16"), "is not UTF-8"),
        (b"#" * (MAX_FILE_NBYTES + 1), "is larger than 1 MiB"),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            read(path, METHODS)
    for path, message in (
        (tmp_path / "missing.yaml", "there is no recipe"),
        (tmp_path, "is a folder"),
        (tmp_path / "recipe.yaml" / "x", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (Path("/dev/zero"), "is larger than 1 MiB"),
    ):
        with pytest.raises(RecipeError, match=message):
            read(path, METHODS)
    (tmp_path / "recipe.yaml").write_text("# " + "x" * (MAX_FILE_NBYTES - len(GOOD) - 3) + "\n" + GOOD)
    read(tmp_path / "recipe.yaml", METHODS)


def test_exponent_without_a_dot_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as a string."""
    (tmp_path / "recipe.yaml").write_text(GOOD.replace("weight: 1", "weight: [1e-5, {0}]".replace("{0}", "2E3")))
    (model,) = read(tmp_path / "recipe.yaml", METHODS).models
    assert model.parameters["weight"] == [1e-5, 2000.0]


def test_merge_keys(tmp_path: Path) -> None:
    text = """\
merge_method: ties
base_model: b
models:
- &first {model: a, parameters: &own {weight: 1, density: 0.5}}
- {<<: *first, model: c}
- model: d
  parameters: {<<: [{weight: 3}, *own], density: 0.25}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    models = read(tmp_path / "recipe.yaml", METHODS).models
    assert [str(model) for model in models] == ["a", "c", "d"]
    assert [dict(model.parameters) for model in models] == [
        {"weight": 1, "density": 0.5},
        {"weight": 1, "density": 0.5},
        {"weight": 3, "density": 0.25},
    ]


# --- from Python


def test_dict_with_python_and_numpy_types(tmp_path: Path) -> None:
    value: dict[str, Any] = {
        "base_model": tmp_path / "base",
        "adapters": ({"adapter": "a", "weight": numpy.float32(0.5)}, {"adapter": "b", "weight": numpy.int64(2)}),
        "random_seed": numpy.uint8(3),
        "parameters": {"normalize": numpy.bool_(True)},
    }
    recipe = read({**value, "parameters": {"normalize": True}}, METHODS)
    assert [adapter.weight for adapter in recipe.adapters] == [0.5, 2]
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert read(tmp_path / "recipe.yaml", METHODS) == recipe


def test_mistakes_in_a_dict_have_no_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        read({1: 2, "merge_method": "ties"}, METHODS)
    assert [(problem.line, problem.message) for problem in caught.value.problems] == [
        (0, "nothing to merge"),
        (0, "ties needs a base_model"),
        (0, "unknown key '1'"),
    ]


# --- --set


def test_overrides(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    sets = (
        "models.0.parameters.weight=1e-3",
        "parameters.normalize=false",
        "output.path=a b=c",
        "output.shard_size=2GB",
        "dtype=float16",
        "models.0.model=org/z@v1",
        "random_seed=7",
    )
    recipe = read(tmp_path / "recipe.yaml", METHODS, sets)
    assert recipe.models[0].model == ModelRef("org/z", "v1")
    assert recipe.models[0].parameters == {"weight": 1e-3}
    assert recipe.parameters == {"normalize": False}
    assert (recipe.output.path, recipe.output.shard_size) == ("a b=c", 2 * 10**9)
    assert (recipe.dtype, recipe.random_seed) == ("float16", 7)
    whole = read(tmp_path / "recipe.yaml", METHODS, ("models=[{model: x, parameters: {weight: [1, 2]}}]",))
    assert whole.models[0].parameters == {"weight": [1, 2]}


def test_overrides_reach_into_short_forms() -> None:
    source = {"base_model": "org/base", "adapters": ["a", "b"], "output": {"path": "o", "gguf": "q4_k_m"}}
    sets = ("adapters.1.weight=0.4", "base_model.model.revision=v1", "output.gguf.0.pure=true")
    recipe = read(source, METHODS, sets, FILE_TYPES)
    assert [(str(entry.adapter), entry.weight) for entry in recipe.adapters] == [("a", 1.0), ("b", 0.4)]
    assert str(recipe.base_model) == "org/base@v1"
    assert (recipe.output.gguf[0].type, recipe.output.gguf[0].pure) == ("q4_k_m", True)


def test_an_override_of_a_weight_replaces_the_one_among_the_parameters() -> None:
    source = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    assert read(source, METHODS, ("models.0.weight=0.5",)).models[0].parameters == {"weight": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dtype", "write PATH=VALUE"),
        ("=3", "write PATH=VALUE"),
        ("models.1.model=x", "'1' is not an item of a list of 1"),
        ("models.-1.model=x", "'-1' is not an item"),
        ("models.\u00b2.model=x", "is not an item"),
        ("models.x=1", "'x' is not an item of a list of 1"),
        ("merge_method.x=1", "'x' is inside 'linear', which is not a mapping"),
        ("dtype=bfloat61", "did you mean 'bfloat16'"),
        ("dtpye=bfloat16", "unknown key 'dtpye'"),
        ("a..b=1", "unknown key 'a'"),
        ("random_seed=[1", "invalid YAML"),
        ("random_seed=!!python/none x", "is not allowed"),
        ("random_seed=", "must be a whole number of at least 0, not ''"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        read(tmp_path / "recipe.yaml", METHODS, (override,))


# --- references


@pytest.mark.parametrize(
    ("written", "model", "adapters"),
    [
        ("org/a", ("org/a", None), []),
        ("org/a@main", ("org/a", "main"), []),
        ("org/a@v1+org/b", ("org/a", "v1"), [("org/b", None)]),
        ("org/a+org/b@v2+./c", ("org/a", None), [("org/b", "v2"), ("./c", None)]),
        ("org/a + org/b", ("org/a", None), [("org/b", None)]),
        ("./x@1", ("./x", "1"), []),
        ("./here@2+1", ("./here@2+1", None), []),
        ("./near+./here@2+1", ("./near", None), [("./here", "2"), ("1", None)]),
        ("~nobody-of-that-name/x", ("~nobody-of-that-name/x", None), []),
        ("x" * 5000, ("x" * 5000, None), []),
    ],
)
def test_model_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, model: tuple[str, str | None], adapters: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here@2+1").mkdir()
    recipe = read({"merge_method": "linear", "models": [{"model": written, "parameters": {"weight": 1}}]}, METHODS)
    assert recipe.models[0].model == ModelRef(*model)
    assert [one.adapter for one in recipe.models[0].adapters] == [ModelRef(*one) for one in adapters]


def test_mergekit_long_form_of_a_reference() -> None:
    long = {"model": {"path": "org/a", "revision": "v1"}, "lora": {"path": "org/l", "revision": "v2"}}
    recipe = read({"merge_method": "linear", "models": [{"model": long, "parameters": {"weight": 1}}]}, METHODS)
    assert recipe.models[0].model == ModelRef("org/a", "v1")
    assert recipe.models[0].adapters[0].adapter == ModelRef("org/l", "v2")


# --- speed


def test_recipe_errors_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("merge_method: tis\nmodels: [a]\n")
    code = """
import sys
from mergeforge.errors import RecipeError
from mergeforge.methods import METHODS
from mergeforge.recipe import json_schema, read
try:
    read(sys.argv[1], METHODS)
except RecipeError as error:
    assert "did you mean 'ties'" in str(error), error
else:
    raise SystemExit("it was accepted")
json_schema()
heavy = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "recipe.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
