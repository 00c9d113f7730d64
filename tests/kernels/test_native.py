"""C++ is built on first use: once, by whichever process comes first, and never with a wrong result."""

import ctypes
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import labkit_kernels
import numpy as np
import pytest
import torch
from labkit_kernels import native

KERNELS = Path(labkit_kernels.__file__).parent
ADD = 'extern "C" void add(float* x, float y, long n) { for (long i = 0; i < n; i++) x[i] += y; }\n'
ARGUMENTS = {"add": [ctypes.c_void_p, ctypes.c_float, ctypes.c_long]}
pytestmark = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "op"
    folder.mkdir()
    (folder / "cpu.cpp").write_text(ADD)
    return folder / "cpu.cpp"


def test_a_library_is_built_once_and_its_functions_take_pointers(source, monkeypatch):
    library = native.load(source, ARGUMENTS)
    x = torch.arange(5.0)
    library.add(x.data_ptr(), 2.0, 5)
    assert x.tolist() == [2, 3, 4, 5, 6]
    monkeypatch.setattr(native, "_compile", None)
    assert native.load(source, ARGUMENTS) is not None


def test_a_changed_source_or_header_is_another_library(source):
    names = [native.build(source)]
    (source.parent / "beside.h").write_text("// new\n")
    names.append(native.build(source))
    source.write_text(ADD + "// new\n")
    names.append(native.build(source))
    assert len(set(names)) == 3 and all(name.parent == native.cache_folder() for name in names)


def test_two_processes_may_race_to_build(source):
    script = f"from labkit_kernels import native; print(native.build({str(source)!r}))"
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate()[0].strip() for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert said[0] == said[1]
    assert list(native.cache_folder().iterdir()) == [Path(said[0])]


def test_a_source_that_does_not_compile_is_one_warning_with_the_compilers_words(source):
    source.write_text("nonsense;\n")
    with pytest.warns(UserWarning, match=r"plain torch, which is slower: .*cannot build op/cpu.cpp: .*nonsense"):
        assert native.load(source, ARGUMENTS) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load(source, ARGUMENTS) is None
    assert not list(native.cache_folder().iterdir())


def test_a_cache_that_cannot_be_written_is_said(source, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(source))  # a file
    with pytest.raises(native.BuildError, match="set LABKIT_CACHE to a folder that can"):
        native.build(source)


def test_no_compiler_is_one_warning_and_right_results(tmp_path):
    script = """
import warnings, torch, labkit_kernels as lk
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(3, 8)
    assert torch.equal(lk.rms_norm(x, torch.ones(8), 1e-6), lk.rms_norm.reference(x, torch.ones(8), 1e-6))
    assert torch.equal(lk.silu_mul(x), lk.silu_mul.reference(x))
    assert not lk.rope.has("cpu")
(one,) = [str(w.message) for w in caught if "plain torch" in str(w.message)]
print(one)
"""
    env = {"CXX": "no-such-compiler", "LABKIT_CACHE": str(tmp_path), "PYTHONPATH": str(KERNELS.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "looked for no-such-compiler; install one (g++), or set CXX to its path" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    script = (
        "import torch, labkit_kernels as lk\n"
        "for op in lk.OPS.values(): op.load('cpu')\n"
        "lk.rms_norm(torch.ones(512, 512), torch.ones(512), 1e-6)\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "names = ('libgomp', 'libomp', 'libiomp')\n"
        "found = {path for path in maps if any(name in path for name in names)}\n"
        "assert len(found) == 1, found\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(source):
    source.write_text(
        f'#include "{KERNELS / "simd.h"}"\n'
        """using namespace labkit;
extern "C" void narrow(const float* x, bf16* vectors, bf16* scalars, long n) {
    for (long i = 0; i < n; i += W) store(vectors + i, load(x + i));
    for (long i = 0; i < n; i++) from_float(scalars + i, x[i]);
}
extern "C" void widen(const bf16* x, float* vectors, float* scalars, long n) {
    for (long i = 0; i < n; i += W) store(vectors + i, load(x + i));
    for (long i = 0; i < n; i++) scalars[i] = to_float(x[i]);
}
"""
    )
    library = native.load(
        source, {"narrow": [ctypes.c_void_p] * 3 + [ctypes.c_long], "widen": [ctypes.c_void_p] * 3 + [ctypes.c_long]}
    )
    bits = np.random.default_rng(0).integers(0, 2**32, 1 << 16, dtype=np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    x = torch.from_numpy(np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32))
    found = torch.empty(2, len(x), dtype=torch.bfloat16)
    library.narrow(x.data_ptr(), found[0].data_ptr(), found[1].data_ptr(), len(x))
    expected = x.bfloat16()
    for one in found:
        assert torch.equal(one.isnan(), expected.isnan())
        assert torch.equal(one.nan_to_num(nan=0.0).view(torch.int16), expected.nan_to_num(nan=0.0).view(torch.int16))
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = torch.empty(2, len(every))
    library.widen(every.data_ptr(), wide[0].data_ptr(), wide[1].data_ptr(), len(every))
    for one in wide:
        assert torch.equal(one.view(torch.int32), every.float().view(torch.int32))
