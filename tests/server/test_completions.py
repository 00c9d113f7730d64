"""/v1/completions against the engine in process: the same tokens, text, logprobs and counts, whole and as a stream."""

import pytest

import labkit as lk
from tests.server.talk import events, in_process, post, until

PROMPT = "def add(a, b):\n"
GREEDY = {"temperature": 0, "max_tokens": 10}


def ask(http, **body):
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def wrong(http, **body):
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY, **body})
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == answer.status_code
    return error


def stream(http, **body):
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY, "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert found.pop() == "[DONE]"
    return found


@pytest.fixture(scope="module")
def expected(server):
    return server.engine.generate(PROMPT, lk.SamplingParams(**GREEDY))


def test_text_tokens_and_counts_are_those_of_the_engine(http, server, expected):
    found = ask(http, return_token_ids=True)
    (choice,) = found["choices"]
    assert choice["text"] == expected.text and choice["token_ids"] == expected.output_ids
    assert choice["prompt_token_ids"] == expected.prompt.tolist()
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None
    assert found["usage"]["prompt_tokens"] == expected.num_prompt and found["usage"]["completion_tokens"] == 10
    assert found["object"] == "text_completion" and found["model"] == server.names[0]
    (plain,) = ask(http)["choices"]  # fields that are not asked for are there, and null
    assert (plain["token_ids"], plain["prompt_token_ids"]) == (None, None)


def test_a_stream_is_the_same_text_in_pieces(http, expected):
    chunks = stream(http, stream_options={"include_usage": True})
    usage = chunks.pop()
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 10
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "length" and not any(reasons[:-1]) and len(chunks) > 1
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_with_each_chunk_if_asked_for(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream(http, stream_options=options)]
    assert counts == sorted(counts) and counts[-1] == 10 and counts[0] < 10


def test_prompts_may_be_texts_token_ids_or_lists_of_them(http, server):
    ids = server.engine.tokenizer.encode(PROMPT)
    single = ask(http)["choices"][0]["text"]
    assert ask(http, prompt=ids)["choices"][0]["text"] == single
    for several in ([PROMPT, "class "], [ids, server.engine.tokenizer.encode("class ")]):
        found = ask(http, prompt=several)
        assert [choice["index"] for choice in found["choices"]] == [0, 1]
        assert found["choices"][0]["text"] == single != found["choices"][1]["text"]
        assert found["usage"]["completion_tokens"] == 20


def test_samples_of_several_prompts_come_in_order(http):
    found = ask(http, prompt=[PROMPT, "class "], n=3, temperature=1.0, seed=5, return_token_ids=True)
    prompts = [tuple(choice["prompt_token_ids"]) for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == list(range(6))
    assert prompts == sorted(prompts, key=prompts.index) and len(set(prompts)) == 2
    assert len({choice["text"] for choice in found["choices"]}) > 2
    texts = [""] * 6
    for chunk in stream(http, prompt=[PROMPT, "class "], n=3, temperature=1.0, seed=5):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in found["choices"]]


