"""The one table of `labkit serve`'s flags, under vLLM's names: what each does here.

A flag is served (it sets an option of the engine, of the server, or of the process), harmless (accepted, changes
nothing here), or refused by name with the reason. Knows nothing of how a command line is read: see `arguments.py`.
"""

from __future__ import annotations

from typing import NamedTuple

ENGINE, SERVER, PROCESS, HARMLESS, REFUSED = "engine", "server", "process", "harmless", "refused"


class Flag(NamedTuple):
    """`kind` is int, float, str, json, list or bool; a bool also has a form --no-NAME. `target` is the option it sets.
    `fits` lists the values that are accepted; of a refused flag those that change nothing here."""

    name: str
    where: str
    kind: str = "str"
    target: str = ""
    help: str = ""
    fits: tuple[str, ...] = ()


NOT_THERE = "is not served by labkit"


def _engine(name: str, kind: str, help: str, target: str = "", fits: tuple[str, ...] = ()) -> Flag:
    return Flag(name, ENGINE, kind, target or name.replace("-", "_"), help, fits)


def _server(name: str, kind: str, help: str, target: str = "") -> Flag:
    return Flag(name, SERVER, kind, target or name.replace("-", "_"), help)


def _process(name: str, kind: str, help: str) -> Flag:
    return Flag(name, PROCESS, kind, name.replace("-", "_"), help)


def _harmless(names: str, kind: str, why: str, fits: tuple[str, ...] = ()) -> list[Flag]:
    return [Flag(name, HARMLESS, kind, "", why, fits) for name in names.split()]


def _refused(names: str, why: str = NOT_THERE, fits: tuple[str, ...] = (), kind: str = "list") -> list[Flag]:
    return [Flag(name, REFUSED, kind, "", why, fits) for name in names.split()]


