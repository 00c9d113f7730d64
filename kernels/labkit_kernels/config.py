"""What a Triton kernel is compiled for: an architecture, and one configuration of its arguments. Does not import
Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ARCHS = (80, 90, 100)
MOST_SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes one program may take


@dataclass(frozen=True)
class Config:
    """A kernel's default launch: the types of its arguments and the values of its constants.

    `constexprs` may hold num_warps and num_stages, like the keyword arguments of a launch. Pointers are assumed to be
    aligned to 16 bytes, and so are the integers named in `aligned`.
    """

    kernel: Any  # a triton.jit function
    signature: dict[str, str]  # name -> "*bf16", "i32", "fp32"
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    archs: tuple[int, ...] = ARCHS
    aligned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        constants = dict(self.constexprs)
        object.__setattr__(self, "num_warps", constants.pop("num_warps", self.num_warps))
        object.__setattr__(self, "num_stages", constants.pop("num_stages", self.num_stages))
        object.__setattr__(self, "constexprs", constants)

    def __repr__(self) -> str:
        pointers = [kind[1:] for kind in self.signature.values() if kind.startswith("*")]
        dtypes = dict.fromkeys(kind for kind in pointers if not kind.startswith("i"))  # index tensors are left out
        return " ".join([*dtypes, *(f"{name}={value}" for name, value in self.constexprs.items())])
