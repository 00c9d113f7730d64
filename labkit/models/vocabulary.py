"""The two ends of a model, where ranks split the vocabulary: each looks up, and computes logits of, its own tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.loading.format import Linear, Units, most_units
from labkit.models.place import Place


class Vocabulary:
    """This rank's part of `size` tokens; all of them where there is one rank."""

    def __init__(self, size: int, place: Place) -> None:
        self.size, self.group = size, place.group
        self.part = place.shard.part("the vocabulary", Units(size, uneven=True)) if place.group else slice(0, size)
        self.most = most_units(size, place.shard.ranks)  # tokens of the rank that has most

    def embed(self, token_ids: Tensor, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings of tokens, where `rows` looks up those of this rank: foreign ones are zero and added up."""
        if self.group is None:
            return rows(token_ids)
        local = token_ids - self.part.start
        foreign = (local < 0) | (local >= self.part.stop - self.part.start)
        found = rows(local.masked_fill(foreign, 0))
        return self.group.all_reduce(found.masked_fill(foreign[:, None], 0))

    def gather(self, logits: Tensor) -> Tensor:
        """[rows, this rank's tokens] -> [rows, vocabulary], the same on every rank."""
        if self.group is None:
            return logits
        padded = F.pad(logits, (0, self.most - logits.shape[1]))
        return self.group.all_gather(padded).transpose(0, 1).flatten(1)[:, : self.size]

    def argmax(self, hidden: Tensor, head: Linear) -> tuple[Tensor, Tensor] | None:
        """Each row's likeliest token and its logit. Ranks tell each other their best, not all logits; of equal ones the
        lowest token counts."""
        found = head.argmax(hidden)
        if self.group is None:
            return found
        if found is None:
            value, index = head(hidden, dtype=torch.float32).max(-1)
            found = index, value
        return self.best(*found)

    def best(self, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest of all ranks, where each has found these among its own tokens."""
        assert self.group is not None
        mine = torch.stack((index.double() + self.part.start, value.double()), -1)  # exact up to 2 ** 53
        every = self.group.all_gather(mine)  # [ranks, rows, 2]
        best = every[..., 1].argmax(0)  # the first of equals
        token, largest = every.gather(0, best[None, :, None].expand(1, -1, 2))[0].unbind(-1)
        return token.long(), largest.to(value.dtype)
