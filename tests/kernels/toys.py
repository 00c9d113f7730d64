"""A tiny op for tests of the code around ops: doubles a tensor and adds to a total in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from labkit_kernels import OPS, Case, Op, Tolerance
from labkit_kernels.check import randn
from torch import Tensor


def double(x: Tensor, total: Tensor) -> Tensor:
    """2x; the sum of x is added to `total`."""
    total += x.sum()
    return 2 * x


def _cases() -> Iterator[Case]:
    def make(device, dtype, generator):
        x = randn(generator, 4, 10, dtype=dtype)[:, 2:8]
        return (x, torch.zeros(6, device=device, dtype=dtype)[2:4]), {}

    yield Case("a view", make)
    yield Case("a view, long", make, timed=True)


@contextmanager
def toy(name: str = "toy", **options) -> Iterator[Op]:
    """The op, registered while the block runs."""
    op = Op(
        name,
        **{
            "reference": double,
            "cases": _cases,
            "tolerance": lambda dtype: Tolerance(1e-5, 1e-5, "one product") if dtype == torch.float32 else WIDE,
            "traffic": lambda x, total: 2 * x.numel() * x.element_size(),
            "flops": lambda x, total: 2 * x.numel(),
            "home": __name__,
            **options,
        },
    )
    try:
        yield op
    finally:
        del OPS[name]


WIDE = Tolerance(2**-7, 2**-7, "one rounding")
