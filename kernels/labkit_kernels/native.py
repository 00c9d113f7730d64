"""Builds the C++ kernels for the CPU on first use and keeps the libraries in a cache folder.

The sources take pointers and include no torch headers, so they compile in seconds. A library's name is a hash of its
source, the flags, the compiler and the processor. It is moved into place in one step, so several processes may build it
at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch  # must load its OpenMP runtime first, so that ours shares it

from .calls import Library

COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math, because masks use minus infinity. Only errno and floating point traps are switched off.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
# GCC for AMD's processors leaves some sums of products in two roundings, and decides so loop by loop: the same sum
# would then differ between blocks of several rows and of one.
FUSED = "--param=avoid-fma-max-bits=0"
SECONDS = 300  # for one source: it takes 10 alone, and many times that beside others
CODES = {torch.float32: 0, torch.bfloat16: 1}  # how a source is told a dtype

_warned: set[str] = set()


@lru_cache
def cpu_flags() -> frozenset[str]:
    """What Linux says that the processor can do; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, ()))


def multiplies_16_bits() -> bool:
    """Whether products of bfloat16 are as fast as those of float32: with AVX-512, with the conversions of newer small
    processors, on ARM with bf16, and where nothing is known."""
    flags = cpu_flags()
    return not flags or bool(flags & {"avx512f", "avx_ne_convert", "bf16"})


class BuildError(RuntimeError):
    """There is no compiler, or the build failed."""


def cache_folder() -> Path:
    """$LABKIT_CACHE, or the user's own cache folder."""
    given = os.environ.get("LABKIT_CACHE")
    base = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labkit"
    return base / "native"


def compiler() -> str:
    """The system's C++ compiler; CXX names another."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    for name in names:
        if (path := shutil.which(name)) is not None:
            return path
    raise BuildError(f"no C++ compiler: looked for {', '.join(names)}; install one (g++), or set CXX to its path")


def openmp_runtime() -> str | None:
    """The OpenMP runtime that torch loaded. Two runtimes in one process would each keep a thread pool."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"(/\S*/lib(?:gomp|iomp5|omp)\b\S*\.so\S*)", maps)
    return found[1] if found else None


@lru_cache(maxsize=8)
def _identity(path: str) -> str:
    """Compiler and processor, for a library's name."""
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    said = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    return "|".join([version, platform.machine(), *(line for line in lines if line.startswith(said))])


@lru_cache(maxsize=8)
def _targets(path: str) -> tuple[tuple[str, ...], ...]:
    """Flags that this compiler accepts, best first; the last work on any processor of this architecture."""
    openmp = ("-fopenmp",) if openmp_runtime() and _takes(path, "-fopenmp", "int main() {}") else ()
    if openmp and not _takes(path, "-fopenmp", _PARALLEL, link=True):
        openmp = ()  # clang with GNU's runtime: clang would link its own
    fused = (FUSED,) if _takes(path, FUSED, "int main() {}") else ()
    for native in ("-march=native", "-mcpu=native"):
        if _takes(path, native, "int main() {}"):
            return ((native, *openmp, *fused), (*openmp, *fused))
    return ((*openmp, *fused),)


_PARALLEL = 'extern "C" void f(float* x) {\n#pragma omp parallel for\nfor (int i = 0; i < 9; i++) x[i] = i;\n}'


def _takes(path: str, flag: str, text: str, link: bool = False) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(text)
        made = source.with_suffix(".o")
        done = subprocess.run([path, flag, "-fPIC", "-c", source, "-o", made], capture_output=True, check=False)
        if done.returncode == 0 and link:
            done = subprocess.run(_link(path, made, source.with_suffix(".so")), capture_output=True, check=False)
        return done.returncode == 0


def _link(path: str, made: Path, library: Path) -> list[str]:
    # Linked by path and without -fopenmp, which would name the compiler's own runtime. --no-undefined: a missing symbol
    # shows here and not at the first call.
    strict = ["-Wl,--no-undefined"] if sys.platform == "linux" else []
    runtime = openmp_runtime()
    return [path, "-shared", str(made), *([runtime] if runtime else []), "-lm", *strict, "-o", str(library)]


def build(source: str | Path) -> Path:
    """The shared library of a C++ file (with the headers beside and above it), built if it does not exist yet."""
    source, path = Path(source), compiler()
    headers = sorted({*source.parent.glob("*.h"), *source.parent.parent.glob("*.h")})
    key = hashlib.sha256(b"".join(file.read_bytes() for file in (source, *headers)))
    key.update(repr((FLAGS, FUSED, path, _identity(path), openmp_runtime())).encode())
    library = cache_folder() / f"{source.parent.name}-{source.stem}-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            _compile(path, source, made)
            made.replace(library)
    except OSError as error:
        raise BuildError(f"cannot write to {library.parent}: {error}; set LABKIT_CACHE to a folder that can") from error
    return library


def _compile(path: str, source: Path, made: Path) -> None:
    said = ""
    for target in _targets(path):
        made_object = made.with_suffix(".o")
        steps = (
            [path, *FLAGS, *target, f"-I{source.parent.parent}", "-c", str(source), "-o", str(made_object)],
            _link(path, made_object, made),
        )
        for command in steps:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"{path} took more than {SECONDS} s for {source.name}") from error
            if done.returncode != 0:
                said = said or next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                break
        else:
            return
    raise BuildError(f"{path} cannot build {source.parent.name}/{source.name}: {said.strip()}")


def load(source: str | Path, functions: Mapping[str, Sequence[object]]) -> Library | None:
    """The library with these functions' argument types set; None, after one warning, where it cannot be built."""
    try:
        library = ctypes.CDLL(str(build(source)))
    except (BuildError, OSError) as error:
        reason = str(error)
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(f"CPU kernels run in plain torch, which is slower: {reason}", stacklevel=2)
        return None
    for name, types in functions.items():
        function = getattr(library, name)
        function.argtypes, function.restype = list(types), None
    return Library(library, list(functions))


def num_threads() -> int:
    return torch.get_num_threads()
