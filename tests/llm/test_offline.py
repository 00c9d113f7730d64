"""vLLM's names, on the embedded model."""

import pytest

import labkit as lk


@pytest.fixture(scope="module")
def llm():
    with lk.LLM(num_blocks=256, max_num_seqs=8, enable_prefix_caching=True) as llm:
        yield llm


def test_outputs_have_what_vllm_users_read(llm):
    asked = lk.SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1)
    first, second = llm.generate(["import os", {"prompt_token_ids": [50, 60, 70]}], asked)
    assert first.prompt == "import os" and second.prompt is None and second.prompt_token_ids == [50, 60, 70]
    out = second.outputs[0]
    assert len(out.token_ids) == len(out.logprobs) == 6 and out.finish_reason == "length" and out.index == 0
    assert llm.get_tokenizer().decode(out.token_ids) == out.text
    assert out.cumulative_logprob == pytest.approx(
        sum(x[i].logprob for x, i in zip(out.logprobs, out.token_ids, strict=True))
    )
    assert all(entry[i].rank == 1 for entry, i in zip(out.logprobs, out.token_ids, strict=True))
    assert second.prompt_logprobs[0] is None and set(second.prompt_logprobs[1]) >= {60}


def test_one_prompt_n_samples_and_a_list_of_parameters(llm):
    outputs = llm.generate("class ", lk.SamplingParams(n=3, max_tokens=5, seed=1))
    assert len(outputs) == 1 and [out.index for out in outputs[0].outputs] == [0, 1, 2]
    short, long = llm.generate(["a", "b"], [lk.SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 4)])
    assert (len(short.outputs[0].token_ids), len(long.outputs[0].token_ids)) == (2, 4)


def test_stop_strings_end_the_text_before_them(llm):
    whole = llm.generate("def f(x):\n", lk.SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    stop = whole[5:8]
    out = llm.generate("def f(x):\n", lk.SamplingParams(temperature=0, max_tokens=12, stop=[stop]))[0].outputs[0]
    assert out.text == whole[: whole.index(stop)] and out.finish_reason == "stop" and out.stop_reason == stop


def test_chat_answers_in_the_models_form(llm):
    out = llm.chat(
        [{"role": "user", "content": "What is `join` for?"}], lk.SamplingParams(temperature=0, max_tokens=60)
    )
    assert out[0].outputs[0].finish_reason == "stop" and out[0].outputs[0].text


def test_bad_words_are_never_written(llm):
    asked = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}
    plain = llm.generate("import ", lk.SamplingParams(**asked))[0].outputs[0].text
    word = plain.split()[0]
    other = llm.generate("import ", lk.SamplingParams(**asked, bad_words=[word]))[0].outputs[0].text
    assert word in plain and other.split()[0] != word


def test_a_shared_prefix_is_found_in_the_cache(llm):
    text = "# a comment that is long enough to fill a block or two of the cache, surely\n" * 2
    asked = lk.SamplingParams(temperature=0, max_tokens=2)
    cold, warm = (llm.generate(text, asked)[0] for _ in range(2))
    assert warm.num_cached_tokens >= 16 > cold.num_cached_tokens
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda llm: lk.LLM(max_num_seq=3), TypeError, "has no option 'max_num_seq'; did you mean 'max_num_seqs'"),
        (lambda llm: lk.LLM(block_size=0), ValueError, "block_size must be at least 1"),
        (lambda llm: lk.LLM("no/such/model"), ValueError, "there is no folder 'no/such/model'"),
        (lambda llm: lk.LLM(dtype="float7"), ValueError, "unknown dtype 'float7'"),
        (lambda llm: llm.generate("x", lk.SamplingParams(), n=3), TypeError, "LLM.generate has no option 'n'"),
        (lambda llm: llm.generate([[5000]]), ValueError, r"is 5000, out of vocabulary: the last id is 4095"),
        (lambda llm: llm.generate({"text": "x"}), TypeError, "a prompt has no option 'text'"),
        (lambda llm: llm.chat("hi"), ValueError, "messages is a list like"),
    ],
)
def test_bad_input_is_named(llm, call, error, message):
    with pytest.raises(error, match=message):
        call(llm)
    assert llm.generate("ok", lk.SamplingParams(max_tokens=1))[0].outputs[0].token_ids
