"""What training by rollouts asks of an engine: log-probabilities of given tokens, and other weights in place.

Weights change between two steps, in the engine's thread. Each output token is stamped with the version of the weights
that it was drawn from (`Handle.weight_versions`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, NamedTuple

from labkit.core.options import flag, whole
from labkit.core.scheduling import preempt
from labkit.core.shown import mimebundle
from labkit.engine.scoring import Scored, score
from labkit.engine.sleeping import Sleeping


class LoadedWeights(NamedTuple):
    """What replacing the weights did."""

    version: int
    num_tensors: int
    num_bytes: int
    freed_blocks: int  # of the prefix cache
    num_running: int  # requests that go on, with keys and values of the weights before

    def __repr__(self) -> str:
        kept = f", {self.num_running} requests go on" if self.num_running else ""
        return (
            f"LoadedWeights(version {self.version}: {self.num_tensors} tensors, {self.num_bytes / 2**20:.1f} MiB; "
            f"{self.freed_blocks} cached blocks forgotten{kept})"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


class Rollouts(Sleeping):
    """A loop whose model's weights can be replaced."""

    def score(
        self,
        pairs: Any,
        *,
        routing: Any = None,
        adapter: str | None = None,
        salt: str | None = None,
        priority: int = 0,
    ) -> Scored | list[Scored]:
        """Log-probabilities of given tokens. `pairs` is one (prompt, output) or a list of them, as token ids or as
        text, or handles that were generated before. Returns a `Scored` for each.

        They are the model's own, before temperature and any other parameter: what `SamplingParams(logprobs=0)` gives
        while generating. With `deterministic=True` they are the same to the bit, whatever else is computed, however
        the prompt is cut into chunks, and whatever of it the prefix cache holds.

        `routing` are the experts that tokens go through, in place of the routers' choice: for each pair
        {layer: [tokens, experts a token]}, as captured while generating, or None.

        >>> eng.score(("def f(x):", " return x"))
        Scored(5 + 3 tokens, total -4.210)
        """
        self._check_open()
        return score(self, pairs, routing, {"adapter": adapter, "salt": salt, "priority": priority})  # type: ignore[arg-type]

    def load_weights(
        self,
        weights: Mapping[str, Any] | str | PathLike[str] | Iterable[tuple[str, Any]],
        *,
        keep_cache: bool = False,
        version: int | None = None,
    ) -> LoadedWeights:
        """Replace the model's weights in place, between two steps. `weights` are all of the model's tensors by the
        names of its checkpoint: a state_dict, (name, tensor) pairs, or a folder of safetensors.

        All or nothing: names and shapes are checked first, and a ValueError changes nothing. Requests go on with their
        tokens, and with the keys and values that the weights before have made; later tokens are stamped with the new
        `version` (None: the next number), see `Handle.weight_versions`. Cached prefixes are forgotten, unless
        `keep_cache`. Adapters stay. Snapshots hold no weights: restoring one does not bring the old ones back.

        >>> eng.load_weights(trained.state_dict())
        LoadedWeights(version 1: 74 tensors, 13.2 MiB; 0 cached blocks forgotten)
        """
        flag("keep_cache", keep_cache)
        self._check_open()
        if version is None:
            version = self.weights_version + 1
        whole("version", version, least=self.weights_version + 1, most=2**53)
        return self._call(lambda: self._load_weights(weights, keep_cache, version))

    def _load_weights(self, weights: Any, keep_cache: bool, version: int) -> LoadedWeights:
        if (replace := getattr(self.runner, "replace_weights", None)) is None:
            raise ValueError(f"{self.runner!r} has no weights to replace: it needs a model")
        self.drain()
        if getattr(self.runner, "is_shared", False):
            gc.collect()  # a fork that nobody has any more may not be gone yet
        num_tensors, num_bytes = replace(weights)
        freed = 0 if keep_cache else self._reset_prefix_cache()
        self.has_older_blocks = keep_cache
        if not keep_cache:
            preempt.recompute_swapped(self.scheduler)
        self.weights_version = version
        running = 0
        for request in self.scheduler.requests.values():
            running += request.row is not None or request.num_output > 0
            if hasattr(request, "stamp"):
                request.stamp(version)
        self.log.add(("Control", "weights", str(version)))
        self.log.flush(self.scheduler.step, self.clock.now())
        self.log.post()
        return LoadedWeights(version, num_tensors, num_bytes, freed, running)
