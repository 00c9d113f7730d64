"""A trace's block gives what `capture=` and `edit=` give, and refuses by name what they cannot say."""

import pytest
import torch

import labkit as lk
from labkit.models import load_model
from tests.models.configs import config

PROMPT = [5, 9, 2, 7, 1, 3]
A, B = (torch.randn(48, generator=torch.Generator().manual_seed(i)) for i in range(2))


@pytest.fixture(scope="module")
def eng():
    model = load_model(config("llama"), load_format="dummy", dtype="float32")
    sched = lk.Scheduler(lk.BlockManager(100, 4))
    return lk.Engine(scheduler=sched, runner=lk.TorchRunner(model))


def greedy(num: int = 6, **options) -> lk.SamplingParams:
    return lk.SamplingParams(max_tokens=num, temperature=0, ignore_eos=True, **options)


def test_saved_outputs_are_those_of_capture(eng):
    with eng.trace(PROMPT, greedy()) as t:
        kept = {
            ("hidden", -1): t.embeddings.output.save(), ("hidden", 1): t.layers[-1].output.save(),
            ("hidden", 2): t.norm.output.save(), ("attention_output", 0): t.layers[0].attention.output.save(),
            ("mlp_output", 1): t.layers[1].mlp.output[:].save(),
        }  # fmt: skip
    layers = {"hidden": [-1, 1, 2], "attention_output": [0], "mlp_output": [1]}
    plain = eng.generate(PROMPT, greedy(capture=layers))
    assert t.handle.output_ids == plain.output_ids and repr(t).startswith("Trace(5 outputs saved, 0 edits")
    for key, states in kept.items():
        assert states.value.shape == (len(PROMPT) + 5, 48)
        torch.testing.assert_close(states.value, plain.captured(*key), rtol=1e-5, atol=1e-5)
    with eng.trace(PROMPT) as t:
        states = t.layers[0].output.save()
    assert len(t.handle.output_ids) == 1 and len(states.value) == len(PROMPT)


def test_changes_are_those_of_edit(eng):
    def halve(states, positions):
        return states * 0.5

    def added(t):
        t.layers[0].output += A
        t.layers[0].output[:] -= 2 * B

    def replaced(t):
        t.layers[1].output[[1, -1]] = torch.stack([A, B])
        t.embeddings.output[0] = A

    def others(t):
        t.layers[0].output = lk.edit.Project(A)
        t.layers[1].output = halve
        t.layers[1].output[2] += B

    def all_positions(t):
        t.layers[-1].output = A.tolist()

    for write, edit in {
        added: {0: [lk.edit.Add(A), lk.edit.Add(2 * B, -1.0)]},
        replaced: {1: lk.edit.Replace(torch.stack([A, B]), positions=[1, -1]), -1: lk.edit.Replace(A, positions=[0])},
        others: {0: lk.edit.Project(A), 1: [lk.edit.Function(halve), lk.edit.Add(B, positions=[2])]},
        all_positions: {1: lk.edit.Replace(A)},
    }.items():
        with eng.trace(PROMPT, greedy()) as t:
            write(t)
            seen = t.layers[1].output.save()
        plain = eng.generate(PROMPT, greedy(edit=edit, capture={"hidden": [1]}))
        assert t.handle.output_ids == plain.output_ids and t.handle.num_edited == plain.num_edited > 0, write
        torch.testing.assert_close(seen.value, plain.captured("hidden", 1), rtol=1e-5, atol=1e-5)


def _set(part, value):
    part.output = value


WRONG = {
    "a factor": (lambda t: t.layers[0].output.__imul__(2), "__imul__ on the output of layers.0. has no translation"),
    "a sum": (lambda t: t.layers[0].output + A, "__add__ on the output .* \\+= and -= add a vector"),
    "a part": (lambda t: _set(t.layers[1].mlp, A), "edits are made behind layers: layers.1..output"),
    "another": (lambda t: _set(t.layers[1], t.layers[0].output), "another output on the output of layers.1."),
    "its sum": (lambda t: _set(t.layers[1], t.layers[0].output.__iadd__(A)), "a sum with another output"),
    "sum of two": (lambda t: _set(t.layers[1], t.layers[1].output.__iadd__(t.norm.output)), "a sum with another"),
    "a slice": (lambda t: t.layers[0].output[1:3], "an index is a position in the prompt, a list of them"),
    "two indices": (lambda t: t.layers[0].output[:, -1], "an index is a position"),
    "some saved": (lambda t: t.layers[0].output[1].save(), "save\\(\\) all, and index its value"),
    "after save": (lambda t: (t.layers[0].output.save(), _set(t.layers[0], A)), "a change after save"),
    "an edit there": (lambda t: t.layers[0].output.__setitem__(1, lk.edit.Add(A)), "take positions="),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_translation_raises_and_nothing_runs(eng, name):
    write, message = WRONG[name]
    with pytest.raises(TypeError, match=message), eng.trace(PROMPT) as t:
        write(t)
    assert t.handle is None and not eng.scheduler.requests


def test_values_are_read_after_the_block_and_failures_raise(eng):
    with pytest.raises(RuntimeError, match="is computed when the block ends"), eng.trace(PROMPT) as t:
        t.layers[0].output.save().value.sum()
    with eng.trace(PROMPT) as t:
        states = t.layers[0].output
    with pytest.raises(RuntimeError, match="was not saved"):
        states.value.sum()
    with pytest.raises(IndexError), eng.trace(PROMPT) as t:
        t.layers[2].output.save()
    with pytest.raises(lk.RequestError, match="the function raised"), eng.trace(PROMPT) as t:
        t.layers[0].output = lambda states, positions: 1 / 0
    with pytest.raises(ValueError, match="the vector has 3 numbers"), eng.trace(PROMPT) as t:
        t.layers[0].output += [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="no capture= and edit= of their own"):
        eng.trace(PROMPT, greedy(edit={0: A}))
    assert len(eng.generate(PROMPT, greedy()).output_ids) == 6
