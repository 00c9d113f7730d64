"""Ops of LLM inference: references, variants, checks, benches. Tensors and scalars only; never imports labkit."""

from .activation import gelu_mul, silu_mul
from .attention import paged_attention
from .bench import bench
from .cache import copy_blocks, store_kv, swap_blocks
from .check import Case, Report, Tolerance, check
from .inputs import step_inputs
from .integer import Integers, integer_argmax, integer_linear, integer_mlp
from .linear import Packed, linear, linear_argmax, linear_invariant, matmul, matmul_add, mlp
from .lora import lora_expand, lora_shrink
from .mass import attention_mass
from .norm import layer_norm, rms_norm
from .quantized import Grouped, Scaled, linear_grouped, linear_scaled, quantize_rows
from .recurrent import Sequences, causal_conv, gated_delta, selective_scan, ssd
from .registry import OPS, Op, Variant, generation, get, watched
from .rotary import rope, rope_kv
from .sampling import sample

__all__ = [
    "OPS",
    "Case",
    "Grouped",
    "Integers",
    "Op",
    "Packed",
    "Report",
    "Scaled",
    "Sequences",
    "Tolerance",
    "Variant",
    "attention_mass",
    "bench",
    "causal_conv",
    "check",
    "copy_blocks",
    "gated_delta",
    "gelu_mul",
    "generation",
    "get",
    "integer_argmax",
    "integer_linear",
    "integer_mlp",
    "layer_norm",
    "linear",
    "linear_argmax",
    "linear_grouped",
    "linear_invariant",
    "linear_scaled",
    "lora_expand",
    "lora_shrink",
    "matmul",
    "matmul_add",
    "mlp",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "rope",
    "rope_kv",
    "sample",
    "selective_scan",
    "silu_mul",
    "ssd",
    "step_inputs",
    "store_kv",
    "swap_blocks",
    "watched",
]
