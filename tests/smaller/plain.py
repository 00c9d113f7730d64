"""Generation by plain transformers with the keys of each layer in our hands: the same rules as labkit's, written
anew, one token after the other. Slow and obviously right."""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache


def generate(model, prompt: list[int], num: int, rule) -> list[int]:
    """Greedy tokens. `rule(step)` says which keys stay, see `Step`; None: all."""
    cache, tokens, out = DynamicCache(config=model.config), list(prompt), []
    layers = model.config.num_hidden_layers
    step = Step(model, layers, len(prompt))
    done = 0
    while len(out) < num:
        until = min(len(tokens), rule.at(step, done))
        ids = torch.tensor([tokens[done:until]])
        past, new = step.num_keys(cache), until - done
        seen = torch.ones(new, new, dtype=torch.bool).tril()
        mask = torch.zeros(new, past + new).masked_fill(~torch.cat((torch.ones(new, past, dtype=bool), seen), 1), -1e30)
        if new == 1:  # it sees everything, in each layer another number of keys
            mask = torch.zeros(1, 1)
        first = past if rule.by_slot else done
        with torch.inference_mode():
            given = model(
                ids, position_ids=torch.arange(first, first + new)[None], attention_mask=mask[None, None],
                output_attentions=True, **{cache_name(model): cache},
            )  # fmt: skip
        done = until
        step.see([weights[0] for weights in given.attentions], cache)
        if done == len(tokens):
            out.append(int(given.logits[0, -1].argmax()))
            tokens.append(out[-1])
        if done == rule.at(step, done - 1):
            cache = step.keep(cache, [rule.keep(step, layer) for layer in range(layers)], rule.by_slot)
            rule.dropped(step, done)
    return out


def cache_name(model) -> str:
    """transformers renames it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Step:
    def __init__(self, model, layers: int, num_prompt: int) -> None:
        self.model, self.num_prompt = model, num_prompt
        self.weights = [[] for _ in range(layers)]  # of each query so far: [heads, keys at that time]
        self.sums = [None] * layers  # [key heads, keys]: of all queries so far
        heads = model.config.num_attention_heads
        self.groups = heads // (getattr(model.config, "num_key_value_heads", None) or heads)
        self.keys = [None] * layers

    def num_keys(self, cache) -> int:
        return cache.get_seq_length()

    def see(self, attentions, cache) -> None:
        for layer, weights in enumerate(attentions):  # [heads, queries, keys]
            by_key_head = weights.unflatten(0, (-1, self.groups)).sum(1)
            self.weights[layer] += by_key_head.unbind(1)
            total = by_key_head.sum(1)
            if self.sums[layer] is not None:
                total[:, : self.sums[layer].shape[1]] += self.sums[layer]
            self.sums[layer] = total
            self.keys[layer] = cache.layers[layer].keys[0]

    def last(self, layer: int, num: int) -> torch.Tensor:
        """Attention of the last `num` queries."""
        parts = self.weights[layer][-num:]
        total = torch.zeros_like(parts[-1])
        for part in parts:
            total[:, : part.shape[1]] += part
        return total

    def keep(self, cache, which, by_slot: bool) -> DynamicCache:
        """A cache of these keys: for each layer [key heads, kept]."""
        kept = DynamicCache(config=self.model.config)
        for layer, index in enumerate(which):
            old = cache.layers[layer]
            at = index[None, :, :, None]
            keys, values = (x.gather(2, at.expand(-1, -1, -1, x.shape[3])) for x in (old.keys, old.values))
            if by_slot:
                keys = self.turned(keys, index)
            kept.update(keys, values, layer)
            self.sums[layer] = self.sums[layer].gather(1, index)
        self.weights = [[] for _ in self.weights]
        return kept

    def turned(self, keys, index):
        """Rotated back from their slots, and then to the slots that they get."""
        rope = self.model.model.rotary_emb

        size = rope(keys, index)[0].shape[-1]  # the part of a head that is rotated
        keys, rest = keys[..., :size], keys[..., size:]

        def half(x):
            return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

        def table(at):
            cos, sin = rope(keys, at)  # [heads, keys, size]
            return cos[None] / rope.attention_scaling, sin[None] / rope.attention_scaling

        cos, sin = table(index)
        plain = keys * cos - half(keys) * sin
        cos, sin = table(torch.arange(index.shape[1]).expand(len(index), -1))
        return torch.cat((plain * cos + half(plain) * sin, rest), -1)


class Rule:
    by_slot = False  # positions are those of the text


def top(score: torch.Tensor, num: int) -> torch.Tensor:
    order = score.sort(dim=1, descending=True, stable=True).indices  # of equal ones, which max-pooling makes, the first
    return order[:, :num].sort(dim=1).values


def and_last(best: torch.Tensor, first: int, end: int) -> torch.Tensor:
    return torch.cat((best, torch.arange(first, end).expand(len(best), -1)), 1)


class Everything(Rule):
    def at(self, step, done):
        return 10**9


class SnapKV(Rule):
    def __init__(self, share: float, window: int, kernel: int, pool: str = "max") -> None:
        self.share, self.window, self.kernel, self.pool = share, window, kernel, pool

    def at(self, step, done):
        return step.num_prompt if done < step.num_prompt else 10**9

    def num(self, step, layer):
        return max(self.window, round(self.share * step.num_prompt))

    def keep(self, step, layer):
        end, num = step.num_prompt, self.num(step, layer)
        votes = step.last(layer, self.window)[:, : end - self.window]
        padded = torch.nn.functional.pad(votes, (self.kernel // 2, self.kernel // 2))
        parts = padded.unfold(1, self.kernel, 1)
        pooled = parts.amax(-1) if self.pool == "max" else parts.mean(-1)
        return and_last(top(pooled, num - self.window), end - self.window, end)

    def dropped(self, step, done):
        pass


class PyramidKV(SnapKV):
    """As its authors' code has it, with groups of layers; `block_size` rounds up to what differs by whole blocks."""

    def __init__(self, share: float, window: int, kernel: int, beta: int, groups: int, block_size: int) -> None:
        super().__init__(share, window, kernel)
        self.beta, self.groups, self.block_size = beta, groups, block_size

    def num(self, step, layer):
        capacity = super().num(step, layer)
        min_num = (capacity - self.window) // self.beta
        max_num = (capacity - self.window) * 2 - min_num
        if max_num >= step.num_prompt - self.window:
            max_num = step.num_prompt - self.window
            min_num = (capacity - self.window) * 2 - max_num
        if step.num_prompt < (capacity - self.window) * 2:
            return capacity
        steps = (max_num - min_num) // (self.groups - 1)
        num = self.window + max_num - layer * self.groups // len(step.sums) * steps
        return num + (self.window + max_num - num) % self.block_size


