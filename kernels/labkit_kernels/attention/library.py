"""Paged attention by NVIDIA's cuDNN: through torch for a whole prompt, and through cuDNN's own frontend for pages.

Neither is picked unless `labkit kernels tune paged_attention` found it fastest on this machine. On an H100 torch's
cuDNN backend reached 546, 594 and 368 TFLOP/s on prompts of 8k with 16/8 and 32/8 heads of 128 and 14/2 of 64
(2026-11-27); the frontend was not measured.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# a graph's tensors
Q, K, V, OUT, QUERY_COUNT, KEY_COUNT, TABLE, VALUE_TABLE, Q_OFFSET, OUT_OFFSET = range(1, 11)
MOST_GRAPHS = 256


def plain(q: Tensor, k_cache: Tensor, options: dict[str, Any]) -> bool:
    """Whether a call is nothing but causal attention of 16 bits, of heads that cuDNN takes, on a GPU."""
    extras = any(options.get(name) for name in ("window", "softcap", "invariant"))
    tensors = any(options.get(name) is not None for name in ("sinks", "alibi", "splits"))
    narrow = q.dtype in (torch.float16, torch.bfloat16) and k_cache.dtype == q.dtype
    return q.is_cuda and narrow and not extras and not tensors and q.shape[2] <= 128 and q.shape[2] % 8 == 0


def is_whole_prompt(q: Tensor, k_cache: Tensor, seq_len: Tensor, options: dict[str, Any]) -> bool:
    """Whether the host knows that this is one prompt without a past. In a captured step its numbers are only bounds."""
    exact = q.shape[0] == options.get("max_query_len") == options.get("max_seq_len")
    return plain(q, k_cache, options) and len(seq_len) == 1 and exact and not torch.cuda.is_current_stream_capturing()


def attend_whole(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *, scale: float) -> Tensor:
    """One prompt without a past, by torch's cuDNN backend. Pages are copied together first: 3% of its time at 8k."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    length, block = q.shape[0], k_cache.shape[2]
    pages = block_table[0, : -(-length // block)].long()
    keys, values = (cache[pages].transpose(0, 1).flatten(1, 2)[None, :, :length] for cache in (k_cache, v_cache))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    return out[0].transpose(0, 1).contiguous()


NEEDS = "it needs nvidia-cudnn-frontend: pip install 'labkit[gpu]'"


def why_no_frontend(**facts: Any) -> str | None:
    return None if importlib.util.find_spec("cudnn") is not None else NEEDS


def frontend() -> Any:
    """The module `cudnn` of nvidia-cudnn-frontend."""
    try:
        return importlib.import_module("cudnn")
    except ImportError as error:
        raise ImportError(f"variant 'cudnn' of paged_attention: {NEEDS}") from error


def attend_frontend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, query_start: Tensor, seq_len: Tensor, *,
    scale: float, max_query_len: int,
) -> Tensor:  # fmt: skip
    """Any batch, by cuDNN's paged attention. Lengths stay on the device, so a captured step holds."""
    out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3])
    longest = 1 << max(0, max_query_len - 1).bit_length()  # few graphs
    shape = (len(seq_len), *q.shape[1:], *q.stride()[:2], longest)
    run, workspace = _built(shape, k_cache.shape, v_cache.shape, tuple(block_table.shape), q.dtype, scale, q.device)
    table = block_table.contiguous()
    run(
        {
            Q: q, K: k_cache, V: v_cache, OUT: out, QUERY_COUNT: query_start.diff(), KEY_COUNT: seq_len.contiguous(),
            TABLE: table, VALUE_TABLE: table, Q_OFFSET: query_start * q.stride(0),
            OUT_OFFSET: query_start * out.stride(0),
        },
        workspace,
    )  # fmt: skip
    return out


@lru_cache(MOST_GRAPHS)
def _built(
    shape: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], table: tuple[int, ...], dtype: torch.dtype,
    scale: float, device: torch.device,
) -> tuple[Callable[[dict[int, Tensor], Tensor], None], Tensor]:  # fmt: skip
    """A graph built for these shapes, and its scratch memory."""
    cudnn = frontend()
    handle = cudnn.create_handle()
    graph = describe(cudnn, shape, keys, values, table, dtype, scale, handle)
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)

    def run(tensors: dict[int, Tensor], workspace: Tensor) -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        graph.execute(tensors, workspace, handle=handle)

    return run, workspace


def describe(
    cudnn: Any, shape: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...], table: tuple[int, ...],
    dtype: torch.dtype, scale: float, handle: Any = None,
) -> Any:  # fmt: skip
    """cuDNN's graph: queries packed one sequence behind another, keys and values in pages, causal from the end."""
    num_seqs, heads, size, q_token, q_head, longest = shape
    kind = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
    wide = {"intermediate_data_type": cudnn.data_type.FLOAT, "compute_data_type": cudnn.data_type.FLOAT}
    graph = cudnn.pygraph(io_data_type=kind, **wide, **({} if handle is None else {"handle": handle}))

    def tensor(name: int, dim: tuple[int, ...], stride: tuple[int, ...] | None = None, of: Any = None) -> Any:
        dense = [1] * len(dim)
        for i in range(len(dim) - 2, -1, -1):
            dense[i] = dense[i + 1] * dim[i + 1]
        whole = cudnn.data_type.INT32 if of is None else of
        made = graph.tensor(name=f"tensor{name}", dim=list(dim), stride=list(stride or dense), data_type=whole)
        made.set_uid(name)
        return made

    queries = tensor(Q, (num_seqs, heads, longest, size), (longest * q_token, q_head, q_token, 1), kind)
    queries.set_ragged_offset(tensor(Q_OFFSET, (num_seqs + 1, 1, 1, 1)))
    pages = (num_seqs, 1, table[1], 1)
    out, _ = graph.sdpa(
        name="attention", q=queries, k=tensor(K, keys, of=kind), v=tensor(V, values, of=kind), attn_scale=scale,
        generate_stats=False, use_padding_mask=True, use_causal_mask_bottom_right=True,
        seq_len_q=tensor(QUERY_COUNT, (num_seqs, 1, 1, 1)), seq_len_kv=tensor(KEY_COUNT, (num_seqs, 1, 1, 1)),
        paged_attention_k_table=tensor(TABLE, pages), paged_attention_v_table=tensor(VALUE_TABLE, pages),
        paged_attention_max_seq_len_kv=table[1] * keys[2],
    )  # fmt: skip
    token = heads * values[3]
    out.set_uid(OUT).set_output(True).set_dim([num_seqs, heads, longest, values[3]])
    out.set_stride([longest * token, values[3], token, 1]).set_data_type(kind)
    out.set_ragged_offset(tensor(OUT_OFFSET, (num_seqs + 1, 1, 1, 1)))
    return graph
