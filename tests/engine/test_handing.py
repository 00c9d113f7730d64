"""Blocks go from one engine to another: the same tokens as in one engine, nothing that is wrong is ever found, and what
does not fit is refused by name."""

import contextlib
import random

import numpy as np
import pytest

import labkit as lk
from labkit.core.blocks.exported import Form
from tests import adapters
from tests.core.test_tiers import offloading
from tests.harness import Flaky, assert_right, params
from tests.models.configs import config, reference_model

PROMPT = [(7 * i + i * i) % 900 + 5 for i in range(100)]
SMALL = {"dtype": "float32", "num_blocks": 64, "max_num_seqs": 4, "max_model_len": 256}
ROOM = {"num_host_blocks": 60, "kv_offloading": True}
ONE = lk.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
GREEDY = lk.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SEEDED = lk.SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)


def pair(prompt=PROMPT, prefill=SMALL, decode=SMALL, **options):
    """A prefill engine that has computed the prompt, and an empty decode engine."""
    source, target = lk.Engine(**prefill), lk.Engine(**{**decode, **ROOM})
    source.generate(prompt, ONE, **options)
    return source, target


def check(*engines):
    for eng in engines:
        eng.check()
        assert eng.close().ok


@pytest.mark.parametrize("how", ["greedy", "seeded", "int8", "n", "n-grams", "draft model"])
def test_tokens_are_those_of_one_engine(how):
    options = {"kv_cache_dtype": "int8"} if how == "int8" else {}
    drafts = {"n-grams": lk.NGramDraft(), "draft model": lk.ModelDraft("tiny-draft", 3, adaptive=False)}
    of_decode = {"draft": drafts[how]} if how in drafts else {}
    wanted = {"seeded": SEEDED, "n": lk.SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=12)}.get(how, GREEDY)
    alone = lk.Engine(**SMALL, **options).generate(PROMPT, wanted)
    source, target = pair(prefill={**SMALL, **options}, decode={**SMALL, **options, **of_decode})
    done = lk.transfer_blocks(PROMPT, source, target)
    assert (done.num_blocks, done.num_known, done.num_left_out) == (6, 0, 0) and done.num_bytes > 6000
    found = target.generate(PROMPT, wanted)
    assert found.num_cached == 96, "the transferred blocks were not found"
    assert [one.output_ids for one in found.family] == [one.output_ids for one in alone.family]
    if how == "draft model":
        one = lk.Engine(**SMALL, **of_decode)
        one.generate(PROMPT, wanted)
        accepted = [[event.num_accepted for event in eng.log.events("Drafted")] for eng in (one, target)]
        assert accepted[0] == accepted[1], "the draft model did not catch up on the transferred prompt"
    check(source, target)


def test_a_prompt_of_an_adapter_goes_to_an_engine_with_the_same_weights_only(tmp_path):
    model = reference_model(config("llama"))
    model.save_pretrained(tmp_path / "base")
    for i in range(2):
        adapters.save(model, tmp_path / f"a{i}", rank=2, seed=i, kinds=("q_proj", "down_proj"))
    options = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "skip_tokenizer_init": True}

    def engine(which, **more):
        return lk.Engine(str(tmp_path / "base"), **options, adapters={"sql": tmp_path / f"a{which}"}, **more)

    prompt = list(range(5, 18))
    source, same, other = engine(0), engine(0, **ROOM), engine(1, **ROOM)
    alone = source.generate(prompt, GREEDY, adapter="sql")
    with pytest.raises(ValueError, match="adapter 'sql' has other weights"):
        lk.transfer_blocks(prompt, source, other, adapter="sql")
    blocks = source.export_blocks(prompt, adapter="sql")
    assert len(blocks) == 3 and "'sql'" in repr(blocks)
    assert same.import_blocks(blocks).num_blocks == 3
    assert same.generate(prompt, GREEDY).num_cached == 0, "found without the adapter"
    found = same.generate(prompt, GREEDY, adapter="sql")
    assert found.num_cached == 12 and found.output_ids == alone.output_ids
    assert len(source.export_blocks(prompt)) == 0
    check(source, same, other)


def test_what_differs_is_refused_by_name_and_changes_nothing(tmp_path):
    source, target = pair()
    blocks = source.export_blocks(PROMPT)
    assert (len(blocks), blocks.num_bytes) == (6, 6 * source.block_form.num_bytes)
    for wrong, said in (
        ({"block_size": 8}, "block_size 16, not 8"),
        ({"kv_cache_dtype": "int8"}, "kv_dtype float32, not int8"),
        ({"dtype": "bfloat16"}, "kv_dtype float32, not bfloat16"),
    ):
        other = lk.Engine(**{**SMALL, **ROOM, **wrong})
        with pytest.raises(ValueError, match=said):
            other.import_blocks(blocks)
        assert len(other.blocks.offload.host) == 0
        check(other)
    with pytest.raises(ValueError, match="kv_offloading_size=1"):
        source.import_blocks(blocks)
    with pytest.raises(ValueError, match="source and target are the same engine"):
        lk.transfer_blocks(PROMPT, target, target)
    with pytest.raises(TypeError, match="import_blocks takes what export_blocks gives"):
        target.import_blocks(b"bytes")
    weights = {name: value + 0.01 for name, value in state_dict().items()}
    target.load_weights(weights)
    with pytest.raises(ValueError, match="the model or its weights differ"):
        target.import_blocks(blocks)
    with pytest.raises(ValueError, match="6 blocks of 16 tokens"):
        lk.Blocks(blocks.form, blocks.tokens[:-1], blocks.data)
    assert len(target.blocks.offload.host) == 0
    check(source, target)


