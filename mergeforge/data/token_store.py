"""Token stores: examples in flat, memory-mapped files, so that a data set may be larger than memory.

A folder holds `tokens.i32`, `labels.i32` and `offsets.i64` of all examples, one after the other, and for each named
store (`train`, `validation`) the numbers of its examples in `NAME.index`. `keys.u64` holds a hash of the row that each
example comes from, `preferences.i8` whether it is a preferred answer (1), a rejected one (-1) or neither (0), and
`weights.f32` how much it counts in the loss.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeforge.data.render import Example
from mergeforge.errors import SourceError
from mergeforge.io.disk import disk_error, sync_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FLUSHED = 1024  # offsets and keys
TOKENS, LABELS, OFFSETS, KEYS = "tokens.i32", "labels.i32", "offsets.i64", "keys.u64"
PREFERENCES, WEIGHTS = "preferences.i8", "weights.f32"
FILES = (TOKENS, LABELS, OFFSETS, KEYS, PREFERENCES, WEIGHTS)


class TokenStore:
    """Examples by number. Another process reopens the files, so data loader workers share their pages."""

    def __init__(self, folder: Path, name: str) -> None:
        import numpy as np

        self.folder, self.name = folder, name
        try:
            self._offsets = np.memmap(folder / OFFSETS, np.int64, "r")
            self._index = np.fromfile(folder / f"{name}.index", np.int64)
            self._tokens = np.memmap(folder / TOKENS, np.int32, "r")
            self._labels = np.memmap(folder / LABELS, np.int32, "r")
            # versions up to 0.1 did not write these
            self._preferences = _open_optional(folder / PREFERENCES, np.int8)
            self._weights = _open_optional(folder / WEIGHTS, np.float32)
        except (OSError, ValueError) as error:
            raise SourceError(f"{folder} holds no token store '{name}': {error}") from None
        if not len(self._tokens) == len(self._labels) == self._offsets[-1]:
            raise SourceError(f"{folder}: the token store is damaged: its files do not match", hint="delete the folder")
        starts = self._offsets[self._index]
        self.lengths: NDArray[np.int32] = (self._offsets[self._index + 1] - starts).astype(np.int32)

    @classmethod
    def open(cls, folder: str | Path, name: str) -> TokenStore:
        """Open the store `name` in a folder. Raises SourceError."""
        return cls(Path(folder), name)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, at: int) -> Example:
        import numpy as np

        number = self._index[at]
        start, stop = self._offsets[number], self._offsets[number + 1]
        tokens, labels = np.array(self._tokens[start:stop]), np.array(self._labels[start:stop])
        preference = 0 if self._preferences is None else int(self._preferences[number])
        return Example(tokens, labels, preference, 1.0 if self._weights is None else float(self._weights[number]))

    def weight_range(self) -> tuple[float, float]:
        """The smallest and the largest weight of an example."""
        if self._weights is None:
            return 1.0, 1.0
        weights = self._weights[self._index]
        return float(weights.min()), float(weights.max())

    def __reduce__(self) -> Any:
        return TokenStore, (self.folder, self.name)


def _open_optional(path: Path, dtype: Any) -> Any:
    import numpy as np

    return np.memmap(path, dtype, "r") if path.exists() else None


class TokenStoreWriter:
    """Writes examples as they come; keeps none in memory."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self.folder = folder
        self.count = self.tokens = self.trained = 0
        self._offsets, self._keys = array("q"), array("Q")  # written FLUSHED at once
        self._preferences, self._weights = array("b"), array("f")
        try:
            self._files = {name: (folder / name).open("wb") for name in FILES}
        except OSError as error:
            raise disk_error(error, str(folder)) from error
        np.zeros(1, np.int64).tofile(self._files[OFFSETS])

    def add(self, example: Example, key: int) -> None:
        self.count += 1
        self.tokens += len(example)
        self.trained += example.trained_tokens
        self._write(TOKENS, example.tokens.data)
        self._write(LABELS, example.labels.data)
        self._offsets.append(self.tokens)
        self._keys.append(key)
        self._preferences.append(example.preference)
        self._weights.append(example.weight)
        if len(self._keys) >= FLUSHED:
            self._flush()

    def close(self) -> None:
        self._flush()
        for name, file in self._files.items():
            with file:
                file.flush()
                sync_file(file.fileno(), str(self.folder / name))

    def lengths(self) -> NDArray[np.int64]:
        """The lengths of all examples, once closed."""
        import numpy as np

        offsets: NDArray[np.int64] = np.fromfile(self.folder / OFFSETS, np.int64)
        return offsets[1:] - offsets[:-1]

    def keys(self) -> NDArray[np.uint64]:
        """The keys of all examples, once closed."""
        import numpy as np

        return np.fromfile(self.folder / KEYS, np.uint64)

    def write_index(self, name: str, numbers: NDArray[np.int64] | Sequence[int]) -> None:
        """Make a store of these examples, once closed."""
        import numpy as np

        np.asarray(numbers, np.int64).tofile(self.folder / f"{name}.index")

    def _flush(self) -> None:
        self._write(OFFSETS, self._offsets)
        self._write(KEYS, self._keys)
        self._write(PREFERENCES, self._preferences)
        self._write(WEIGHTS, self._weights)
        del self._offsets[:], self._keys[:], self._preferences[:], self._weights[:]

    def _write(self, name: str, values: memoryview | array[int] | array[float]) -> None:
        try:
            self._files[name].write(values)
        except OSError as error:
            raise disk_error(error, str(self.folder / name)) from error
