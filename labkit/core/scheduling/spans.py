"""Where a chunk of a prefill may end, for a prompt with spans whose tokens one step must compute together. And how many
inputs of images a step may begin to compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from labkit.core.blocks.spans import Span
from labkit.core.request import Request


def fit(spans: Sequence[Span], start: int, count: int, most: int) -> int:
    """`count` tokens from `start` on, or up to `most`, so that the end splits no span of one step; 0 if the first
    token's span has no room."""
    end = start + count
    for span in spans:
        if span.in_one_step and span.start < end < span.end:
            return span.end - start if span.end - start <= most else max(span.start - start, 0)
    return count


def within(spans: Sequence[Span], start: int, count: int, encoded: int, most: int) -> int:
    """`count` tokens from `start` on, or fewer, so that the step begins at most `most` inputs of images, of which
    `encoded` are other requests'. The first image of a step is always begun."""
    for span in spans:
        if span.pixels is None or not start <= span.start < start + count:
            continue
        if encoded and encoded + span.num_inputs > most:
            return span.start - start
        encoded += span.num_inputs
    return count


def begun(spans: Sequence[Span], start: int, count: int) -> int:
    """How many inputs of images this chunk begins."""
    return sum(span.num_inputs for span in spans if span.pixels is not None and start <= span.start < start + count)


def too_long(spans: Sequence[Span], most: int) -> str | None:
    """Why a step of `most` tokens can never hold one of these spans."""
    longest = max((span for span in spans if span.in_one_step), key=lambda span: span.length, default=None)
    if longest is not None and longest.length > most:
        what = f"{'a prompt' if longest.whole else 'an image'} of {longest.length} tokens"
        return f"{what} is computed in one step: raise max_num_batched_tokens ({most}) to that"
    return None


def too_many_bytes(spans: Sequence[Span], requests: Iterable[Request], most: int) -> str | None:
    """Why the pixels of these spans are too many beside those of live requests. Equal images share theirs."""
    if not any(span.pixels for span in spans):
        return None
    held = {id(span.pixels): span.num_bytes for request in requests for span in request.spans}
    more = {id(span.pixels): span.num_bytes for span in spans}
    if (total := sum((held | more).values())) <= most:
        return None
    return (
        f"the queue is full: with this request's images, live requests hold {total:,} bytes of processed images, and "
        f"at most {most:,} are allowed (max_waiting_image_gb)"
    )
