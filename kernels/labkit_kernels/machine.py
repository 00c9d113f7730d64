"""Measures the peak rates of this machine: bytes/s from cache and from memory, and flop/s."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SECONDS = 0.2  # seconds per measurement
LEAST = 3  # samples per measurement
FLUSH = 256 << 20  # bytes that push everything else out of a GPU's cache
MEMORY = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes of a probe, so that no cache helps
SLOW = 5e9  # flop/s: a larger product would take seconds and show no more
UNKNOWN_CACHE = 32 << 20  # bytes, if the system does not report it


class Machine:
    """The roofs of one device, each measured on first use.

    On a CPU a call finds in the cache what the previous call left there, so data that fits is compared with the cache's
    bandwidth. On a GPU the cache is flushed before every timed call, so all bytes come from memory.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.cache_bytes = _cache_bytes() if device == "cpu" else 0
        self._flush = torch.empty(FLUSH // 4, dtype=torch.int32, device=device) if device == "cuda" else None
        self._bytes_per_second: dict[str, float] = {}
        self._flops_per_second: dict[torch.dtype, float] = {}

    def __repr__(self) -> str:
        found = [f"{name} {1e-9 * rate:.0f} GB/s" for name, rate in self._bytes_per_second.items()]
        found += [f"{str(d)[6:]} {1e-9 * rate:.0f} GFLOP/s" for d, rate in self._flops_per_second.items()]
        return f"Machine({self.device}{': ' if found else ''}{', '.join(found)})"

    def times(self, run: Callable[[], Any]) -> list[float]:
        """Seconds a call, several samples."""
        return self._times_on_cuda(run) if self._flush is not None else self._times_on_cpu(run)

    def limit(self, moved: int, computed: int, dtype: torch.dtype) -> tuple[float, str]:
        """The least seconds in which this machine could move and compute this much, and the roof that bounds it."""
        place = self.place(moved)
        moving = moved / self.bytes_per_second(place) if moved else 0.0
        computing = computed / self.flops_per_second(dtype) if computed else 0.0
        if not (moved or computed):
            return 0.0, ""
        return (moving, place) if moving >= computing else (computing, "compute")

    def place(self, moved: int) -> str:
        """Where this many bytes are between two calls. A cache may still hold part of twice its size."""
        return "cache" if moved <= 2 * self.cache_bytes else "memory"

    def bytes_per_second(self, place: str) -> float:
        """The best rate that reading or copying reaches in `cache` or `memory`."""
        if place not in self._bytes_per_second:
            self._bytes_per_second[place] = self._measure_bytes(place)
        return self._bytes_per_second[place]

    def flops_per_second(self, dtype: torch.dtype) -> float:
        """The rate that a product of two large random matrices reaches."""
        if dtype not in self._flops_per_second:
            self._flops_per_second[dtype] = self._measure_flops(dtype)
        return self._flops_per_second[dtype]

    def measure_again(self, roof: str, dtype: torch.dtype) -> None:
        """Measure a roof again that a call exceeded: the machine may have been busy when it was measured. It can only
        rise."""
        if roof == "compute":
            self._flops_per_second[dtype] = max(self.flops_per_second(dtype), self._measure_flops(dtype))
        else:
            self._bytes_per_second[roof] = max(self.bytes_per_second(roof), self._measure_bytes(roof))

    def _measure_bytes(self, place: str) -> float:
        if place == "memory":
            return self._move(MEMORY[self.device])
        sizes = [size for size in (1 << k for k in range(17, 40)) if size <= self.cache_bytes // 2]
        return max(self._move(size) for size in sizes or [self.cache_bytes])  # the caches near a core are among them

    def _move(self, size: int) -> float:
        source = torch.arange(size // 4, dtype=torch.int32, device=self.device)
        target, half = torch.empty_like(source[: size // 8]), source[: size // 8]
        reading = min(self.times(lambda: torch.max(source)))
        return size / min(reading, min(self.times(lambda: target.copy_(half))))

    def _measure_flops(self, dtype: torch.dtype) -> float:
        if self.device == "cuda":
            return self._product(8192, dtype)
        rates = [self._product(512, dtype)]
        if rates[0] > SLOW:
            rates.append(self._product(1024, dtype))
        if dtype.itemsize == 2:  # kernels may compute in float32, which is faster where 16 bits are emulated
            rates.append(self.flops_per_second(torch.float32))
        return max(rates)

    def _product(self, size: int, dtype: torch.dtype) -> float:
        a: Tensor = torch.randn(size, size, device=self.device).to(dtype)
        return 2 * size**3 / min(self.times(lambda: a @ a))

    def _times_on_cpu(self, run: Callable[[], Any]) -> list[float]:
        run()
        begin = time.perf_counter()
        run()
        once = time.perf_counter() - begin
        repeat = max(1, int(5e-4 / max(once, 1e-7)))  # a sample shorter than half a millisecond measures the clock
        found: list[float] = []
        stop = time.perf_counter() + SECONDS
        while len(found) < LEAST or time.perf_counter() < stop:
            begin = time.perf_counter()
            for _ in range(repeat):
                run()
            found.append((time.perf_counter() - begin) / repeat)
        return found

    def _times_on_cuda(self, run: Callable[[], Any]) -> list[float]:
        assert self._flush is not None
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        found: list[float] = []
        spent = 0.0
        while len(found) < LEAST or (spent < SECONDS and len(found) < 200):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began = time.perf_counter()
            self._flush.zero_()  # an op reads from memory, and its launch hides behind this
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            spent += time.perf_counter() - began
            found.append(begin.elapsed_time(end) * 1e-3)
        return found


def _cache_bytes() -> int:
    """Size of the largest cache that a thread of this CPU uses."""
    found = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            found.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(found, default=UNKNOWN_CACHE)
