"""`divergence` finds where two settings differ: the token, the layer, the op. If nothing differs, it says so."""

import math

import pytest
import torch
from labkit_kernels import rms_norm

import labkit as lk
from labkit.lab.layers import relative
from labkit.lab.side import Side

from .conftest import fine_rms_norm

PROMPT = (
    "import os\nimport sys\n\ndef main(argv):\n    if len(argv) > 1:\n        print(argv[0], sys.path)\n    return "
)


def off_in(layer: int, factor: float = 3.0):
    """A norm that is wrong before the attention of one layer: of its 17 calls a step, that is number 2 * layer."""
    calls = [0]

    def wrong(x, weight, eps, residual=None):
        out = fine_rms_norm(x, weight, eps, residual)
        calls[0] += 1
        return out * factor if (calls[0] - 1) % 17 == 2 * layer else out

    return wrong


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_a_wrong_op_in_one_layer_is_found_by_layer_and_by_name(engine, variant, layer):
    variant("rms_norm", "off", off_in(layer))
    found = lk.divergence(engine, {"use": {"rms_norm": "off"}}, PROMPT, max_tokens=8)
    assert found.layer == layer and not found.identical
    assert found.op.op == "rms_norm" and found.op.layer == layer and found.op.call == 2 * layer
    assert found.op.variant_b == "off" and found.op.difference == pytest.approx(2.0, rel=0.01)
    assert all(one.largest < found.tolerance for one in found.layers if one.layer < layer)
    assert f"rms_norm in layer {layer}" in repr(found)
    assert not rms_norm.swapped and "launch" not in vars(engine.runner) and "forward" not in vars(engine.runner.model)


def test_the_first_token_that_differs_is_the_one_that_running_by_hand_gives(engine, variant):
    variant("rms_norm", "off", off_in(2, 4.0))
    found = lk.divergence(engine, (engine, {"use": {"rms_norm": "off"}}), PROMPT, max_tokens=12)
    greedy = lk.SamplingParams(temperature=0, max_tokens=12)
    a = engine.generate(PROMPT, greedy, salt="a")
    variant("rms_norm", "off", off_in(2, 4.0))
    with rms_norm.use("off"):
        b = engine.generate(PROMPT, greedy, salt="b")
    place = next(i for i, (x, y) in enumerate(zip(a.output_ids, b.output_ids, strict=True)) if x != y)
    assert found.position == place and not found.same
    assert found.tokens == tuple(engine.tokenizer.decode([h.output_ids[place]]) for h in (a, b))
    assert f"token {place} of the answer: {found.tokens[0]!r} in a" in repr(found).splitlines()[0]
    assert all(gap is None or gap >= 0 for gap in found.gaps)
    assert found.num_positions == len(a.prompt) + place
    html = found._repr_html_()
    assert "<svg" in html and "#d55e00" in html and "tolerated" in html and "<script" not in html


def test_the_same_is_said_to_be_the_same_to_the_bit(engine):
    found = lk.divergence(engine, engine, PROMPT, max_tokens=6)
    assert found.same and found.identical and found.layer is None and found.op is None
    assert "the same: 6 tokens, and every hidden state to the bit" in repr(found)
    frame = found.frame()
    assert list(frame["layer"]) == list(range(-1, 8)) and frame["largest"].max() == 0
    assert found.num_positions == len(engine.tokenizer.encode(PROMPT)) + 6 - 1  # the last token is no input
    assert ">0<" in found._repr_html_()


def test_dtypes_differ_by_roundings_that_grow_with_the_layers(variant):
    found = lk.divergence({"dtype": "float32"}, {"dtype": "bfloat16"}, PROMPT, max_tokens=6)
    by_layer = [one.largest for one in found.layers]
    assert by_layer[0] == 0 and 1e-4 < by_layer[1] <= by_layer[-1] < 0.03 and found.tolerance == 0.03
    assert found.worst.largest == max(by_layer) and not found.identical and found.layer is None
    assert "dtype='float32'" in repr(found) and "num_blocks" not in repr(found)
    strict = lk.divergence({"dtype": "float32"}, {"dtype": "bfloat16"}, PROMPT, max_tokens=2, tolerance=1e-4)
    assert strict.layer == 0 and strict.layers[1].first is not None


def test_a_prompt_out_of_the_cache_in_chunks_and_in_other_blocks_gives_the_same_in_float32():
    plain = {"dtype": "float32"}
    for other in ({"cached": True}, {"chunk": 4}, {"block_size": 4}, {"batch": 5}):
        found = lk.divergence(plain, plain | other, PROMPT, max_tokens=6)
        assert found.same and found.layer is None, f"{other}: {found!r}"
        assert found.worst.largest < 1e-5
        hit = 32 if "cached" in other else 0  # of 35 tokens two blocks; what is not computed is not compared
        assert found.num_positions == 40 - hit


