"""From logits to tokens, with each request's sampling parameters.

Rows without special parameters share a few vector operations. Penalties are computed as one matrix over the rows that
have them, and so are the masks of grammars. Bias, words and callers' functions are applied row by row. Randomness is a
hash of (request's seed, sample, position), so a request's text depends on its seed only: not on the batch, and not on
preemptions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.core.params import SamplingParams
from labkit.core.plan import Join, Plan, TokenLogprobs
from labkit.sampling.masks import Mask, MaskThreads, RowMasks, apply_ahead, apply_masks
from labkit.transfer import fetch, put

Sample = Callable[..., Tensor]  # the op: (logits, temperature, top_k, top_p, min_p, key) -> tokens


class Drawn(NamedTuple):
    """One step's sampled tokens, still on the device."""

    tokens: Tensor  # [samples] int64
    chosen: Tensor  # [samples]: the drawn token's logit; nan or -inf tells that the row could not be sampled
    errors: dict[int, str]  # which sample -> the error of the caller's function
    logprobs: LogprobBatch | None = None


class LogprobBatch(NamedTuple):
    rows: list[int]  # what each line is of: any numbers
    wanted: list[int]  # how many of the top entries each row asked for
    chosen: Tensor  # [rows]
    rank: Tensor  # [rows]
    top: Tensor  # [rows, most wanted]
    top_ids: Tensor

    def fetched(self) -> LogprobBatch:
        """Start the copy to the host; `by_row` is valid once an event recorded now has completed."""
        return LogprobBatch(self.rows, self.wanted, *map(fetch, self[2:]))

    def by_row(self) -> dict[int, TokenLogprobs]:
        columns = zip(
            self.rows, self.wanted, self.chosen.tolist(), self.rank.tolist(), self.top.tolist(), self.top_ids.tolist(),
            strict=True,
        )  # fmt: skip
        return {
            row: TokenLogprobs(own, rank, tuple(ids[:k]), tuple(top[:k])) for row, k, own, rank, top, ids in columns
        }


def logprobs_of(logits: Tensor, tokens: Tensor, wanted: list[int], rows: list[int]) -> LogprobBatch:
    """Log-probabilities of `tokens` and of the likeliest tokens, before any sampling parameter is applied."""
    wanted = [min(number, logits.shape[-1]) if number >= 0 else logits.shape[-1] for number in wanted]
    scores = logits.log_softmax(-1)
    chosen = scores.gather(1, tokens[:, None])
    rank = (scores > chosen).sum(-1) + 1
    top = scores.topk(min(max(wanted), scores.shape[1]), dim=-1)
    return LogprobBatch(rows, wanted, chosen[:, 0], rank, top.values, top.indices)


class Special:
    """One row's special parameters: masks, bias, words, functions, logprobs; and its tokens so far."""

    def __init__(self, join: Join, stop_ids: Iterable[int], vocab_size: int, device: torch.device) -> None:
        params = join.params
        self.params = params
        self.num_prompt = join.num_prompt
        self.prompt: list[int] = join.tokens[: join.num_prompt].tolist()
        self.output: list[int] = join.tokens[join.num_prompt :].tolist()
        self.stops = frozenset(i for i in stop_ids if i < vocab_size)
        self.stop_ids = put(sorted(self.stops), device, np.int64)
        self.bias = None
        if params.logit_bias:
            ids, values = zip(*params.logit_bias.items(), strict=True)
            self.bias = put(ids, device, np.int64), put(values, device, np.float32)
        self.forbidden = None
        if params.allowed_token_ids is not None:
            self.forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self.forbidden[put(params.allowed_token_ids, device, np.int64)] = False
        # A processor with state, such as a grammar, starts fresh for every row.
        processors = [f.begin() if hasattr(f, "begin") else f for f in params.logits_processors]
        self.masks: list[Mask] = [f for f in processors if hasattr(f, "fill")]
        self.functions = [f for f in processors if not hasattr(f, "fill")]
        self.needs_history = bool(processors or params.bad_word_ids)
        self.changes = bool(
            self.functions or params.bad_word_ids or self.bias is not None or self.forbidden is not None
            or params.min_tokens
        )  # fmt: skip

    def apply(self, logits: Tensor, known: int, output: list[int]) -> Tensor:
        """This row's logits [vocabulary] after `output`, with all its parameters but the masks applied."""
        params = self.params
        if self.forbidden is not None:
            logits = logits.masked_fill(self.forbidden, -torch.inf)
        for word in params.bad_word_ids:
            *before, last = word
            if not before or output[-len(before) :] == before:
                logits[last].fill_(-torch.inf)  # an assignment to one element would copy the number from the host
        if known - self.num_prompt < params.min_tokens:
            logits[self.stop_ids] = -torch.inf
        if self.bias is not None:
            logits.index_add_(0, *self.bias)
        for function in self.functions:
            logits = self._call(function, output, logits)
        return logits

    def _call(self, function: Callable[..., Any], output: list[int], logits: Tensor) -> Tensor:
        given = function(self.prompt, output, logits)
        if not isinstance(given, Tensor) or given.shape != logits.shape:
            what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"it must return logits of shape {tuple(logits.shape)}, it returned {what}")
        return given


