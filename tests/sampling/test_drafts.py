"""Drafts by lookup: what they guess, from whose text, and how much they keep."""

import copy

import numpy as np
import pytest

import labkit as lk
from labkit.core.scheduling.drafting import Asked


def asked(texts, most=4, serials=None):
    width = max(map(len, texts))
    tokens = np.full((len(texts), width + 3), -7, np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    rows = np.arange(len(texts))
    lengths = np.array([len(text) for text in texts])
    given = np.array(serials) if serials is not None else rows + 1
    return Asked(rows, given, lengths, np.full(len(texts), most), tokens)


def naive(text, least, longest, most):
    """The longest match, of equal ones the latest; what followed, over and over."""
    text = list(text)
    for n in range(min(longest, len(text) - 1), least - 1, -1):
        for begin in range(len(text) - n - 1, -1, -1):
            if text[begin : begin + n] == text[-n:]:
                after = text[begin + n :]
                return (after * most)[:most]
    return []


@pytest.mark.parametrize(("least", "longest"), [(1, 1), (1, 3), (2, 5), (3, 3)])
def test_ngrams_find_the_longest_match_and_of_equal_ones_the_latest(least, longest):
    rng = np.random.default_rng(0)
    draft = lk.NGramDraft(6, lookup_min=least, lookup_max=longest)
    for _ in range(200):
        texts = [rng.integers(0, 3, rng.integers(1, 30)) for _ in range(3)]
        found = draft.propose(asked(texts, most=6))
        assert [guess.tolist() for guess in found] == [naive(text, least, longest, 6) for text in texts]


def test_a_suffix_is_found_in_earlier_requests_and_in_its_own():
    draft = lk.SuffixDraft(8)
    first = list(range(100, 130))
    assert [len(guess) for guess in draft.propose(asked([first]))] == [0]
    guess = draft.propose(asked([[1, 2, 103, 104]], serials=[2]))[0]
    assert guess.tolist() == [105, 106, 107, 108]
    own = [5, 6, 7, 5, 6]
    assert draft.propose(asked([own], serials=[3]))[0].tolist() == [7, 5, 6, 7]


def test_a_longer_match_is_trusted_for_more_tokens():
    draft = lk.SuffixDraft(16)
    first = list(range(100, 140))
    draft.propose(asked([first]))
    lengths = [len(draft.propose(asked([[1, *first[3 : 3 + n]]], most=16, serials=[n + 1]))[0]) for n in (1, 2, 4, 8)]
    assert lengths == [0, 4, 8, 16]


def test_what_a_suffix_draft_keeps_is_bounded_and_stale_entries_are_no_guess():
    rng = np.random.default_rng(1)
    draft = lk.SuffixDraft(4, num_texts=3, num_entries=64)
    for serial in range(40):
        texts = [rng.integers(0, 4, 20)]
        guess = draft.propose(asked(texts, serials=[serial]))[0]
        if len(guess):  # a match of two tokens at least, in a text that is kept
            kept = [draft.text[p, : draft.length[p]].tolist() for p in draft.place_of.values()]
            tail = texts[0][-2:].tolist()
            assert any(text[i : i + 2] == tail for text in kept for i in range(len(text) - 1))
    assert len(draft.place_of) == 3 and len(draft.index) == 64 and draft.text.shape == (3, 64)
    again = copy.deepcopy(draft)
    assert repr(again) == repr(draft) == "SuffixDraft(4 tokens, 3 of 3 texts)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lk.NGramDraft(0), "num_speculative_tokens must be at least 1"),
        (lambda: lk.NGramDraft(4, lookup_min=3, lookup_max=2), "prompt_lookup_min must be at most 2"),
        (lambda: lk.SuffixDraft(4, num_texts=0), "num_texts must be at least 1"),
        (lambda: lk.ModelDraft("tiny-draft", 99), "num_speculative_tokens must be at most 32"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
