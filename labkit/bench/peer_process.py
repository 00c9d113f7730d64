"""Runs one engine in its own process: loads it once, then serves passes that arrive as lines of JSON.

    python peer_process.py BACKEND MODEL '{"num_threads": 2}'

Any Python that has the engine can start it, so it imports labkit only if labkit is the engine. It prints {"ready":
seconds}, then answers each {"asks": [[ids, number of outputs], ...]} with {"seconds": ..., "outputs": [numbers]} and
whatever else the engine reports: "first" and "done" are seconds by request.
"""

import json
import os
import sys
import time


def labkit(model, options):
    from labkit import Engine, SamplingParams
    from labkit.core.events.types import Step

    engine = Engine(model, **options)
    blocks = engine.blocks

    def run(asks):
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in asks]
        blocks.reset()
        before, wastes = len(engine.log.events(Step)), []
        queried, hit = blocks.num_queried_tokens, blocks.num_hit_tokens
        begin = time.perf_counter()
        handles = [engine.submit(ids, own) for (ids, _), own in zip(asks, params, strict=True)]
        count = 0
        while engine.step():
            count += 1
            if count % 16 == 0:
                wastes.append(blocks.stats().waste)
        seconds = time.perf_counter() - begin
        steps = engine.log.events(Step)[before:]
        zero = min(handle.arrival for handle in handles)
        queried, hit = blocks.num_queried_tokens - queried, blocks.num_hit_tokens - hit
        return {
            "seconds": seconds,
            "outputs": [handle.num_output for handle in handles],
            "first": [(handle.first_token_at - zero) / 1e9 for handle in handles],
            "done": [(handle.finished_at - zero) / 1e9 for handle in handles],
            "batches": [
                [s.prefill_tokens, s.decode_tokens, s.output_tokens, s.used_blocks, s.duration / 1e9] for s in steps
            ],
            "block_size": blocks.block_size,
            "hit_rate": hit / queried if queried else None,
            "waste": sum(wastes) / len(wastes) if wastes else None,
        }

    return run


def transformers(model, options, continuous=True):
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(options.get("num_threads") or torch.get_num_threads())
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def together(asks):
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=asks[0][1])
        batching = ContinuousBatchingConfig(max_memory_percent=0.1)  # the default takes half a minute to zero
        settings = {"generation_config": config, "continuous_batching_config": batching}
        with causal.continuous_batching_context_manager(**settings) as manager:
            begin = time.perf_counter()
            names = [manager.add_request(list(ids), max_new_tokens=n) for ids, n in asks]
            found = {}
            while len(found) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.error:
                    raise RuntimeError(result.error)
                if result is not None and result.is_finished():
                    found[result.request_id] = len(result.generated_tokens)
                if not manager.is_running() and result is None:
                    raise RuntimeError("transformers' continuous batching stopped")
            seconds = time.perf_counter() - begin
        return {"seconds": seconds, "outputs": [found[name] for name in names]}

    def padded(asks, size=16):
        begin = time.perf_counter()
        for i in range(0, len(asks), size):
            some = asks[i : i + size]
            length, most = max(len(ids) for ids, _ in some), max(n for _, n in some)
            tokens, mask = (torch.zeros(len(some), length, dtype=torch.int64) for _ in range(2))
            for row, (ids, _) in enumerate(some):
                tokens[row, length - len(ids) :], mask[row, length - len(ids) :] = torch.tensor(ids), 1
            length = {"max_new_tokens": most, "min_new_tokens": most}
            causal.generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
        return {"seconds": time.perf_counter() - begin, "outputs": [n for _, n in asks]}

    return together if continuous else torch.inference_mode()(padded)


def transformers_static(model, options):
    return transformers(model, options, continuous=False)


def vllm(model, options):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(options.get('num_threads') or os.cpu_count()) - 1}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    chosen = {"max_num_seqs": "max_num_seqs", "max_model_len": "max_model_len"}
    settings = {theirs: options[ours] for ours, theirs in chosen.items() if options.get(ours)}
    settings["enable_prefix_caching"] = options.get("prefix_caching", True)
    llm = LLM(model=model, dtype=options.get("dtype", "bfloat16"), disable_log_stats=True, **settings)

    def run(asks):
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in asks]
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        outs = llm.generate([{"prompt_token_ids": ids} for ids, _ in asks], params, use_tqdm=False)
        return {"seconds": time.perf_counter() - begin, "outputs": [len(out.outputs[0].token_ids) for out in outs]}

    return run


