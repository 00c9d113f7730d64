"""Builds an engine's parts from a model's name and the usual serving options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from labkit.core.blocks.manager import BlockManager
from labkit.core.options import choose, flag, named_options, real, whole
from labkit.core.scheduling.scheduler import Scheduler
from labkit.engine.adapters import checked
from labkit.engine.encoders import scheduler_of, token_ids
from labkit.engine.images import Images, load_images, sees
from labkit.engine.room import num_blocks, num_disk_blocks, num_host_blocks, num_states, partition, pool_of
from labkit.engine.speculation import check_on_ranks, draft_on_ranks, load_draft, speculation
from labkit.images import ImageUrls
from labkit.parallel.ranks import job
from labkit.runner.base import KV_CACHE_DTYPES

MAX_ADAPTERS = 8  # on the device at a time, unless the caller says
log = logging.getLogger("labkit.engine")


class Parts(NamedTuple):
    scheduler: Scheduler
    runner: Any
    tokenizer: Any
    images: Images | None = None


@named_options
@dataclass(frozen=True)
class Options:
    """How to load and serve a model.

    `dtype` "auto" is the checkpoint's own dtype. `block_size` None is 16, or what `labkit kernels tune`
    found fastest on this GPU. `device` None is a GPU if there is one. `num_blocks` None is as many as fit into
    `gpu_memory_utilization` of a GPU's memory, or into a quarter of a CPU's free memory.
    `memory_size` limits the GiB of weights, keys and values that a process may hold. `max_model_len` limits prompt
    plus output. `num_threads` None is one thread for a small model on a CPU, else torch's default. On a GPU, `graphs`
    None replays captured decode steps and `max_in_flight` None keeps one step in flight; "all" captures steps with
    prefills, drafts and special sampling, too. A size is captured when it first comes, or with `capture_at_start`
    before the first request. `deterministic` computes each request in the same way, bit for bit, whatever is served
    beside it; this is slower. `quantization` rounds a dense checkpoint's weights while they are loaded: "int8", "int4"
    (or "int4-g32": groups of 32 inputs, not 128), "nf4", "fp8". `hybrid_kv` gives layers with a sliding window blocks
    of their own, which are freed as soon as the window has passed them; decode steps are then not captured.
    `kv_groups` gives so many groups of layers block tables of their own, so that `kv=lk.PyramidKV(...)` keeps other
    numbers of keys in them; a block is then of one group, and decode steps are not captured.
    `kv_cache_dtype` "int8", "fp8_e4m3" (or "fp8") or "fp8_e5m2" stores keys and values in 8 bits, with a scale for each
    token and head. `kv_offloading` keeps cached blocks that are evicted in the `num_host_blocks` blocks of host memory;
    `kv_offloading_size` does so in that many GiB. `kv_disk_path` is a folder for those that host memory evicts, of at
    most `kv_disk_size` GiB, whose prefixes outlive the engine. `adapters` are LoRA adapters by name ({"sql":
    "folder"}), of which `max_adapters` (8) are on the device at a time, with ranks to `max_adapter_rank` (None: 16, or
    the largest of `adapters`); either option makes room for `engine.adapters.load`. `max_cpu_adapters` limits how many
    are kept in host memory; others are read again. `draft` or `speculative_config` ({"method": "ngram", "suffix",
    "draft_model", "eagle" or "eagle3", "num_speculative_tokens": 4, ...}) decodes speculatively.
    `tensor_parallel_size` processes split every layer among them, and `pipeline_parallel_size` stages have some of the
    layers each, as evenly as can be or as `pp_layer_partition` says ("15,15,16,15");
    `distributed_executor_backend` "mp" computes in a process of its own also with one rank; with "ray" the ranks are
    actors of Ray, on this machine or on the cluster at `ray_address`, with "external" the processes of torchrun.
    `ray_host` is the address of this machine for ranks on others. `restart` starts ranks again that have ended, and
    serves their requests again. `workers` are processes that run already, see `lk.Workers`. GPUs sum small messages
    through symmetric memory where torch has it, unless `disable_custom_all_reduce`.
    Of models with images, `limit_mm_per_prompt` ({"image": 4}) limits a request's images, and `mm_processor_kwargs` go
    to the model's processor; `mm_processor_cache_gb` GiB of what it makes are kept in host memory, and
    `mm_encoder_cache_gb` GiB of image features on the device, the longest unused go first.
    A request is rejected if with it the processed images of all requests that have not ended would take more than
    `max_waiting_image_gb` GiB. Images of chats may be files below `allowed_local_media_path` and come from hosts in
    `allowed_media_domains`, besides data: URLs.
    `classifier_from_token` makes a reranker of a causal model: tokens whose logits behind a prompt are its classes. Of
    two, such as ["no", "yes"], the second one's probability is the score.
    All other options go to `BlockManager` and `Scheduler`.
    """

    dtype: Any = "auto"
    device: Any = None
    load_format: str = "auto"
    path: str = "auto"
    trust_remote_code: bool = False
    skip_tokenizer_init: bool = False
    seed: int = 0
    num_threads: int | None = None
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    memory_size: float | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    num_host_blocks: int = 0
    kv_offloading: bool = False
    kv_offloading_size: float | None = None
    host_eviction: Any = "lru"
    kv_disk_path: Any = None
    kv_disk_size: float = 10.0
    num_states: int | None = None
    state_score: Any = None
    state_every: int | None = None
    prefix_caching: bool = True
    eviction: Any = "lru"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_waiting: int | None = None
    chunked_prefill: bool = True
    max_prefill_chunk: int | None = None
    prefill_share: float = 0.5
    order: Any = "fcfs"
    admission: Any = None
    chunk: Any = None
    step_budget: Any = None
    victim: Any = "latest"
    preemption: str = "auto"
    swap_cost: Any = None
    recompute_cost: Any = None
    kv_loading: str = "auto"
    disk_cost: Any = None
    watermark: float = 0.01
    prefix_hold: bool = True
    max_in_flight: int | None = None
    draft: Any = None
    speculative_config: Any = None
    graphs: bool | str | None = None
    capture_at_start: bool = False
    deterministic: bool = False
    quantization: str | None = None
    hybrid_kv: bool = False
    kv_groups: int = 1
    kv_cache_dtype: str = "auto"
    adapters: Any = None
    max_adapters: int | None = None
    max_adapter_rank: int | None = None
    max_cpu_adapters: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pp_layer_partition: Any = None
    distributed_executor_backend: str | None = None
    ray_address: str | None = None
    ray_host: str | None = None
    restart: bool = False
    disable_custom_all_reduce: bool = False
    workers: Any = None
    limit_mm_per_prompt: Any = None
    mm_processor_kwargs: Any = None
    mm_processor_cache_gb: float = 0.25
    mm_encoder_cache_gb: float = 1.0
    max_waiting_image_gb: float | None = 4.0
    allowed_local_media_path: str | None = None
    allowed_media_domains: Any = None
    classifier_from_token: Any = None
    log: Any = None

    def __post_init__(self) -> None:
        for name in (
            "trust_remote_code",
            "skip_tokenizer_init",
            "prefix_caching",
            "deterministic",
            "hybrid_kv",
            "capture_at_start",
        ):
            flag(name, getattr(self, name))
        choose("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        whole("kv_groups", self.kv_groups, least=1)
        flag("kv_offloading", self.kv_offloading)
        speculation(self.speculative_config, self.draft)
        self._check_parallel()
        real("kv_disk_size", self.kv_disk_size, least=0.0, open_left=True)
        if self.num_states is not None:
            whole("num_states", self.num_states, least=0)
        real("mm_processor_cache_gb", self.mm_processor_cache_gb, least=0.0)
        real("mm_encoder_cache_gb", self.mm_encoder_cache_gb, least=0.0)
        if self.max_waiting_image_gb is not None:
            real("max_waiting_image_gb", self.max_waiting_image_gb, least=0.0)
        if self.memory_size is not None:
            real("memory_size", self.memory_size, least=0.0, open_left=True)
        if self.kv_offloading_size is not None:
            real("kv_offloading_size", self.kv_offloading_size, least=0.0)
            if self.num_host_blocks and self.kv_offloading_size:
                raise ValueError("kv_offloading_size says how many blocks host memory has: leave out num_host_blocks")
        if self.kv_disk_path is not None and not self.offloads:
            raise ValueError("blocks go to disk through host memory: kv_disk_path needs kv_offloading=True")
        if self.kv_disk_path is not None and not isinstance(self.kv_disk_path, (str, PathLike)):
            raise ValueError(f"kv_disk_path is a folder, got {self.kv_disk_path!r}")
        checked(self.adapters)
        for name, most in (("max_adapters", 4096), ("max_adapter_rank", 256), ("max_cpu_adapters", None)):
            if (given := getattr(self, name)) is not None:
                whole(name, given, least=1, **({} if most is None else {"most": most}))
        if not self.has_adapters and (self.max_adapter_rank or self.max_cpu_adapters):
            raise ValueError("max_adapter_rank and max_cpu_adapters need adapters= or max_adapters=")
        whole("seed", self.seed, least=0)
        if self.block_size is not None:
            whole("block_size", self.block_size, least=1, most=2**20)
        real("gpu_memory_utilization", self.gpu_memory_utilization, least=0.0, most=1.0, open_left=True)
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            whole(name, getattr(self, name), least=1)
        for name, least in (("num_blocks", 1), ("max_model_len", 2), ("num_threads", 1), ("max_in_flight", 0)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least=least)

    def _check_parallel(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            whole(name, getattr(self, name), least=1)
        flag("restart", self.restart)
        flag("disable_custom_all_reduce", self.disable_custom_all_reduce)
        partition(self.pp_layer_partition, None if self.workers is not None else self.pipeline_parallel_size)
        if self.distributed_executor_backend is not None:
            choose("distributed_executor_backend", self.distributed_executor_backend, EXECUTORS)
        if (self.ray_address or self.ray_host) and self.distributed_executor_backend != "ray":
            raise ValueError("ray_address and ray_host need distributed_executor_backend='ray'")
        if self.distributed_executor_backend == "external" and self.restart and job() is not None:
            raise ValueError(
                "restart=True needs ranks that labkit starts: torchrun --max-restarts starts its own again"
            )
        if self.distributed_executor_backend == "uni" and self.has_workers:
            raise ValueError("distributed_executor_backend='uni' is one process: several ranks need 'mp'")
        if self.has_workers and self.kv_disk_path is not None:
            raise ValueError(
                "kv_disk_path is for one process: leave it out, kv_offloading_size works with several ranks"
            )
        if self.has_workers and self.pipeline_parallel_size > 1 and self.hybrid_kv:
            raise ValueError("hybrid_kv is not there with pipeline_parallel_size > 1: leave out one of them")
        if self.has_workers and self.kv_groups > 1:
            raise ValueError("kv_groups is for one process, as kv= is: leave it out, or the ranks")

    @property
    def has_workers(self) -> bool:
        """Is the model computed by other processes?"""
        several = self.tensor_parallel_size > 1 or self.pipeline_parallel_size > 1
        backend = self.distributed_executor_backend
        alone = backend in ("mp", "ray") or (backend == "external" and job() is not None)
        return several or self.workers is not None or alone

    @property
    def has_adapters(self) -> bool:
        return self.adapters is not None or self.max_adapters is not None

    @property
    def offloads(self) -> bool:
        return self.kv_offloading or bool(self.kv_offloading_size)


EXECUTORS = {"mp": None, "uni": None, "ray": "actors of Ray", "external": "processes of torchrun"}
SCHEDULING = (
    "max_num_seqs", "max_num_batched_tokens", "max_waiting", "chunked_prefill", "max_prefill_chunk", "prefill_share",
    "order", "admission", "chunk", "step_budget", "victim", "preemption", "swap_cost", "recompute_cost", "kv_loading",
    "disk_cost", "watermark",
    "prefix_hold", "max_in_flight", "log",
)  # fmt: skip
LOADING = (
    "dtype", "load_format", "path", "max_model_len", "seed", "trust_remote_code", "deterministic", "quantization",
    "num_threads", "graphs", "hybrid_kv", "kv_groups", "kv_cache_dtype", "kv_disk_path", "memory_size",
    "mm_encoder_cache_gb",
)  # fmt: skip
OF_DRAFT = ("dtype", "load_format", "seed", "trust_remote_code", "deterministic")


def is_quantized(runner: Any) -> bool:
    """Whether its model's weights are stored in fewer bits; unknown of ranks in other processes."""
    from labkit.loading.dense import Dense

    format = getattr(getattr(runner, "model", None), "format", None)
    return format is not None and not isinstance(format, Dense)


