"""Beam search over an engine: the k likeliest continuations. Beams with a common beginning share its blocks through the
prefix cache.

Each step submits one request per beam for one token. So beams are batched with everything else that is served, and can
be preempted like any request. The cost is that each beam's last partial block is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from labkit.core.options import flag, named_options, real, whole
from labkit.core.params import SamplingParams
from labkit.engine.intake import prompt_ids

if TYPE_CHECKING:
    from labkit.engine.engine import Engine


MOST_BEAMS = 64


@named_options
@dataclass(frozen=True)
class BeamSearchParams:
    """`beam_width` hypotheses of at most `max_tokens`. A hypothesis's score is its log-probability divided by length **
    length_penalty."""

    beam_width: int = 4
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        whole("beam_width", self.beam_width, least=1, most=MOST_BEAMS)
        whole("max_tokens", self.max_tokens, least=1)
        flag("ignore_eos", self.ignore_eos)
        real("length_penalty", self.length_penalty, least=-100.0)


@dataclass(frozen=True)
class Beam:
    """A continuation, its summed log-probability, and "stop" or "length"."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    finish_reason: str | None = None
    text: str | None = None

    def score(self, length_penalty: float) -> float:
        length = len(self.token_ids) - (self.finish_reason == "stop")
        return self.logprob / max(1, length) ** length_penalty


@dataclass
class Search:
    """The beams of one prompt, running and finished."""

    prompt: list[int]
    beams: list[Beam] = field(default_factory=lambda: [Beam()])
    ended: list[Beam] = field(default_factory=list)


class SearchStopped(Exception):
    """The search was told to stop."""


def beam_search(
    engine: Engine,
    prompts: Sequence[Any],
    params: BeamSearchParams | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[Beam]]:
    """For each of a list of prompts (text, token ids, or anything `Engine.submit` takes) its best continuations, best
    first. `should_stop` is asked before each token; when it says so, SearchStopped is raised."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) and isinstance(prompts[0], int)):
        raise TypeError(f"prompts is a list of prompts: write [{prompts!r}]")
    params = BeamSearchParams() if params is None else params
    if not isinstance(params, BeamSearchParams):
        raise ValueError(f"params must be BeamSearchParams, got {params!r}")
    width = params.beam_width
    ask = SamplingParams(max_tokens=1, temperature=0, logprobs=2 * width, ignore_eos=True, detokenize=False)
    eos = () if params.ignore_eos else engine.runner.eos_token_ids
    searches = [Search(prompt_ids(engine, prompt)[0].tolist()) for prompt in prompts]
    for _ in range(params.max_tokens):
        asked = [(search, beam) for search in searches for beam in search.beams]
        if not asked:
            break
        if should_stop():
            raise SearchStopped
        handles = engine.generate([[*search.prompt, *beam.token_ids] for search, beam in asked], ask)
        for search in searches:
            search.beams = []
        for (search, beam), handle in zip(asked, handles, strict=True):
            entry = handle.raise_failure().logprobs[0]
            for token, logprob in zip(entry.top_ids, entry.top, strict=True):
                longer = Beam((*beam.token_ids, token), beam.logprob + logprob, "stop" if token in eos else None)
                (search.ended if longer.finish_reason else search.beams).append(longer)
        for search in searches:
            search.beams = sorted(search.beams, key=lambda beam: -beam.logprob)[:width]
    return [_best(engine, search, params) for search in searches]


def _best(engine: Engine, search: Search, params: BeamSearchParams) -> list[Beam]:
    cut = [Beam(beam.token_ids, beam.logprob, "length") for beam in search.beams]
    best = sorted((*search.ended, *cut), key=lambda beam: -beam.score(params.length_penalty))[: params.beam_width]
    tokenizer: Any = engine.tokenizer
    if tokenizer is None:
        return best
    return [Beam(b.token_ids, b.logprob, b.finish_reason, tokenizer.decode(list(b.token_ids))) for b in best]