FLAGS: tuple[Flag, ...] = (
    # -- the model and how it is loaded
    _process("model", "list", "folder, org/name or .gguf file; several are served by name, NAME=PATH gives one"),
    _engine("dtype", "str", "auto, half, float16, bfloat16, float or float32"),
    _engine("quantization", "str", "rounds a dense checkpoint while it is loaded: int8, int4, nf4, fp8"),
    _engine("load-format", "str", "auto, or dummy for random weights"),
    _engine("kv-cache-dtype", "str", "auto, int8, fp8, fp8_e4m3 or fp8_e5m2"),
    _engine("trust-remote-code", "bool", "let a checkpoint run its own code"),
    _engine("seed", "int", "of random weights and sampling"),
    _engine("limit-mm-per-prompt", "json", 'most images of a prompt: {"image": 4}'),
    _engine("mm-processor-kwargs", "json", "options of the model's image processor"),
    _engine("mm-processor-cache-gb", "float", "GiB of host memory for processed images (0.25)"),
    _engine("max-waiting-image-gb", "float", "GiB of processed images of requests that have not ended (4)"),
    _engine("mm-encoder-cache-gb", "float", "GiB of the device for image features (1)"),
    _engine("skip-tokenizer-init", "bool", "serve token ids only"),
    _engine("device", "str", "cpu, cuda, cuda:1, ...; without it a GPU if there is one"),
    _engine("num-threads", "int", "CPU threads of the engine"),
    _engine("deterministic", "bool", "same bits whatever else is in the batch"),
    _engine("tensor-parallel-size", "int", "processes (GPUs) that split every layer"),
    _engine("pipeline-parallel-size", "int", "stages of processes that have some of the layers each"),
    _engine("pp-layer-partition", "str", "layers of each stage, such as 15,15,16,15; without it as even as can be"),
    _engine("data-parallel-size", "int", "engines in processes of their own, behind a router (docs/parallel.md)"),
    _engine("router", "str", "which of them a request goes to: prefix_aware, least_loaded, round_robin, ..."),
    _engine(
        "distributed-executor-backend", "str", "mp: processes of this host; ray: actors; external: torchrun; uni: one",
        fits=("mp", "uni", "ray", "external"),
    ),
    _engine("ray-address", "str", "the Ray cluster to use (RAY_ADDRESS, or one of its own)"),
    _engine("ray-host", "str", "this machine's address for ranks on other hosts"),
    _engine("disable-custom-all-reduce", "bool", "GPUs sum small messages with NCCL, too"),
    _engine("restart", "bool", "start ranks or replicas that have ended again, and serve their requests again"),
    # -- memory and scheduling
    _engine("max-model-len", "int", "most tokens of a request, prompt and answer"),
    _engine("gpu-memory-utilization", "float", "share of a GPU's memory"),
    _engine("memory-size", "float", "most GiB of weights, keys and values that a process may hold"),
    _engine("max-num-seqs", "int", "requests that run at a time"),
    _engine("max-num-batched-tokens", "int", "tokens of a step"),
    _engine("block-size", "int", "tokens of a KV block"),
    _engine("num-gpu-blocks-override", "int", "number of KV blocks", "num_blocks"),
    _engine("num-host-blocks", "int", "KV blocks in host memory, for preemption by swap and --kv-offloading"),
    _engine("kv-offloading", "bool", "keep evicted prefix blocks in host memory"),
    _engine("kv-offloading-size", "float", "the same, in so many GiB instead of --num-host-blocks"),
    _engine("kv-disk-path", "str", "folder for those that host memory evicts"),
    _engine("kv-disk-size", "float", "GiB that this folder may take (10)"),
    _engine("enable-prefix-caching", "bool", "reuse the blocks of equal prefixes (on by default)", "prefix_caching"),
    _engine("enable-chunked-prefill", "bool", "split long prompts over steps (on by default)", "chunked_prefill"),
    _engine("long-prefill-token-threshold", "int", "most prompt tokens of a request in a step", "max_prefill_chunk"),
    _engine("scheduling-policy", "str", "fcfs, priority, sjf or lpm", "order"),
    _engine("victim", "str", "who is preempted: latest, order, least_computed or most_computed"),
    _engine("preemption", "str", "recompute, swap or auto"),
    _engine("eviction", "str", "lru, fifo, lfu, slru, s3-fifo, ttl, cost or hinted"),
    _process("enforce-eager", "bool", "no captured CUDA graphs"),
    _engine("speculative-config", "json", 'drafts: {"method": "ngram" | "draft_model" | "eagle3" | .., "model": ..}'),
    _engine("graphs", "str", "all: capture steps with prefills, too, not only decode steps", fits=("all",)),
    _engine("capture-at-start", "bool", "capture every size before the first request"),
    # -- adapters
    _process("enable-lora", "bool", "serve LoRA adapters beside the model"),
    _process("lora-modules", "list", 'adapters: NAME=PATH or {"name": ..., "path": ...}; clients name them as model'),
    _process("max-loras", "int", "adapters on the device at a time (8)"),
    _process("max-lora-rank", "int", "largest rank of an adapter (16, or that of --lora-modules)"),
    _process("max-cpu-loras", "int", "adapters that are kept in host memory"),
    _server("lora-root", "str", "opens /v1/load_lora_adapter and /v1/unload_lora_adapter, for folders below this one"),
    # -- what clients see
    _server("served-model-name", "list", "names that requests may use as model"),
    _server("allowed-local-media-path", "str", "a folder: images may be file URLs of files below it (none by default)"),
    _server("allowed-media-domains", "list", "HOST or HOST:PORT, from where images are fetched (none by default)"),
    _server("model-root", "str", "opens /v1/load_model and /v1/unload_model, for models below this folder"),
    _server("api-key", "list", "keys that open every route but /health and /ping (also VLLM_API_KEY)"),
    _server("max-waiting", "int", "requests that may wait; more are answered 503"),
    _server("stream-interval", "int", "tokens in a chunk of a stream after its first (1)"),
    _server("max-logprobs", "int", "most logprobs of a token"),
    _server("chat-template", "str", "a file with a chat template, or the template itself"),
    _server("default-chat-template-kwargs", "json", "variables of the chat template"),
    _server("return-tokens-as-token-ids", "bool", "tokens in logprobs are written as token_id:ID"),
    _server("enable-force-include-usage", "bool", "each chunk of a stream has its usage", "force_include_usage"),
    _server("enable-per-request-metrics", "bool", "answers have their times in metrics", "per_request_metrics"),
    _server("enable-tokenizer-info-endpoint", "bool", "opens /tokenizer_info", "tokenizer_info"),
    _server("enable-request-id-headers", "bool", "every answer has X-Request-Id", "request_id_headers"),
    _server("response-role", "str", "role of the answers in chats"),
    _server("enable-auto-tool-choice", "bool", "let models call tools of their own accord"),
    _server("tool-call-parser", "str", "how calls are written: hermes, llama3_json, mistral, pythonic, ..."),
    _server("exclude-tools-when-tool-choice-none", "bool", "hide tools from the model where it may not call them"),
    _server("reasoning-parser", "str", "splits reasoning off: deepseek_r1 or qwen3"),
    _server("max-stored-responses", "int", "how many answers of /v1/responses are kept (1024)"),
    _server("pooler-config", "json", 'how embeddings are made, such as {"pooling_type": "MEAN", "normalize": true}'),
    _server("override-pooler-config", "json", "the same as --pooler-config", "pooler_config"),
    _process("model-settings", "json", 'settings of one of several models: {"NAME": {"tool-call-parser": "hermes"}}'),
    _process("generation-config", "str", "auto (the model's sampling defaults), vllm (none), or a folder"),
    _process("override-generation-config", "json", "sampling defaults, as JSON"),
    # -- the process
    _process("host", "str", "address to listen on (127.0.0.1)"),
    _process("port", "int", "port to listen on (8000); 0 is any free one"),
    _process("uds", "str", "path of a Unix domain socket to listen on, instead of host and port"),
    _process("config", "str", "a YAML file with flags; the command line goes first"),
    _process("ssl-keyfile", "str", "private key for HTTPS"),
    _process("ssl-certfile", "str", "certificate for HTTPS"),
    _process("ssl-ca-certs", "str", "certificates of authorities"),
    _process("uvicorn-log-level", "str", "debug, info, warning, error or critical"),
    _server("shutdown-timeout", "float", "seconds that running requests have when the server is stopped"),
    _server("root-path", "str", "prefix of the paths behind a proxy"),
    _server("allowed-origins", "json", "origins of pages that may call the server (none by default)"),
    _server("allowed-methods", "json", "methods that these pages may use"),
    _server("allowed-headers", "json", "headers that these pages may send"),
    _server("allow-credentials", "bool", "whether these pages may send cookies"),
    _process("kv-transfer-config", "json", "prefill and decode apart, with vLLM's keys (docs/deployment.md)"),
    _process("kv-events-config", "json", "publish prefix cache events over ZMQ, with vLLM's keys (labkit[events])"),
    _server("otlp-traces-endpoint", "str", "OTLP over HTTP: a span for each request is sent there (labkit[otel])"),
    _server("enable-admin", "bool", "routes that pause, sleep and show events (also VLLM_SERVER_DEV_MODE=1)"),
    _server("admin-key", "list", "keys that these routes need"),
    _server("enable-activations", "bool", "requests may change and read activations (`edit`, `capture`)"),
    _server("edit-vectors", "str", "a file of safetensors: vectors that `edit` may name"),
    _server("enable-log-requests", "bool", "a line of log for each request (on by default)", "log_requests"),
    _process("disable-log-requests", "bool", "no line of log for each request"),
    # -- accepted, and without effect here
    *_harmless("enable-prompt-tokens-details enable-server-load-tracking", "bool", "always on"),
    *_harmless("disable-log-stats disable-uvicorn-access-log disable-fastapi-docs", "bool", "is off already"),
    *_harmless("enable-reasoning", "bool", "--reasoning-parser turns it on"),
    *_harmless("mm-processor-cache-type mm-encoder-tp-mode", "str", "one process keeps processed images"),
    *_harmless("skip-mm-profiling disable-chunked-mm-input", "bool", "as it is"),
    *_harmless("max-log-len", "int", "prompts are not logged"),
    *_harmless("swap-space", "float", "labkit's flag for it is --num-host-blocks"),
    *_harmless("cpu-offload-gb", "float", "weights stay where they are computed", ("0", "0.0")),
    *_harmless("kv-offloading-backend", "str", "blocks go to host memory, and from there to files", ("native",)),
    *_harmless("disable-frontend-multiprocessing async-scheduling disable-hybrid-kv-cache-manager", "bool", "as it is"),
    *_harmless("max-seq-len-to-capture max-cudagraph-capture-size", "int", "graphs are captured as needed"),
    *_harmless("cuda-graph-sizes cudagraph-capture-sizes", "list", "graphs are captured as needed"),
    *_harmless("compilation-config structured-outputs-config attention-config", "json", "labkit has other parts"),
    *_harmless("optimization-level guided-decoding-backend attention-backend", "str", "labkit has other parts"),
    *_harmless("h11-max-incomplete-event-size h11-max-header-count", "int", "headers have a bound of their own"),
    *_harmless("tokenizer-mode config-format model-impl", "str", "the checkpoint decides", ("auto", "hf")),
    *_harmless("runner", "str", "text is generated and embedded", ("auto", "generate", "pooling")),
    *_harmless("task", "str", "text is generated and embedded", ("auto", "generate", "embed")),
    *_harmless("chat-template-content-format", "str", "templates get text", ("auto", "string")),
    # -- refused by name
    *_refused(
        "api-server-count", "has one server here", ("1",),
    ),
    *_refused("enable-expert-parallel enable-eplb enable-dbo headless data-parallel-backend", kind="bool"),
    *_refused("fully-sharded-loras", kind="bool"),
    *_refused("lora-dtype", "cannot be chosen; adapters have the model's dtype", ("auto",)),
    *_refused("speculative-model num-speculative-tokens",
              'is a key of --speculative-config, such as {"method": "ngram", "num_speculative_tokens": 4}'),
    *_refused("tool-parser-plugin reasoning-parser-plugin", "would run code of its own in the server"),
    *_refused("tool-server", "would call tools in the server"),
    *_refused("media-io-kwargs", "is not read; images are decoded in one way"),
    *_refused("tokenizer revision code-revision tokenizer-revision hf-config-path hf-overrides rope-scaling rope-theta",
              "is not read; give labkit a local folder with the files that you want"),
    *_refused("download-dir", "is not read; HF_HOME says where models are kept"),
    *_refused("hf-token", "is not read; HF_TOKEN holds the token"),
    *_refused("enable-sleep-mode trust-request-chat-template enable-ssl-refresh", kind="bool"),
    *_refused("middleware logits-processors log-config-file ssl-cert-reqs "
              "collect-detailed-traces kv-cache-memory-bytes convert "
              "logits-processor-pattern scheduler-cls worker-cls worker-extension-cls num-lookahead-slots "
              "model-loader-extra-config additional-config"),
)  # fmt: skip

SHORT = {
    "q": "quantization", "tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "dp": "data-parallel-size",
    "O": "optimization-level", "asc": "api-server-count",
}  # fmt: skip
BY_NAME = {flag.name: flag for flag in FLAGS}
