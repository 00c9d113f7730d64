"""Inputs that are embeddings at spans of positions: as with transformers' `inputs_embeds`, however the prompt is cut,
cached, preempted or shared."""

import copy

import numpy as np
import pytest
import torch

import labkit as lk
from labkit.models import load_model
from labkit.runner.replay import can_replay
from tests.models.configs import NATIVE, OTHERS, VOCAB, config, reference_model
from tests.runner.test_torch import engine, params

PROMPT = [(7 * i) % VOCAB for i in range(30)]
SETTINGS = [
    {},
    {"size": 4, "max_num_batched_tokens": 7},
    {"size": 1, "blocks": 400, "max_num_batched_tokens": 1},
    {"size": 4, "blocks": 22, "max_num_batched_tokens": 16, "preemption": "recompute", "watermark": 0.0},
    {"size": 4, "blocks": 22, "host": 60, "max_num_batched_tokens": 16, "preemption": "swap", "watermark": 0.0},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            theirs = reference_model(config(kind))
            folder = tmp_path_factory.mktemp(kind)
            theirs.save_pretrained(folder)
            made[kind] = load_model(folder, dtype="float32"), theirs
        return made[kind]

    return get


def spans_of(theirs, seed=0):
    """Two images, say: five and eleven positions."""
    size = theirs.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    scale = theirs.get_input_embeddings().weight.std()
    return [
        lk.Span(start, length, embeddings=torch.randn(length, size, generator=generator) * scale)
        for start, length in ((3, 5), (12, 11))
    ]


def inputs_of(theirs, spans):
    inputs = theirs.get_input_embeddings()(torch.tensor([PROMPT])).detach()
    for span in spans:
        inputs[0, span.start : span.end] = torch.tensor(span.embeddings)
    return inputs


def expected(theirs, spans, num=8):
    inputs = inputs_of(theirs, spans)
    with torch.inference_mode():
        out = theirs.generate(
            inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2], dtype=torch.int64), max_new_tokens=num,
            do_sample=False, eos_token_id=None, pad_token_id=2,
        )  # fmt: skip
    return out[0].tolist()


@pytest.mark.parametrize("kind", sorted({*NATIVE, *OTHERS}))
def test_tokens_are_those_of_transformers(models, kind):
    ours, theirs = models(kind)
    spans = spans_of(theirs)
    eng = engine(ours, size=4, max_num_batched_tokens=16)
    request = eng.submit(PROMPT, params(8, logprobs=0), spans=spans)
    plain = eng.submit(PROMPT, params(8, logprobs=0))
    eng.run()
    assert request.output_ids == expected(theirs, spans)
    first, other = request.logprobs[0].logprob, plain.logprobs[0].logprob
    with torch.inference_mode():
        logits = theirs(inputs_embeds=inputs_of(theirs, spans)).logits[0, -1].log_softmax(-1)
    assert first == pytest.approx(float(logits[request.output_ids[0]]), abs=1e-3)
    assert abs(first - other) > 1e-3, "the embeddings were meant to matter"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_however_the_work_is_cut(models, settings):
    ours, theirs = models("llama")
    spans, others = spans_of(theirs), spans_of(theirs, seed=1)
    eng = engine(ours, **settings)
    handles = [eng.submit(PROMPT, params(8, n=2), spans=which) for which in (spans, others, spans)]
    eng.run()
    for handle, which in zip(handles, (spans, others, spans), strict=True):
        for one in (handle, *handle.samples):
            assert one.output_ids == expected(theirs, which), settings
    if "preemption" in settings:
        assert eng.scheduler.num_preempted > 0


