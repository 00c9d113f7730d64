"""What a vLLM server answers at /metrics, at two moments: the names, labels and buckets of its metrics."""

EDGES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5)
MODEL = 'engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"'


def answer(*, generated: int, prompt: int, hits: int, steps: int, ttft: dict[float, int], itl: dict[float, int],
           running: int = 3, waiting: int = 2, usage: float = 0.25, finished: int = 0) -> str:  # fmt: skip
    """`ttft` and `itl`: bucket -> how many values fell into it."""
    return f"""\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{{generation="0"}} 10744.0
# HELP process_open_fds Number of open file descriptors.
# TYPE process_open_fds gauge
process_open_fds 74.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{{MODEL}}} {float(running)}
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{{MODEL}}} {float(waiting)}
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{{MODEL}}} {usage}
# HELP vllm:prefix_cache_queries_total Prefix cache queries, in terms of number of queried tokens.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{{{MODEL}}} {float(prompt)}
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{{{MODEL}}} 1.7630571253184965e+09
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{{{MODEL}}} {float(hits)}
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{{{MODEL}}} 1.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{{MODEL}}} {float(prompt)}
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{{MODEL}}} {float(generated)}
# TYPE vllm:request_success_total counter
vllm:request_success_total{{{MODEL.replace(",", ',finished_reason="stop",')}}} {float(finished)}
vllm:request_success_total{{{MODEL.replace(",", ',finished_reason="length",')}}} 2.0
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{{MODEL.replace(",", ',le="1.0",')}}} 0.0
vllm:iteration_tokens_total_bucket{{{MODEL.replace(",", ',le="+Inf",')}}} {float(steps)}
vllm:iteration_tokens_total_count{{{MODEL}}} {float(steps)}
vllm:iteration_tokens_total_sum{{{MODEL}}} {float(prompt + generated)}
{histogram("time_to_first_token_seconds", ttft)}
{histogram("inter_token_latency_seconds", itl)}
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="2000",num_cpu_blocks="None"}} 1.0
"""


def histogram(name: str, values: dict[float, int]) -> str:
    assert set(values) <= set(EDGES)
    lines, total = [f"# TYPE vllm:{name} histogram"], 0
    for edge in EDGES:
        total += values.get(edge, 0)
        lines.append(f'vllm:{name}_bucket{{engine="0",le="{edge}",{MODEL[11:]}}} {float(total)}')
    lines.append(f'vllm:{name}_bucket{{engine="0",le="+Inf",{MODEL[11:]}}} {float(total)}')
    lines += [f"vllm:{name}_count{{{MODEL}}} {float(total)}", f"vllm:{name}_sum{{{MODEL}}} 1.0"]
    return "\n".join(lines)


FIRST = answer(generated=1000, prompt=5000, hits=1000, steps=200, ttft={0.1: 4}, itl={0.02: 300})
SECOND = answer(generated=1400, prompt=5600, hits=1480, steps=300, ttft={0.1: 4, 0.25: 10}, itl={0.02: 300, 0.04: 200},
                running=5, waiting=0, usage=0.5, finished=3)  # fmt: skip
