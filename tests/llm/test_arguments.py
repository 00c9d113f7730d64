"""vLLM's engine arguments: set, accepted or refused by name, and the same on the command line."""

import pytest

import labkit as lk
from labkit.llm.arguments import FIXED, HARMLESS, EngineArgs, read
from labkit.server.flags import ENGINE, FLAGS
from labkit.server.flags import HARMLESS as HARMLESS_FLAG

TUTORIAL = {
    "enforce_eager": True, "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "swap_space": 4, "seed": 1,
    "disable_log_stats": True, "max_logprobs": 5, "tokenizer_mode": "auto", "config_format": "hf", "load_format": "hf",
    "async_scheduling": False, "gpu_memory_utilization": 0.5, "trust_remote_code": True, "dtype": "float32",
    "enable_prefix_caching": False, "enable_chunked_prefill": True, "num_gpu_blocks_override": 64, "max_num_seqs": 4,
    "max_num_batched_tokens": 64, "scheduling_policy": "priority", "quantization": None, "max_model_len": 256,
    "block_size": 8, "kv_cache_dtype": "auto", "disable_custom_all_reduce": True, "limit_mm_per_prompt": {"image": 0},
    "distributed_executor_backend": "mp", "generation_config": "vllm", "skip_tokenizer_init": False, "revision": None,
    "compilation_config": {"level": 3}, "long_prefill_token_threshold": 0, "enable_lora": False, "max_lora_rank": 16,
    "speculative_config": None, "cpu_offload_gb": 0, "hf_overrides": {}, "runner": "auto", "logits_processors": [],
}  # fmt: skip


def test_every_argument_of_tutorials_is_accepted_and_takes_effect():
    with lk.LLM(**TUTORIAL) as llm:
        s = llm.engine.scheduler
        assert (s.max_num_seqs, s.max_num_batched_tokens, s.max_model_len) == (4, 64, 256)
        assert (s.blocks.num_blocks, s.blocks.block_size, s.blocks.prefix_caching) == (64, 8, False)
        assert llm.max_logprobs == 5 and read(TUTORIAL).engine["graphs"] is False
        with pytest.raises(ValueError, match=r"logprobs must be at most max_logprobs \(5\), got 6"):
            llm.generate("x", lk.SamplingParams(logprobs=6))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nnodes": 2}, "nnodes=2: nnodes has one engine here"),
        ({"num_speculative_tokens": 4}, "speculative_config={'method': ..., ...} holds it"),
        ({"default_mm_loras": {"a": "b"}}, "default_mm_loras is not served"),
        ({"tokenizer_mode": "mistral"}, "tokenizer_mode='auto' is accepted"),
        ({"tokenizer": "org/other"}, "tokenizer='org/other' is not read"),
        ({"task": "transcription"}, "task is not known"),
        ({"cpu_offload_gb": 4}, "cpu_offload_gb is not served"),
        ({"logprobs_mode": "processed_logits"}, "they are raw_logprobs"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        lk.LLM(**given)


def test_an_unknown_argument_names_the_closest():
    with pytest.raises(TypeError, match="LLM has no option 'enforce_eagre'; did you mean 'enforce_eager'"):
        lk.LLM(enforce_eagre=True)
    with pytest.raises(TypeError, match="AsyncEngineArgs has no option"):
        lk.AsyncEngineArgs(model="x", nothing_of_the_kind=1)
    args = EngineArgs(model="org/name", max_num_seqs=3)
    assert (args.model, args.max_num_seqs) == ("org/name", 3) and "max_num_seqs=3" in repr(args)
    with pytest.raises(AttributeError, match="was not given 'seed'"):
        _ = args.seed


def test_the_command_line_and_the_arguments_agree():
    """Each flag that sets an option of the engine, or changes nothing, is an argument with the same effect."""
    values = {"int": 3, "float": 0.5, "str": "auto", "bool": True, "json": {}, "list": []}
    for flag in FLAGS:
        name = flag.name.replace("-", "_")
        if flag.where == ENGINE:
            value = flag.fits[0] if flag.fits else values[flag.kind]
            assert read({name: value}).engine == ({flag.target: value} if name != "load_format" else {name: "auto"})
        elif name in ("runner", "task"):  # a server embeds as well, an LLM does not
            assert "generate" in flag.fits and read({name: "generate"}).engine == {}
        elif flag.where == HARMLESS_FLAG and (name in FIXED or name in HARMLESS):
            for value in flag.fits or (values[flag.kind],):
                number = float(value) if flag.kind == "float" else value
                assert read({name: number}).engine == {}


def test_names_of_engine_options_still_work():
    assert read({"num_blocks": 5, "prefix_caching": False}).engine == {"num_blocks": 5, "prefix_caching": False}
    runner = lk.FakeRunner(seed=0)
    assert read({"runner": runner}).engine == {"runner": runner}
