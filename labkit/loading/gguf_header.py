"""The header of a GGUF file: its metadata, and where each tensor lies. It knows nothing of models.

A file may come from anywhere, so every count and length is compared with the bytes that are left before anything is
made of it; what does not add up is a ValueError that names the file, the place in it and the reason.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit.loading.gguf_blocks import TYPES, UNREAD, BlockType

VERSIONS = (2, 3)
MOST_DIMS, LONGEST_NAME, LONGEST_KEY = 4, 63, 65535  # names and keys in bytes
MOST_ALIGNMENT = 2**20
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class StoredTensor:
    """Rows of blocks somewhere in a file. `shape` is in the order of torch: the innermost dimension last."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    file: GGUFHeader
    start: int  # byte of the file

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.num_elements * self.type.num_bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def rows(self) -> np.ndarray:
        """[rows, bytes], a view of the file."""
        return self.file.view(self.start, self.num_bytes).reshape(-1, self.row_bytes)


class GGUFHeader:
    """One file: `fields` by key, `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size < 24:
            raise self._error("the file", f"it has {path.stat().st_size} bytes, fewer than a header")
        with path.open("rb") as file:
            self._data: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at, self._size = 0, len(self._data)
        num_tensors, num_fields = self._counts()
        self.fields = self._read_fields(num_fields)
        self.alignment = self._alignment()
        self.tensors = self._read_tensors(num_tensors)

    def __repr__(self) -> str:
        return f"GGUFHeader({self.path.name}: {len(self.tensors)} tensors, {len(self.fields)} fields)"

    def view(self, start: int, count: int) -> np.ndarray:
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        return np.frombuffer(self._data, np.uint8, count, start)

    def close(self) -> None:
        self._data = None  # arrays that still look at it keep it mapped

    # -- what the header is made of ------------------------------------------------------------------------------

    def _error(self, what: str, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {what}: {reason}")

    def _take(self, count: int, what: str) -> int:
        """Where these bytes begin; the next ones come behind them."""
        if count > self._size - self._at:
            raise self._error(what, f"it needs {count} bytes, and {self._size - self._at} are left: cut short?")
        self._at += count
        return self._at - count

    def _number(self, form: str, size: int, what: str) -> Any:
        return struct.unpack_from(form, self._data, self._take(size, what))[0]  # type: ignore[arg-type]

    def _u32(self, what: str) -> int:
        return int(self._number("<I", 4, what))

    def _u64(self, what: str) -> int:
        return int(self._number("<Q", 8, what))

    def _string(self, what: str, longest: int | None = None) -> str:
        count = self._u64(what)
        if longest is not None and count > longest:
            raise self._error(what, f"its name has {count} bytes, more than {longest}")
        start = self._take(count, what)
        try:
            return self._data[start : start + count].decode("utf-8")  # type: ignore[index]
        except UnicodeDecodeError as error:
            raise self._error(what, f"its text is not UTF-8 ({error.reason})") from error

    def _counts(self) -> tuple[int, int]:
        start = self._take(4, "the magic")
        if self._data[start : start + 4] != b"GGUF":  # type: ignore[index]
            raise self._error("the magic", "it is not that of a GGUF file")
        version = self._u32("the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "the file is big-endian" if swapped in VERSIONS else f"it is {version}, not one of {VERSIONS}"
            raise self._error("the version", kind)
        num_tensors, num_fields = self._u64("the number of tensors"), self._u64("the number of fields")
        for what, count, least in (("tensors", num_tensors, 24), ("fields", num_fields, 13)):  # bytes of the smallest
            if count * least > self._size - self._at:
                raise self._error(f"the number of {what}", f"{count} do not fit into {self._size} bytes")
        return num_tensors, num_fields

    # -- fields --------------------------------------------------------------------------------------------------

    def _read_fields(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i in range(count):
            key = self._string(f"field {i}", LONGEST_KEY)
            what = f"field {key[:64]!r}"
            if key in found:
                raise self._error(what, "it is there twice")
            found[key] = self._value(self._u32(what), what)
        return found

    def _value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self._string(what)
        if kind == ARRAY:
            return self._array(what)
        return self._numbers(kind, 1, what)[0].item()

    def _array(self, what: str) -> Any:
        """A list of strings, or an array of numbers."""
        kind, count = self._u32(what), self._u64(what)
        if kind == STRING:
            if count * 8 > self._size - self._at:
                raise self._error(what, f"{count} strings do not fit into what is left of the file")
            return [self._string(what) for _ in range(count)]
        if kind == ARRAY:
            raise self._error(what, "it is an array of arrays, which no model needs")
        return self._numbers(kind, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in SCALARS:
            raise self._error(what, f"there is no value type {kind}")
        dtype = np.dtype(SCALARS[kind])
        start = self._take(count * dtype.itemsize, what)
        data = self.view(start, count * dtype.itemsize)
        return data.astype(bool) if kind == 7 else data.copy().view(dtype)

    def _alignment(self) -> int:
        found = self.fields.get("general.alignment", 32)
        if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= MOST_ALIGNMENT:
            raise self._error("general.alignment", f"it must be a power of two, and is {str(found)[:32]}")
        if found & (found - 1):
            raise self._error("general.alignment", f"it must be a power of two, and is {found}")
        return found

    # -- tensors -------------------------------------------------------------------------------------------------

    def _read_tensors(self, count: int) -> dict[str, StoredTensor]:
        found: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
        for i in range(count):
            name = self._string(f"tensor {i}", LONGEST_NAME)
            if name in found:
                raise self._error(f"tensor {name!r}", "it is there twice")
            found[name] = self._tensor(f"tensor {name!r}")
        start = -(-self._at // self.alignment) * self.alignment  # of the data
        tensors = {}
        for name, (type, shape, offset) in found.items():
            tensor = StoredTensor(name, type, shape, self, start + offset)
            if tensor.start + tensor.num_bytes > self._size:
                end = tensor.start + tensor.num_bytes
                raise self._error(f"tensor {name!r}", f"it ends at byte {end} of {self._size}: is the file cut short?")
            tensors[name] = tensor
        return tensors

    def _tensor(self, what: str) -> tuple[BlockType, tuple[int, ...], int]:
        num_dims = self._u32(what)
        if not 1 <= num_dims <= MOST_DIMS:
            raise self._error(what, f"it has {num_dims} dimensions, not 1 to {MOST_DIMS}")
        shape = tuple(self._u64(what) for _ in range(num_dims))[::-1]
        kind, offset = self._u32(what), self._u64(what)
        if kind not in TYPES:
            known = ", ".join(type.name for type in TYPES.values())
            raise self._error(
                what, f"its type is {UNREAD.get(kind, kind)}, which labkit does not read; it reads {known}"
            )
        type = TYPES[kind]
        if 0 in shape or shape[-1] % type.num_elements:
            raise self._error(what, f"shape {shape} is not made of whole blocks of {type.num_elements} ({type.name})")
        if offset % self.alignment:
            raise self._error(what, f"its offset {offset} is no multiple of {self.alignment}")
        return type, shape, offset
