"""Packed products on processors with fewer instructions than this one: built for them, and called here."""

import os
import subprocess
import sys

import pytest
import torch
from labkit_kernels import Integers, Packed, check, get, native

NEEDS = {"haswell": {"avx2", "fma", "f16c"}, "cascadelake": {"avx512f", "avx512vl", "avx512_vnni"}}
OPS = ("linear", "linear_argmax", "mlp", "integer_linear", "integer_argmax", "integer_mlp")
ROWS = [(0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 28), (30, 223)]
TABLE = [-127, -90, -60, -40, -20, -9, -3, 0, 2, 8, 19, 37, 60, 85, 110, 127]


def packed_products() -> None:
    """In float32 sums of bfloat16: no row depends on the rows beside it."""
    product = get("linear").variants["cpu"].function
    generator = torch.Generator().manual_seed(0)
    weight = Packed.pack(torch.randn(70, 300, generator=generator).bfloat16())
    x = torch.randn(400, 300, generator=generator).bfloat16()
    whole = product(x, weight)
    for begin, end in ROWS:
        assert torch.equal(product(x[begin:end], weight), whole[begin:end]), (begin, end)


def invariant_products() -> None:
    """Sums in float32 are rounded alike in blocks of four rows and of one."""
    product = get("linear_invariant").pick("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    for depth in (16, 50, 72):
        x, weight = torch.randn(37, depth, generator=generator), torch.randn(23, depth, generator=generator)
        whole = product(x, weight)
        assert all(torch.equal(product(x[i : i + 1], weight)[0], whole[i]) for i in range(len(x))), depth


def integer_products() -> list[torch.Tensor]:
    """Their bits are the same on all processors."""
    product = get("integer_linear").variants["cpu"].function
    generator, found = torch.Generator().manual_seed(0), []
    for bits, group, depth, table in [
        (8, 300, 300, None), (8, 16, 200, None), (4, 32, 256, None), (4, 48, 200, None), (4, 64, 192, TABLE),
    ]:  # fmt: skip
        low, high, dtype = (-128, 128, torch.int8) if bits == 8 else (0, 16, torch.uint8)
        values = torch.randint(low, high, (70, depth), generator=generator).to(dtype)
        scales = torch.rand(2, 70, -(-depth // group), generator=generator)
        more = {} if table is None else {"table": tuple(table)}
        if bits == 4 and group == 32:
            more["order"] = torch.randperm(depth, generator=generator)
        weight = Integers.pack(
            values, scales[0], scales[1] - 0.5 if group < 64 else None, group=group, bits=bits, **more
        )
        x = torch.randn(250, depth, generator=generator).bfloat16()
        x[7] = 0
        x[8, 5] = 3e38
        whole = product(x, weight, out_dtype=torch.float32)
        for begin, end in ROWS:
            assert torch.equal(product(x[begin:end], weight, out_dtype=torch.float32), whole[begin:end]), (begin, end)
        found.append(whole)
    return found


@pytest.mark.parametrize("march", NEEDS)
def test_packed_products_on_processors_without_bfloat16(march, tmp_path):
    """AVX2, and AVX-512 before it had products of bfloat16; the first without OpenMP, as on macOS, and tuned for AMD,
    where GCC likes to leave sums of products unfused."""
    if not native.cpu_flags() >= NEEDS[march]:
        pytest.skip(f"this processor does not have all of {', '.join(NEEDS[march])}")
    path = os.pathsep.join([os.getcwd(), *sys.path])
    environ = os.environ | {"LABKIT_CACHE": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, __file__, march, tmp_path / "found.pt"], env=environ, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if get("integer_linear").picked("cpu", torch.bfloat16).name == "cpu":
        for one, other in zip(torch.load(tmp_path / "found.pt"), integer_products(), strict=True):
            assert torch.equal(one, other)


if __name__ == "__main__":
    more = ("-mtune=znver3",) if sys.argv[1] == "haswell" else ("-fopenmp",)
    if native._takes(native.compiler(), native.FUSED, "int main() {}"):
        more = (*more, native.FUSED)
    native._targets = lambda path: ((f"-march={sys.argv[1]}", *more),)
    torch.set_num_threads(2)
    for name in OPS:
        report = check(name, "cpu")
        assert report.ok and "cpu" in get(name).variants, report
    packed_products()
    invariant_products()
    torch.save(integer_products(), sys.argv[2])
