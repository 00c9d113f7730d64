"""`labkit doctor`: checks versions, devices, compiler, folders and the embedded model. Changes nothing.

A probe is a function that returns rows. If a probe fails unexpectedly, the error becomes a row and the others still
run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labkit.widgets import style

OK, WARN, FAIL = "ok", "warn", "fail"
PYTHONS = ((3, 11), (3, 14))  # lower bound, and upper bound (excluded)
EXTRAS = ("lab", "study", "server", "images", "structured")
MARKS = {OK: "ok  ", WARN: "warn", FAIL: "FAIL"}
COLORS = {OK: style.HUES[2], WARN: style.HUES[1], FAIL: style.HUES[5]}
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One finding. A row that is not ok says what to do."""

    name: str
    state: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Report:
    """All rows. `ok` is False if one failed; warnings leave it True.

    >>> Report((Row("compiler", "ok", "g++ 13"),))
    ok    compiler  g++ 13
    1 ok, 0 warnings, 0 failures
    """

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return not self.count(FAIL)

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {"labkit_doctor": 1, "ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    def __repr__(self) -> str:
        wide = max((len(row.name) for row in self.rows), default=0)
        lines = []
        for row in self.rows:
            lines.append(f"{MARKS[row.state]}  {row.name:{wide}}  {row.found}")
            if row.fix:
                lines.append(f"{'':{wide + 8}}{row.fix}")
        return "\n".join([*lines, self._sum()])

    def _sum(self) -> str:
        return f"{self.count(OK)} ok, {self.count(WARN)} warnings, {self.count(FAIL)} failures"

    def _repr_html_(self) -> str:
        from html import escape

        lines = [
            (style.key(row.state, COLORS[row.state]), escape(row.name),
             escape(row.found) + (f"<br><b>{escape(row.fix)}</b>" if row.fix else ""))
            for row in self.rows
        ]  # fmt: skip
        return style.page(style.title(self._sum()), style.table((), lines, align="lll"))


Probe = Callable[[], Iterable[Row]]


def examine(probes: dict[str, Probe] | None = None) -> Report:
    """Check everything. Takes some seconds, because it builds the CPU kernels and loads a model."""
    rows: list[Row] = []
    for name, probe in (PROBES if probes is None else probes).items():
        try:
            rows += probe()
        except Exception as error:  # one failing check must not hide the others
            rows.append(
                Row(name, FAIL, f"{type(error).__name__}: {error}", "this check itself failed: please report it")
            )
    return Report(tuple(rows))


# -- probes ----------------------------------------------------------------------------------------------------------


def python() -> Iterator[Row]:
    shown = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        yield Row("python", OK, shown)
    else:
        yield Row("python", FAIL, shown, "labkit needs Python 3.11 to 3.13")


def packages() -> Iterator[Row]:
    """Installed versions against the requirements in pyproject.toml."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in importlib.metadata.requires("labkit") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Row("packages", WARN, "labkit itself is not installed", "pip install -e . in its folder")
        return
    for extra in ("", *EXTRAS):
        mine = [r for r in asked if (r.marker is None or r.marker.evaluate({"extra": extra})) and r.name != "labkit"]
        base = {r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}
        versions, wrong = [], []
        for requirement in mine:
            if extra and requirement.name in base:
                continue
            version = _version(requirement.name)
            versions.append(f"{requirement.name} {version or 'missing'}")
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{requirement.name}{requirement.specifier}")
        name, target = (f"packages, {extra}", f"'labkit[{extra}]'") if extra else ("packages", "labkit")
        if wrong:
            state = WARN if extra else FAIL
            yield Row(name, state, ", ".join(versions), f"pip install {target} (needs {', '.join(wrong)})")
        else:
            yield Row(name, OK, ", ".join(versions))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu() -> Iterator[Row]:
    import torch

    devices = nvidia_devices()
    if not torch.cuda.is_available():
        if devices:
            fix = "install a PyTorch build with CUDA (pytorch.org has the line), or a newer driver"
            yield Row("gpu", WARN, f"{', '.join(devices)}; torch {torch.__version__} does not see it", fix)
        else:
            yield Row("gpu", OK, "none: kernels run on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        free, total = torch.cuda.mem_get_info(i)
        found = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        if (major, minor) < (8, 0):
            yield Row("gpu", WARN, found, "Triton kernels need sm_80 or newer: run with device='cpu'")
        elif free < 2 * GIB:
            yield Row("gpu", WARN, found, "other programs hold its memory: nvidia-smi lists them")
        else:
            yield Row("gpu", OK, found)
    triton = _version("triton")
    if triton is None:
        yield Row("triton", FAIL, "missing", "pip install triton: without it a GPU has no kernels")
    else:
        yield Row("triton", OK, f"{triton}, CUDA {torch.version.cuda}")


def nvidia_devices() -> list[str]:
    """GPUs that the driver lists, whatever torch was built for; empty without nvidia-ml-py or a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def jupyter() -> Iterator[Row]:
    fix = "pip install 'labkit[lab]' into the environment that runs the Jupyter server, and restart it"
    version = _version("ipykernel")
    if version is None or tuple(int(part) for part in version.split(".")[:2]) < (7, 1):
        yield Row("ipykernel", WARN, version or "missing", "pip install 'ipykernel>=7.1': live figures need it")
    else:
        yield Row("ipykernel", OK, version)
    folders = labextensions()
    for name, path in (("anywidget", "anywidget"), ("ipywidgets", "@jupyter-widgets/jupyterlab-manager")):
        seen = next((folder / path for folder in folders if (folder / path).is_dir()), None)
        if seen is None:
            yield Row(f"{name} in JupyterLab", WARN, f"in none of {len(folders)} extension folders", fix)
        else:
            yield Row(f"{name} in JupyterLab", OK, str(seen))


def labextensions() -> list[Path]:
    """Where a Jupyter server of this environment looks for lab extensions."""
    try:
        from jupyter_core.paths import jupyter_path
    except ImportError:
        return []
    return [Path(path) for path in jupyter_path("labextensions")]


def compiler() -> Iterator[Row]:
    from labkit_kernels import native

    slower = "without it the CPU kernels run in plain torch, which is slower"
    try:
        path = native.compiler()
    except native.BuildError as error:
        yield Row("compiler", WARN, str(error), slower)
        return
    yield Row("compiler", OK, path)
    sources = sorted(Path(native.__file__).parent.glob("*/cpu.cpp"))
    begin, built = time.perf_counter(), 0
    for source in sources:
        try:
            native.build(source)
            built += 1
        except native.BuildError as error:
            yield Row(f"CPU kernel, {source.parent.name}", WARN, str(error), slower)
    yield Row("CPU kernels", OK if built else WARN, f"{built} of {len(sources)}, {time.perf_counter() - begin:.1f} s")


def cpu() -> Iterator[Row]:
    flags = cpu_flags()
    shown = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if name in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{cores} cores; {', '.join(shown) or 'none of avx2, avx512f, amx_bf16'}"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        yield Row("cpu", WARN, found, "the CPU kernels are written for AVX2 and later: expect them to be slow")
    else:
        yield Row("cpu", OK, found)


def cpu_flags() -> frozenset[str]:
    from labkit_kernels import native

    return native.cpu_flags()


def memory() -> Iterator[Row]:
    free = free_memory()
    if free is None:
        yield Row("memory", OK, "not reported by this system")
    elif free < 2 * GIB:
        yield Row("memory", WARN, f"{free / GIB:.1f} GiB free", "give engines num_blocks=, or end other programs")
    else:
        yield Row("memory", OK, f"{free / GIB:.1f} GiB free")


def free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def folders() -> Iterator[Row]:
    for name, (path, fix) in caches().items():
        problem = why_not_writable(path)
        yield Row(name, OK, str(path)) if problem is None else Row(name, WARN, f"{path}: {problem}", fix)


def caches() -> dict[str, tuple[Path, str]]:
    """The cache folders: (path, what setting moves it)."""
    from labkit_kernels.native import cache_folder

    home = Path.home()
    hub = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface")
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton")
    return {
        "cache of kernels": (cache_folder(), "set LABKIT_CACHE to a folder that can be written"),
        "cache of models": (hub, "set HF_HOME to a folder that can be written"),
        "cache of Triton": (triton, "set TRITON_CACHE_DIR to a folder that can be written"),
    }


def why_not_writable(path: Path) -> str | None:
    """None if files can be created there, else the reason. The folder need not exist yet."""
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"no permission to write to {there}"


def browser() -> Iterator[Row]:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        yield Row("chromium", WARN, "missing", "apt install chromium: only the browser tests need it")
    else:
        yield Row("chromium", OK, found)


def port() -> Iterator[Row]:
    taken = [number for number in (8888, 8000) if not is_free(number)]
    if not is_free(0):
        yield Row("port", FAIL, "none can be opened on 127.0.0.1", "allow this user to listen on 127.0.0.1")
    elif taken:
        fix = "JupyterLab takes the next one; labkit lab --port and labkit serve --port choose"
        yield Row("port", OK, f"{', '.join(map(str, taken))} taken; {fix}")
    else:
        yield Row("port", OK, "8888 and 8000 are free")


def is_free(number: int) -> bool:
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def model() -> Iterator[Row]:
    from labkit.core.params import SamplingParams
    from labkit.engine.engine import Engine

    begin = time.perf_counter()
    engine = Engine(num_blocks=16, device="cpu")
    try:
        handle = engine.generate("import os\n", SamplingParams(temperature=0, max_tokens=8))
    finally:
        engine.close()
    took = time.perf_counter() - begin
    if handle.num_output:
        yield Row("embedded model", OK, f"loaded and wrote {handle.num_output} tokens in {took:.1f} s")
    else:
        yield Row(
            "embedded model", FAIL, "loaded, but generated nothing", "install labkit again: its files may be damaged"
        )


PROBES: dict[str, Probe] = {
    "python": python,
    "packages": packages,
    "gpu": gpu,
    "jupyter": jupyter,
    "compiler": compiler,
    "cpu": cpu,
    "memory": memory,
    "folders": folders,
    "chromium": browser,
    "port": port,
    "embedded model": model,
}
