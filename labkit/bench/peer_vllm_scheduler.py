"""Times vLLM's scheduler alone, in a Python that has vLLM installed. Runs as a script; does not import labkit.

Takes one JSON argument {"rows": [...], "prompt": 256, "block": 16} and prints one line of JSON. It calls `schedule` and
`update_from_output` as the engine would, with made-up tokens; no model is loaded.
"""

import json
import os
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}


def make_scheduler(rows, block, num_blocks, folder):
    import torch
    import vllm.v1.core.sched.scheduler as sched_module
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=8192)
    config = VllmConfig(
        model_config=model,
        cache_config=CacheConfig(block_size=block, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_model_len=8192,
            is_encoder_decoder=False,
            max_num_seqs=rows,
            max_num_batched_tokens=max(8192, rows * 272),
            async_scheduling=False,
        ),
        device_config=DeviceConfig("cpu"),
    )
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=block, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    kv = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return sched_module.Scheduler(
        config, kv, StructuredOutputManager(config), block_size=block, hash_block_size=block, log_stats=True
    )


def measure(rows, prompt, block, steps, folder):
    import numpy as np
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(block, sha256)
    length = prompt + block + 32 + steps
    scheduler = make_scheduler(rows, block, rows * (length // block + 2) + 8, folder)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=length, ignore_eos=True, stop_token_ids=[31_999])
    for i in range(rows):
        ids = rng.integers(0, 32_000, prompt - block // 2 + i % block).tolist()
        scheduler.add_request(Request(f"q{i}", ids, params, None, block_hasher=hasher))

    def step(n):
        begin = time.perf_counter_ns()
        plan = scheduler.schedule()
        middle = time.perf_counter_ns()
        ids = list(plan.num_scheduled_tokens)
        tokens = [[(k * 7919 + n * 104_729) % 31_000] for k in range(len(ids))]
        output = ModelRunnerOutput(ids, {id: k for k, id in enumerate(ids)}, tokens)
        launched = time.perf_counter_ns()
        scheduler.update_from_output(plan, output)
        return (middle - begin + time.perf_counter_ns() - launched) / 1e3, len(ids)

    for n in range(32):
        _, running = step(n)
    assert running == rows, f"{running} of {rows} rows run"
    times = np.array([step(n)[0] for n in range(32, 32 + steps)])
    p50, p99 = np.percentile(times, (50, 99))
    return {"rows": rows, "mean": float(times.mean()), "p50": float(p50), "p99": float(p99), "steps": steps}


def main():
    asked = json.loads(sys.argv[1])
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(CONFIG, file)
        timed = [
            measure(rows, asked["prompt"], asked["block"], {16: 800, 256: 300}.get(rows, 120), folder)
            for rows in asked["rows"]
        ]
    print(json.dumps({"version": vllm.__version__, "decode": timed}))


if __name__ == "__main__":
    main()
