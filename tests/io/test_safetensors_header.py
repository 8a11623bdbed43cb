"""Headers of safetensors files: what is refused, what is unusual but valid, and fuzzed headers."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from mergeforge.checkpoints.checkpoint import open_checkpoint
from mergeforge.core.tensor_info import DTYPES
from mergeforge.errors import SourceError
from mergeforge.execute import executor
from mergeforge.io.safetensors_header import MAX_HEADER_NBYTES, read_header
from mergeforge.planner import make_plan

F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def file_of(path: Path, header: dict[str, Any] | bytes, data: bytes = bytes(16), length: int | None = None) -> Path:
    """Write a file with the given header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def opens(path: Path) -> bool:
    """Whether safetensors' own parser accepts the file."""
    try:
        with safe_open(path, "numpy") as file:
            file.keys()
    except (SafetensorError, OSError):
        return False
    return True


def refused(path: Path, *words: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_header(path)
    assert caught.value.exit_code == 3
    for word in (path.name, *words):
        assert word in str(caught.value)


def test_names_a_git_lfs_pointer(tmp_path: Path) -> None:
    """`git clone` without Git LFS leaves a few lines of text in place of each weight file."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4400000000\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    refused(tmp_path / "model.safetensors", "Git LFS pointer")


@pytest.mark.parametrize("metadata", [{}, None, {"format": "pt"}])
def test_reads_every_metadata_that_safetensors_reads(tmp_path: Path, metadata: Any) -> None:
    path = file_of(tmp_path / "model.safetensors", {"__metadata__": metadata, "x": F32})
    assert opens(path) and read_header(path).metadata == (metadata or {})


SHARDS = ("first.safetensors", "second.safetensors")


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (SHARDS, "model.safetensors.index.json"),
        (SHARDS, "diffusion_pytorch_model.safetensors.index.json"),
        (("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"), None),
        (("x.safetensors",), None),
    ],
)
def test_reads_weights_that_are_named_otherwise(tmp_path: Path, names: tuple[str, ...], index: str | None) -> None:
    for name in names:
        file_of(tmp_path / name, {name: F32})
    if index:
        (tmp_path / index).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    assert set(open_checkpoint(tmp_path, "x").tensors) == set(names)


def test_refuses_to_guess_among_several_files(tmp_path: Path) -> None:
    for name in ("x-00001-of-00003.safetensors", "x-00002-of-00003.safetensors"):
        file_of(tmp_path / name, {name: F32})
    with pytest.raises(SourceError, match="x-00001-of-00003"):
        open_checkpoint(tmp_path, "x")


# --- C1: lengths


@pytest.mark.parametrize("content", [b"", b"\x01", bytes(7)])
def test_refuses_a_truncated_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, "ends within its header")


@pytest.mark.parametrize("length", [0, 200, MAX_HEADER_NBYTES + 1, (1 << 63), (1 << 64) - 1])
def test_refuses_impossible_header_lengths(tmp_path: Path, length: int) -> None:
    path = file_of(tmp_path / "x.safetensors", {"a": F32}, length=length)
    refused(path)
    assert not opens(path)


# --- C2, C3, C4, C6, C7, C9: broken rules, each with the tensor's name

BROKEN: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "data one byte short": ({"a": entry(0, 20)}, "truncated|should have"),
    "one byte after the data": ({"a": entry(0, 15, [15], "U8")}, "should have"),
    "no tensor for the data": ({}, "should have"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 16)}, "'b'|gap"),
    "hole at the start": ({"a": entry(4, 16)}, "'a'|gap"),
    "overlap": ({"a": entry(0, 12), "b": entry(8, 16)}, "'b'|overlaps"),
    "same range twice": ({"a": entry(0, 16), "b": entry(0, 16)}, "'b'|overlaps"),
    "begins after its end": ({"a": entry(16, 0, [4])}, "'a'"),
    "negative": ({"a": entry(-16, 0, [4])}, "'a'|whole numbers"),
    "past the end": ({"a": entry(0, 1 << 40)}, "should have"),
    "shape too small": ({"a": entry(0, 16, [3])}, "'a'|takes 12 bytes"),
    "shape too large": ({"a": entry(0, 16, [2, 3])}, "'a'|takes 24 bytes"),
    "product overflows": ({"a": entry(0, 16, [1 << 40, 1 << 40])}, "'a'"),
    "product overflows to zero": ({"a": entry(0, 16), "b": entry(16, 16, [1 << 40, 1 << 40, 0])}, "'b'"),
    "huge dimension": ({"a": entry(0, 16, [1 << 50, 0])}, "'a'"),
    "negative dimension": ({"a": entry(0, 16, [-4])}, "'a'"),
    "two negative dimensions": ({"a": entry(0, 16, [-2, -2])}, "'a'"),
    "dimension with a dot": ({"a": entry(0, 16, [4.0])}, "'a'"),
    "dimension that is a flag": ({"a": entry(0, 4, [True]), "b": entry(4, 16)}, "'a'"),
    "dimension that is text": ({"a": entry(0, 16, ["4"])}, "'a'"),
    "shape that is no list": ({"a": {**F32, "shape": 4}}, "'a'"),
    "offset that is text": ({"a": {**F32, "data_offsets": ["0", "16"]}}, "'a'"),
    "offset that is a flag": ({"a": {**F32, "data_offsets": [False, 16]}}, "'a'"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 16, 16]}}, "'a'"),
    "offsets that are an object": ({"a": {**F32, "data_offsets": {"0": 1, "16": 2}}}, "'a'"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, "'a'|dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 16]}}, "'a'|shape"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, "'a'|data_offsets"),
    "unknown dtype": ({"a": {**F32, "dtype": "F31"}}, "'a'|F31"),
    "dtype in lower case": ({"a": {**F32, "dtype": "f32"}}, "'a'|f32"),
    "dtype that is a number": ({"a": {**F32, "dtype": 32}}, "'a'"),
    "half a byte": ({"a": entry(0, 16, [33], "F4")}, "'a'"),
    "entry that is null": ({"a": None}, "'a'"),
    "entry that is text": ({"a": "F32"}, "'a'"),
    "entry that is a list": ({"a": [1, 2, 3]}, "'a'"),
    "name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), "duplicate key 'a'"),
    "key of an entry twice": (
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "duplicate key 'dtype'",
    ),
    "not UTF-8": (b'{"\xff":%b}' % json.dumps(F32).encode(), "not JSON"),
    "half of a surrogate pair": (b'{"\\ud800":%b}' % json.dumps(F32).encode(), "not JSON"),
    "surrogate in an extra field": (
        b'{"a":{"x":"\\udfff","dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        "not JSON",
    ),
    "NUL bytes at the end": (json.dumps({"a": F32}).encode() + bytes(8), "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "a number": (b"17", "not a JSON object"),
    "cut off": (json.dumps({"a": F32}).encode()[:-2], "not JSON"),
    "not a number": (b'{"a":{"x":NaN,"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "not JSON"),
    "infinity": (b'{"a":{"x":-Infinity,"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "not JSON"),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON"),
    "a number of 5000 digits": (b'{"a":' + b"1" * 5000 + b"}", "not JSON"),
    "leading space": (b" " + json.dumps({"a": F32}).encode(), "not a JSON object"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps({"a": F32}).encode(), "not a JSON object"),
    "metadata that is no object": ({"__metadata__": ["pt"], "a": F32}, "__metadata__"),
    "metadata with a number": ({"__metadata__": {"format": 1}, "a": F32}, "__metadata__"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{},"a":%b}' % json.dumps(F32).encode(), "duplicate key"),
}
STRICTER = {"name twice", "leading space", "key of an entry twice"}  # safetensors 0.8 lets some of these pass


@pytest.mark.parametrize("what", BROKEN)
def test_refuses_files_that_break_a_rule(tmp_path: Path, what: str) -> None:
    header, words = BROKEN[what]
    path = file_of(tmp_path / "x.safetensors", header)
    refused(path, words.split("|")[0] if words[0] == "'" else "")
    with pytest.raises(SourceError, match="|".join(words.split("|"))):
        read_header(path)
    assert what in STRICTER or not opens(path)


def test_finds_a_duplicate_among_many_names_quickly(tmp_path: Path) -> None:
    names = [f'"t{at}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for at in range(100_000)]
    path = file_of(tmp_path / "x.safetensors", f"{{{','.join([*names, names[-1]])}}}".encode(), b"")
    refused(path, "duplicate key 't99999'")


# --- C5, C8, C10, C11, C12: odd, and fine

FINE: dict[str, dict[str, Any] | bytes] = {
    "no tensors": {},
    "metadata only": {"__metadata__": {"format": "pt"}},
    "0-d": {"a": entry(0, 4, []), "b": entry(4, 16)},
    "zero-size": {"a": entry(0, 0, [0, 7]), "b": entry(0, 16), "c": entry(16, 16, [7, 0])},
    "zero-size in the middle": {"a": entry(0, 8), "z": entry(8, 8, [0]), "b": entry(8, 16)},
    "not in the order of the file": {"b": entry(8, 16), "a": entry(0, 8)},
    "odd alignment": {"a": entry(0, 1, [1], "U8"), "b": entry(1, 13), "c": entry(13, 16, [3], "I8")},
    "four-bit": {"a": entry(0, 16, [4, 8], "F4")},
    "six-bit": {"a": entry(0, 12, [16], "F6_E3M2"), "b": entry(12, 15, [4], "F6_E2M3"), "c": entry(15, 16, [1], "U8")},
    "odd names": {
        name: entry(at * 4, at * 4 + 4) for at, name in enumerate(("", "a\0b", "../../etc/passwd", "\u202ex"))
    },
    "an extra field": {"a": {**F32, "extra": {"x": [1, None]}}},
    "spaces at the end": json.dumps({"a": F32}).encode() + b"   ",
    "escaped names": b'{"\\u0061\\ud83d\\ude00":%b}' % json.dumps(F32).encode(),
}


@pytest.mark.parametrize("what", FINE)
def test_accepts_unusual_valid_files(tmp_path: Path, what: str) -> None:
    header = FINE[what]
    empty = isinstance(header, dict) and not any(key != "__metadata__" for key in header)
    path = file_of(tmp_path / "x.safetensors", header, b"" if empty else bytes(16))
    found = read_header(path)
    assert opens(path)
    for name, (info, offset) in found.tensors.items():
        assert 0 <= offset <= offset + info.nbytes <= path.stat().st_size, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_every_dtype(tmp_path: Path, dtype: str) -> None:
    path = file_of(tmp_path / "x.safetensors", {"a": entry(0, 48, [48 * 8 // DTYPES[dtype][0]], dtype)}, bytes(48))
    assert read_header(path).tensors["a"][0].nbytes == 48
    assert opens(path)


# --- C10, C11, C12 through a whole merge


@pytest.mark.parametrize("shard_size", ["5GB", "100"])
def test_copies_unmerged_tensors_byte_for_byte(models: Path, tmp_path: Path, shard_size: str) -> None:
    """A base with tensors of every dtype next to the weights, at odd offsets, with arbitrary bytes."""
    weights = models / "base" / "model.safetensors"
    header = read_header(weights)
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    data, entries, expected = b"\xaa", {"odd.u8": entry(0, 1, [1], "U8")}, {"odd.u8": b"\xaa"}
    for dtype in DTYPES:
        raw = os.urandom(48)
        for name, shape, nbytes in (("flat", [48 * 8 // DTYPES[dtype][0]], 48), ("empty", [0, 7], 0)):
            entries[f"odd.{dtype}.{name}"] = entry(len(data), len(data) + nbytes, shape, dtype)
            expected[f"odd.{dtype}.{name}"] = raw[:nbytes]
            data += raw[:nbytes]
    entries["odd.scalar"] = entry(len(data), len(data) + 4, [])
    expected["odd.scalar"] = b"\x00\x00\xc0\x7f"
    data += b"\x00\x00\xc0\x7f"
    for name, (info, offset) in header.tensors.items():
        entries[name] = entry(len(data), len(data) + info.nbytes, list(info.shape), info.dtype)
        data += content[offset : offset + info.nbytes]
    assert start
    file_of(weights, entries, data)
    recipe = {"base_model": "base", "adapters": ["adapters/loan"], "output": {"shard_size": shard_size}}
    plan = make_plan(recipe, out=tmp_path / "out")
    executor.run_plan(plan)
    merged = open_checkpoint(tmp_path / "out", "out").tensors
    assert merged.keys() == entries.keys()
    for name, raw in expected.items():
        found = merged[name]
        assert (found.info.dtype, list(found.info.shape)) == (entries[name]["dtype"], entries[name]["shape"])
        with open(found.file.path, "rb") as file:
            file.seek(found.offset)
            assert file.read(found.info.nbytes) == raw, name
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert opens(path)


# --- C14, C15: the index


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards and their index."""
    for at, name in enumerate("ab"):
        file_of(tmp_path / f"model-{at + 1:05d}-of-00002.safetensors", {name: F32})
    return tmp_path


def index_of(folder: Path, weight_map: Any, **more: Any) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map, **more})
    (folder / "model.safetensors.index.json").write_text(text)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_reads_an_index(sharded: Path) -> None:
    index_of(sharded, {"a": ONE, "b": TWO}, extra=[1])
    assert open_checkpoint(sharded, "x").tensors.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": ONE, "b": "gone-1.safetensors", "c": "gone-2.safetensors"},
            "lacks gone-1.safetensors, gone-2.safetensors",
        ),
        ({"a": "../x.safetensors"}, "outside its folder: '../x.safetensors'"),
        ({"a": "/abs.safetensors"}, "outside its folder"),
        ({"a": "s/../../b.safetensors"}, "outside its folder"),
        ({"a": "s/b.safetensors"}, "outside its folder"),
        ({"a": "..\\b.safetensors"}, "outside its folder"),
        ({"a": "b\0.safetensors"}, "outside its folder"),
        ({"a": "config.json"}, "outside its folder"),
        ({"a": ""}, "outside its folder"),
        ({"a": 1}, "no weight_map"),
        ([ONE], "no weight_map"),
        (None, "no weight_map"),
        ({"a": TWO, "b": ONE}, "disagree about the file of a, b"),
        ({"a": ONE, "b": TWO, "c": TWO}, "disagree about the file of c"),
        ({"a": ONE, "c": TWO}, "disagree about the file of c"),
        ({"a": ONE}, ""),
        ({"a": ONE, "d": "folder.safetensors"}, "is not a regular file"),
        ({"a": ONE, "d": "pipe.safetensors"}, "is not a regular file"),
        ({"a": ONE, "d": "zero.safetensors"}, "is not a regular file"),
        ({"a": ONE, "d": "twice.safetensors"}, "holds a, which another file of its folder holds too"),
        ({"a": ONE, "d": "more.safetensors"}, "does not list e, which its files hold"),
        ({"a": ONE, "d": "code.bin"}, "is a pickle"),
    ],
)
def test_refuses_an_inconsistent_index(sharded: Path, weight_map: Any, message: str) -> None:
    (sharded / "folder.safetensors").mkdir()
    os.mkfifo(sharded / "pipe.safetensors")
    (sharded / "zero.safetensors").symlink_to("/dev/zero")
    file_of(sharded / "twice.safetensors", {"a": entry(0, 8), "d": entry(8, 16)})
    file_of(sharded / "more.safetensors", {"d": entry(0, 8), "e": entry(8, 16)})
    file_of(sharded.parent / "x.safetensors", {"a": F32})
    (sharded / "code.bin").write_bytes(b"x")
    index_of(sharded, weight_map)
    if not message:  # a shard that nobody names is left alone
        assert open_checkpoint(sharded, "x").tensors.keys() == {"a"}
        return
    with pytest.raises(SourceError) as caught:
        open_checkpoint(sharded, "x")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": ' + "[" * 100_000, "\udcff"])
def test_refuses_an_index_that_is_not_json(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=r"index\.json"):
        open_checkpoint(sharded, "x")


def test_refuses_an_index_that_is_a_pipe(sharded: Path) -> None:
    os.mkfifo(sharded / "model.safetensors.index.json")
    with pytest.raises(SourceError, match="not a regular file"):
        open_checkpoint(sharded, "x")


def test_ignores_a_stale_index_next_to_a_single_file(sharded: Path) -> None:
    index_of(sharded, {"a": ONE, "gone": "gone.safetensors"})
    file_of(sharded / "model.safetensors", {"single": F32})
    found = open_checkpoint(sharded, "x")
    assert found.tensors.keys() == {"single"}
    assert "holds both" in found.warnings[0]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_refuses_weights_that_are_not_a_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="not a regular file"):
        open_checkpoint(tmp_path, "x")


