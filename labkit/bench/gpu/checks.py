"""Correctness checks before any timing: every kernel against its reference, and the model against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from labkit.bench.gpu.where import Where

DTYPES = ("float32", "float16", "bfloat16")
AT_ONCE = 8  # processes: most of a check is compiling


def kernels(where: Where) -> dict[str, Any]:
    """Every variant for this device against its reference, in several processes at once."""
    from labkit_kernels import OPS

    names = ["rms_norm"] if where.quick else sorted(OPS, key=lambda name: name != "paged_attention")
    jobs = [(name, dtype) for name in names for dtype in DTYPES]
    with ThreadPoolExecutor(1 if where.quick else AT_ONCE) as pool:
        found = list(pool.map(lambda job: _elsewhere(where, *job), jobs))
    wrong = [line for one in found for line in one["wrong"]]
    count = sum(one["checked"] for one in found)
    return {"ok": not wrong and count > 0, "checked": count, "wrong": wrong[:20]}


def _elsewhere(where: Where, name: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, "-c", f"from {__name__} import one; one({name!r}, {dtype!r}, {where.device!r})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return {"checked": 0, "wrong": [f"{name} {dtype}: {said}"]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def one(name: str, dtype: str, device: str) -> None:
    """One op's variants for this device, in one dtype; printed as JSON."""
    from labkit_kernels import check, get

    op = get(name)
    op.load_all()
    count, wrong = 0, []
    for variant in op.variants.values():
        if variant.device == torch.device(device).type:
            report = check(op, variant.name, device, [getattr(torch, dtype)])
            count += report.count("ok")
            bad = [row for row in report.rows if row.status not in ("ok", "refused")]
            wrong += [f"{row.op}/{row.variant}: {row.case} {row.dtype}: {row.reason}" for row in bad]
    print(json.dumps({"checked": count, "wrong": wrong}))


def gate(where: Where) -> dict[str, Any]:
    """The embedded model against transformers."""
    from labkit.assets import path
    from labkit.bench import gate as quality

    found = quality.check(str(path("tiny")), "bfloat16", where.device)
    return {"ok": found.ok, "kl": found.kl, "agreement": found.agreement}


def limits(where: Where) -> dict[str, Any]:
    """Bandwidth measured by reading random data, and the GEMM peak on random data, which draws more power than
    constants."""
    from labkit.bench import limit

    found = limit.measure(where.device, where.dtype)
    sheet = limit.datasheet(where.device)
    return {
        "bandwidth": found.bandwidth,
        "peak": found.peak,
        **({"datasheet_bandwidth": sheet.bandwidth, "datasheet_peak": sheet.peak} if sheet else {}),
    }
