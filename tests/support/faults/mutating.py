"""Files made wrong: bytes changed anywhere, and values of JSON and YAML changed for ones that nobody expects."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

Mutation = Callable[[bytes, Random], bytes]
ODD: list[Any] = [None, True, False, 0, 1, -1, 7, 1 << 31, 1 << 63, 1 << 64, 10**400, -(1 << 63), 0.5, -0.0, 1e308]
ODD += [float("nan"), float("inf"), "", "x", "0", "../x", "/etc/passwd", "a\0b", "\ud800", "{{", "é" * 300, "!!python"]
ODD += [[], [[]], {}, {"": ""}, [None], [1, 2, 3], {"a": {"b": []}}, ["x"] * 500]
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 48, 1 << 63, (1 << 64) - 1]


def changed_bytes(data: bytes, chance: Random) -> bytes:
    """A few bytes flipped, cut out, doubled, put in, or taken for a number of another size."""
    new = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        at = chance.randrange(len(new) + 1) if chance.random() < 0.5 else chance.randrange(min(len(new), 64) + 1)
        length = chance.choice([1, 1, 2, 4, 8, 64])
        how = chance.randrange(6)
        if how == 0 and at < len(new):
            new[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del new[at : at + length]
        elif how == 2:
            new[at:at] = new[at : at + length]
        elif how == 3:
            new[at:at] = chance.randbytes(length)
        elif how == 4:
            number = struct.pack("<Q", chance.choice(NUMBERS))[: chance.choice([1, 2, 4, 8])]
            new[at : at + len(number)] = number
        else:
            del new[chance.randrange(len(new) + 1) :]
    return bytes(new)


def changed_json(data: bytes, chance: Random) -> bytes:
    return _encode(_changed(json.loads(data), chance), chance)


def changed_yaml(data: bytes, chance: Random) -> bytes:
    value = _changed(yaml.safe_load(data), chance)
    if chance.random() < 0.3:
        return _encode(value, chance)
    return yaml.dump(value, allow_unicode=chance.random() < 0.5).encode("utf-8", "surrogatepass")


def changed_header(data: bytes, chance: Random) -> bytes:
    """A safetensors file whose header is another; its length is right, mostly."""
    length = int.from_bytes(data[:8], "little")
    header = changed_json(data[8 : 8 + length], chance)
    told = len(header) + chance.choice([0, 0, 0, 0, 1, -1])
    return struct.pack("<Q", max(told, 0)) + header + data[8 + length :]


def changed_lines(data: bytes, chance: Random) -> bytes:
    """JSON Lines with one row that is another."""
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = changed_json(lines[at], chance)
    return b"\n".join(lines)


def _encode(value: Any, chance: Random) -> bytes:
    if chance.random() < 0.02:
        return b"[" * 100_000
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    return text.encode("utf-8", "surrogatepass")


def _changed(value: Any, chance: Random) -> Any:
    """One value somewhere in it replaced, taken away, renamed, or copied to where another one was."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 2, 3])):
        places = list(_places(value))
        if not places:
            return chance.choice(ODD)
        held, key = chance.choice(places)
        how = chance.randrange(8)
        if how == 0:
            del held[key]
        elif how == 1 and isinstance(held, dict):
            held[str(chance.choice(["", "x", "__proto__", "name", "weight"]))] = held.pop(key)
        elif how == 2:
            other, which = chance.choice(places)
            held[key] = copy.deepcopy(other[which])
        elif how == 3 and isinstance(held[key], int | float) and abs(held[key]) < 1e300:
            held[key] = chance.choice([held[key] + 1, -held[key], held[key] * 2, float(held[key]), str(held[key])])
        else:
            held[key] = copy.deepcopy(chance.choice(ODD))
    return value


def _places(value: Any) -> Any:
    """Every (container, key) in a value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
