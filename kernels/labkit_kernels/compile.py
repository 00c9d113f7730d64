"""Compiles Triton kernels ahead of time, also for GPUs that this machine does not have.

    from labkit_kernels.compile import compile_ops
    print(compile_ops(["rms_norm"]))    # registers, spills and shared memory on sm_80, sm_90 and sm_100

Importing this module does not import Triton; kernel files are imported on first use.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from . import show
from .config import ARCHS, MOST_SHARED, Config
from .launches import language, launched
from .registry import OPS, Op, get
from .rows import Rows, short, write
from .sass import multiplying, registers_and_stack

MOST_REGISTERS = 255  # one thread may have
MOST_TENSOR_MEMORY = 512  # columns of sm_100's tensor memory


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture. `status` is "ok", "FAILED" (spills, or too much memory) or "raised"."""

    op: str
    kernel: str
    config: str
    arch: str
    status: str
    reason: str = ""
    registers: int | None = None
    spills: int | None = None  # bytes stored and loaded
    shared: int | None = None  # bytes
    num_warps: int = 0
    num_stages: int = 0
    seconds: float = 0.0
    loops: tuple[dict[str, int], ...] = ()  # instructions by kind of the loops that multiply, when asked for


@dataclass(frozen=True, repr=False)
class Report(Rows):
    """What the compiler reported: one row per kernel, configuration and architecture."""

    rows: tuple[Row, ...] = ()
    heads = ("op", "kernel", "arch", "status", "registers", "spills", "shared", "warps", "seconds", "config")
    kind = Row

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.status == "ok" for row in self.rows)

    def __repr__(self) -> str:
        return f"Report({len(self.rows)} kernels compiled: {self.said()})"

    def _repr_html_(self) -> str:
        return show.page("compiled ahead of time", f"{self.said()}; no GPU was asked", *self.parts())

    def parts(self) -> list[str]:
        """One line per kernel and architecture; bars show the share of what the architecture has."""
        lines, before = [], None
        for row in self.rows:
            most = MOST_SHARED.get(int(row.arch.removeprefix("sm_")), 1)
            new = (row.kernel, row.config) != before
            before = (row.kernel, row.config)
            registers = None if row.registers is None else row.registers / MOST_REGISTERS
            shared = None if row.shared is None else row.shared / most
            lines.append(
                [
                    f"<b>{escape(row.kernel)}</b>" if new else "",
                    show.code(row.config) if new else "",
                    row.arch,
                    show.status(row.status),
                    f"{show.bar(registers, show.BLUE)}{show.number(row.registers, 'd')}",
                    f"{show.bar(shared, show.ORANGE)}{show.number(row.shared, ',d')}",
                    show.number(row.spills, ",d"),
                    f"{row.num_warps}, {row.num_stages}",
                    escape(short(row.reason)),
                ]
            )
        heads = (
            "kernel",
            "_configuration",
            "",
            "",
            "registers a thread",
            "shared bytes",
            ">spilled",
            "warps, stages",
            "",
        )
        return [show.table(heads, lines)]

    def cells(self, row: Row) -> list[str]:
        numbers = ["" if n is None else str(n) for n in (row.registers, row.spills, row.shared, row.num_warps)]
        said = "; ".join(f"loop of {sum(loop.values())}: {loop}" for loop in row.loops)
        last = short(row.reason or row.config) if not row.loops else f"{row.config}\n    {said}"
        return [row.op, row.kernel, row.arch, row.status, *numbers, f"{row.seconds:.2f}", last]


def compile_ops(
    ops: Sequence[str | Op] | None = None, archs: Sequence[int] = ARCHS, more: bool = False, loops: bool = False
) -> Report:
    """Compile the default configurations of these ops (None: of all that have Triton kernels). `more`: also those that
    the tests leave out; `loops`: count the instructions of loops."""
    rows = []
    for op in ops if ops is not None else list(OPS.values()):
        op = get(op) if isinstance(op, str) else op
        rows += [
            compile_config(op.name, config, arch, loops)
            for config in configs(op, more) for arch in archs if arch in config.archs
        ]  # fmt: skip
    return Report(tuple(rows))


def compile_variant(
    op: Op | str, variant: str, archs: Sequence[int] = ARCHS, dtype: torch.dtype | None = None
) -> Report:
    """Compile what a variant launches on its op's timed cases, for variants written in a notebook cell. Runs nothing.

    `dtype` None means bfloat16, or the dtype that the variant accepts.
    """
    op = get(op) if isinstance(op, str) else op
    one = op.get(variant)
    dtype = dtype or (one.dtypes or (torch.bfloat16,))[0]
    found: dict[tuple[Any, ...], Config] = {}
    for case in [case for case in op.cases() if case.timed] or list(op.cases()):
        if case.dtypes is None or dtype in case.dtypes:
            args, options = case.inputs("cuda" if torch.cuda.is_available() else "cpu", dtype)
            for launch in launched(one.function, *args, **options):
                config = launch.config()
                key = (config.kernel, repr(sorted(config.signature.items())), repr(sorted(config.constexprs.items())))
                found.setdefault((*key, config.num_warps, config.num_stages), config)
    if not found:
        raise ValueError(f"variant {variant!r} of {op.name} launches no Triton kernel: there is nothing to compile")
    return Report(tuple(compile_config(op.name, config, arch) for config in found.values() for arch in archs))