def test_blocks_of_other_weights_never_go_out(monkeypatch):
    monkeypatch.setattr("labkit.engine.handing.PIECE", 1)  # one block between two steps
    source, target = pair()
    given = source.pieces(source.chain_of(PROMPT))
    assert len(next(given)) == 1
    weights = state_dict()
    largest = max(weights, key=lambda name: weights[name].numel())
    weights[largest] = weights[largest].clone()
    weights[largest].view(-1)[1001:1003] += 1.0  # a sample of the weights does not notice
    before = source.snapshot()
    source.load_weights(weights)
    source.generate(PROMPT, ONE)
    assert list(given) == [], "a transfer goes on with the blocks of other weights"
    assert len(source.export_blocks(PROMPT)) == 6
    with pytest.raises(ValueError, match="the model or its weights differ"):
        lk.transfer_blocks(PROMPT, source, target)
    source.load_weights(state_dict(), keep_cache=True)
    with pytest.raises(ValueError, match=r"blocks of other weights.*reset_prefix_cache"):
        lk.transfer_blocks(PROMPT, source, target)
    source.reset_prefix_cache()
    source.generate(PROMPT, ONE)
    assert lk.transfer_blocks(PROMPT, source, target).num_blocks == 6
    source.restore(before)
    with pytest.raises(ValueError, match="blocks of other weights"):
        source.export_blocks(PROMPT)
    check(source, target)


def state_dict():
    from safetensors.torch import load_file

    (path,) = lk.assets.path("tiny").glob("*.safetensors")
    return load_file(path)


def filled(prompt, **options):
    """A fake engine that has computed the prompt."""
    eng = offloading(**options)
    eng.generate(prompt, params(1))
    return eng


FAKE = list(range(1, 42))  # 10 full blocks of 4


def test_only_what_is_missing_is_copied_and_counted_in_events():
    source, target = filled(FAKE, blocks=32), filled(FAKE[:20], blocks=32)
    done = lk.transfer_blocks(FAKE, source, target)
    assert (done.num_blocks, done.num_known, done.num_bytes) == (10, 5, 5 * 16)
    assert lk.transfer_blocks(FAKE, source, target).num_known == 10
    (went, *_), (came, *_) = source.log.events("Exported"), target.log.events("Imported")
    assert (went.num_blocks, came.num_blocks, came.num_bytes, came.peer) == (5, 5, 80, None)
    assert target.blocks.offload.num_received == 5
    request = target.generate(FAKE, params(4))
    assert request.num_cached == 40
    assert_right(target, request)


def test_other_salts_and_spans_have_blocks_of_their_own():
    source, target = offloading(blocks=32), offloading(blocks=32)
    spans = [lk.Span(8, 4, b"image")]
    source.generate(FAKE, params(1), salt="a", spans=spans)
    assert len(source.export_blocks(FAKE)) == 0
    assert len(source.export_blocks(FAKE, salt="a", spans=[lk.Span(8, 4, b"other")])) == 2
    assert lk.transfer_blocks(FAKE, source, target, salt="a", spans=spans).num_blocks == 10
    assert target.generate(FAKE, params(2)).num_cached == 0
    assert target.generate(FAKE, params(2), salt="a").num_cached == 8
    assert target.generate(FAKE, params(2), salt="a", spans=spans).num_cached == 40


def test_host_memory_bounds_what_comes_in_and_the_beginning_stays():
    source = filled(FAKE, blocks=32)
    target = offloading(blocks=32, host=6)
    done = lk.transfer_blocks(FAKE, source, target)
    assert (done.num_blocks, done.num_left_out) == (6, 4) and "no room in host memory for 4" in repr(done)
    assert target.num_known(target.chain_of(FAKE)) == 6
    other = list(range(100, 117))
    other_source = filled(other, blocks=32, runner=lk.FakeRunner(seed=1, vocab_size=200))
    again = offloading(blocks=32, host=6, runner=lk.FakeRunner(seed=1, vocab_size=200))
    big = filled(FAKE, blocks=32, runner=lk.FakeRunner(seed=1, vocab_size=200))
    lk.transfer_blocks(FAKE, big, again)
    assert lk.transfer_blocks(other, other_source, again).num_blocks == 4, "older blocks did not make room"
    assert again.num_known(again.chain_of(FAKE)) == 2, "the end of the older prompt goes first"
    again.check()


