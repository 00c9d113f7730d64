"""How much memory an engine's keys and values get: how many blocks, and what each process may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from labkit.core.options import whole

CPU_SHARE = 0.25  # share of the free memory that a CPU uses for keys and values
GIB = 2**30


def partition(given: Any, stages: int | None) -> tuple[int, ...] | None:
    """The layers of each stage, from "15,15,16,15" or a list; `stages` None: of as many as there are.

    >>> partition("5,3", 2)
    (5, 3)
    """
    if given is None:
        return None
    parts: Any = given.split(",") if isinstance(given, str) else given
    wrong = f"pp_layer_partition is the layers of each stage, such as '15,15,16,15', got {given!r}"
    try:
        found = tuple(
            int(part) if isinstance(part, str) else whole("pp_layer_partition", part, least=1) for part in parts
        )
    except (TypeError, ValueError):
        raise ValueError(wrong) from None
    if not found or min(found) < 1:
        raise ValueError(f"{wrong}; each stage has a layer at least")
    if stages is not None and len(found) != stages:
        raise ValueError(
            f"pp_layer_partition={given!r} has {len(found)} stages: set pipeline_parallel_size={len(found)}"
        )
    return found


def pool_of(options: Any, device: Any, num_ranks: int) -> tuple[int | None, int, int]:
    """What is known of the pool before the model is loaded; see `labkit.models.place.Pool`."""
    if options.num_blocks is not None:
        return options.num_blocks * (options.block_size or 16), 0, 0
    return None, options.max_num_seqs, int(_memory(options, device, num_ranks))


def num_states(runner: Any, options: Any) -> int | None:
    """How many states of recurrent layers are kept: as many as were asked for, else two a row, if these and the rows'
    own take no more than half of the memory."""
    each: int = getattr(runner, "state_bytes", 0)
    rows: int = options.max_num_seqs
    if not each:
        if options.num_states is not None:
            raise ValueError(f"num_states is for models with recurrent layers, and {runner!r} has none")
        return None
    kept = options.num_states
    if kept is None:
        kept = min(2 * rows, max(0, int(_memory(options, runner.device, 1) / 2 // each) - rows))
    runner.state_room = (rows + kept) * each
    return int(kept)


def _memory(options: Any, device: Any, num_ranks: int) -> float:
    if options.memory_size is not None:
        return float(options.memory_size * GIB * num_ranks)
    if str(device).startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info()[1] * options.gpu_memory_utilization * num_ranks)
    from labkit.runner.memory import available_memory

    return CPU_SHARE * available_memory()


def num_blocks(runner: Any, options: Any, size: int, max_model_len: int) -> int:
    """As many blocks as fit, but no more than could ever be used."""
    most: int = options.max_num_seqs * -(-max_model_len // size) * len(runner.windows)
    if options.memory_size is not None:
        fit = min(most, _fitting(runner.held(size), options.memory_size * GIB, getattr(runner, "state_room", 0)))
        if (asked := options.num_blocks) is not None and asked > fit:
            raise ValueError(
                f"num_blocks={asked} do not fit: with memory_size={options.memory_size:g} GiB a process has room for "
                f"{fit} blocks of {size} tokens"
            )
        return options.num_blocks or fit
    if options.num_blocks is not None:
        return int(options.num_blocks)
    share = options.gpu_memory_utilization if str(runner.device).startswith("cuda") else CPU_SHARE
    found: int = runner.fitting_blocks(size, share, options.max_num_batched_tokens, options.max_num_seqs)
    return min(found, most)


def _fitting(held: Sequence[tuple[int, int]], most: float, states: int = 0) -> int:
    """How many blocks every process has room for. `held`: its bytes of weights and states, and those of a block."""
    fit = min(int((most - weights) // max(each, 1)) - 1 for weights, each in held)  # one more is scratch
    if fit < 1:
        weights, each = max(held)
        less = "lower max_num_seqs or num_states"
        more = f", the states of recurrent layers {_mib(states)} MiB: {less}" if states else ""
        raise ValueError(
            f"memory_size leaves no room for keys and values: a process may hold {_mib(most)} MiB, its weights take "
            f"{_mib(weights - states)} MiB and a block {_mib(each)} MiB{more}"
        )
    return fit


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f}"


def num_host_blocks(runner: Any, options: Any, size: int) -> int:
    if not options.kv_offloading_size:
        return int(options.num_host_blocks)
    each: int = runner.bytes_per_block(size)
    if (blocks := int(options.kv_offloading_size * GIB) // each) < 1:
        raise ValueError(
            f"kv_offloading_size={options.kv_offloading_size} GiB holds no block: a block takes {each} bytes"
        )
    return blocks


def num_disk_blocks(runner: Any, options: Any, size: int) -> int:
    if options.kv_disk_path is None:
        return 0
    from labkit.runner.disk import MOST_HEADER

    each: int = runner.bytes_per_block(size) + 4 * size + MOST_HEADER
    if (blocks := int(options.kv_disk_size * GIB) // each) < 1:
        raise ValueError(f"kv_disk_size={options.kv_disk_size} GiB holds no block: a block takes {each} bytes")
    return blocks