def configs(op: Op, more: bool = False) -> list[Config]:
    """The configurations that an op's Triton module lists; of a module shared by ops, those of this op's kernels."""
    if not op.has("triton"):
        return []
    module = importlib.import_module(op.variants["triton"].function.__module__)
    lists = [module.AOT, *([module.MORE] if more and hasattr(module, "MORE") else [])]
    return [one for listed in lists for one in (listed.get(op.name, ()) if isinstance(listed, dict) else listed)]


def compile_config(op: str, config: Config, arch: int, loops: bool = False) -> Row:
    """One row. A compiler error becomes data."""
    name = config.kernel.__name__.lstrip("_")
    said = (op, name, repr(config), f"sm_{arch}")
    facts = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    begin = time.perf_counter()
    try:
        compiled = compiled_for(config, arch)
    except Exception as error:  # a compiler may raise anything on an unfinished kernel
        return Row(*said, "raised", f"{type(error).__name__}: {error}", seconds=time.perf_counter() - begin, **facts)
    registers, stack = registers_and_stack(compiled.asm["cubin"])
    spills = spilled(compiled.asm["ptx"], arch) if stack else 0  # ptxas again is a quarter of a compile
    shared = compiled.metadata.shared
    reason = ""
    if spills:
        reason = f"{spills} bytes spilled"
    elif shared > MOST_SHARED[arch]:
        reason = f"{shared} bytes of shared memory, more than {MOST_SHARED[arch]}"
    elif (columns := getattr(compiled.metadata, "tmem_size", 0)) > MOST_TENSOR_MEMORY:  # then all it does is trap
        reason = f"{columns} columns of tensor memory, more than {MOST_TENSOR_MEMORY}"
    counted = multiplying(compiled.asm["cubin"]) if loops else ()
    seconds = time.perf_counter() - begin
    status = "FAILED" if reason else "ok"
    return Row(*said, status, reason, registers, spills, shared, seconds=seconds, loops=counted, **facts)


def compiled_for(config: Config, arch: int) -> Any:
    """Triton's compiled kernel: `.asm["ptx"]`, `.metadata`."""
    import triton

    from .jit import ASTSource, GPUTarget

    names = config.kernel.arg_names
    signature = {name: config.signature.get(name, "constexpr") for name in names}
    unknown = (config.signature.keys() | config.constexprs.keys()) - set(names)
    missing = [name for name in names if name not in config.signature and name not in config.constexprs]
    if unknown or missing:
        raise ValueError(f"signature and constants of {config.kernel.__name__}: missing {missing}, unknown {unknown}")
    aligned = [name for name in names if signature[name].startswith("*") or name in config.aligned]
    source = ASTSource(
        config.kernel,
        signature,
        {(names.index(name),): value for name, value in config.constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    with language:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spilled(ptx: str, arch: int) -> int:
    """Bytes that a thread spills, as ptxas reports them."""
    target = re.search(r"^\.target (\S+?)[,\s]", ptx + "\n", re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [_ptxas(arch), "-v", f"--gpu-name={target[1] if target else f'sm_{arch}'}", source]
        done = subprocess.run(
            [*command, "-o", source.with_suffix(".cubin")], capture_output=True, text=True, check=True
        )
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    if not found:
        raise RuntimeError(f"ptxas reported no spills: {done.stderr}")
    return sum(map(int, found))


def _ptxas(arch: int) -> str:
    """The assembler that ships with Triton; Triton says which of its two supports this architecture."""
    from .jit import get_ptxas

    path: str = get_ptxas(arch).path
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """`compile [op...] [--arch 90] [--all] [--loops] [--json FILE]`; 1 when a kernel spills, does not fit or does not
    compile."""
    parser = argparse.ArgumentParser("labkit kernels compile", description="compile Triton kernels ahead of time")
    parser.add_argument("ops", nargs="*", metavar="op")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS)
    parser.add_argument("--all", action="store_true", help="also configurations that the tests leave out")
    parser.add_argument("--loops", action="store_true", help="instructions by kind of the loops that multiply")
    parser.add_argument("--json", metavar="FILE", help="rows as JSON; - for the standard output")
    options = parser.parse_args(argv)
    report = compile_ops(options.ops or None, options.arch or ARCHS, options.all, options.loops)
    write(report, options.json)
    return 0 if report.ok else 1


if __name__ == "__main__":
    from labkit_kernels.compile import main as _main  # this module once, not a second copy of its classes

    sys.exit(_main())