def test_blocks_come_from_host_memory_and_through_a_third_engine_before_any_step():
    source, middle, target = filled(FAKE, blocks=12, host=40), offloading(blocks=32), offloading(blocks=32)
    source.generate([9, 8, 7] * 14, params(1))
    assert len(source.blocks.offload.host), "nothing was offloaded"
    assert lk.transfer_blocks(FAKE, source, middle).num_blocks == 10
    assert lk.transfer_blocks(FAKE, middle, target).num_blocks == 10, "what waits for the next plan is there, too"
    request = target.generate(FAKE, params(4))
    assert request.num_cached == 40
    assert_right(target, request)
    for eng in (source, middle, target):
        eng.run()
        eng.check()
        assert not eng.blocks.offload.out and not eng.blocks.pins


def test_a_transfer_that_ends_early_leaves_a_shorter_prefix():
    source, target = filled(FAKE, blocks=32), offloading(blocks=32)
    chain = source.chain_of(FAKE)
    whole = source.export_blocks(FAKE)
    rest = chain.blocks(whole.form, 6, whole.data[6:])
    assert target.take_in(rest, 0, 4)[0] == 0, "blocks whose beginning is not there are of no use"
    pieces = source.pieces(chain)
    target.take_in(next(pieces), 0, 3)
    pieces.close()
    assert not source.blocks.pins, "the source holds blocks of a transfer that has ended"
    assert target.num_known(chain) == 3
    request = target.generate(FAKE, params(4))
    assert request.num_cached == 12
    assert_right(target, request)


def test_requests_go_on_in_both_engines_and_a_starving_one_gets_held_blocks():
    source = filled(FAKE, blocks=12)
    chain = source.chain_of(FAKE)
    pieces = source.pieces(chain)
    next(pieces)
    assert source.blocks.num_used == 10
    needy = source.generate([3] * 44, params(2))
    assert needy.status.value == "finished" and not source.blocks.pins
    assert list(pieces) == []
    source.check()


def test_background_engines_exchange_blocks_while_they_serve():
    with lk.Engine(**SMALL) as source, lk.Engine(**SMALL, **ROOM) as target:
        busy = [
            eng.submit([9, 8, 7], lk.SamplingParams(temperature=0, max_tokens=150, ignore_eos=True))
            for eng in (source, target)
        ]
        source.generate(PROMPT, ONE)
        assert lk.transfer_blocks(PROMPT, source, target).num_blocks == 6
        found = target.generate(PROMPT, GREEDY)
        assert found.num_cached == 96
        for one in busy:
            one.wait()
        assert busy[0].output_ids == busy[1].output_ids
        source.check()
        target.check()


def test_forms_say_what_differs():
    form = Form(16, "int8", "2 x [4, 16, 8]", "abc", 1024)
    assert form.why_not(form) is None
    assert "model or its weights" in form.why_not(form._replace(model="x"))
    assert "shapes 2 x [1], not 2 x [4, 16, 8]" in form.why_not(form._replace(shapes="2 x [1]"))


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_transfers_and_requests_gives_right_tokens(seed):
    rng = random.Random(seed)
    print(f"seed {seed}")
    prompts = [[rng.randrange(50) for _ in range(rng.randrange(4, 60))] for _ in range(4)]
    prompts += [prompts[0][:20] + prompts[1], prompts[0] + prompts[2]]
    engines = [
        offloading(
            blocks=rng.randrange(34, 60), host=rng.randrange(8, 60), disk=rng.choice([0, 0, 20]),
            runner=Flaky(rng, rng.choice([0.0, 0.05]), seed=1, vocab_size=50), max_num_seqs=3,
            max_in_flight=rng.randrange(3), eviction=rng.choice(["lru", "slru", "fifo"]),
        )
        for _ in range(3)
    ]  # fmt: skip
    handles = []
    for _ in range(60):
        eng, other = rng.sample(engines, 2)
        act = rng.random()
        if act < 0.3:
            handles.append((eng, eng.submit(rng.choice(prompts), params(rng.randrange(1, 9)))))
        elif act < 0.6:
            lk.transfer_blocks(rng.choice(prompts), eng, other)
        elif act < 0.65:
            eng.blocks.evict()
        else:
            for _ in range(rng.randrange(1, 5)):
                with contextlib.suppress(RuntimeError):
                    eng.step()
        eng.check()
        other.check()
    for eng in engines:
        while eng.scheduler.has_work:
            with contextlib.suppress(RuntimeError):
                eng.step()
            eng.check()
    for eng, handle in handles:
        if handle.error is None:
            assert_right(eng, handle)


def test_a_read_of_many_blocks_is_the_bytes_of_each():
    source, _ = pair()
    whole = source.export_blocks(PROMPT)
    piece = next(source.pieces(source.chain_of(PROMPT), 4))
    assert piece.first == 4 and np.array_equal(piece.data, whole.data[4:])