def test_refuses_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no model\.safetensors"):
        open_checkpoint(tmp_path, "x")
    with pytest.raises(SourceError, match="neither a folder nor a file"):
        open_checkpoint(tmp_path / "nowhere", "x")
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(SourceError, match="cannot be read"):
        open_checkpoint(tmp_path, "x")


# --- a fuzzer: whatever becomes of a valid header, what is accepted here is valid for safetensors too

VALID = {
    "__metadata__": {"format": "pt"},
    "a": entry(0, 8),
    "b": entry(8, 12, [2], "F16"),
    "c": entry(12, 16, [2, 2], "U8"),
}
JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-5, 20)
    | st.sampled_from([1 << 31, 1 << 32, 1 << 48, 1 << 63, 1 << 64, -(1 << 63), 4.0, 1e30])
    | st.text(max_size=3)
    | st.sampled_from(list(DTYPES))
    | st.lists(st.integers(-1, 17), max_size=4)
    | st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=2)
)
PLACES = [(name, key) for name in "abc" for key in ("dtype", "shape", "data_offsets")]
PLACES += [("a",), ("b",), ("__metadata__",), ("__metadata__", "format"), ("new",), ("a", "new")]
DEEP = [(name, key, at) for name in "abc" for key in ("shape", "data_offsets") for at in (0, 1)]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*PLACES, *DEEP]), JUNK, st.binary(max_size=20) | st.just(bytes(16)))
def test_fuzz_one_field(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, ...], junk: Any, data: bytes
) -> None:
    header: Any = copy.deepcopy(VALID)
    within = header
    for key in place[:-1]:
        within = within[key]
    if isinstance(within, list) and place[-1] >= len(within):
        within.append(junk)
    else:
        within[place[-1]] = junk
    agree_on(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", json.dumps(header).encode(), data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 300), st.integers(0, 255), st.booleans())
def test_fuzz_one_byte(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, insert: bool) -> None:
    raw = bytearray(json.dumps(VALID).encode())
    at %= len(raw)
    raw[at : at if insert else at + 1] = bytes([byte])
    agree_on(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", bytes(raw), bytes(16))


def agree_on(path: Path, header: bytes, data: bytes) -> None:
    file_of(path, header, data)
    try:
        read_header(path)
    except SourceError as error:
        assert path.name in str(error)
        return
    assert opens(path), header
