"""Trees of guesses: the text is that of plain decoding, and leaves are accepted where they are right."""

import numpy as np
import pytest
import torch
from labkit_kernels.attention.reference import paged_attention, tree_attention

import labkit as lk
from labkit.core.plan import Plan
from labkit.runner.trees import accepted_of, masks_of, parents_of
from tests.engine.test_speculation import PROMPTS, SETTINGS, answers

OPTIONS = {"block_size": 4, "dtype": "float32"}


def plan_of(tokens, drafts, parents):
    """Decode rows with drafts, row i at position 10 * i."""
    num = len(drafts)
    counts = np.array(drafts) + 1
    indptr = np.concatenate(([0], np.cumsum(counts)))
    rows = np.arange(num)
    return Plan(
        0, 0, rows, 10 * rows, counts, num, np.array(tokens), indptr, rows[:0], indptr[:-1], rows,
        drafts=np.array(drafts), parents=np.array(parents),
    )  # fmt: skip


def test_a_tree_is_walked_from_the_root():
    assert parents_of((2, 2, 1), 5).tolist() == [-1, -1, 0, 0, 2]
    assert parents_of((2, 2, 1), 3).tolist() == [-1, -1, 0]
    plan = plan_of([1, 5, 6, 7, 8, 9, 1, 5], [5, 1], [-1, -1, 0, 0, 2, -1])
    assert plan.offsets().tolist() == [0, 1, 1, 2, 2, 3, 0, 1]
    drawn = {
        (5, 8, 0, 0, 3, 0, 5, 4): ([5, 8, 3, 5, 4], [[0, 3], [0]]),  # down the first branch and to its second leaf
        (6, 0, 4, 0, 0, 0, 2, 0): ([6, 4, 2], [[1], []]),  # the second candidate, which has no children
        (4, 5, 6, 7, 8, 9, 2, 0): ([4, 2], [[], []]),
        (5, 7, 0, 9, 0, 2, 2, 0): ([5, 7, 9, 2, 2], [[0, 2, 4], []]),
    }
    for tokens, (expected, paths) in drawn.items():
        stands, indptr = plan.verify(np.array(tokens))
        assert np.array(tokens)[stands].tolist() == expected
        assert indptr.tolist() == [0, len(paths[0]) + 1, len(expected)]
        assert [chosen.tolist() for _, chosen in accepted_of(plan, stands)] == paths
    mask = dict(masks_of(plan, torch.device("cpu")))[0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"window": 5, "softcap": 3.0}, {"alibi": 4}, {"sinks": 4}])
def test_attention_over_a_tree_is_that_of_each_branch_alone(more):
    made = torch.Generator().manual_seed(3)
    options = {"scale": 0.3} | {
        key: torch.randn(value, generator=made).abs() if key in ("alibi", "sinks") else value
        for key, value in more.items()
    }
    k, v = (torch.randn(6, 2, 4, 8, generator=made) for _ in range(2))
    q = torch.randn(7, 4, 8, generator=made)
    table = torch.tensor([[3, 1, 4, 5], [2, 0, 0, 0]], dtype=torch.int32)
    start, length = torch.tensor([0, 6, 7], dtype=torch.int32), torch.tensor([13, 3], dtype=torch.int32)
    mask = dict(masks_of(plan_of([0] * 6, [5], [-1, -1, 0, 0, 2]), torch.device("cpu")))[0]
    out = paged_attention(q, k, v, table, start, length, **options)
    other = out[6].clone()
    tree_attention(out, ((0, mask),), q, k, v, table, start, length, **options)
    assert torch.equal(out[6], other)
    for i in range(6):
        path = [*range(7), *(7 + mask[i].nonzero()[:, 0])]  # places of the keys that it sees, in order
        own_k, own_v = (torch.stack([cache[table[0, at // 4], :, at % 4] for at in path], 1)[None] for cache in (k, v))
        alone = paged_attention(
            q[i : i + 1], own_k, own_v, torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]),
            torch.tensor([len(path)]), **options,
        )  # fmt: skip
        torch.testing.assert_close(out[i : i + 1], alone)


@pytest.fixture(scope="module")
def plain():
    return answers(lk.Engine(**OPTIONS, num_blocks=200))


@pytest.mark.parametrize("setting", ["roomy", "swapped"])
def test_every_kind_of_request_gets_the_tokens_of_plain_decoding(plain, setting):
    eng = lk.Engine(draft=lk.TreeDraft("tiny-draft", (3, 2, 2)), **OPTIONS, **SETTINGS[setting])
    assert answers(eng) == plain
    steps = eng.log.events("Step")
    assert 0 < sum(step.accepted_tokens for step in steps) < sum(step.draft_tokens for step in steps)
    eng.close()


def test_leaves_are_accepted_and_the_draft_goes_on_from_them():
    """Wrong keys and values of either model would show as fewer accepted tokens than by hand."""
    asked = lk.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    eng = lk.Engine(draft=lk.TreeDraft("tiny-draft", (3, 2)), num_blocks=100, **OPTIONS)
    handle = eng.generate(PROMPTS[0], asked)
    text, begin = handle.tokens[: handle.num_tokens].tolist(), handle.num_prompt
    small = lk.Engine(lk.assets.path("tiny-draft"), num_blocks=100, **OPTIONS)
    found, at = [], begin + 1
    while at < len(text):  # after text[:at]: the three likeliest tokens, and the two that follow the likeliest
        most = min(5, len(text) - at - 1)
        if not most:
            break
        first = top(small, text[:at], 3)
        second = top(small, [*text[:at], first[0]], 2)
        right = int(text[at] in first[:most])
        if most > 3 and text[at] == first[0]:
            right += text[at + 1] in second[: most - 3]
        found.append(right)
        at += right + 1
    assert [event.num_accepted for event in eng.log.events("Drafted")] == found
    assert 2 in found and 0 in found
    eng.close(), small.close()


def top(eng, ids, num):
    asked = lk.SamplingParams(max_tokens=1, temperature=0, logprobs=num, ignore_eos=True)
    return list(eng.generate(ids, asked).logprobs[0].top_ids)


def test_trees_on_transformers_models_give_the_same_text():
    asked = lk.SamplingParams(max_tokens=12, temperature=0.8, seed=5, ignore_eos=True)
    options = {**OPTIONS, "num_blocks": 100, "path": "transformers"}
    model = lk.load_model(lk.assets.path("tiny-draft"), dtype="float32")
    tree = lk.Engine(draft=lk.TreeDraft(model, (2, 2)), **options)
    assert tree.generate(PROMPTS[1], asked).text == lk.Engine(**options).generate(PROMPTS[1], asked).text
    assert sum(event.num_accepted for event in tree.log.events("Drafted"))
    tree.close()


def test_widths_are_checked():
    with pytest.raises(ValueError, match="widths must be at least 1"):
        lk.TreeDraft("tiny-draft", (2, 0))
    with pytest.raises(ValueError, match="1 to 32 guesses together"):
        lk.TreeDraft("tiny-draft", (20, 20))