def test_beside_others_in_bfloat16_and_deterministic_to_the_bit():
    loose = lk.divergence({"dtype": "bfloat16"}, {"dtype": "bfloat16", "batch": 6}, PROMPT, max_tokens=6)
    assert loose.layer is None and math.isfinite(
        loose.worst.largest
    )  # roundings only, whatever this machine adds first
    options = {"dtype": "bfloat16", "deterministic": True}
    assert lk.divergence(options, options | {"batch": 6}, PROMPT, max_tokens=6).identical


def test_other_tokens_from_the_same_layers_are_not_blamed_on_a_layer(engine, variant):
    variant("sample", "second", lambda logits, *columns: logits.topk(2).indices[:, 1])
    found = lk.divergence(engine, {"use": {"sample": "second"}}, PROMPT, max_tokens=4)
    assert found.position == 0 and found.layer is None and found.worst.largest == 0
    assert "the head or the sampler differs" in repr(found)
    assert found.gaps[0] == pytest.approx(-found.gaps[1])  # b draws what is less likely, by as much


def test_whatever_raises_leaves_the_engine_as_it_was(engine, variant):
    def raises(x, weight, eps, residual=None):
        raise ArithmeticError("not today")

    variant("rms_norm", "raises", raises)
    chunk = engine.scheduler.max_prefill_chunk
    with pytest.raises(ArithmeticError):
        lk.divergence(engine, {"use": {"rms_norm": "raises"}, "chunk": 4, "batch": 3}, PROMPT)
    assert not rms_norm.swapped and not engine.scheduler.has_work and engine.scheduler.max_prefill_chunk == chunk
    assert "launch" not in vars(engine.runner)
    engine.check()


def test_settings_that_cannot_be_are_named(engine):
    with pytest.raises(ValueError, match=r"cached: none of the 2 prompt tokens.*blocks of 16"):
        lk.divergence({}, {"cached": True}, {"prompt_token_ids": [5, 6]})
    with pytest.raises(TypeError, match="block_size"):
        lk.divergence({}, {"blok_size": 4}, PROMPT)
    with pytest.raises(TypeError, match="b is an Engine, a dict of settings, or a pair"):
        lk.divergence({}, "bfloat16", PROMPT)
    with pytest.raises(ValueError, match="cannot be changed in an engine that exists"):
        lk.divergence(engine, (engine, {"dtype": "float32"}), PROMPT)
    with pytest.raises(ValueError, match="pass model="):
        lk.divergence(engine, {"dtype": "float32"}, PROMPT)
    with pytest.raises(ValueError, match="has no variant 'nobody'"):
        lk.divergence({}, {"use": {"rms_norm": "nobody"}}, PROMPT)
    fake = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8, 4)), runner=lk.FakeRunner(seed=0))
    with pytest.raises(ValueError, match="has no layers"):
        lk.divergence(fake, fake, [1, 2])
    with pytest.raises(ValueError, match="GiB of hidden states"):
        import labkit.lab.divergence as module

        limit, module.MOST_BYTES = module.MOST_BYTES, 1000
        try:
            lk.divergence(engine, engine, PROMPT)
        finally:
            module.MOST_BYTES = limit


def test_a_side_prints_what_it_sets():
    side = Side.of({"use": {"rms_norm": "reference"}, "batch": 3, "cached": True, "chunk": 8, "block_size": 4}, "a")
    assert repr(side) == "block_size=4, use rms_norm='reference', batch=3, prefix cached, chunk=8"
    assert repr(Side.of({}, "a")) == "as it is"


def test_relative_differences_are_by_line_and_nan_is_infinitely_far():
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 4.5], [0.0, 0.0], [1.0, float("nan")], [0.0, 1e-9]])
    assert relative(a, b).tolist()[:2] == pytest.approx([0.1, 0.0])
    assert relative(a, b)[2] == float("inf") and relative(a, b)[3] > 1


def test_replayed_graphs_give_what_steps_give_and_a_running_engine_goes_on(engine):
    plain = {"dtype": "float32"}
    assert lk.divergence(plain | {"graphs": False}, plain | {"graphs": True}, PROMPT, max_tokens=6).identical
    engine.start()
    try:
        assert lk.divergence(engine, {"chunk": 8}, PROMPT, max_tokens=4).same
        assert engine.is_running
    finally:
        engine.pause()


def test_what_differs_in_replayed_graphs_only_is_said_to(engine, monkeypatch):
    """The looked-at runs agree here whatever the plain ones gave: as where only a replay is wrong."""
    import labkit.lab.side as module

    run, seen = module.Side.run, []

    def garbled(self, eng, ids, params, id=None):
        handle = run(self, eng, ids, params, id)
        seen.append(id)
        if id is None and len(seen) > 2:  # the second side's plain run
            handle.output = handle.output_array.copy()
            handle.output[2] += 1
        return handle

    monkeypatch.setattr(module.Side, "run", garbled)
    found = lk.divergence(engine, engine, PROMPT, max_tokens=6)
    assert found.position == 2 and found.only_replayed and "only with replayed graphs" in repr(found)
    assert found.tokens[0] != found.tokens[1] and found.worst.largest == 0
