"""C++ for the CPU, built on first use and kept. Knows a compiler and a cache folder; refuses to know what is computed.

Sources see no torch headers, only pointers: they compile in seconds. The library is named by a hash of its source, the
flags, the compiler and the processor, and moved into place in one step, so that processes may race to build it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch  # its OpenMP runtime must be in the process first: ours then shares it

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
TARGETS = (("-march=native",), ())  # the second: any processor of this kind
SECONDS = 120

_warned: set[str] = set()


class BuildError(RuntimeError):
    """No compiler, or it did not like the source."""


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


@lru_cache(maxsize=8)
def _identity(path: str) -> str:
    """Compiler and processor, as they go into a library's name."""
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        flags = ""
    return f"{version}|{platform.machine()}|{flags}"


def build(source: str | Path) -> Path:
    """The shared library of a C++ file (and the headers beside it), made if it is not there yet."""
    source, path = Path(source), compiler()
    headers = sorted({*source.parent.glob("*.h"), *source.parent.parent.glob("*.h")})
    text = b"".join(file.read_bytes() for file in (source, *headers))
    key = hashlib.sha256(text + _identity(path).encode() + repr((FLAGS, TARGETS)).encode()).hexdigest()[:16]
    library = cache_folder() / f"{source.parent.name}-{source.stem}-{key}.so"
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
    for target in TARGETS:
        command = [path, *FLAGS, *target, f"-I{source.parent.parent}", str(source), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{path} took more than {SECONDS} s for {source.name}") from error
        if done.returncode == 0:
            return
    first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
    raise BuildError(f"{path} cannot build {source.name}: {first}")


def load(source: str | Path, functions: Mapping[str, Sequence[object]]) -> ctypes.CDLL | None:
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
    return library


def num_threads() -> int:
    return torch.get_num_threads()