def test_logprobs_are_those_of_the_engine(http, server):
    handle = server.engine.generate(PROMPT, lk.SamplingParams(**GREEDY, logprobs=3))
    found = ask(http, logprobs=3)["choices"][0]
    logprobs = found["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx([entry.logprob for entry in handle.logprobs], abs=2e-2)
    assert "".join(logprobs["tokens"]) == found["text"]
    for at, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert found["text"][at:].startswith(token)
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    pieces = [chunk["choices"][0]["logprobs"] for chunk in stream(http, logprobs=3)]
    assert [t for piece in pieces for t in piece["tokens"]] == logprobs["tokens"]
    assert [t for piece in pieces for t in piece["text_offset"]] == logprobs["text_offset"]
    named = ask(http, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["tokens"]
    assert named == [f"token_id:{id}" for id in handle.output_ids]


def test_echo_repeats_the_prompt_with_its_logprobs(http, server):
    handle = server.engine.generate(PROMPT, lk.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
    found = ask(http, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert found["text"] == PROMPT and found["finish_reason"] == "length"
    wanted = [handle.prompt_logprobs[i].logprob for i in range(1, handle.num_prompt)]
    assert found["logprobs"]["token_logprobs"][0] is None and found["logprobs"]["top_logprobs"][0] is None
    assert found["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=2e-2)
    longer = ask(http, echo=True, logprobs=1, max_tokens=4)["choices"][0]
    assert longer["text"].startswith(PROMPT) and len(longer["logprobs"]["tokens"]) == handle.num_prompt + 4
    ids = server.engine.tokenizer.encode(PROMPT)
    assert ask(http, prompt=ids, echo=True)["choices"][0]["text"] == PROMPT + ask(http)["choices"][0]["text"]
    chunks = stream(http, echo=True, logprobs=1, max_tokens=4)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == longer["text"]
    assert len(chunks[0]["choices"][0]["logprobs"]["tokens"]) > handle.num_prompt


def test_prompt_logprobs_in_vllms_form(http, server):
    found = ask(http, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    ids = server.engine.tokenizer.encode(PROMPT)
    assert found[0] is None and len(found) == len(ids)
    for id, line in zip(ids[1:], found[1:], strict=True):
        assert {"logprob", "rank", "decoded_token"} == set(line[str(id)]) and 2 <= len(line) <= 3


def test_best_of_gives_the_likeliest(http, server):
    sampled = {"temperature": 1.0, "seed": 3}
    params = lk.SamplingParams(n=4, max_tokens=10, logprobs=0, **sampled)
    handle = server.engine.generate(PROMPT, params)
    family = [handle, *handle.samples]
    best = max(family, key=lambda member: sum(entry.logprob for entry in member.logprobs) / member.num_output)
    found = ask(http, best_of=4, **sampled)
    assert [choice["text"] for choice in found["choices"]] == [best.text] and found["choices"][0]["logprobs"] is None
    assert found["usage"]["completion_tokens"] == sum(member.num_output for member in family)


def test_stop_strings_end_the_text_and_are_named(http, expected):
    stop = expected.text[5:8]
    found = ask(http, stop=[stop, "never"])["choices"][0]
    assert found["text"] == expected.text[: expected.text.index(stop)]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)
    chunks = [chunk["choices"][0] for chunk in stream(http, stop=stop)]
    assert "".join(chunk["text"] for chunk in chunks) == found["text"] and chunks[-1]["stop_reason"] == stop
    kept = ask(http, stop=stop, include_stop_str_in_output=True)["choices"][0]["text"]
    assert kept == found["text"] + stop


def test_a_stop_token_is_named(http, expected):
    token = expected.output_ids[3]
    found = ask(http, stop_token_ids=[token])["choices"][0]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", token)


def test_vllms_sampling_fields_reach_the_engine(http, server):
    fields = {
        "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.5, "seed": 7,
        "frequency_penalty": 0.2, "temperature": 0.8, "min_tokens": 2, "ignore_eos": True, "bad_words": ["zzz"],
        "logit_bias": {"100": -5.0}, "skip_special_tokens": False, "max_tokens": 12,
    }  # fmt: skip
    handle = server.engine.generate(PROMPT, lk.SamplingParams(**fields))
    assert ask(http, **fields)["choices"][0]["text"] == handle.text
    allowed = server.engine.tokenizer.encode("abc def")
    found = ask(http, allowed_token_ids=allowed, return_token_ids=True)["choices"][0]["token_ids"]
    assert set(found) <= set(allowed)
    assert ask(http, top_k=-1)["choices"]


def test_priority_salt_and_own_ids_reach_the_engine(http, server):
    answer = http.post(
        "/v1/completions",
        json={"prompt": PROMPT, **GREEDY, "priority": 3, "cache_salt": "tenant"},
        headers={"X-Request-Id": "mine-1"},
    )
    assert answer.json()["id"] == "cmpl-mine-1" and answer.headers["x-request-id"] == "cmpl-mine-1"
    (found,) = [r for r in server.engine.scheduler.ended.values() if r.id.startswith("cmpl-mine-1")]
    assert (found.priority, found.salt) == (3, "tenant")


def test_cached_tokens_are_counted(http):
    long = "x = 1\n" * 40
    ask(http, prompt=long)
    found = ask(http, prompt=long)["usage"]
    assert 16 <= found["prompt_tokens_details"]["cached_tokens"] < found["prompt_tokens"]


@pytest.mark.parametrize("form", [{"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}])
def test_a_choice_is_one_of_them(http, form):
    pytest.importorskip("llguidance")
    assert ask(http, **form)["choices"][0]["text"] in ("yes", "no")


def test_a_prompt_is_cut_from_the_left(http, server):
    found = ask(http, truncate_prompt_tokens=3, return_token_ids=True)["choices"][0]
    assert found["prompt_token_ids"] == server.engine.tokenizer.encode(PROMPT)[-3:]


def test_unknown_fields_are_ignored_and_those_that_would_matter_are_refused(http, expected):
    assert ask(http, user="me", some_future_field=1)["choices"][0]["text"] == expected.text
    for name, value in (("suffix", "end"), ("logits_processors", ["x"])):
        assert wrong(http, **{name: value})["param"] == name


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"logit_bias": {"100": 1000}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [5] * 3000}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"priority": 2**40}, "priority"),
        ({"guided_regex": "(", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"model": "nobody"}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_with_the_name_of_the_field(http, body, param):
    if "guided" in str(body):
        pytest.importorskip("llguidance")
    found = wrong(http, **body)["param"]
    assert found is not None and found.split(".")[0] == param


def test_numbers_that_json_does_not_have_are_wrong_too(http):
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = f'{{"prompt": "x", "temperature": {number}}}'
        answer = http.post("/v1/completions", content=text, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, number


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}'],
    ids=["empty", "open", "list", "null", "text", "bytes", "deep", "surrogate"],
)
def test_a_body_that_is_no_json_object_is_the_clients_mistake(http, body):
    answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "BadRequestError"


def test_a_body_of_another_kind_is_refused(http):
    answer = http.post("/v1/completions", data={"prompt": "x"})
    assert answer.status_code == 415


def test_beam_search_gives_the_likeliest_continuations_of_each_prompt(http, server):
    prompts = ["def f(", "import "]
    found = http.post(
        "/v1/completions", json={"prompt": prompts, "n": 2, "use_beam_search": True, "max_tokens": 4, "echo": True}
    ).json()
    beams = lk.beam_search(server.engine, prompts, lk.BeamSearchParams(beam_width=2, max_tokens=4))
    expected = [prompt + beam.text for prompt, two in zip(prompts, beams, strict=True) for beam in two]
    assert [choice["text"] for choice in found["choices"]] == expected and len(set(expected)) == 4
    assert found["usage"]["completion_tokens"] == sum(len(beam.token_ids) for two in beams for beam in two)
    form = {"structured_outputs": {"choice": ["red", "green", "blue"]}, "max_tokens": 8}
    chosen = http.post("/v1/completions", json={"prompt": "x", "n": 3, "use_beam_search": True, **form}).json()[
        "choices"
    ]
    assert {choice["text"] for choice in chosen} <= {"red", "green", "blue"}
    for more in ({"stream": True}, {"logprobs": 1}, {"n": 65}, {"ignore_eos": True, **form}):
        answer = http.post("/v1/completions", json={"prompt": "x", "use_beam_search": True, **more})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(more))


def test_a_client_that_leaves_ends_its_beam_search(server):
    body = {"prompt": "x", "n": 4, "use_beam_search": True, "max_tokens": 900, "ignore_eos": True}
    client = post(server.port, "/v1/completions", body)
    until(lambda: server.engine.scheduler.has_work)
    client.close()
    until(lambda: server.num_open == 0 and not server.engine.scheduler.has_work)
    assert server.engine.blocks.stats().used_blocks == 0


def test_all_logprobs_are_given_where_that_is_allowed(server, http):
    assert http.post("/v1/completions", json={"prompt": "x", "prompt_logprobs": -1}).status_code == 400

    async def calls(client):
        body = {"prompt": "x = ", "max_tokens": 1, "logprobs": -1, "prompt_logprobs": -1}
        return (await client.post("/v1/completions", json=body)).json()["choices"][0]

    found = in_process(server.engine, calls, max_logprobs=-1)
    assert len(found["prompt_logprobs"][1]) == server.engine.runner.vocab_size
    assert len(found["logprobs"]["top_logprobs"][0]) > 3000  # tokens that are written alike share an entry
