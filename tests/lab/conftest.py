"""Variants made in a test are removed afterwards, and measurements are short."""

import importlib
from collections.abc import Callable, Iterator

import pytest
from labkit_kernels import OPS, get

import labkit as lk


@pytest.fixture
def variant() -> Iterator[Callable]:
    """`variant("rms_norm", "mine", function)` for the time of a test; no op may be left swapped."""
    made = []

    def make(op: str, name: str, function: Callable) -> Callable:
        get(op).variant(name)(function)
        made.append((op, name))
        return function

    yield make
    for op, name in made:
        get(op).variants.pop(name, None)
        get(op).checked.pop(name, None)
    assert not [op for op in OPS.values() if op.swapped]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(importlib.import_module("labkit_kernels.machine"), "SECONDS", 0.002)


@pytest.fixture(scope="module")
def engine() -> Iterator[lk.Engine]:
    """In float32: in bfloat16 some CPUs compute norms inside products, and call no rms_norm."""
    eng = lk.Engine(num_blocks=128, dtype="float32")
    yield eng
    assert eng.close().ok


def fine_rms_norm(x, weight, eps, residual=None):
    """The reference's own formula in another order."""
    from labkit_kernels import rms_norm

    return rms_norm.reference(x, weight, eps, residual)


def wrong_rms_norm(x, weight, eps, residual=None):
    return fine_rms_norm(x, weight, eps + 0.3, residual)
