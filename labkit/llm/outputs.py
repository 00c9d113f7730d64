"""What vLLM's users read of a request: outputs with texts, tokens, logprobs and times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from labkit.core.params import RequestOutputKind
from labkit.core.plan import TokenLogprobs
from labkit.engine.beams import Beam
from labkit.engine.handle import Handle

REASONS = {"stop string": "stop", "eos": "stop"}  # the others keep their name


@dataclass(frozen=True)
class Logprob:
    """One token's log-probability, its rank (1: the likeliest) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Times on the engine's clock, in seconds."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def first_token_latency(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None


@dataclass(frozen=True)
class BeamSearchSequence:
    """One of the likeliest continuations: all tokens, those of the prompt first, and the text of them."""

    tokens: list[int]
    text: str | None = None
    cum_logprob: float = 0.0
    finish_reason: str | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)


@dataclass(frozen=True)
class BeamSearchOutput:
    """The likeliest continuations of a prompt, the best first."""

    sequences: list[BeamSearchSequence]

    def __iter__(self) -> Iterator[BeamSearchSequence]:
        return iter(self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> BeamSearchSequence:
        return self.sequences[index]


class Reader:
    """The outputs of one request as it grows, in the kind that its parameters ask for."""

    def __init__(self, handle: Handle, kind: RequestOutputKind = RequestOutputKind.CUMULATIVE) -> None:
        self.handle, self.kind = handle, kind
        self.members: list[Handle] = [handle, *handle.samples]  # type: ignore[list-item]
        self._shown = [(0, 0)] * len(self.members)  # tokens and characters that were read before
        self._is_over = [False] * len(self.members)  # whether the end was read
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def ended(self) -> bool:
        return all(member.ended for member in self.members)

    @property
    def output_ids(self) -> list[int]:
        """The tokens of all continuations."""
        return [id for member in self.members for id in member.output_ids]

    def read(self) -> RequestOutput | None:
        """What there is, or what is new of it; None if that is nothing."""
        ended = self.ended
        if self.kind is RequestOutputKind.FINAL_ONLY and not ended:
            return None
        if self.kind is RequestOutputKind.DELTA:
            outputs = [self._delta(i, member) for i, member in enumerate(self.members) if not self._is_over[i]]
            outputs = [out for out in outputs if out.token_ids or out.text or out.finish_reason]
        else:
            outputs = [_output(member, 0, 0) for member in self.members]
        if not ended and not any(out.token_ids or out.finish_reason for out in outputs):
            return None
        handle = self.handle
        return RequestOutput(
            request_id=handle.id,
            prompt=handle.prompt_text,
            prompt_token_ids=handle.prompt.tolist(),
            outputs=outputs,
            prompt_logprobs=self._of_prompt(),
            finished=ended,
            num_cached_tokens=handle.num_cached,
            metrics=metrics_of(handle),
        )

    def _delta(self, i: int, member: Handle) -> CompletionOutput:
        num_tokens, num_chars = self._shown[i]
        out = _output(member, num_tokens, num_chars)
        self._shown[i] = (num_tokens + len(out.token_ids), num_chars + len(out.text))
        self._is_over[i] = out.finished()
        return out

    def _of_prompt(self) -> list[dict[int, Logprob] | None] | None:
        handle = self.handle
        if handle.params.prompt_logprobs is None:
            return None
        if self._prompt_logprobs is None or len(self._prompt_logprobs) < len(handle.prompt):
            ids, found = handle.prompt.tolist(), handle.prompt_logprobs
            tokenizer = handle.engine.tokenizer if handle.params.detokenize else None
            self._prompt_logprobs = [
                None,
                *(_dict_of(found[i], ids[i], tokenizer) for i in range(1, len(ids)) if i in found),
            ]
        return self._prompt_logprobs


def _output(member: Handle, num_tokens: int, num_chars: int) -> CompletionOutput:
    """A continuation from this token and this character on."""
    ended = member.ended  # read first: what arrives later comes with the next output
    ids = member.output_ids[num_tokens:]
    tokenizer = member.engine.tokenizer if member.params.detokenize else None
    logprobs = None
    if member.params.logprobs is not None:  # of a running request they come after the token
        known = member.logprobs[num_tokens:]
        ids = ids if ended else ids[: len(known)]
        entries = zip(known, ids, strict=False)
        logprobs = [_dict_of(entry, id, tokenizer) for entry, id in entries]
    reason = member.finish_reason if ended else None
    return CompletionOutput(
        index=member.sample,
        text=member.text[num_chars:] if tokenizer is not None else "",
        token_ids=ids,
        cumulative_logprob=member.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=REASONS.get(reason or "", reason),
        stop_reason=member.stop_reason if ended else None,
        error=member.error,
    )


def output_of(handle: Handle) -> RequestOutput:
    """A request as a RequestOutput, as in vLLM."""
    found = Reader(handle, RequestOutputKind.CUMULATIVE).read()
    if found is None:
        return RequestOutput(handle.id, handle.prompt_text, handle.prompt.tolist(), finished=False)
    return found


def metrics_of(handle: Handle) -> RequestMetrics:
    def seconds(at: int | None) -> float | None:
        return None if at is None else at / 1e9

    return RequestMetrics(
        arrival_time=handle.arrival / 1e9,
        first_scheduled_time=seconds(handle.admitted_at),
        first_token_time=seconds(handle.first_token_at),
        finished_time=seconds(handle.finished_at),
        num_preemptions=handle.num_preemptions,
    )


def beam_of(prompt: list[int], beam: Beam, tokenizer: Any) -> BeamSearchSequence:
    tokens = [*prompt, *beam.token_ids]
    text = tokenizer.decode(tokens) if tokenizer is not None else None
    return BeamSearchSequence(tokens, text, beam.logprob, beam.finish_reason)


def _dict_of(entry: TokenLogprobs, id: int, tokenizer: Any) -> dict[int, Logprob]:
    def text(id: int) -> str | None:
        return tokenizer.decode([id]) if tokenizer is not None else None

    found = {id: Logprob(entry.logprob, entry.rank, text(id))}
    for rank, (other, logprob) in enumerate(zip(entry.top_ids, entry.top, strict=True), start=1):
        found.setdefault(other, Logprob(logprob, rank, text(other)))
    return found
