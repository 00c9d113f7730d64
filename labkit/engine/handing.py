"""Hands computed blocks from one engine to another: out as `Blocks`, in through host memory.

Pieces of a few MiB go between two steps, so that a transfer never holds a step up for long. Blocks are found by what
they hold, so a transfer that ends early leaves a shorter prefix, and nothing that is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from labkit.core.blocks.exported import Blocks, Form
from labkit.core.blocks.prefix import Span, hash_blocks, root_hash, span_keys
from labkit.core.blocks.table import Pin
from labkit.core.options import named_arguments
from labkit.core.shown import mimebundle
from labkit.engine.hinting import Hinting
from labkit.engine.intake import read_prompt

PIECE = 4 * 2**20  # bytes that are copied between two steps


class Transferred(NamedTuple):
    """What a transfer did. The blocks of a prompt are all its full blocks."""

    num_blocks: int  # now there, of the prompt's
    num_known: int  # of these: were there before
    num_left_out: int  # had no room in host memory
    num_bytes: int
    seconds: float

    def __repr__(self) -> str:
        known = f", {self.num_known} were there" if self.num_known else ""
        left = f"; no room in host memory for {self.num_left_out}" if self.num_left_out else ""
        speed = f", {self.num_bytes / self.seconds / 1e6:.0f} MB/s" if self.num_bytes and self.seconds else ""
        return (
            f"Transferred({self.num_blocks} blocks{known}{left}; {self.num_bytes / 2**20:.1f} MiB in "
            f"{1e3 * self.seconds:.1f} ms{speed})"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


class Chain(NamedTuple):
    """The full blocks of a prompt, which an engine may have or not."""

    tokens: np.ndarray
    hashes: list[bytes]
    salt: str | None
    adapter: str | None
    keys: dict[int, bytes]

    def blocks(self, form: Form, first: int, data: np.ndarray) -> Blocks:
        end = first + len(data)
        keys = {index: key for index, key in self.keys.items() if index < end}
        tokens = self.tokens[: end * form.block_size]
        return Blocks(form, tokens, data, salt=self.salt, adapter=self.adapter, keys=keys, first=first)


class Handing(Hinting):
    """A loop that gives computed blocks to others and takes theirs."""

    _form: tuple[int, Form] | None = None
    kv_connector: Any = None  # to engines in other processes, if there is one

    @property
    def block_form(self) -> Form:
        """What must be the same in engines that hand blocks to each other."""
        if self._form is None or self._form[0] != self.weights_version:
            if (form := getattr(self.runner, "block_form", None)) is None:
                raise ValueError(
                    f"blocks go to other engines from a runner of one process that has them: {self.runner!r}"
                )
            self._form = self.weights_version, self._call(form)
        return self._form[1]

    def chain_of(
        self, prompt: Any, *, salt: str | None = None, adapter: str | None = None, spans: Sequence[Span] = ()
    ) -> Chain:
        """The full blocks of a prompt that a request of it would look for."""
        tokens, _, images = read_prompt(self, prompt)  # type: ignore[arg-type]
        key = None if adapter is None else self.adapters.key_for(adapter)  # type: ignore[attr-defined]
        size = self.blocks.block_size
        keys = span_keys((*spans, *images), size, len(tokens))
        hashes = hash_blocks(tokens, size, root_hash(salt, key), keys)
        return Chain(tokens, hashes, salt, key, keys)

    def num_known(self, chain: Chain) -> int:
        """How many of these blocks are here, on the device or in host memory: the first ones."""
        return self._call(lambda: self._num_known(chain.hashes))

    def _num_known(self, hashes: Sequence[bytes]) -> int:
        prefix, offload = self.blocks.prefix, self.blocks.offload
        for i, digest in enumerate(hashes):
            if digest not in prefix.block_of and (offload is None or digest not in offload.host):
                return i
        return len(hashes)

    # -- out -----------------------------------------------------------------------------------------------------

    @named_arguments
    def export_blocks(
        self, prompt: Any, *, salt: str | None = None, adapter: str | None = None, spans: Sequence[Span] = ()
    ) -> Blocks:
        """The prompt's full blocks that are computed and still here, on the device or in host memory, as bytes for
        `import_blocks` of another engine. There may be none.

        >>> prefill.generate(prompt, lk.SamplingParams(max_tokens=1))
        >>> decode.import_blocks(prefill.export_blocks(prompt))
        """
        self._check_open()
        chain = self.chain_of(prompt, salt=salt, adapter=adapter, spans=spans)
        self.check_export()
        pieces = list(self.pieces(chain))
        data = [piece.data for piece in pieces]
        form = self.block_form
        found = chain.blocks(form, 0, np.concatenate(data) if data else np.zeros((0, form.num_bytes), np.uint8))
        self.note_transfer("Exported", len(found), found.num_bytes, None)
        return found

    def check_export(self) -> None:
        """Refuse to give what the engine that takes it would hold for blocks of these weights."""
        self._check_groups()
        if self.has_older_blocks:
            raise ValueError(
                "the prefix cache has blocks of other weights, from load_weights(keep_cache=True) or a snapshot before "
                "it: they stay in this engine until reset_prefix_cache()"
            )

    def pieces(self, chain: Chain, first: int = 0) -> Iterator[Blocks]:
        """The chain's blocks that are here, from block `first` on, a few at a time. Those on the device are held until
        the last one is copied, as long as no request needs their place."""
        form = self.block_form
        step = max(1, PIECE // max(form.num_bytes, 1))
        pin = self._call(lambda: self._hold(chain.hashes[first:]))
        try:
            for at in range(first, len(chain.hashes), step):
                hashes = chain.hashes[at : at + step]
                data = self._call(lambda hashes=hashes: self._copy_out(hashes, form))  # type: ignore[misc]
                if len(data):
                    yield chain.blocks(form, at, data)
                if len(data) < len(hashes):
                    return
        finally:
            self._call(lambda: self._let_go(pin))

    def _hold(self, hashes: Sequence[bytes]) -> Pin:
        """A pin, which is soft: a request that would starve gets the blocks."""
        blocks = self.blocks
        found = [block for digest in hashes if (block := blocks.prefix.block_of.get(digest)) is not None]
        blocks.hold(found)
        pin = Pin(tuple(found), len(found) * blocks.block_size, None)
        blocks.pins.append(pin)
        return pin

    def _let_go(self, pin: Pin) -> None:
        if any(mine is pin for mine in self.blocks.pins):
            self.blocks.unpin(pin)

    def _copy_out(self, hashes: Sequence[bytes], form: Form) -> np.ndarray:
        """The bytes of the first of these blocks, up to one that is not here. Of another form, which comes with other
        weights, there are none."""
        blocks, offload, runner = self.blocks, self.blocks.offload, self.runner
        num = self._num_known(hashes) if self.block_form == form and not self.has_older_blocks else 0
        device: dict[int, int] = {}  # place in the result -> block
        host: dict[int, int] = {}
        ready: dict[int, np.ndarray] = {}
        for i, digest in enumerate(hashes[:num]):
            if (block := blocks.prefix.block_of.get(digest)) is not None:
                device[i] = block
                continue
            place = offload.host.prefix.block_of[digest]  # type: ignore[union-attr]
            what = offload.out.get(place, None)  # type: ignore[union-attr]
            if what is None:
                host[i] = place
            elif isinstance(what, int):
                device[i] = what  # it has left the device, where its bytes are until the next plan
            else:
                ready[i] = what
        data = np.zeros((num, form.num_bytes), np.uint8)
        for there, in_host in ((device, False), (host, True)):
            if there:
                data[list(there)] = runner.read_blocks(list(there.values()), in_host=in_host)  # type: ignore[attr-defined]
        for i, what in ready.items():
            data[i] = what
        return data

    def _check_groups(self) -> None:
        if self.blocks.states is not None:
            raise ValueError(
                "blocks alone do not continue a prefix of a model with recurrent layers: their states stay"
            )
        if self.blocks.windows != (None,):
            raise ValueError(
                f"blocks go to other engines if all layers keep the whole context, windows is {self.blocks.windows}: "
                "leave out hybrid_kv and kv_groups"
            )

    # -- in ------------------------------------------------------------------------------------------------------

    def import_blocks(self, blocks: Blocks) -> Transferred:
        """Take in blocks of another engine: requests find them in the prefix cache from here on. They come through host
        memory, so the engine needs `kv_offloading=True` and room there; what has no room is left out, from the end. A
        ValueError names what differs, and changes nothing."""
        if not isinstance(blocks, Blocks):
            raise TypeError(f"import_blocks takes what export_blocks gives, got {blocks!r}")
        begin = time.perf_counter()
        self.check_import(blocks.form, blocks.adapter)
        new = known = 0
        step = max(1, PIECE // max(blocks.form.num_bytes, 1))
        for at in range(0, len(blocks), step):
            fresh, had, left = self.take_in(blocks, at, at + step)
            new, known = new + fresh, known + had
            if left:
                break
        num_bytes = new * blocks.form.num_bytes
        self.note_transfer("Imported", new, num_bytes, None)
        return Transferred(
            blocks.first + new + known, blocks.first + known, len(blocks) - new - known, num_bytes,
            time.perf_counter() - begin,
        )  # fmt: skip

    def check_import(self, form: Form, adapter: str | None) -> None:
        """Refuse what cannot be used here, by name."""
        self._check_open()
        self._check_groups()
        if self.blocks.offload is None:
            raise ValueError(
                "blocks of other engines come through host memory, and this engine has none: make it with "
                "kv_offloading_size=1 (GiB), or num_host_blocks= and kv_offloading=True"
            )
        if not self.blocks.prefix_caching:
            raise ValueError("blocks of other engines are found through the prefix cache, and prefix_caching is off")
        if (reason := self.block_form.why_not(form)) is not None:
            raise ValueError(reason)
        if adapter is not None:
            name = adapter.partition("@")[0]
            if self.adapters.key_for(name) != adapter:  # type: ignore[attr-defined]
                raise ValueError(f"blocks of another engine cannot be used here: adapter {name!r} has other weights")

    def take_in(self, blocks: Blocks, begin: int, end: int) -> tuple[int, int, int]:
        """Blocks `begin` to `end` of these: how many are new, were here, and had no room."""
        return self._call(lambda: self._take_in(blocks, begin, end))

    def _take_in(self, blocks: Blocks, begin: int, end: int) -> tuple[int, int, int]:
        offload, prefix = self.blocks.offload, self.blocks.prefix
        assert offload is not None
        if self.block_form != blocks.form:
            raise ValueError("the weights of this engine were replaced during the transfer")
        if blocks.first and self._num_known(blocks.hashes[: blocks.first]) < blocks.first:
            return 0, 0, len(blocks)  # what they go on from has left meanwhile: nobody would find them
        stubs, data = blocks.stubs()[begin:end], blocks.data[begin:end]
        missing = [
            i for i, stub in enumerate(stubs)
            if stub.digest not in prefix.block_of and stub.digest not in offload.host
            and stub.digest not in offload.reading
        ]  # fmt: skip
        oldest = self.in_flight[0][0].step if self.in_flight else self.scheduler.step
        wanted = [stubs[i] for i in missing]
        num = offload.receive(blocks.hashes, wanted, [data[i].copy() for i in missing], oldest)
        return num, len(stubs) - len(missing), len(missing) - num

    def note_transfer(self, kind: str, num_blocks: int, num_bytes: int, peer: str | None) -> None:
        """Write to the log what went out or came in."""

        self._call(lambda: self._note((kind, num_blocks, num_bytes, peer)))

    def note_failure(self, request: str, peer: str | None, reason: str) -> None:
        """Write to the log that blocks did not come, so that the request computes its prompt."""
        self._call(lambda: self._note(("TransferFailed", request, peer, reason)))

    def _note(self, event: tuple[object, ...]) -> None:
        self.log.add(event)
        self.log.flush(self.scheduler.step, self.clock.now())
        self.log.post()


@named_arguments
def transfer_blocks(
    prompt: Any, source: Handing, target: Handing, *, salt: str | None = None, adapter: str | None = None,
    spans: Sequence[Span] = (),
) -> Transferred:  # fmt: skip
    """Hand over the prompt's computed full blocks from one engine to another in this process, where a request of the
    same prompt then finds them in the prefix cache. Only blocks that the target lacks are copied, a few MiB at a time,
    while both engines go on.

    >>> prefill.generate(prompt, lk.SamplingParams(max_tokens=1))
    >>> lk.transfer_blocks(prompt, prefill, decode)
    >>> decode.generate(prompt)
    """
    begin = time.perf_counter()
    if source is target:
        raise ValueError("source and target are the same engine: it has its own blocks already")
    source._check_open()
    source.check_export()
    chain = source.chain_of(prompt, salt=salt, adapter=adapter, spans=spans)
    target.check_import(source.block_form, chain.adapter)
    known, new, left = target.num_known(chain), 0, 0
    first = known
    for piece in source.pieces(chain, first):
        fresh, had, left = target.take_in(piece, 0, len(piece))
        new, known = new + fresh, known + had
        if left:
            left = len(chain.hashes) - known - new
            break
    num_bytes = new * source.block_form.num_bytes
    source.note_transfer("Exported", new, num_bytes, None)
    target.note_transfer("Imported", new, num_bytes, None)
    return Transferred(known + new, known, left, num_bytes, time.perf_counter() - begin)