def build(model: Any = None, *, tokenizer: Any = None, **settings: Any) -> Parts:
    """Load the model, size the cache, make the scheduler. None is the embedded model."""
    options = Options(**settings)
    import torch
    from labkit_kernels.attention import default_block_size

    from labkit.assets import embedded
    from labkit.loading.checkpoint import resolve
    from labkit.parallel.load import load, load_tokenizer

    source = embedded("tiny" if model is None else model)
    folder = resolve(source) if isinstance(source, (str, Path)) else None
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if tokenizer is None and folder is not None and not options.skip_tokenizer_init:
        tokenizer = load_tokenizer(folder, options.trust_remote_code)
    draft = speculation(options.speculative_config, options.draft)
    loading: dict[str, Any] = {name: getattr(options, name) for name in LOADING}
    loading |= {
        "source": folder if folder is not None else source, "device": device,
        "eos_token_id": getattr(tokenizer, "eos_token_id", None), "adapter_room": _adapter_room(options),
        "classifier_from_token": token_ids(options.classifier_from_token, tokenizer),
        "capture": options.max_num_batched_tokens if options.capture_at_start else None,
    }  # fmt: skip
    ranks = getattr(options.workers, "ranks", None)
    num_ranks = ranks.num if ranks else options.tensor_parallel_size * options.pipeline_parallel_size
    loading |= {"layers": partition(options.pp_layer_partition, None), "pool": pool_of(options, device, num_ranks)}
    draft_options = {name: getattr(options, name) for name in OF_DRAFT}
    loading["draft"] = None
    if options.has_workers:
        loading["draft"] = draft_on_ranks(draft, draft_options)
        runner: Any = _parallel(options, loading)
        try:
            check_on_ranks(draft, loading["draft"], runner, tokenizer)
        except BaseException:
            runner.close()
            raise
    else:
        runner = load(loading, with_draft=lambda made: load_draft(draft, made, folder, tokenizer, **draft_options))
    length: int = runner.max_model_len
    if device.type == "cpu" and runner.dtype_name == "float16":
        log.warning('float16 is slow on CPUs: dtype="bfloat16" is as small and faster')
    if device.type == "cpu" and runner.dtype_name == "float32" and is_quantized(runner):
        log.warning('float32 on a CPU dequantizes quantized weights for each product: dtype="bfloat16" is much faster')
    scheduling = {name: getattr(options, name) for name in SCHEDULING}
    if getattr(runner, "keeps_nothing", False):
        return Parts(scheduler_of(runner, options, scheduling), runner, tokenizer)
    size = options.block_size or default_block_size(runner.head_size, device)
    states = num_states(runner, options)
    blocks = BlockManager(
        num_blocks(runner, options, size, length),
        size,
        num_host_blocks=num_host_blocks(runner, options, size),
        eviction=options.eviction,
        prefix_caching=options.prefix_caching,
        windows=runner.windows,
        kv_offloading=options.offloads,
        host_eviction=options.host_eviction,
        num_disk_blocks=num_disk_blocks(runner, options, size),
        num_states=states,
        state_score=options.state_score,
        state_every=options.state_every,
    )
    scheduling["pipeline_stages"] = stages = runner.workers.ranks.stages if options.has_workers else 1
    if options.max_in_flight is None:
        apart = device.type == "cuda" or options.has_workers  # this process is free while a step is computed
        busy = stages if stages > 1 else int(apart)
        scheduling["max_in_flight"] = busy if draft is None else 0
    scheduling["max_adapters"] = loading["adapter_room"][0] if loading["adapter_room"] else None
    if options.max_waiting_image_gb is not None:
        scheduling["max_image_bytes"] = int(options.max_waiting_image_gb * 2**30)
    scheduler = Scheduler(blocks, max_model_len=length, draft=draft, **scheduling)
    return Parts(scheduler, runner, tokenizer, _images(options, folder))


