"""vLLM's engine arguments: what each becomes here. Loads nothing.

An argument sets an option of `Engine`, possibly under another name; or is harmless: accepted, because the result is the
same with it; or fits with some values only, and is refused by name with any other.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from labkit.engine import lora_names
from labkit.engine.build import Options
from labkit.llm.pooling import pooler_settings

if TYPE_CHECKING:
    from labkit.engine.block_events import BlockEventPublisher

RENAMED = {
    "enable_prefix_caching": "prefix_caching",
    "enable_chunked_prefill": "chunked_prefill",
    "scheduling_policy": "order",
    "num_gpu_blocks_override": "num_blocks",
    "long_prefill_token_threshold": "max_prefill_chunk",
    "max_num_queued_reqs": "max_waiting",
}
OWN = ("scheduler", "runner", "clock", "tokenizer", "data_parallel_size", "router", *Options.__dataclass_fields__)

HARMLESS = frozenset((
    # how it runs, not what comes out
    "swap_space", "max_seq_len_to_capture", "cudagraph_capture_sizes", "max_cudagraph_capture_size", "cuda_graph_sizes",
    "compilation_config", "optimization_level", "attention_backend", "attention_config", "kernel_config", "moe_backend",
    "linear_backend", "disable_hybrid_kv_cache_manager", "disable_cascade_attn",
    "async_scheduling", "stream_interval", "block_allocator", "use_v2_block_manager", "num_lookahead_slots",
    "preemption_mode", "prefix_caching_hash_algo", "max_parallel_loading_workers", "safetensors_load_strategy",
    "structured_outputs_config", "guided_decoding_backend", "performance_mode", "enable_flashinfer_autotune",
    "distributed_timeout_seconds", "gpu_memory_limit", "shutdown_timeout", "calculate_kv_scales",
    # what is logged and counted
    "disable_log_stats", "disable_log_requests", "enable_log_requests", "max_log_len", "use_tqdm_on_load",
    "aggregate_engine_logging", "log_level", "kv_cache_metrics", "kv_cache_metrics_sample", "cudagraph_metrics",
    "show_hidden_metrics_for_version", "enable_mfu_metrics", "enable_layerwise_nvtx_tracing", "engine_use_ray",
    "enable_logging_iteration_details", "served_model_name", "fail_on_environ_validation", "jit_monitor_mode",
    # of images, sound and video
    "mm_processor_cache_type",
    "disable_mm_preprocessor_cache", "media_io_kwargs",
    "interleave_mm_strings", "skip_mm_profiling", "mm_encoder_tp_mode", "language_model_only", "enable_mm_embeds",
    "disable_chunked_mm_input", "limit_mm_per_prompt_override",
))  # fmt: skip


class Fits(NamedTuple):
    """The values that change nothing here, and why others are refused."""

    values: tuple[Any, ...]
    why: str


_ONE = Fits((None, 1), "has one engine here, on one host")
_NO = Fits((None, False, 0, "", (), [], {}), "is not served by labkit")
_DRAFT = Fits((None,), "is not an option here; speculative_config={'method': ..., ...} holds it (see lk.Engine)")
_FILES = Fits((None,), "is not read; give a local folder with the files that you want")


def _all(names: str, fits: Fits) -> dict[str, Fits]:
    return dict.fromkeys(names.split(), fits)


FIXED: dict[str, Fits] = {
    **_all(
        "nnodes prefill_context_parallel_size decode_context_parallel_size",
        _ONE,
    ),
    "worker_use_ray": Fits((None, False), _ONE.why),
    "kv_offloading_backend": Fits((None, "native"), "is not there; blocks go to host memory, and from there to files"),
    **_all(
        "enable_expert_parallel enable_eplb enable_dbo enable_sleep_mode enable_prompt_embeds cpu_offload_gb "
        "kv_cache_memory_bytes kv_transfer_config worker_cls worker_extension_cls "
        "scheduler_cls logits_processors logits_processor_pattern "
        "additional_config model_loader_extra_config ignore_patterns otlp_traces_endpoint collect_detailed_traces "
        "reasoning_parser rope_scaling rope_theta disable_sliding_window quantization_config "
        "return_sampling_mask enable_return_routed_experts enable_trace_replay",
        _NO,
    ),
    **_all("enable_lora_bias default_mm_loras lora_target_modules", _NO),
    "fully_sharded_loras": Fits((None, False), "is not served; adapters are sharded as the layers they belong to"),
    "lora_dtype": Fits((None, "auto"), "cannot be chosen; adapters have the model's dtype"),
    **_all("speculative_model num_speculative_tokens spec_method spec_model spec_tokens", _DRAFT),
    **_all("revision code_revision tokenizer_revision hf_config_path", _FILES),
    "download_dir": Fits((None,), "is not read; HF_HOME says where models are kept"),
    "hf_token": Fits((None, True), "is not read; HF_TOKEN holds the token"),
    "tokenizer_mode": Fits((None, "auto", "hf", "fast"), "cannot be chosen; the checkpoint's tokenizer is read"),
    "config_format": Fits((None, "auto", "hf"), "cannot be chosen; config.json is read"),
    "model_impl": Fits((None, "auto", "hf"), "is not an option here; path= chooses it (see lk.Engine)"),
    "runner": Fits((None, "auto", "generate", "pooling"), "is not known"),
    "task": Fits(
        (
            None,
            "auto",
            "generate",
            "embed",
            "embedding",
            "classify",
            "score",
            "reward",
            "token_embed",
            "token_classify",
        ),
        "is not known",
    ),
    "convert": Fits((None, "auto", "none", "embed", "classify"), "is not known"),
    "logprobs_mode": Fits((None, "raw_logprobs"), "cannot be chosen; they are raw_logprobs"),
}
HERE = (
    "enforce_eager",
    "max_logprobs",
    "generation_config",
    "override_generation_config",
    "chat_template",
    "load_format",
    "kv_events_config",
    "pooler_config",
    "override_pooler_config",
    "hf_overrides",
)


class Asked(NamedTuple):
    """Options of the engine, and those of `LLM` itself."""

    engine: dict[str, Any]
    max_logprobs: int | None = None
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = {}
    chat_template: str | None = None
    pooler_settings: Mapping[str, Any] = {}
    kv_events_config: Any = None  # a dict, vLLM's object with these fields, or JSON

    def publisher(self, engine: Any) -> BlockEventPublisher | None:
        """Publishes the engine's block events, if it was asked for; to be closed before the engine."""
        config = self.kv_events_config
        if config is None:
            return None
        from labkit.engine.block_events import publisher_of

        if isinstance(config, str):
            config = json.loads(config)
        return publisher_of(engine, config if isinstance(config, Mapping) else vars(config))


