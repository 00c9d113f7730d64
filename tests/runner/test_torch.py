"""The engine on a real model: greedy tokens equal transformers' generate, however the work is chunked, shared,
preempted or swapped; and the runner's other promises."""

import random

import pytest
import torch

import labkit as lk
from labkit.models import load_model
from tests.models.configs import NATIVE, OTHERS, VOCAB, config, reference_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, theirs) by architecture and seed, made once."""
    made = {}

    def get(kind: str, seed: int = 0):
        if (kind, seed) not in made:
            theirs = reference_model(config(kind, seed), seed)
            folder = tmp_path_factory.mktemp(kind)
            theirs.save_pretrained(folder)
            made[kind, seed] = load_model(folder, dtype="float32"), theirs
        return made[kind, seed]

    return get


def greedy(theirs, prompt: list[int], num: int) -> list[int]:
    """transformers' own greedy continuation."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False, eos_token_id=None,
            pad_token_id=2,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def engine(model, *, blocks: int = 200, size: int = 16, host: int = 0, caching: bool = True, **options) -> lk.Engine:
    bm = lk.BlockManager(blocks, size, num_host_blocks=host, prefix_caching=caching)
    return lk.Engine(scheduler=lk.Scheduler(bm, **options), runner=lk.TorchRunner(model))


def params(num: int, **options) -> lk.SamplingParams:
    return lk.SamplingParams(max_tokens=num, temperature=0, ignore_eos=True, **options)


def prompts_of(rng: random.Random, number: int) -> list[list[int]]:
    """Some share a beginning."""
    start = [rng.randrange(VOCAB) for _ in range(20)]
    found = []
    for i in range(number):
        own = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 16, 30]))]
        found.append(start[: rng.choice([5, 16, 20])] + own if i % 2 else own)
    return found


def lookup(tokens):
    """What followed where the latest token occurred before."""
    at = (tokens[:-1] == tokens[-1]).nonzero()[0]
    return tokens[at[-1] + 1 : at[-1] + 5] if len(at) else tokens[:2]


SETTINGS = [
    {"size": 16, "max_num_batched_tokens": 2048},
    {"size": 1, "max_num_batched_tokens": 64, "blocks": 900},
    {"size": 3, "max_num_batched_tokens": 7, "blocks": 400},
    {"size": 64, "max_num_batched_tokens": 1},
    {"size": 16, "max_num_batched_tokens": 64, "caching": False, "max_in_flight": 1},
    {"size": 4, "blocks": 24, "max_num_batched_tokens": 32, "preemption": "recompute", "watermark": 0.0},
    {"size": 4, "blocks": 24, "host": 60, "max_num_batched_tokens": 32, "preemption": "swap", "watermark": 0.0},
    {"size": 3, "blocks": 40, "host": 60, "preemption": "swap", "max_in_flight": 1, "watermark": 0.0},
    {"size": 4, "max_num_batched_tokens": 64, "draft": lookup},
]


def expectations(theirs, seed: int, number: int, length: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, transformers' continuation)."""
    return [(prompt, greedy(theirs, prompt, length)) for prompt in prompts_of(random.Random(seed), number)]


def is_greedy(theirs, prompt: list[int], tokens: list[int]) -> bool:
    """Whether each token is the likeliest after those before it, which one pass tells: then they are what transformers
    generates. Where rounding decides between two tokens, `generate` has the last word."""
    with torch.inference_mode():
        likeliest = theirs(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].argmax(-1)
    return likeliest.tolist() == tokens or greedy(theirs, prompt, len(tokens)) == tokens


def assert_greedy_identity(ours, expected: list[tuple[list[int], list[int]]], settings: dict) -> lk.Engine:
    length = len(expected[0][1])
    eng = engine(ours, **settings)
    handles = [eng.submit(prompt, params(length, n=2 if i == 1 else 1)) for i, (prompt, _) in enumerate(expected)]
    for _ in range(100_000):
        if eng.step() is None:
            break
        eng.check()
    for (_, tokens), handle in zip(expected, handles, strict=True):
        for member in (handle, *handle.samples):
            assert member.output_ids == tokens, f"{settings}, {member!r}"
    return eng


def said(settings):
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in settings.items())


@pytest.mark.parametrize("settings", SETTINGS, ids=said)
@pytest.mark.parametrize("number", [1, 16])
def test_greedy_tokens_are_those_of_transformers_in_every_setting(models, settings, number):
    ours, theirs = models("llama")
    eng = assert_greedy_identity(ours, expectations(theirs, number, number, length=12), settings)
    if settings.get("blocks", 200) <= 40 and number > 1:
        assert eng.scheduler.num_preempted > 0, "the pool was meant to be tight"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", sorted(NATIVE | OTHERS))
def test_greedy_tokens_are_those_of_transformers_for_every_architecture(models, kind, seed):
    """One of three models against `generate`; the others against one pass over what was said, a tenth of the work."""
    ours, theirs = models(kind, seed)
    if seed == 0:
        expected = expectations(theirs, seed, number=5, length=10)
    else:
        prompts = prompts_of(random.Random(seed), 5)
        handles = engine(ours).generate(prompts, params(10))
        expected = [(prompt, handle.output_ids) for prompt, handle in zip(prompts, handles, strict=True)]
        assert all(len(tokens) == 10 and is_greedy(theirs, prompt, tokens) for prompt, tokens in expected)
    for settings in SETTINGS[seed::3]:  # each is met by one of the three models
        assert_greedy_identity(ours, expected, settings)


