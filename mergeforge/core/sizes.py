"""Parse and format sizes such as 5GB, 800MB and 2GiB."""

from __future__ import annotations

import re
from typing import Any

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_size(value: Any) -> int:
    """Parse 5000000000, "5GB", "800MB" or "2GiB" to bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value), re.IGNORECASE)
    if isinstance(value, bool) or not match:
        raise ValueError(f"{value!r} is not a size; write 5GB, 800MB or 2GiB")
    exact = float(match[1]) * UNITS[(match[2] or "").lower()]
    if exact > 1 << 62:
        raise ValueError(f"{value!r} is more than any disk holds")
    size = int(exact)
    if size < 1:
        raise ValueError("a size must be at least one byte")
    return size


def format_size(nbytes: float) -> str:
    """Format as 1.5 GB, 320.0 MB or 12 B, in decimal units as on the Hub."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes:.0f} B"
