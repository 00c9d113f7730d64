"""Checkpoints in GGUF files: tensors by their Hugging Face names, as plain numbers.

Which of a file's tensors is which, and the config, is said by `labkit.loading.gguf_models`. Reading a part of a tensor
reads and dequantizes the blocks of this part only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.options import closest
from labkit.loading.gguf_blocks import Scaled, dequantize, scaled
from labkit.loading.gguf_header import GGUFHeader, StoredTensor
from labkit.loading.gguf_models import Part, config_of, parts_of

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
CHUNK = 2**22  # elements dequantized at a time


class GGUFFile:
    """A model in a GGUF file, or in the files of a split one; see `labkit.loading.checkpoint.Source`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = [GGUFHeader(file) for file in split_files(self.path)]
        _check_split(self.files)
        self.fields: dict[str, Any] = self.files[0].fields
        self.tensors = _all_tensors(self.files)
        self.config = config_of(self.fields, self.tensors, str(self.path))
        self.parts = parts_of(self.fields, self.tensors, self.config, str(self.path))
        self.shapes = {name: part.shape for name, part in self.parts.items()}

    def __repr__(self) -> str:
        return f"GGUFFile({self.path.name}: {len(self.shapes)} tensors in {len(self.files)} files)"

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        if name not in self.parts:
            raise ValueError(f"{self.path} lacks tensor {name!r}; {closest(name, list(self.shapes)[:8])}")
        shape = self.shapes[name]
        bounds = [cut.indices(size)[:2] for cut, size in zip(part, shape, strict=False)]
        bounds += [(0, size) for size in shape[len(bounds) :]]
        rows, columns = bounds[0], bounds[1] if len(bounds) > 1 else (0, 1)
        out = _read_rows(self.parts[name], rows, columns, dtype or torch.float32)
        return out.reshape([max(stop - start, 0) for start, stop in bounds]).to(device)

    def blocks(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> Scaled:
        """The blocks of these rows that hold these columns, in order, not multiplied out."""
        part = self.parts[name]
        type = part.tensor.type
        first, last = columns[0] // type.num_elements, -(-columns[1] // type.num_elements)
        data = part.tensor.rows()[part.stored_rows(np.arange(*rows)), first * type.num_bytes : last * type.num_bytes]
        return scaled(type, data)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _read_rows(part: Part, rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[rows, columns]; a vector is read as rows of one element."""
    tensor, type = part.tensor, part.tensor.type
    data = tensor.rows() if len(part.shape) > 1 else tensor.rows().reshape(-1, type.num_bytes)
    first, last = columns[0] // type.num_elements, -(-columns[1] // type.num_elements)  # blocks of each row
    within = slice(columns[0] - first * type.num_elements, columns[1] - first * type.num_elements)
    wanted = part.stored_rows(np.arange(*rows))
    out = torch.empty(len(wanted), max(columns[1] - columns[0], 0), dtype=dtype)
    step = max(CHUNK // max(out.shape[1], 1), 1)
    for at in range(0, len(wanted), step):
        blocks = data[wanted[at : at + step], first * type.num_bytes : last * type.num_bytes]
        out[at : at + step] = torch.from_numpy(dequantize(type, blocks)[:, within]) - part.offset
    return out


def split_files(path: Path) -> list[Path]:
    """The file itself, or all files of the split model that it belongs to."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match[3])
    if not 1 <= int(match[2]) <= total:
        raise ValueError(f"{path}: its name says part {int(match[2])} of {total}")
    first = path.with_name(f"{match[1]}-00001-of-{match[3]}.gguf")
    files = [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, total + 1)]
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{first} lacks {len(missing)} of its {total} parts, {missing[0]} first")
    return files


def metadata(path: Path) -> dict[str, Any]:
    """The fields of the model's file, or of the first of its files."""
    header = GGUFHeader(split_files(path)[0])
    header.close()
    return header.fields


def _check_split(files: list[GGUFHeader]) -> None:
    for i, file in enumerate(files):
        number, count = file.fields.get("split.no", 0), file.fields.get("split.count", 1)
        if not (isinstance(number, int) and isinstance(count, int)) or (number, max(count, 1)) != (i, len(files)):
            raise ValueError(
                f"{file.path}: its metadata says part {number} of {count} (counted from 0), its name says {i} of "
                f"{len(files)}"
            )


def _all_tensors(files: list[GGUFHeader]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        if twice := found.keys() & file.tensors.keys():
            raise ValueError(f"{file.path}: tensor {min(twice)!r}: another part of the model has it too")
        found |= file.tensors
    count = files[0].fields.get("split.tensors.count", len(found))
    if not isinstance(count, int) or count != len(found):
        raise ValueError(f"{files[0].path}: the parts hold {len(found)} tensors together, not {count}")
    return found
