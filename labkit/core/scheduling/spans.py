"""Where a chunk of a prefill may end, for a prompt with spans whose tokens one step must compute together. And how many
inputs of images a step may begin to compute."""

from __future__ import annotations

from collections.abc import Sequence

from labkit.core.blocks.spans import Span


def fit(spans: Sequence[Span], start: int, count: int, most: int) -> int:
    """`count` tokens from `start` on, or up to `most`, so that the end splits no bidirectional span; 0 if the first
    token's span has no room."""
    end = start + count
    for span in spans:
        if span.bidirectional and span.start < end < span.end:
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
    longest = max((span.length for span in spans if span.bidirectional), default=0)
    if longest > most:
        return f"an image of {longest} tokens is computed in one step: raise max_num_batched_tokens ({most}) to that"
    return None