class Owed(NamedTuple):
    """Drawn tokens on their way to the host, and the rows that need them there before their next draw."""

    tokens: Tensor  # [samples], valid once `event` has completed
    event: torch.cuda.Event | None
    rows: list[tuple[int, Special]]  # (sample, row)


class Guessed:
    """The drafts of a step, for draws that depend on the tokens before them: each draw assumes the drafts before it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sample, query = plan.draws()
        self.own = plan.sample_query[self.sample]  # where the sample's own token is
        self.nth = query - self.own

    def before(self, i: int) -> list[int]:
        """The drafts that draw i assumes."""
        own = int(self.own[i])
        found: list[int] = self.plan.tokens[own + 1 : own + 1 + int(self.nth[i])].tolist()
        return found

    def stands(self, tokens: Tensor) -> np.ndarray:
        return self.plan.verify(tokens.cpu().numpy())[0]


class Sampler:
    """Holds the parameters by row and draws the tokens.

    What a grammar, a word or a caller's function allows depends on the tokens before, so the host has to know them. It
    waits for them as late as it can: once the next step's forward is launched. Masks are then computed while the device
    computes.
    """

    def __init__(
        self, vocab_size: int, num_rows: int, eos_ids: tuple[int, ...], seed: int, device: torch.device
    ) -> None:
        self.vocab_size, self.num_rows, self.eos_ids = vocab_size, num_rows, eos_ids
        self.seed, self.device = seed, device
        self.base = np.zeros(num_rows, np.uint64)
        self.plain = np.zeros(num_rows, bool)  # rows without special parameters
        self.greedy = np.zeros(num_rows, bool)  # those of them that are greedy
        self.cold = np.zeros(num_rows, bool)  # all rows that are
        self.columns = [  # temperature, top_k, top_p, min_p; one line more than rows, for padding
            torch.zeros(num_rows + 1, dtype=dtype, device=device)
            for dtype in (torch.float32, torch.int32, torch.float32, torch.float32)
        ]
        self.seeds = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)  # `base`, for keys made there
        self.special: dict[int, Special] = {}
        self.penalized: dict[int, int] = {}  # row -> its place in the counts
        self.num_host_rows = 0  # rows that need every token on the host before the next draw
        self.owed: Owed | None = None
        self.threads = MaskThreads()
        self._places: list[int] = []
        self.in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self.count = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self.penalties = torch.zeros((0, 3), device=device)  # presence, frequency, repetition

    # -- rows ----------------------------------------------------------------------------------------------------

    def join(self, joins: Iterable[Join]) -> None:
        joins = list(joins)
        if not joins:
            return
        for join in joins:
            self.leave(join.row)
            self.base[join.row] = self._base(join)
            special = self._is_special(join.params)
            self.plain[join.row] = join.params.is_plain
            self.cold[join.row] = join.params.temperature == 0
            self.greedy[join.row] = self.plain[join.row] and join.params.temperature == 0
            if special:
                stop_ids = (*join.params.stop_token_ids, *(() if join.params.ignore_eos else self.eos_ids))
                made = self.special[join.row] = Special(join, stop_ids, self.vocab_size, self.device)
                self.num_host_rows += made.needs_history
            if join.params.penalizes:
                self._penalize(join)
        rows = put([join.row for join in joins], self.device, np.int64)
        self.seeds[rows] = put(self.base[[join.row for join in joins]].view(np.int64), self.device)
        params = [join.params for join in joins]
        values = (
            ([p.temperature for p in params], np.float32),
            ([0 if p.top_k >= self.vocab_size else p.top_k for p in params], np.int32),
            ([p.top_p for p in params], np.float32),
            ([p.min_p for p in params], np.float32),
        )
        for column, (given, dtype) in zip(self.columns, values, strict=True):
            column[rows] = put(given, self.device, dtype)

    def leave(self, row: int) -> None:
        special = self.special.pop(row, None)
        if special is not None:
            self.num_host_rows -= special.needs_history
        if row in self.penalized:
            self._places.append(self.penalized.pop(row))

    def reset(self) -> None:
        self.owed = None
        for row in [*self.special, *self.penalized]:
            self.leave(row)

    def settle(self) -> None:
        """Give rows that need them the tokens of the draw before; waits until these are on the host."""
        if self.owed is None:
            return
        owed, self.owed = self.owed, None
        if owed.event is not None:
            owed.event.synchronize()
        on_host = owed.tokens.tolist()
        for i, special in owed.rows:
            special.output.append(on_host[i])

    def _base(self, join: Join) -> int:
        """The start of this sample's randomness: its seed or, without one, the runner's seed and the request's id."""
        seed = join.params.seed
        own = f"s{seed}" if seed is not None else f"u{self.seed}:{join.request.partition('/')[0]}"
        digest = hashlib.blake2b(f"{own}:{join.sample}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    @staticmethod
    def _is_special(params: SamplingParams) -> bool:
        return bool(
            params.logits_processors or params.bad_word_ids or params.logit_bias or params.min_tokens
            or params.allowed_token_ids is not None or params.logprobs is not None
        )  # fmt: skip

    def _penalize(self, join: Join) -> None:
        if not self._places:
            have = len(self.count)
            more = max(8, have)
            self._places = list(range(have, have + more))[::-1]
            self.in_prompt = torch.cat((self.in_prompt, self.in_prompt.new_zeros(more, self.vocab_size)))
            self.count = torch.cat((self.count, self.count.new_zeros(more, self.vocab_size)))
            self.penalties = torch.cat((self.penalties, self.penalties.new_zeros(more, 3)))
        place = self.penalized[join.row] = self._places.pop()
        tokens = put(join.tokens, self.device, np.int64)
        self.in_prompt[place] = False
        self.in_prompt[place, tokens[: join.num_prompt]] = True
        self.count[place] = 0
        output = tokens[join.num_prompt :]
        self.count[place].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        params = join.params
        given = [params.presence_penalty, params.frequency_penalty, params.repetition_penalty]
        self.penalties[place] = put(given, self.device, np.float32)

    # -- sampling -----------------------------------------------------------------------------------------------

    def draw(
        self, logits: Tensor, rows: np.ndarray, known: np.ndarray, sample: Sample, plan: Plan | None = None
    ) -> Drawn:
        """One token for each of `rows` from its row of `logits` [samples, vocabulary] float32, which may be modified.
        `known` are the tokens that each row has before the draw. With the `plan` of a step that verifies drafts, a row
        is there once for each of its draws: what depends on its tokens is computed as if the drafts were right."""
        wanted = [(i, row) for i, row in enumerate(rows.tolist()) if row in self.special] if self.special else []
        asking = [(i, row) for i, row in wanted if self.special[row].params.logprobs is not None]
        lines = put([i for i, _ in asking], self.device, np.int64) if asking else None
        raw = logits[lines] if lines is not None else None
        guessed = Guessed(plan) if plan is not None and (wanted or self.penalized) else None
        errors: dict[int, str] = {}
        if wanted and self.num_host_rows:
            self.settle()
        for i, row in wanted:
            special = self.special[row]
            if special.changes:
                output = special.output if guessed is None else special.output + guessed.before(i)
                try:
                    logits[i] = special.apply(logits[i].clone(), int(known[i]), output)
                except Exception as error:  # a caller's own function may raise anything
                    errors[i] = _failed(error)
        if masked := [(i, row) for i, row in wanted if self.special[row].masks and i not in errors]:
            errors |= {i: _failed(error) for i, error in self._mask(logits, masked, guessed).items()}
        if self.penalized:
            self._apply_penalties(logits, rows, guessed)
        index = put(rows, self.device, np.int64)
        keys = put(self.keys(rows, known), self.device)
        columns = [column[index] for column in self.columns]
        tokens = sample(logits, *columns, keys)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        waiting = [(i, self.special[row]) for i, row in wanted if self.special[row].needs_history]
        if guessed is None:
            if self.penalized:
                self._count(tokens, rows)
            if self.num_host_rows:
                self._owe(tokens, waiting)
        elif self.penalized or waiting:  # only tokens that stand count
            stands = guessed.stands(tokens)
            self._count(tokens[put(stands.nonzero()[0], self.device)], rows[stands])
            self._owe(tokens, [(i, special) for i, special in waiting if stands[i]])
        batch = None
        if raw is not None:
            numbers = [self.special[row].params.logprobs or 0 for _, row in asking]
            batch = logprobs_of(raw, tokens[lines], numbers, [i for i, _ in asking]).fetched()
        return Drawn(tokens, chosen, errors, batch)

    def _mask(
        self, logits: Tensor, masked: list[tuple[int, int]], guessed: Guessed | None
    ) -> dict[int, Exception]:  # fmt: skip
        """Forbid what masks forbid; the errors of those that failed."""
        given = [(self.special[row].masks, self.special[row].output) for _, row in masked]
        lines = [i for i, _ in masked]
        if guessed is None:
            failed = apply_masks(logits, lines, given, self.threads)
        else:
            rows = [RowMasks(self.special[row].masks, self.special[row].output, guessed.before(i), stops)
                    for i, row in masked for stops in (self.special[row].stops,)]  # fmt: skip
            failed = apply_ahead(logits, lines, rows)
        return {lines[i]: error for i, error in failed.items()}

    def _owe(self, tokens: Tensor, rows: list[tuple[int, Special]]) -> None:
        if rows:
            on_host, event = fetch(tokens), None
            if tokens.device.type == "cuda":
                event = torch.cuda.Event()
                event.record()
            self.owed = Owed(on_host, event, rows)

    def keys(self, rows: np.ndarray, known: np.ndarray) -> np.ndarray:
        """What each row's next draw hashes: its seed and its number of tokens."""
        return _keys(self.base[rows], known)

    def _where_penalized(self, rows: np.ndarray) -> tuple[Tensor, Tensor, list[int]] | None:
        """Which lines have penalties, their places in the counts, and the lines once more on the host."""
        lines = [(i, self.penalized[row]) for i, row in enumerate(rows.tolist()) if row in self.penalized]
        if not lines:
            return None
        pairs = put(lines, self.device, np.int64)
        return pairs[:, 0], pairs[:, 1], [i for i, _ in lines]

    def _apply_penalties(self, logits: Tensor, rows: np.ndarray, guessed: Guessed | None) -> None:
        if (where := self._where_penalized(rows)) is None:
            return
        lines, places, known = where
        count, wide = self.count[places], logits[lines]
        if guessed is not None:
            assumed = [(at, id) for at, i in enumerate(known) for id in guessed.before(i)]
            if assumed:
                pairs = put(assumed, self.device, np.int64)
                count.index_put_((pairs[:, 0], pairs[:, 1]), count.new_ones(len(assumed)), accumulate=True)
        presence, frequency, repetition = self.penalties[places].unbind(1)
        seen = self.in_prompt[places] | (count > 0)
        repeated = torch.where(wide > 0, wide / repetition[:, None], wide * repetition[:, None])
        wide = torch.where(seen, repeated, wide)
        wide = wide - frequency[:, None] * count - presence[:, None] * (count > 0)
        logits[lines] = wide

    def _count(self, tokens: Tensor, rows: np.ndarray) -> None:
        if (where := self._where_penalized(rows)) is not None:
            lines, places, _ = where
            self.count.index_put_((places, tokens[lines]), self.count.new_ones(len(lines)), accumulate=True)


def _failed(error: Exception) -> str:
    return f"logits processor failed: {type(error).__name__}: {error}"


def _keys(base: np.ndarray, known: np.ndarray) -> np.ndarray:
    """One well-mixed key a draw."""
    x = base ^ (known.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)