class H2O(Rule):
    def __init__(self, share: float, every: int) -> None:
        self.share, self.every, self.next = share, every, None

    def at(self, step, done):
        return step.num_prompt if self.next is None else self.next

    def keep(self, step, layer):
        num, end = round(self.share * step.num_prompt), step.sums[layer].shape[1]
        last = round(num / 2)
        return and_last(top(step.sums[layer][:, : end - last], num - last), end - last, end)

    def dropped(self, step, done):
        self.next = done + self.every


class RKV(Rule):
    def __init__(self, budget: int, window: int, every: int, share: float) -> None:
        self.budget, self.window, self.every, self.share, self.next = budget, window, every, share, None

    def at(self, step, done):
        return step.num_prompt if self.next is None else self.next

    def keep(self, step, layer):
        end, kernel = step.keys[layer].shape[1], 7
        attention = step.last(layer, self.window) / self.window
        padded = torch.nn.functional.pad(attention, (kernel // 2, kernel // 2), value=-1.0)
        attention = padded.unfold(1, kernel, 1).amax(-1)
        keys = step.keys[layer]
        unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        alike = torch.einsum("hkd,hld->hkl", unit, unit) * (1 - torch.eye(end))
        score = self.share * attention - (1 - self.share) * alike.mean(2).softmax(1)
        return and_last(top(score[:, : end - self.window], self.budget - self.window), end - self.window, end)

    def dropped(self, step, done):
        self.next = done + self.every


class Streaming(Rule):
    def __init__(self, sinks: int, window: int, every: int, by_slot: bool = False) -> None:
        self.by_slot = by_slot
        self.sinks, self.window, self.every = sinks, window, every
        self.next = sinks + window + every

    def at(self, step, done):
        return self.next

    def keep(self, step, layer):
        heads, end = step.keys[layer].shape[:2]
        return and_last(torch.arange(self.sinks).expand(heads, -1), end - self.window, end)

    def dropped(self, step, done):
        self.next = done + self.every