def _images(options: Options, folder: Path | None) -> Images | None:
    """The image processor of a model that sees."""
    if folder is None or not sees(folder):
        return None
    found = load_images(
        folder, limits=options.limit_mm_per_prompt, kwargs=options.mm_processor_kwargs,
        trust_remote_code=options.trust_remote_code, cache_gb=options.mm_processor_cache_gb,
    )  # fmt: skip
    found.urls = ImageUrls(local_path=options.allowed_local_media_path, domains=options.allowed_media_domains or ())
    return found


def _adapter_room(options: Options) -> tuple[int, int] | None:
    """How many adapters of which rank the device holds at a time."""
    if not options.has_adapters:
        return None
    from labkit.loading.peft import read_rank

    given = checked(options.adapters)
    rank = options.max_adapter_rank or max([16, *(_of(name, read_rank, path) for name, path in given.items())])
    return options.max_adapters or MAX_ADAPTERS, rank


def _of(name: str, read: Callable[[Any], Any], path: Any) -> Any:
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"adapter {name!r}: {error}") from error


def _parallel(options: Options, loading: dict[str, Any]) -> Any:
    """A runner whose model other processes compute."""
    from labkit.parallel.load import sendable
    from labkit.parallel.processes import Workers
    from labkit.parallel.runner import ParallelRunner

    sent = sendable(loading)
    if options.workers is not None:
        if not isinstance(options.workers, Workers):
            raise ValueError(f"workers are lk.Workers(...), got {options.workers!r}")
        return ParallelRunner(options.workers, sent, owns_workers=False)
    workers = _workers(options, loading["device"].type)
    try:
        return ParallelRunner(workers, sent)
    except BaseException:
        workers.close()
        raise


def _workers(options: Options, device: str) -> Any:
    """Processes as `distributed_executor_backend` says. Outside torchrun, "external" starts its own."""
    given: dict[str, Any] = {
        "tensor_parallel_size": options.tensor_parallel_size, "device": device,
        "pipeline_parallel_size": options.pipeline_parallel_size, "num_threads": options.num_threads,
        "custom_all_reduce": not options.disable_custom_all_reduce,
    }  # fmt: skip
    if options.distributed_executor_backend == "external" and job() is not None:
        from labkit.parallel.external import ExternalWorkers

        return ExternalWorkers(**given)
    if options.distributed_executor_backend == "ray":
        from labkit.parallel.actors import RayWorkers

        return RayWorkers(address=options.ray_address, host=options.ray_host, restart=options.restart, **given)
    from labkit.parallel.processes import Workers

    return Workers(restart=options.restart, **given)
