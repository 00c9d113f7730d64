"""A request as a policy sees it, read-only, and what a step did for each. A view holds nothing of its own, so that
making one costs a fraction of a microsecond."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from labkit.core.blocks.tables import Ints
from labkit.core.request import Request

SEEN = frozenset((
    "adapter", "admitted_at", "arrival", "cached_tokens", "error", "finish_reason", "finished_at", "first_token_at",
    "id", "num_cached", "num_left", "num_output", "num_preemptions", "num_prompt", "num_tokens", "output_ids", "params",
    "parent_session", "priority", "prompt", "salt", "sample", "serial", "session", "status", "tokens",
))  # fmt: skip
ARRAYS = ("prompt", "tokens")
NO_EXTRA: Mapping[str, Any] = MappingProxyType({})


class ReadOnlyError(AttributeError):
    """A policy tried to change what it was shown."""


class RequestView:
    """A request as a policy sees it: `id`, `prompt`, `params`, `arrival` (ns), `priority`, `num_prompt`, `num_tokens`,
    `num_output`, `num_left` (tokens it may still produce), `cached_tokens`, `num_preemptions`, `status`, and so on.
    `extra` is `params.extra_args`, or empty. Valid during the call; keep `id` or `serial`, not the view.

    >>> import labkit as lk
    >>> params = lk.SamplingParams(max_tokens=5, extra_args={"tenant": "a"})
    >>> view = RequestView(lk.Request("r1", np.arange(3, dtype=np.int32), params))
    >>> view.num_prompt, view.extra["tenant"]
    (3, 'a')
    """

    __slots__ = ("_request",)

    def __init__(self, request: Request) -> None:
        _set_request(self, request)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a policy does not see {name!r} of a request; it sees {', '.join(sorted(SEEN))}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise ReadOnlyError(f"a policy reads: it cannot set {name!r} of request {self._request.id!r}")

    def __delattr__(self, name: str) -> None:
        raise ReadOnlyError(f"a policy reads: it cannot delete {name!r} of request {self._request.id!r}")

    def __repr__(self) -> str:
        return f"View of {self._request!r}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RequestView) and other._request is self._request

    def __hash__(self) -> int:
        return hash(self._request.id)

    @property
    def extra(self) -> Mapping[str, Any]:
        given = self._request.params.extra_args
        return NO_EXTRA if given is None else MappingProxyType(given)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are there."""
        request = self._request
        if request.row is None or request.tables is None:
            return int(request.num_computed)
        return int(request.tables.num_computed[request.row])

    @property
    def prefill_left(self) -> int:
        """Tokens to compute before it decodes. Of a waiting request that no order had looked up, all that it knows."""
        request = self._request
        if request.row is None:
            return int(request.num_tokens - max(request.num_computed, request.cached_tokens))
        return int(request.num_tokens) - self.num_computed


def _array(name: str) -> property:
    def read(view: RequestView) -> Any:
        value = getattr(view._request, name).view()
        value.flags.writeable = False
        return value

    return property(read)


_set_request = RequestView._request.__set__  # type: ignore[attr-defined]  # past `__setattr__`
for _name in SEEN:  # properties in C: an order reads them for every waiting request
    setattr(RequestView, _name, _array(_name) if _name in ARRAYS else property(attrgetter(f"_request.{_name}")))


class Progress(NamedTuple):
    """What one committed step did, as columns: `prompt_tokens` computed for and `output_tokens` given to each request
    of `serials`. `ended` are those that ended since the last one. A request that is computed again after a preemption
    counts its prompt again."""

    step: int
    now: int
    serials: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    ended: tuple[RequestView, ...] = ()

    def __repr__(self) -> str:
        prompt, output = int(self.prompt_tokens.sum()), int(self.output_tokens.sum())
        return f"Progress(step {self.step}: {prompt} prompt and {output} output tokens of {len(self.serials)} requests)"
