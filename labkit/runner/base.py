"""The interface of a runner: it is given plans and returns results. Does not depend on the scheduler."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from labkit.core.plan import Plan, Result

# What keys and values can be stored as, and the name of torch's dtype; "auto" is the model's own.
KV_CACHE_DTYPES = {
    "auto": None,
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
}


class Layout(NamedTuple):
    """What a runner must allocate. Block 0 is scratch and is not counted in `num_blocks`."""

    num_blocks: int
    block_size: int
    num_rows: int
    num_host_blocks: int = 0
    windows: tuple[int | None, ...] = (None,)  # by group of layers: the last tokens they attend to, None: all
    num_disk_blocks: int = 0  # blocks that may be kept on disk
    num_adapters: int = 0  # that the device holds at a time
    num_states: int | None = None  # kept states of recurrent layers, besides one a row; None: there are no such layers


class Pending(Protocol):
    """A launched plan; `result()` waits for it."""

    def result(self) -> Result: ...


class Runner(Protocol):
    """Call `open` once, then `launch` plans in order. A launch may return before the work is done. A runner with a disk
    also has `on_disk()`: the blocks that it found there when it was opened, the longest unused first."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def open(self, layout: Layout) -> None: ...
    def launch(self, plan: Plan) -> Pending: ...


class Done(NamedTuple):
    """A plan that was computed during launch."""

    value: Result

    def result(self) -> Result:
        return self.value
