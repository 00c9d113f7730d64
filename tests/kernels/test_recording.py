"""A recording makes the same calls again, with arguments of every kind, and Python code between them where it was."""

import ctypes
import shutil

import labkit_kernels
import pytest
import torch
from labkit_kernels import native
from labkit_kernels.calls import between
from labkit_kernels.recording import record

MIX = """
#include "{repeat}"
struct Pair {{ int64_t a; double b; }};
extern "C" void mix(double* out, double a, int b, const int64_t* none, int64_t c, float d, const Pair* pair,
                    const int64_t* pair_of, int e, int64_t f, double g, bool h) {{
    const double all[] = {{a, (double)b, none == nullptr ? 1. : 0., (double)c, d, (double)pair->a, pair->b,
                          (double)pair_of[1], (double)e, (double)f, g, (double)h}};
    for (int i = 0; i < 12; i++) out[i] += all[i];
}}
extern "C" void twice(double* x, int64_t n) {{ for (int64_t i = 0; i < n; i++) x[i] *= 2; }}
LABKIT_REPEATABLE(mix)
{more}
"""
pytestmark = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler")


class Pair(ctypes.Structure):
    _fields_ = [("a", ctypes.c_int64), ("b", ctypes.c_double)]


Two = ctypes.c_int64 * 2
KINDS = {
    "mix": [ctypes.c_void_p, ctypes.c_double, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float,
            ctypes.POINTER(Pair), Two, ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_bool],
    "twice": [ctypes.c_void_p, ctypes.c_int64],
}  # fmt: skip
SUMS = [0.5, -3, 1, -(2**40), 0.25, 7, -1.5, 12, 1, 2**50, 1e300, 1]


def build(folder, more: str):
    (folder / "op").mkdir()
    source = folder / "op" / "cpu.cpp"
    header = f"{labkit_kernels.__path__[0]}/repeat.h"
    source.write_text(MIX.format(repeat=header, more=more))
    return native.load(source, KINDS)


@pytest.mark.parametrize("more, parts", [("LABKIT_REPEATABLE(twice)", 1), ("", 2)])
def test_arguments_of_every_kind_are_given_again(tmp_path, monkeypatch, more, parts):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    library = build(tmp_path, more)
    out = torch.zeros(12, dtype=torch.float64)

    def calls():
        pair = Pair(7, -1.5)
        library.mix(out.data_ptr(), 0.5, -3, None, -(2**40), 0.25, pair, Two(11, 12), True, 2**50, 1e300, True)
        library.twice(out.data_ptr(), 12)

    _, recording = record(calls)
    once = torch.tensor(SUMS, dtype=torch.float64) * 2
    assert torch.equal(out, once)
    assert len(recording.calls) == 2 and len(recording.parts) == parts
    del calls
    for _ in range(3):
        out.zero_()
        recording.repeat()
        assert torch.equal(out, once)


def test_python_between_calls_stays_between_them(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    library, out, seen = build(tmp_path, "LABKIT_REPEATABLE(twice)"), torch.ones(1, dtype=torch.float64), []

    def calls():
        library.twice(out.data_ptr(), 1)
        library.twice(out.data_ptr(), 1)
        between(lambda: seen.append(out.item()))
        library.twice(out.data_ptr(), 1)

    _, recording = record(calls)
    assert len(recording.parts) == 3
    recording.repeat()
    assert seen == [4, 32] and out.item() == 64
