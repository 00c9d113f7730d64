"""Masks of many rows at once: bits, lines, errors of one row, threads."""

import numpy as np
import pytest
import torch

from labkit.sampling.masks import MaskThreads, apply_masks, unpack, unpack_there


class Only:
    """Allows these tokens."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def fill(self, output, bits):
        if output == [-1]:
            raise ValueError("unlucky")
        bits[:] = 0
        for token in self.tokens:
            bits.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 97])
def test_bits_are_unpacked_alike_on_every_device(vocab_size):
    bits = np.random.default_rng(1).integers(-(2**31), 2**31, (5, -(-vocab_size // 32)), np.int32)
    here = unpack(bits, vocab_size, torch.device("cpu"))
    assert here.shape == (5, vocab_size) and here.dtype == torch.bool
    assert torch.equal(here, unpack_there(torch.from_numpy(bits.view(np.uint8)), vocab_size))
    for row, token in ((2, 0), (4, vocab_size - 1)):
        assert here[row, token] == bool(bits[row, token // 32] >> token % 32 & 1)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_each_line_has_its_own_mask_and_a_failure_is_its_own(num_threads, every):
    num, vocab_size = 20, 70
    logits = torch.randn(num * every, vocab_size, generator=torch.manual_seed(2))
    before = logits.clone()
    lines = list(range(0, num * every, every))
    given = [([Only(i, 69 - i), Only(i, 3)], [-1] if i == 7 else [i]) for i in range(num)]
    errors = apply_masks(logits, lines, given, MaskThreads(num_threads))
    assert list(errors) == [7] and str(errors[7]) == "unlucky"
    for line in range(num * every):
        i, rest = divmod(line, every)
        left = set(logits[line].isfinite().nonzero()[:, 0].tolist())
        expected = set(range(vocab_size)) if rest or i == 7 else {i, 69 - i} & {i, 3}
        assert left == expected, line
        assert torch.equal(logits[line][list(left)], before[line][list(left)])
