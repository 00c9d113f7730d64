"""Reads the machine code of a compiled kernel: what its loops issue. Needs no GPU; Triton ships the disassembler.

python -m labkit_kernels compile paged_attention --arch 90 --loops
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
TENSOR = ("HGMMA", "HMMA", "IGMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA")
KINDS = {
    "tensor": TENSOR,
    "exp": ("MUFU",),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FADD2", "FMUL2", "FFMA2", "HFMA2", "HADD2", "HMUL2"),
    "convert": ("F2F", "F2FP", "I2F", "I2FP", "F2I"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "UTMALDG", "UTMASTG", "LDTM", "STTM", "ATOMG"),
    "barrier": ("BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "SYNCS", "WARPGROUP", "MEMBAR", "ARRIVES"),
    "local": ("LDL", "STL"),
}


def multiplying(cubin: bytes) -> tuple[dict[str, int], ...]:
    """Of each innermost loop with a matrix product, the instructions by kind that a thread issues in one pass; in the
    order in which the loops lie in memory."""
    lines = instructions(cubin)
    back = []
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < at:
            back.append((int(target[1], 16), at))
    inner = [
        (low, high) for low, high in back
        if not any((a, b) != (low, high) and low <= a and b <= high for a, b in back)
    ]  # fmt: skip
    found = [_count([name for at, name, _ in lines if low <= at <= high]) for low, high in inner]
    return tuple(counts for counts in found if counts["tensor"])


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """What a thread takes: registers, and bytes of stack. What spills lies on the stack."""
    said = _dumped(cubin, "-res-usage")
    found = re.search(r"\bREG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no registers: {said}")
    return int(found[1]), int(found[2])


def instructions(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, name, operands) of every instruction."""
    found = [LINE.match(line) for line in _dumped(cubin, "-sass").splitlines()]
    return [(int(match[1], 16), match[2], match[3]) for match in found if match]


def _dumped(cubin: bytes, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout


def _count(names: list[str]) -> dict[str, int]:
    kind_of = {name: kind for kind, members in KINDS.items() for name in members}
    counts = Counter(kind_of.get(name.partition(".")[0], "other") for name in names)
    return {kind: counts[kind] for kind in (*KINDS, "other")}
