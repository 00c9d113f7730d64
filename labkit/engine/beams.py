"""Beam search over an engine: the k likeliest continuations. Beams with a common beginning share its blocks through the
prefix cache.

Each step submits one request per beam for one token. So beams are batched with everything else that is served, and can
be preempted like any request. The cost is that each beam's last partial block is computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.core.options import flag, named_options, real, whole
from labkit.core.params import SamplingParams
from labkit.engine.intake import make_grammar, prompt_ids

if TYPE_CHECKING:
    from labkit.engine.engine import Engine


MOST_BEAMS = 64


@named_options
@dataclass(frozen=True)
class BeamSearchParams:
    """`beam_width` hypotheses of at most `max_tokens`. A hypothesis's score is its log-probability divided by length **
    length_penalty. `structured_outputs`, as in SamplingParams, leaves only hypotheses that fit a form; what they score
    is unchanged.

    >>> BeamSearchParams(beam_width=2, max_tokens=8, structured_outputs={"regex": "[a-z]+"}).beam_width
    2
    """

    beam_width: int = 4
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0
    structured_outputs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        whole("beam_width", self.beam_width, least=1, most=MOST_BEAMS)
        whole("max_tokens", self.max_tokens, least=1)
        flag("ignore_eos", self.ignore_eos)
        real("length_penalty", self.length_penalty, least=-100.0)
        SamplingParams(structured_outputs=self.structured_outputs, ignore_eos=self.ignore_eos)  # checks it


@dataclass(frozen=True)
class Beam:
    """A continuation, its summed log-probability, and "stop" or "length"."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    finish_reason: str | None = None
    text: str | None = None
    mask: Any = field(default=None, repr=False, compare=False)  # how far it has come in the form

    def score(self, length_penalty: float) -> float:
        length = len(self.token_ids) - (self.finish_reason == "stop")
        divisor: float = max(1, length) ** length_penalty
        return self.logprob / divisor


@dataclass
class Search:
    """The beams of one prompt, running and finished."""

    prompt: list[int]
    beams: list[Beam]
    ended: list[Beam] = field(default_factory=list)


class Ranking:
    """A logits processor that changes nothing. It keeps the likeliest of the allowed tokens, with log-probabilities
    among all tokens."""

    def __init__(self, num: int, mask: Any, output: Sequence[int], vocab_size: int) -> None:
        bits = np.full(-(-vocab_size // 32), -1, np.int32)
        mask.fill(list(output), bits)
        self.allowed = np.unpackbits(bits.view(np.uint8), count=vocab_size, bitorder="little").view(bool)
        self.num = min(num, int(self.allowed.sum()))
        self.best: list[tuple[int, float]] = []

    def __call__(self, prompt: list[int], output: list[int], logits: Any) -> Any:
        import torch

        forbidden = torch.from_numpy(~self.allowed).to(logits.device)
        top = logits.log_softmax(-1).masked_fill(forbidden, -np.inf).topk(self.num)
        self.best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return logits


class SearchStopped(Exception):
    """The search was told to stop."""


def beam_search(
    engine: Engine,
    prompts: Sequence[Any],
    params: BeamSearchParams | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    grammar: Any = None,
    adapter: str | None = None,
) -> list[list[Beam]]:
    """For each of a list of prompts (text, token ids, or anything `Engine.submit` takes) its best continuations, best
    first. `should_stop` is asked before each token; when it says so, SearchStopped is raised. `grammar` is that of
    `params.structured_outputs`, if it was compiled before. `adapter` names one of `engine.adapters`."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) and isinstance(prompts[0], int)):
        raise TypeError(f"prompts is a list of prompts: write [{prompts!r}]")
    params = BeamSearchParams() if params is None else params
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params must be BeamSearchParams, got {params!r}")
    if grammar is None and params.structured_outputs is not None:
        grammar = make_grammar(engine, params.structured_outputs)
    width = params.beam_width
    eos = () if params.ignore_eos else engine.runner.eos_token_ids
    searches = []
    for prompt in prompts:
        first = Beam(mask=None if grammar is None else grammar.begin())
        searches.append(Search(prompt_ids(engine, prompt)[0].tolist(), [first]))
    for _ in range(params.max_tokens):
        asked = [(search, beam) for search in searches for beam in search.beams]
        if not asked:
            break
        if should_stop():
            raise SearchStopped
        next_tokens = _next_tokens(engine, asked, 2 * width, adapter)
        for search in searches:
            search.beams = []
        for (search, beam), found in zip(asked, next_tokens, strict=True):
            for token, logprob in found:
                ids, reason = (*beam.token_ids, token), "stop" if token in eos else None
                longer = Beam(ids, beam.logprob + logprob, reason, mask=beam.mask)
                (search.ended if reason else search.beams).append(longer)
        for search in searches:
            best = sorted(search.beams, key=lambda beam: -beam.logprob)[:width]
            search.beams = [replace(beam, mask=copy.deepcopy(beam.mask)) for beam in best]
    return [_best(engine, search, params) for search in searches]


def _next_tokens(
    engine: Engine, asked: list[tuple[Search, Beam]], num: int, adapter: str | None
) -> list[list[tuple[int, float]]]:
    """The likeliest next tokens of each beam, with their log-probabilities."""
    plain = SamplingParams(max_tokens=1, temperature=0, logprobs=num, ignore_eos=True, detokenize=False)
    vocab_size = engine.runner.vocab_size
    rankings = [None if beam.mask is None else Ranking(num, beam.mask, beam.token_ids, vocab_size) for _, beam in asked]
    params = [plain if r is None else replace(plain, logprobs=None, logits_processors=(r,)) for r in rankings]
    prompts = [[*search.prompt, *beam.token_ids] for search, beam in asked]
    handles = engine.generate(prompts, params, adapter=adapter)
    found = []
    for ranking, handle in zip(rankings, handles, strict=True):
        handle.raise_failure()
        if ranking is not None:
            found.append(ranking.best)
        else:
            entry = handle.logprobs[0]
            found.append(list(zip(entry.top_ids, entry.top, strict=True)))
    return found


def _best(engine: Engine, search: Search, params: BeamSearchParams) -> list[Beam]:
    cut = [Beam(beam.token_ids, beam.logprob, "length") for beam in search.beams]
    best = sorted((*search.ended, *cut), key=lambda beam: -beam.score(params.length_penalty))[: params.beam_width]
    tokenizer: Any = engine.tokenizer
    texts = [None if tokenizer is None else tokenizer.decode(list(beam.token_ids)) for beam in best]
    return [replace(beam, text=text, mask=None) for beam, text in zip(best, texts, strict=True)]