def test_a_request_gets_the_same_text_whatever_is_served_beside_it(models):
    ours, _ = models("qwen3")
    sampled = lk.SamplingParams(max_tokens=20, temperature=1.2, top_p=0.9, seed=7, ignore_eos=True)
    alone = engine(ours).generate([3, 1, 4], sampled).output_ids
    rng = random.Random(0)
    busy = engine(ours, size=4, blocks=40, max_num_batched_tokens=16, watermark=0.0)
    for prompt in prompts_of(rng, 8):
        busy.submit(prompt, lk.SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True))
    handle = busy.submit([3, 1, 4], sampled)
    busy.run()
    assert busy.scheduler.num_preempted > 0
    assert handle.output_ids == alone


def test_drafts_change_no_token_that_is_drawn_at_random(models):
    """A draft counts if it is what would have been drawn, with the same seed at the same place; also where masks,
    penalties and bias depend on the drafts before it. Logprobs are those without drafts."""
    ours, _ = models("llama")

    def never_twice(prompt, output, logits):
        if output:
            logits[output[-1]] = -torch.inf
        return logits

    asked = [lk.SamplingParams(max_tokens=60, ignore_eos=True, seed=i, temperature=0.3 * i, top_k=8) for i in range(4)]
    special = {"max_tokens": 24, "ignore_eos": True, "seed": 1, "top_k": 4, "temperature": 0.5}
    asked += [
        lk.SamplingParams(**special, **more)
        for more in (
            {"repetition_penalty": 1.3, "logprobs": 2}, {"frequency_penalty": 0.7, "presence_penalty": -0.5},
            {"logprobs": 0}, {"logit_bias": {7: 3.0}, "min_tokens": 9, "stop_token_ids": [7]},
            {"bad_word_ids": [[7, 8], [3]], "n": 2}, {"logits_processors": [never_twice]},
            {"allowed_token_ids": list(range(40))},
        )
    ]  # fmt: skip
    found, values = [], []
    for draft in (None, lookup):
        eng = engine(ours, draft=draft, size=4)
        handles = [eng.submit([5, 6, 7], one) for one in asked]
        eng.run()
        eng.check()
        assert not eng.scheduler.requests and eng.blocks.num_used == 0
        members = [member for handle in handles for member in handle.family]
        found.append([(member.output_ids, [entry.rank for entry in member.logprobs]) for member in members])
        numbers = [entry.logprob for member in members for entry in member.logprobs]
        values = values or numbers
        assert numbers == pytest.approx(values, abs=1e-4)
        events = eng.log.events("Drafted")
    assert found[0] == found[1]
    assert 0 < sum(event.num_accepted for event in events) < sum(event.num_drafts for event in events)
    assert {event.request for event in events} == {member.id for member in members}


def test_samples_of_one_request_differ_and_repeat(models):
    ours, _ = models("llama")
    asked = lk.SamplingParams(n=4, max_tokens=12, temperature=1.5, seed=1, ignore_eos=True)
    runs = []
    for _ in range(2):
        handle = engine(ours).generate([5, 6, 7], asked)
        runs.append([member.output_ids for member in (handle, *handle.samples)])
    assert runs[0] == runs[1]
    assert len(set(map(tuple, runs[0]))) == 4


def test_logprobs_are_those_of_the_model(models):
    ours, theirs = models("llama")
    prompt = [3, 1, 4, 1, 5]
    eng = engine(ours, max_num_batched_tokens=3)
    handle = eng.generate(prompt, params(4, logprobs=3, prompt_logprobs=2))
    ids = prompt + handle.output_ids
    with torch.inference_mode():
        scores = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    for i, entry in enumerate(handle.logprobs):
        line = scores[len(prompt) - 1 + i]
        assert entry.logprob == pytest.approx(line[handle.output_ids[i]].item(), abs=1e-4) and entry.rank == 1
        assert list(entry.top_ids) == line.topk(3).indices.tolist()
    assert sorted(handle.prompt_logprobs) == [1, 2, 3, 4]
    for position, entry in handle.prompt_logprobs.items():
        assert entry.logprob == pytest.approx(scores[position - 1][prompt[position]].item(), abs=1e-4)