def test_the_prefix_cache_knows_one_image_from_another(models):
    ours, theirs = models("llama")
    eng = engine(ours, size=4)
    spans = iter(spans_of(theirs))  # any iterable will do
    assert engine(ours).submit(PROMPT, params(2), spans=spans).spans == tuple(spans_of(theirs))
    cached = []
    for which in (spans_of(theirs), spans_of(theirs), spans_of(theirs, seed=1), []):
        request = eng.submit(PROMPT, params(2), spans=which)
        eng.run()
        cached.append(request.num_cached)
    assert cached == [0, 28, 0, 0]  # the first block holds part of the first image


def test_captured_decode_steps_do_not_meet_embeddings(models):
    ours, theirs = models("llama")
    spans = [lk.Span(20, 10, embeddings=spans_of(theirs)[1].embeddings[:10])]  # to the end of the prompt
    wanted = expected(theirs, spans)
    bm = lk.BlockManager(22, 4, num_host_blocks=60)
    sched = lk.Scheduler(bm, preemption="swap", watermark=0.0, max_num_batched_tokens=9, max_prefill_chunk=9)
    eng = lk.Engine(scheduler=sched, runner=lk.TorchRunner(ours, graphs=False))
    handles = [eng.submit(PROMPT, params(8), spans=spans) for _ in range(3)]
    eng.run()
    assert [handle.output_ids for handle in handles] == [wanted] * 3
    runner = eng.runner
    runner.rows.embedded[0] = 30
    plan = next(iter([lk.Plan(0, 0, np.array([0]), np.array([29]), np.array([1]), 1, np.zeros(1, np.int32),
                              np.array([0, 1]), np.zeros(0, np.int64), np.array([0]), np.array([0]))]))  # fmt: skip
    runner.sampler.plain[0], runner.rows.asking[0] = True, False
    rest = runner.rows, runner.sampler
    assert not can_replay(plan, *rest) and can_replay(plan._replace(start=np.array([30])), *rest)


def test_what_cannot_be_is_named(models):
    ours, _ = models("llama")
    eng = engine(ours)
    size = ours.embedding_size
    good = np.zeros((3, size))
    with pytest.raises(ValueError, match=r"one line for each of its 3 tokens, got shape \(2, 48\)"):
        lk.Span(0, 3, embeddings=good[:2])
    with pytest.raises(ValueError, match="hold nan or infinity"):
        lk.Span(0, 3, embeddings=good * np.nan)
    with pytest.raises(ValueError, match="embeddings of size 47, the model's have 48"):
        eng.submit(PROMPT, params(2), spans=[lk.Span(0, 3, embeddings=good[:, 1:])])
    with pytest.raises(ValueError, match="overlaps another span with embeddings"):
        eng.submit(PROMPT, params(2), spans=[lk.Span(0, 3, embeddings=good), lk.Span(2, 3, embeddings=good)])
    with pytest.raises(ValueError, match="does not lie within the prompt's 30 tokens"):
        eng.submit(PROMPT, params(2), spans=[lk.Span(29, 3, embeddings=good)])
    with pytest.raises(ValueError, match="real numbers, got complex"):
        lk.Span(0, 3, embeddings=good + 1j)
    with pytest.raises(ValueError, match="beyond 65504, the largest number of the model's dtype"):
        half = engine(copy.copy(ours))
        half.runner.largest_input = torch.finfo(torch.float16).max
        half.submit(PROMPT, params(2), spans=[lk.Span(0, 3, embeddings=good + 1e6)])
    for spans in (None, 3, lk.Span(0, 3, b"x")):
        with pytest.raises(ValueError, match="spans must be a list of Span"):
            eng.submit(PROMPT, params(2), spans=spans)
    with pytest.raises(ValueError, match="a span's key"):
        lk.Span(0, 3)
    fake = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(9, 4)), runner=lk.FakeRunner(), clock=lk.VirtualClock())
    with pytest.raises(ValueError, match="computes from token ids alone"):
        fake.submit([1, 2, 3], params(2), spans=[lk.Span(0, 3, embeddings=good)])
    assert lk.Span(0, 3, embeddings=good).key == lk.Span(0, 3, embeddings=torch.zeros(3, size)).key
