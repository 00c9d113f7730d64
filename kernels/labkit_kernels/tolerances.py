"""Tolerances for ops that compute in float32 and round once."""

from __future__ import annotations

import torch

from .check import Tolerance

ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def rounded_once(dtype: torch.dtype) -> Tolerance:
    """One unit in the last place of the dtype; in float32, sums in another order."""
    unit = ROUNDING[dtype]
    return Tolerance(unit, unit, "computed in float32 and rounded once; sums may go in another order")


def exact(dtype: torch.dtype) -> Tolerance:
    return Tolerance(0.0, 1e-45, "values are moved, not computed")
