"""A submitted request as its caller sees it: read text and tokens as they arrive, wait, iterate, abort."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from typing import Any, Protocol

from labkit.core.captures import Captured
from labkit.core.plan import Extras, TokenLogprobs
from labkit.core.request import Request, Status
from labkit.core.scheduling.scheduler import RejectedError
from labkit.engine.activations import Activations, Shards, raise_missing, read_activations
from labkit.text.stream import Text
from labkit.text.tokenizer import Decoder


class Owner(Protocol):
    """What a handle needs of its engine."""

    @property
    def tokenizer(self) -> Decoder | None: ...

    def wait_for(self, handles: Iterable[Handle], timeout: float | None = None) -> None: ...
    def wait_past(self, handle: Handle, seen: int) -> int: ...
    async def wait_past_async(self, handle: Handle, seen: int | None) -> int: ...
    def abort(self, request: str | Request) -> Handle: ...
    def hand_out(self) -> None: ...


class RequestError(RuntimeError):
    """This request failed; the engine continues."""


class Handle(Request):
    """What `Engine.submit` returns.

    `for text in handle` and `async for text in handle` yield text as it is produced (token ids if the engine has no
    tokenizer). `handle.wait()` and `await handle` return when the request has ended. `handle.text`, `.output_ids` and
    `.logprobs` hold what there is so far. Without a background thread, waiting also steps the engine.
    """

    __slots__ = (
        "_captures",
        "_lock",
        "_text",
        "engine",
        "logprobs",
        "num_edited",
        "pooled",
        "prompt_logprobs",
        "prompt_text",
        "shards",
        "versions",
    )

    def __init__(self, *args: Any, engine: Owner, prompt_text: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.engine = engine
        self.prompt_text = prompt_text
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}
        self._captures: list[Captured] = []
        self.shards: Shards | None = None  # where captures go instead
        self.pooled: Any = None  # of a request that pools: an array, once it has ended
        self.num_edited = 0  # edits made, times tokens; also on tokens that were computed again
        self.versions: list[tuple[int, int]] = []  # (first output token, version of the weights it was drawn from)
        self._text: Text | None = None
        self._lock = threading.Lock()

    @property
    def captures(self) -> list[Captured]:
        """What `capture` has given so far, in parts as they were handed out."""
        if self.params.capture is not None:
            self.engine.hand_out()
        return self._captures

    @captures.setter
    def captures(self, found: list[Captured]) -> None:
        self._captures = found

    @property
    def family(self) -> list[Handle]:
        """This request, and its further samples."""
        return [self, *self.samples]  # type: ignore[list-item]

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        import copy

        other = object.__new__(Handle)
        memo[id(self)] = other
        for name in (*Request.__slots__, *Handle.__slots__):
            if name not in ("_lock", "_text"):
                setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        other._text, other._lock = None, threading.Lock()
        return other

    # -- output so far -------------------------------------------------------------------------------------------

    @property
    def output_ids(self) -> list[int]:
        """Tokens so far; may be read from any thread while the engine runs."""
        while True:  # the row may have been given to another request meanwhile
            row = self.row
            ids: list[int] = self.output_array.tolist()
            if self.row == row:
                return ids

    @property
    def text(self) -> str:
        """Text so far, in whole characters, without a tail that may become a stop string."""
        if self.engine.tokenizer is None or not self.params.detokenize:
            raise ValueError(f"request {self.id!r} has no text: the engine has no tokenizer, or detokenize=False")
        ended = self.ended  # read first, so that tokens that arrive later are not missed
        text = self.read_text()
        return text.final if ended else text.shown

    def read_text(self) -> Text:
        """The text, updated to the latest token."""
        with self._lock:
            ids = self.output_ids
            if self._text is None or self._text.num_tokens > len(ids):
                assert self.engine.tokenizer is not None
                self._text = Text(self.engine.tokenizer, self.prompt.tolist(), self.params)
            if self._text.num_tokens < len(ids):
                self._text.feed(ids[self._text.num_tokens :])
            return self._text

    def forget_text(self) -> None:
        """The tokens changed because the engine was rewound."""
        self._text = None
        del self.logprobs[self.num_output :]

    def stamp(self, version: int) -> None:
        """Tokens from here on are drawn from this version of the weights."""
        here = self.num_output
        kept = [(first, one) for first, one in self.versions if first < here]
        if not kept or kept[-1][1] != version:
            kept.append((here, version))
        self.versions = kept

    @property
    def weight_versions(self) -> list[int]:
        """The version of the weights that each output token was drawn from: see `Engine.load_weights`."""
        found: list[int] = []
        num, versions = len(self.output_ids), self.versions or [(0, 0)]
        ends = [first for first, _ in versions[1:]] + [num]
        for (_, version), end in zip(versions, ends, strict=True):
            found += [version] * (min(end, num) - len(found))
        return found

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or token that ended the request, if any."""
        if self.finish_reason == "stop string":
            return self.read_text().stop_string
        return self.output_ids[-1] if self.finish_reason == "stop" else None

    @property
    def cumulative_logprob(self) -> float | None:
        return sum(entry.logprob for entry in self.logprobs) if self.logprobs else None

    def captured(self, what: str, layer: int) -> Any:
        """The layer's output [tokens, hidden size], or its attention as a list of [heads, queries, keys] by chunk."""
        if what == "attention":
            found = [part.values[what, layer] for part in self.captures if (what, layer) in part.values]
            if not found:
                raise_missing(f"request {self.id!r}", what, layer)
            return found
        return self.activations[what, layer]

    @property
    def activations(self) -> Activations:
        """What `capture` has given so far, also of prompt tokens that a sample shares with its parent."""
        parent = self.parent.captures if isinstance(self.parent, Handle) else []
        shared = [part for one in parent if (part := one.before(self.num_prompt)) is not None]
        if self.params.capture is not None and (folder := self.params.capture.get("folder")) is not None:
            if self.shards is not None:
                self.shards.flush()
            return read_activations(folder, None if self.shards is None else self.shards.run).of(self.id)
        return Activations.in_memory(self.id, [*shared, *self.captures], self.tokens)

    def take(self, extras: Extras) -> None:
        """Store what the runner returned besides a token."""
        if extras.logprobs:
            self.logprobs += extras.logprobs[: max(0, self.num_output - len(self.logprobs))]
        if extras.prompt_logprobs:
            self.prompt_logprobs |= extras.prompt_logprobs

    def keep(self, captured: Captured) -> None:
        """These lines are its own."""
        self._captures.append(captured)

    def write(self, shards: Shards, captured: Captured) -> None:
        """The same, in a folder."""
        self.shards = shards
        shards.add(self, captured, self.tokens[captured.positions])

    # -- waiting -------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> Handle:
        """Wait until the request has ended; raises TimeoutError after `timeout` seconds, and RequestError if the
        request failed."""
        self.engine.wait_for([self], timeout)
        return self.raise_failure()

    def abort(self) -> Handle:
        self.engine.abort(self)
        return self

    def raise_failure(self) -> Handle:
        """A request that failed or was rejected has no answer; an aborted one has what there is."""
        if self.error is not None:
            raise RequestError(f"request {self.id!r} failed: {self.error}")
        if self.status is Status.REJECTED:
            raise RejectedError(f"request {self.id!r} is rejected: {self.finish_reason}")
        return self

    def _pieces(self) -> tuple[Any, int]:
        """Everything so far in the form that iteration yields, and its length."""
        if self.engine.tokenizer is None or not self.params.detokenize:
            ids = self.output_ids
            return ids, len(ids)
        text = self.text
        return text, len(text)

    def __iter__(self) -> Iterator[Any]:
        seen = num_tokens = 0
        while True:
            ended = self.ended
            pieces, end = self._pieces()
            if end > seen:
                yield from pieces[seen:] if isinstance(pieces, list) else (pieces[seen:],)
                seen = end
            if ended:
                self.raise_failure()
                return
            num_tokens = self.engine.wait_past(self, num_tokens)

    async def __aiter__(self) -> AsyncIterator[Any]:
        seen = num_tokens = 0
        while True:
            ended = self.ended
            pieces, end = self._pieces()
            if end > seen:
                for piece in pieces[seen:] if isinstance(pieces, list) else (pieces[seen:],):
                    yield piece
                seen = end
            if ended:
                self.raise_failure()
                return
            num_tokens = await self.engine.wait_past_async(self, num_tokens)

    def __await__(self) -> Generator[Any, None, Handle]:
        return self._end().__await__()

    async def _end(self) -> Handle:
        while not self.ended:
            await self.engine.wait_past_async(self, None)
        return self.raise_failure()
