"""`%load_ext labkit`: the magics `%labkit` and `%%bench`, over functions that can be called directly."""

from __future__ import annotations

import argparse
import ast
import gc
import platform
import shlex
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from labkit.bench.cell import IdleError, Timing, measure, measure_engine
from labkit.core.version import __version__
from labkit.engine.engine import Engine
from labkit.widgets import style


class UsageError(ValueError):
    """A magic was called with arguments it does not know."""


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.format_usage().strip()}: {message}")


class EngineRow:
    """One open engine, in a line."""

    def __init__(self, engine: Engine) -> None:
        scheduler, blocks = engine.scheduler, engine.blocks
        self.runner = type(engine.runner).__name__
        self.state = "running" if engine.is_running else "stepped by hand"
        self.step = scheduler.step
        self.rows = f"{scheduler.num_running} of {scheduler.max_num_seqs}"
        self.waiting = scheduler.num_waiting
        self.blocks = (
            f"{blocks.num_used} used, {blocks.num_cached} cached, {blocks.num_free} free of {blocks.num_blocks}"
        )

    def __repr__(self) -> str:
        return (
            f"  {self.runner}, {self.state}: step {self.step}, {self.rows} rows, {self.waiting} waiting, "
            f"blocks {self.blocks}"
        )


@dataclass(frozen=True)
class Status:
    """The engines open in this process, and the versions and devices they use."""

    engines: tuple[EngineRow, ...]
    versions: dict[str, str]
    machine: str

    def __repr__(self) -> str:
        head = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        engines = [repr(row) for row in self.engines] or ["  no engine is open"]
        return "\n".join([head, self.machine, *engines])

    def _repr_html_(self) -> str:
        head = ("engine", "state", "step", "rows", "waiting", "blocks")
        rows = [[str(getattr(row, name)) for name in ("runner", *head[1:])] for row in self.engines]
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        table = style.text_table(head, rows) if rows else style.note("no engine is open")
        return style.page(style.title(versions), style.note(self.machine), table)


def status() -> Status:
    """What `%labkit status` shows."""
    live = [one for one in gc.get_objects() if issubclass(type(one), Engine) and getattr(one, "closed", True) is None]
    loaded = {"labkit": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        if (module := sys.modules.get(name)) is not None:
            loaded[name] = str(getattr(module, "__version__", "?"))
    return Status(tuple(EngineRow(engine) for engine in live), loaded, _machine())


def _machine() -> str:
    from labkit.notebook.doctor import GIB, cpu_flags, free_memory

    free = free_memory()
    parts = [f"{platform.system()} {platform.machine()}"]
    parts += [name for name in ("avx512f", "amx_bf16") if name in cpu_flags()]
    parts += [] if free is None else [f"{free / GIB:.1f} GiB free"]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def bench(cell: str, space: dict[str, Any], *, repeats: int | None = None, warmup: int = 2, what: str = "") -> Timing:
    """What `%%bench` does with a cell, using the names in `space`.

    If a cell ends with a function or an engine, it runs once, and the function's calls or the engine's steps are timed.
    Any other cell is timed as a whole.
    """
    tree = ast.parse(cell, "<bench>")
    if not tree.body:
        raise UsageError("the cell is empty: there is nothing to time")
    given = {} if repeats is None else {"repeats": repeats}
    last = tree.body[-1]
    if isinstance(last, ast.Expr) and isinstance(last.value, (ast.Name, ast.Attribute, ast.Lambda)):
        head = ast.Module(tree.body[:-1], [])
        exec(compile(head, "<bench>", "exec"), space)
        value = eval(compile(ast.Expression(last.value), "<bench>", "eval"), space)
        name = what or ast.unparse(last.value)
        if isinstance(value, Engine):
            try:
                return measure_engine(value, warmup=warmup, **given)
            except IdleError as error:
                raise UsageError(str(error)) from None
        if callable(value):
            return measure(value, warmup=warmup, what=name, **given)
        raise UsageError(
            f"the cell ends with {name!r}, which is {type(value).__name__}: end it with a function or an engine, or "
            f"with a statement to time the whole cell"
        )
    code = compile(tree, "<bench>", "exec")
    return measure(lambda: exec(code, space), warmup=warmup, what=what or "the cell", **given)


def labkit_magic(line: str) -> Any:
    """%labkit status | doctor | version"""
    words = shlex.split(line) or ["status"]
    if words[1:] or words[0] not in ("status", "doctor", "version"):
        raise UsageError(f"%labkit takes status, doctor or version, got {line.strip()!r}")
    if words[0] == "version":
        return __version__
    if words[0] == "doctor":
        from labkit.notebook.doctor import examine

        return examine()
    return status()


def bench_magic(line: str, cell: str, space: dict[str, Any]) -> Timing:
    """%%bench [-r REPEATS] [-w WARMUP] [name]"""
    parser = _Words(prog="%%bench", add_help=False)
    parser.add_argument("-r", "--repeats", type=int)
    parser.add_argument("-w", "--warmup", type=int, default=2)
    parser.add_argument("name", nargs="*")
    args = parser.parse_args(shlex.split(line))
    return bench(cell, space, repeats=args.repeats, warmup=args.warmup, what=" ".join(args.name))


def load(shell: Any) -> None:
    """Register the magics with a running IPython."""
    from IPython.core.error import UsageError as ShellError

    def said(call: Any) -> Any:
        try:
            return call()
        except (UsageError, SyntaxError) as error:
            raise ShellError(str(error)) from None  # one line instead of a traceback

    def line_magic(line: str) -> Any:
        return said(lambda: labkit_magic(line))

    def cell_magic(line: str, cell: str) -> Any:
        return said(lambda: bench_magic(line, cell, shell.user_ns))

    line_magic.__doc__, cell_magic.__doc__ = labkit_magic.__doc__, bench_magic.__doc__
    shell.register_magic_function(line_magic, "line", "labkit")
    shell.register_magic_function(cell_magic, "cell", "bench")
