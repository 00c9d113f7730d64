"""If a new Triton moved something, the error names it and the versions that work."""

import importlib

import pytest

triton = pytest.importorskip("triton")

from labkit_kernels import jit  # noqa: E402


def test_a_part_that_is_gone_is_said_with_the_versions_that_work(monkeypatch):
    monkeypatch.delattr("triton.runtime.interpreter.TensorHandle")
    first, last = jit.TESTED
    expected = f"triton {triton.__version__} changed triton.runtime.interpreter.TensorHandle: it no longer exists; "
    with pytest.raises(ImportError) as caught:
        importlib.reload(jit)
    assert str(caught.value).startswith(f"{expected}labkit was tested with {first} to {last}: pip install 'triton>=")
    monkeypatch.undo()
    importlib.reload(jit)


def test_the_versions_that_were_tested_hold_the_installed_one():
    first, last = (tuple(map(int, version.split("."))) for version in jit.TESTED)
    assert first <= tuple(map(int, triton.__version__.split(".")[:2])) <= last
