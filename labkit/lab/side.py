"""One side of a comparison: an engine, and how to run a prompt in it.

A setting is either of the run (`use`, `batch`, `cached`, `chunk`), which any engine supports and which is undone
afterwards, or of the engine (every option of `labkit.Engine`), for which an engine is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from labkit_kernels import get

from labkit.core.options import check_names, flag, whole
from labkit.core.params import SamplingParams
from labkit.engine.engine import Engine
from labkit.engine.handle import Handle
from labkit.lab.trial import alone

OF_RUN = ("use", "batch", "cached", "chunk")
_number = count()


@dataclass(frozen=True)
class Side:
    """How one side is computed.

    `use` maps ops to variants. `batch` is how many prompts are computed together. `cached` takes the prompt's full
    blocks from the prefix cache. `chunk` limits the prompt tokens of a step.
    """

    engine: Engine | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the engine to build, if there is none
    use: dict[str, str] = field(default_factory=dict)
    batch: int = 1
    cached: bool = False
    chunk: int | None = None

    @classmethod
    def of(cls, given: Any, name: str) -> Side:
        """From an engine, settings, or a pair of both."""
        engine: Engine | None = None
        if isinstance(given, tuple) and len(given) == 2:
            engine, given = given
        elif isinstance(given, Engine):
            engine, given = given, {}
        if not isinstance(given, Mapping) or (engine is not None and not isinstance(engine, Engine)):
            raise TypeError(f"{name} is an Engine, a dict of settings, or a pair of both, got {given!r}")
        from labkit.engine.build import Options

        check_names(f"divergence: {name}", given, (*OF_RUN, *Options.__dataclass_fields__))
        options = {key: value for key, value in given.items() if key not in OF_RUN}
        if engine is not None and options:
            raise ValueError(f"{name}: {', '.join(options)} cannot be changed in an engine that exists: leave it out")
        side = cls(engine, options, **{key: value for key, value in given.items() if key in OF_RUN})
        whole("batch", side.batch, least=1, most=256)
        flag("cached", side.cached)
        if side.chunk is not None:
            whole("chunk", side.chunk, least=1)
        for op, variant in side.use.items():
            get(op).get(variant)
        return side

    def __repr__(self) -> str:
        parts = [f"{key}={value!r}" for key, value in self.options.items()]
        parts += [f"use {op}={variant!r}" for op, variant in self.use.items()]
        parts += [f"batch={self.batch}"] if self.batch != 1 else []
        parts += ["prefix cached"] if self.cached else []
        parts += [f"chunk={self.chunk}"] if self.chunk is not None else []
        return ", ".join(parts) or "as it is"

    def differs_in_ops_only(self, other: Side) -> bool:
        return self.use != other.use and replace(self, use={}) == replace(other, use={})

    @contextmanager
    def opened(self, model: Any) -> Iterator[Engine]:
        """The engine to run in, used by nobody else: the given one, or one that is built and closed afterwards."""
        if self.engine is not None:
            with alone(self.engine):
                yield self.engine
            return
        engine = Engine(model, **self.options)
        try:
            yield engine
        finally:
            engine.close()

    def run(self, engine: Engine, ids: list[int], params: SamplingParams, id: str | None = None) -> Handle:
        """One prompt's answer under these settings. The engine's own settings are restored afterwards."""
        salt = f"side {next(_number)}"
        with ExitStack() as stack:
            for op, variant in self.use.items():
                stack.enter_context(get(op).use(variant))
            stack.enter_context(_chunked(engine, self.chunk))
            if self.cached:
                engine.generate([prompt(ids)], SamplingParams(temperature=0, max_tokens=1), salt=salt)
            beside = SamplingParams(temperature=0, max_tokens=params.max_tokens, ignore_eos=True)
            handles: list[Handle] = []
            stack.callback(lambda: [engine.abort(handle) for handle in handles])
            for i in range(1, self.batch):  # other prompts of other lengths, before it in the batch
                turned = [*ids[i % len(ids) :], *ids[: i % len(ids)]][: max(1, len(ids) - i)]
                handles.append(engine.submit(prompt(turned), beside, salt=f"{salt}, beside {i}"))
            handle = engine.submit(prompt(ids), params, salt=salt, id=id)
            handles.append(handle)
            handle.wait()
            if self.cached and not handle.num_cached:
                size = engine.blocks.block_size
                raise ValueError(
                    f"cached: none of the {len(ids)} prompt tokens came from the prefix cache: that needs blocks of "
                    f"{size} that are full before the last token, and prefix_caching=True"
                )
        return handle


@contextmanager
def settled(a: Side, b: Side, model: Any, prompt: Any, max_tokens: int) -> Iterator[tuple[Side, Side]]:
    """Both sides with an engine, if they can share one: an engine that was given, or one built for both."""
    given = a.engine or b.engine
    for side in (a, b):
        if side.options and given is not None and model is None:
            raise ValueError(f"{side!r} needs an engine of its own: pass model=")
        if side.engine is not None and not hasattr(side.engine.runner, "model"):
            raise ValueError(f"{side.engine.runner!r} has no layers: divergence compares engines with a model")
    if given is not None:
        yield tuple(side if side.engine or side.options else replace(side, engine=given) for side in (a, b))  # type: ignore[misc]
        return
    length = len(prompt) + 8 if isinstance(prompt, (str, list, tuple)) else 2048  # tokens, at most
    batch = max(a.batch, b.batch)

    def sized(side: Side) -> Side:
        size = side.options.get("block_size", 16)
        blocks = (-(-(length + max_tokens) // size) + 1) * (batch + 1) * 2 + 8
        return replace(side, options={"num_blocks": blocks} | side.options)

    if a.options != b.options:
        yield sized(a), sized(b)
        return
    engine = Engine(model, **sized(a).options)
    try:
        yield replace(a, engine=engine, options={}), replace(b, engine=engine, options={})
    finally:
        engine.close()


def prompt(ids: list[int]) -> dict[str, Any]:
    return {"prompt_token_ids": ids}


@contextmanager
def _chunked(engine: Engine, chunk: int | None) -> Iterator[None]:
    if chunk is None:
        yield
        return
    before = engine.scheduler.max_prefill_chunk
    engine.control(max_prefill_chunk=chunk)
    try:
        yield
    finally:
        engine.control(max_prefill_chunk=before)