def openvino(model, options):
    import numpy
    import openvino
    import openvino_genai

    if not os.path.exists(os.path.join(model, "openvino_model.xml")):
        raise SystemExit(
            f"{model} is not an OpenVINO folder: optimum-cli export openvino -m MODEL --task text-generation-with-past "
            f"--weight-format fp16 FOLDER makes one"
        )
    settings = openvino_genai.SchedulerConfig()
    settings.cache_size, settings.max_num_seqs = 4, options.get("max_num_seqs", 256)
    settings.max_num_batched_tokens = options.get("max_num_batched_tokens", 2048)
    settings.enable_prefix_caching = options.get("prefix_caching", True)
    plugin = {"INFERENCE_NUM_THREADS": options.get("num_threads") or os.cpu_count()}
    if not options.get("quantization"):  # nothing is rounded to 8 bits, which is its default
        plugin |= {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"}
        plugin["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
    pipe = openvino_genai.ContinuousBatchingPipeline(model, settings, "CPU", plugin)
    names = iter(range(10**9))

    def config(num):
        made = openvino_genai.GenerationConfig()
        made.max_new_tokens, made.ignore_eos, made.do_sample = num, True, False
        return made

    def run(asks):
        begin = time.perf_counter()
        handles = [
            pipe.add_request(next(names), openvino.Tensor(numpy.array([ids], dtype=numpy.int64)), config(n))
            for ids, n in asks
        ]
        while pipe.has_non_finished_requests():
            pipe.step()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "outputs": [len(handle.read_all()[0].generated_ids) for handle in handles]}

    return run


def llamacpp(model, options):
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    if not model.endswith(".gguf"):
        raise SystemExit(f"{model} is not a GGUF file")
    rows = options.get("max_num_seqs", 256)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_gpu_layers = model, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = options.get("num_threads") or os.cpu_count()
    settings.n_parallel, settings.n_batch = rows, options.get("max_num_batched_tokens", 2048)
    settings.n_ctx, settings.kv_unified = options.get("max_model_len", 1024) * rows, True
    server = xllamacpp.Server(settings)

    def complete(ask):
        ids, num = ask
        told = []
        wanted = {"prompt": ids, "n_predict": num, "ignore_eos": True, "temperature": 0.0}
        server.handle_completions(wanted | {"cache_prompt": options.get("prefix_caching", True)}, told.append)
        answer = json.loads(told[-1]) if isinstance(told[-1], str) else told[-1]
        if "usage" not in answer:
            raise RuntimeError(str(answer)[:300])
        return answer["usage"]["completion_tokens"]

    def run(asks):
        with ThreadPoolExecutor(len(asks)) as pool:
            begin = time.perf_counter()
            outputs = list(pool.map(complete, asks))
            return {"seconds": time.perf_counter() - begin, "outputs": outputs}

    return run


BACKENDS = {
    "labkit": labkit,
    "transformers": transformers,
    "transformers-static": transformers_static,
    "vllm": vllm,
    "openvino": openvino,
    "llamacpp": llamacpp,
}


def peak_memory():
    """Peak memory of this process and its children in bytes; None if the system does not report it."""
    try:
        parents, peaks = {}, {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/status") as file:
                    lines = dict(line.split(":", 1) for line in file)
            except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
                continue
            parents[int(name)] = int(lines["PPid"])
            peaks[int(name)] = int(lines.get("VmHWM", "0 kB").split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(peaks.get(pid, 0) for pid in family)


def main():
    backend, model, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints must not mix with answers

    def say(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    begin = time.perf_counter()
    try:
        run = BACKENDS[backend](model, options)
        run([[[1, 2, 3], 2]])
    except BaseException as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise
    say({"ready": time.perf_counter() - begin})
    for line in sys.stdin:
        try:
            answer = run(json.loads(line)["asks"])
        except Exception as error:  # other engines' errors are part of the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["peak_memory"] = peak_memory()
        say(answer)
    os._exit(0)  # some engines leave threads running


if __name__ == "__main__":
    main()