def test_captured_layers_cover_every_computed_token(models):
    ours, theirs = models("llama")
    prompt = list(range(3, 23))
    eng = engine(ours, max_num_batched_tokens=8)
    eng.generate(prompt, params(1))  # would be a prefix hit otherwise
    handle = eng.generate(prompt, params(3, capture={"hidden": [0], "attention": [1]}))
    ids = prompt + handle.output_ids[:-1]
    with torch.inference_mode():
        given = theirs(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(handle.captured("hidden", 0), given, rtol=1e-4, atol=1e-4)
    assert sum(part.shape[1] for part in handle.captured("attention", 1)) == len(ids)
    with pytest.raises(ValueError, match="captured nothing of 'hidden', layer 1"):
        handle.captured("hidden", 1)


def test_time_travel_gives_the_same_tokens_again(models):
    ours, _ = models("llama")
    eng = engine(ours, size=4)
    handle = eng.submit([1, 2, 3], lk.SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True))
    for _ in range(5):
        eng.step()
    before = eng.snapshot()
    twin = eng.fork()
    eng.run()
    first = handle.output_ids
    eng.restore(before)
    eng.run()
    twin.run()
    assert handle.output_ids == first == twin.request(handle.id).output_ids


def test_a_logits_processor_is_obeyed_and_its_failure_is_its_requests_alone(models):
    ours, theirs = models("llama")

    def only_even(prompt, output, logits):
        logits[1::2] = -torch.inf
        return logits

    def breaks(prompt, output, logits):
        if len(output) == 2:
            raise KeyError("oops")
        return logits

    eng = engine(ours)
    even = eng.submit([1, 2, 3], params(6, logits_processors=[only_even]))
    broken = eng.submit([1, 2, 3], params(6, logits_processors=[breaks]))
    short = eng.submit([1, 2, 3], params(6, logits_processors=[lambda p, o, x: x[:-1]]))
    nothing = eng.submit([1, 2, 3], params(6, logits_processors=[lambda p, o, x: x * float("nan")]))
    plain = eng.submit([1, 2, 3], params(6))
    eng.run()
    assert len(even.output_ids) == 6 and not any(i % 2 for i in even.output_ids)
    assert broken.finish_reason == "error" and "KeyError: 'oops'" in broken.error
    assert "must return logits of shape (97,)" in short.error
    assert "nan" in nothing.error
    assert plain.output_ids == greedy(theirs, [1, 2, 3], 6)
    with pytest.raises(lk.RequestError, match="oops"):
        broken.wait()
    eng.check()
    assert eng.blocks.num_used == 0


def test_masks_and_penalties_are_obeyed(models):
    ours, theirs = models("llama")
    first, second = greedy(theirs, [1, 2, 3], 2)
    eng = engine(ours)
    ask = {
        "forbidden": params(2, bad_word_ids=[[first]]),
        "pair": params(2, bad_word_ids=[[first, second]]),
        "allowed": params(3, allowed_token_ids=[5, 6]),
        "biased": params(3, logit_bias={"11": 100.0}),
        "penalized": params(40, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=1e6),
    }
    got = {name: eng.generate([1, 2, 3], asked).output_ids for name, asked in ask.items()}
    assert got["forbidden"][0] != first
    assert got["pair"][0] == first and got["pair"][1] != second
    assert set(got["allowed"]) <= {5, 6}
    assert got["biased"] == [11, 11, 11]
    assert len(set(got["penalized"])) == 40 and not {1, 2, 3} & set(got["penalized"])


def test_min_tokens_keeps_stop_tokens_from_being_drawn(models):
    ours, theirs = models("llama")
    first = greedy(theirs, [1, 2, 3], 1)[0]
    eng = engine(ours)
    asked = lk.SamplingParams(max_tokens=5, temperature=0, stop_token_ids=[first], min_tokens=2)
    assert first not in eng.generate([1, 2, 3], asked).output_ids[:2]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"logit_bias": {97: 1.0}}, "logit_bias names token 97, out of vocabulary: the last id is 96"),
        ({"allowed_token_ids": [5, 400]}, "allowed_token_ids names token 400"),
        ({"capture": {"hidden": [3]}}, "capture of 'hidden' names layer 3: this runner has 2 layers"),
        ({"bad_words": ["no"]}, "bad_words need text"),
    ],
)
def test_parameters_that_this_model_cannot_obey_are_named(models, asked, message):
    eng = engine(models("llama")[0])
    with pytest.raises(ValueError, match=message):
        eng.submit([1], params(2, **asked))
    assert eng.step() is None


def test_a_failed_forward_loses_nothing(models, monkeypatch):
    ours, theirs = models("llama")
    eng = engine(ours, size=4)
    handle = eng.submit([4, 5, 6], params(8))
    for _ in range(3):
        eng.step()
    real = ours.forward
    monkeypatch.setattr(ours, "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        eng.step()
    monkeypatch.setattr(ours, "forward", real)
    eng.run()
    eng.check()
    assert handle.output_ids == greedy(theirs, [4, 5, 6], 8)


def test_a_variant_put_in_use_serves_a_running_engine(models):
    import labkit_kernels as kernels

    ours, _ = models("llama")
    calls = []

    @kernels.rms_norm.variant("counting")
    def counting(x, weight, eps, residual=None):
        calls.append(len(x))
        return kernels.rms_norm.reference(x, weight, eps, residual)

    eng = engine(ours)
    handle = eng.submit([1, 2, 3], params(6))
    eng.step()
    assert not calls
    with kernels.rms_norm.use("counting"):
        eng.step()
        assert len(calls) == 5  # two a layer, and the last
    eng.run()
    assert len(calls) == 5 and handle.num_output == 6
    del kernels.rms_norm.variants["counting"]