def read(given: Mapping[str, Any], owner: str = "LLM") -> Asked:
    """vLLM's arguments as options. A TypeError names an unknown argument and the closest one, a ValueError a value that
    labkit cannot follow.

    >>> read({"enable_prefix_caching": False, "nnodes": 1, "enforce_eager": True}).engine
    {'prefix_caching': False, 'graphs': False}
    """
    engine: dict[str, Any] = lora_names.lora_options({name: given[name] for name in lora_names.NAMES if name in given})
    own: dict[str, Any] = {}
    for name, value in given.items():
        if name == "runner" and not (value is None or isinstance(value, str)):
            engine["runner"] = value  # labkit's own: an object that computes
        elif name in FIXED:
            _check_fits(name, value)
        elif name in HERE:
            _here(name, value, engine, own)
        elif name in RENAMED or name in OWN:
            _option(RENAMED.get(name, name), value, engine)
        elif name not in HARMLESS and name not in lora_names.NAMES:
            raise TypeError(f"{owner} has no option {name!r}{_closest(name)}")
    return Asked(engine, **own)


def _here(name: str, value: Any, engine: dict[str, Any], own: dict[str, Any]) -> None:
    if name == "enforce_eager":
        if value:
            engine["graphs"] = False
    elif name == "load_format":
        engine[name] = "auto" if value in (None, "hf", "safetensors") else value
    elif name in ("pooler_config", "override_pooler_config"):
        if value is not None:
            own["pooler_settings"] = pooler_settings(value)
    elif name == "hf_overrides":
        _overrides(value or {}, engine)
    elif value is not None:
        own[name] = value


def _overrides(given: Any, engine: dict[str, Any]) -> None:
    """Of a model's config only what makes a reranker of a causal model: the tokens whose logits are its classes."""
    known = {"architectures", "classifier_from_token", "is_original_qwen3_reranker", "method", "num_labels"}
    if not isinstance(given, Mapping) or not set(given) <= known:
        raise ValueError(f"hf_overrides={given!r}: hf_overrides holds classifier_from_token, or nothing")
    if given and "classifier_from_token" not in given:
        raise ValueError("hf_overrides: classifier_from_token names the tokens whose logits are classes")
    if given:
        engine["classifier_from_token"] = given["classifier_from_token"]


def _option(name: str, value: Any, engine: dict[str, Any]) -> None:
    """None and 0 mean "choose for me" in vLLM, where labkit has a default."""
    default = getattr(Options, name, None)
    if value is None and default is not None:
        return
    if name == "max_prefill_chunk" and value == 0:
        return
    if name == "max_model_len" and value in (-1, "auto"):
        return
    if name == "tokenizer" and isinstance(value, str):
        raise ValueError(f"tokenizer={value!r} is not read: give a local folder that holds the tokenizer you want")
    engine[name] = value


def _check_fits(name: str, value: Any) -> None:
    fits = FIXED[name]
    if value not in fits.values:
        first = next((one for one in fits.values if one is not None), None)
        also = f"; {name}={first!r} is accepted" if first is not None else ""
        raise ValueError(f"{name}={value!r}: {name} {fits.why}{also}")


def _closest(name: str) -> str:
    known = [*OWN, *RENAMED, *HERE, *FIXED, *lora_names.NAMES, *sorted(HARMLESS)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else " (help(lk.Engine) lists all)"


class EngineArgs:
    """A model and its options, as `LLM` takes them. Attributes are those that were given.

    >>> EngineArgs(model="org/name", max_num_seqs=8).max_num_seqs
    8
    """

    def __init__(self, model: Any = None, **options: Any) -> None:
        read(options, type(self).__name__)
        self.model, self.options = model, options

    def __getattr__(self, name: str) -> Any:
        options: dict[str, Any] = self.__dict__.get("options", {})
        if name not in options:
            raise AttributeError(f"{type(self).__name__} was not given {name!r}")
        return options[name]

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}(model={self.model!r}{given})"


class AsyncEngineArgs(EngineArgs):
    """What `AsyncLLMEngine.from_engine_args` takes."""
