"""Prefix cache events over ZMQ, in the form that cluster routers read from vLLM: a publisher and a reader.

A message is three frames: topic, sequence number (8 bytes, big-endian), and a MessagePack batch [time, events, rank].
An event is an array that begins with its type. Lost messages are asked for again at a second address, by number.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

from labkit.core.blocks.prefix import root_hash
from labkit.core.events.log import EventLog
from labkit.core.events.types import Batch
from labkit.core.messagepack import pack, unpack
from labkit.core.options import check_names, named_options, text, whole
from labkit.core.shown import Shown

END = b"\xff" * 8  # in place of a number: the replay is over
MEDIA = {"gpu": "GPU", "cpu": "CPU", "disk": "DISK"}
CONFIG = (
    "enable_kv_cache_events", "publisher", "endpoint", "replay_endpoint", "buffer_steps", "hwm", "max_queue_size",
    "topic",
)  # fmt: skip


def publisher_of(source: Any, config: Mapping[str, Any]) -> BlockEventPublisher | None:
    """A publisher from vLLM's `--kv-events-config`; None if events are off."""
    if not isinstance(config, Mapping):
        raise ValueError(f"kv-events-config is a JSON object, got {config!r}")
    check_names("kv-events-config", config, CONFIG)
    options = {name: value for name, value in config.items() if name in CONFIG[2:]}
    kind = config.get("publisher", "zmq")
    if kind not in ("zmq", "null"):
        raise ValueError(f"kv-events-config: publisher is zmq or null, got {kind!r}")
    if not config.get("enable_kv_cache_events", False) or kind == "null":
        return None
    if hasattr(source, "replicas"):
        raise ValueError("kv-events-config: block events are not published with data_parallel_size above 1")
    return BlockEventPublisher(source, **options)


@named_options
class BlockEventPublisher(Shown):
    """Publishes what an engine's prefix cache stores and removes, from now on; what is stored already comes first.

    `endpoint` is bound (tcp://*:5557). With a `replay_endpoint`, the last `buffer_steps` batches can be asked for
    again. More than `max_queue_size` batches that wait to be sent are dropped; readers see the gap. `array_like=False`
    writes events as maps, as newer versions of vLLM do. Needs labkit[events].

    >>> publisher = BlockEventPublisher(engine, endpoint="tcp://127.0.0.1:5557")
    """

    def __init__(
        self, source: Any, endpoint: str = "tcp://*:5557", replay_endpoint: str | None = None,
        buffer_steps: int = 10_000, hwm: int = 100_000, max_queue_size: int = 100_000, topic: str = "",
        rank: int = 0, array_like: bool = True,
    ) -> None:  # fmt: skip
        zmq = _zmq()
        self.log: EventLog = getattr(source, "log", source)
        if not isinstance(self.log, EventLog):
            raise TypeError(f"a BlockEventPublisher needs an engine or an EventLog, got {source!r}")
        whole("buffer_steps", buffer_steps, least=1)
        self.topic = text("topic", topic, may_be_empty=True).encode()
        self.rank, self.array_like = whole("rank", rank, least=0), array_like
        self._blocks = weakref.ref(source.blocks) if hasattr(source, "blocks") else None
        most = whole("max_queue_size", max_queue_size, least=1)
        self._queue: queue.Queue[tuple[int, bytes] | None] = queue.Queue(most)
        self._adapter_of: dict[bytes, str | None] = {}  # hash -> adapter, of what is stored in any medium
        self._copies: dict[bytes, int] = {}
        self.num_batches = self.num_dropped = 0
        self._router: Any = None
        self._pub = zmq.Context.instance().socket(zmq.PUB)
        self._pub.set_hwm(whole("hwm", hwm, least=0))
        self.endpoint = _bind(self._pub, endpoint)
        self.replay_endpoint = None
        if replay_endpoint is not None:
            self._router = zmq.Context.instance().socket(zmq.ROUTER)
            self.replay_endpoint = _bind(self._router, replay_endpoint)
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer_steps)
        self._again = False  # the log was cut back: say everything anew
        getattr(source, "_call", _here)(self._listen)
        self._thread = threading.Thread(target=self._run, name="labkit-block-events", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        dropped = f", {self.num_dropped} dropped" if self.num_dropped else ""
        return f"BlockEventPublisher({self.endpoint}, {self.num_batches} batches{dropped})"

    def close(self) -> None:
        """Send what waits, and unbind."""
        self._leave()
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(5.0)

    # -- in the engine's thread ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        self.log.post()
        self._begin()
        self._leave = self.log.subscribe(self._post)

    def _begin(self) -> None:
        """What is stored now, for those who listen from the beginning."""
        events: list[dict[str, Any]] = [{"type": "AllBlocksCleared"}]
        blocks = self._blocks() if self._blocks is not None else None
        self._adapter_of.clear()
        self._copies.clear()
        if blocks is not None:
            tiers = blocks.offload.tiers if blocks.offload is not None else []
            for cache in (blocks.prefix, *(tier.prefix for tier in tiers)):
                for place in sorted(cache.block_of.values(), key=cache.depth_of.__getitem__):
                    digest, parent = cache.hash_of(place), cache.parent_hash_of(place)
                    events += self._stored(digest, parent, (place,), cache.tokens_of[place].tobytes(), cache.medium)
        self._send(events, time.time())

    def _post(self, batches: list[Batch]) -> None:
        if self._again:  # these batches are part of what is stored by now
            self._again = False
            return self._begin()
        for batch in batches:
            events: list[dict[str, Any]] = []
            for event in batch.events:
                if event[0] == "Stored":
                    events += self._stored(*event[1:])
                elif event[0] == "Removed":
                    events.append(self._removed(event[1], event[4]))
                elif event[0] == "Cleared":
                    self._adapter_of.clear()
                    self._copies.clear()
                    events.append({"type": "AllBlocksCleared"})
                elif event[0] == "Rewound":
                    self._again = True
            if events:
                self._send(events, time.time())

    def _stored(
        self, digests: bytes, parents: bytes, blocks: tuple[int, ...], tokens: bytes, medium: str
    ) -> list[dict[str, Any]]:
        """One event for each chain: runs of blocks in which each follows the one before."""
        width = len(tokens) // len(blocks)
        found: list[dict[str, Any]] = []
        roots = self._roots()
        for i in range(len(blocks)):
            digest, parent = digests[32 * i : 32 * i + 32], parents[32 * i : 32 * i + 32]
            ids = struct.unpack(f"<{width // 4}i", tokens[i * width : (i + 1) * width])
            adapter = roots[parent] if parent in roots else self._adapter_of.get(parent)
            self._adapter_of[digest] = adapter
            self._copies[digest] = self._copies.get(digest, 0) + 1
            if found and found[-1]["block_hashes"][-1] == parent:
                found[-1]["block_hashes"].append(digest)
                found[-1]["token_ids"] += ids
                continue
            found.append(
                {
                    "type": "BlockStored", "block_hashes": [digest],
                    "parent_block_hash": None if parent in roots else parent, "token_ids": list(ids),
                    "block_size": width // 4, "lora_id": None, "medium": MEDIA[medium],
                    "lora_name": adapter and adapter.partition("@")[0],
                }
            )  # fmt: skip
        return found

    def _roots(self) -> dict[bytes, str | None]:
        blocks = self._blocks() if self._blocks is not None else None
        known = {} if blocks is None else {digest: adapter for digest, (_, adapter) in blocks.prefix.roots.items()}
        return {root_hash(None, None): None, **known}

    def _removed(self, digests: bytes, medium: str) -> dict[str, Any]:
        each = [digests[at : at + 32] for at in range(0, len(digests), 32)]
        for digest in each:
            self._copies[digest] = self._copies.get(digest, 1) - 1
            if self._copies[digest] <= 0:
                del self._copies[digest]
                self._adapter_of.pop(digest, None)
        return {"type": "BlockRemoved", "block_hashes": each, "medium": MEDIA[medium]}

    def _send(self, events: list[dict[str, Any]], now: float) -> None:
        number, self.num_batches = self.num_batches, self.num_batches + 1
        if self.array_like:
            batch: Any = [now, [list(event.values()) for event in events], self.rank]
        else:
            batch = {"ts": now, "events": events, "data_parallel_rank": self.rank}
        try:
            self._queue.put_nowait((number, pack(batch)))
        except queue.Full:
            self.num_dropped += 1

    # -- in a thread of its own ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                try:
                    waiting = self._queue.get(timeout=0.02)
                    if waiting is None:
                        return
                    self._buffer.append(waiting)
                    self._pub.send_multipart((self.topic, waiting[0].to_bytes(8, "big"), waiting[1]))
                except queue.Empty:
                    pass
                while self._router is not None and self._router.poll(0):
                    self._replay(self._router.recv_multipart())
        finally:
            self._pub.close(linger=1000)
            if self._router is not None:
                self._router.close(linger=1000)

    def _replay(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[2]) != 8:
            return  # no request of this protocol
        first = int.from_bytes(frames[2], "big")
        for number, payload in self._buffer:
            if number >= first:
                self._router.send_multipart((frames[0], b"", number.to_bytes(8, "big"), payload))
        self._router.send_multipart((frames[0], b"", END, b""))


@named_options
class BlockEventSubscriber(Shown):
    """Reads block events of labkit, vLLM or SGLang, and mirrors what is stored: `stored[medium]` maps a hash to (parent
    hash, token ids). After a gap it asks for the missing batches. Needs labkit[events].

    >>> reader = BlockEventSubscriber("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558")
    >>> reader.poll(0.1)
    """

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        zmq = _zmq()
        self.endpoint, self.replay_endpoint = endpoint, replay_endpoint
        self.stored: dict[str, dict[Any, tuple[Any, tuple[int, ...]]]] = {}
        self.last = -1  # the latest batch that was applied
        self.num_batches = self.num_gaps = self.num_replayed = self.num_lost = 0
        self.last_lost = False  # a gap could not be filled: the mirror may be wrong until all is cleared
        self._first = b""  # batch 0
        self._sub = zmq.Context.instance().socket(zmq.SUB)
        self._sub.connect(endpoint)
        self._sub.setsockopt(zmq.SUBSCRIBE, topic.encode())

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(blocks)} in {medium}" for medium, blocks in self.stored.items()) or "nothing stored"
        lost = f", {self.num_lost} lost" if self.num_lost else ""
        return f"BlockEventSubscriber({self.endpoint}: {sizes}; {self.num_batches} batches, {self.num_gaps} gaps{lost})"

    def poll(self, timeout: float = 0.0) -> int:
        """Apply what has arrived, waiting up to `timeout` seconds for the first; returns how many batches."""
        before, wait = self.num_batches, round(timeout * 1000)
        while self._sub.poll(wait):
            wait = 0
            frames = self._sub.recv_multipart()
            if len(frames) == 3 and len(frames[1]) == 8:
                self.receive(int.from_bytes(frames[1], "big"), frames[2])
        return self.num_batches - before

    def receive(self, number: int, payload: bytes) -> None:
        """Apply one batch; those before it that are missing are asked for first."""
        if number <= self.last:
            if number or payload == self._first:
                return  # a replay brought it already
            self.stored.clear()  # another number 0: the publisher has started anew
            self.last = -1
        if number > self.last + 1:
            self.num_gaps += 1
            self.replay()
            if number <= self.last:
                return
            missing = number - self.last - 1
            self.num_lost += missing
            self.last_lost |= missing > 0
        self._apply(number, payload)

    def replay(self, timeout: float = 5.0) -> int:
        """Ask for the batches after the last one applied; returns how many came."""
        if self.replay_endpoint is None:
            return 0
        zmq, num = _zmq(), 0
        socket = zmq.Context.instance().socket(zmq.DEALER)
        try:
            socket.connect(self.replay_endpoint)
            socket.send_multipart((b"", (self.last + 1).to_bytes(8, "big")))
            while socket.poll(round(timeout * 1000)):
                *_, number, payload = socket.recv_multipart()
                if number == END:
                    break
                at = int.from_bytes(number, "big")
                if at > self.last:
                    self.num_lost += at - self.last - 1
                    self._apply(at, payload)
                    num += 1
        finally:
            socket.close(linger=0)
        self.num_replayed += num
        return num

    def _apply(self, number: int, payload: bytes) -> None:
        try:
            batch = unpack(payload)
            events = batch["events"] if isinstance(batch, dict) else batch[1]
            for event in events:
                self._event(event if isinstance(event, dict) else _named(event))
        except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
            warnings.warn(f"batch {number} of {self.endpoint} cannot be read: {error!r}", stacklevel=2)
            self.last_lost = True
        if number == 0:
            self._first = payload
        self.last = number
        self.num_batches += 1

    def _event(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "AllBlocksCleared":
            self.stored.clear()
            self.last_lost = False
            return
        there = self.stored.setdefault((event.get("medium") or "GPU").lower(), {})
        if kind == "BlockRemoved":
            for digest in event["block_hashes"]:
                there.pop(digest, None)
        elif kind == "BlockStored":
            parent, size, ids = event["parent_block_hash"], event["block_size"], event["token_ids"]
            for i, digest in enumerate(event["block_hashes"]):
                there[digest] = (parent, tuple(ids[i * size : (i + 1) * size]))
                parent = digest

    def close(self) -> None:
        self._sub.close(linger=0)


_FIELDS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


def _named(event: list[Any]) -> dict[str, Any]:
    """An event written as an array; fields beyond the known ones are left out."""
    return {"type": event[0], **dict(zip(_FIELDS[event[0]], event[1:], strict=False))}


def _here(function: Any) -> Any:
    return function()


def _zmq() -> Any:
    try:
        import zmq
    except ImportError:
        raise ImportError("block events are sent with pyzmq: pip install 'labkit[events]'") from None
    return zmq


def _bind(socket: Any, endpoint: str) -> str:
    zmq = _zmq()
    try:
        socket.bind(text("endpoint", endpoint))
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise ValueError(f"{endpoint!r} cannot be bound: {error}") from None
    return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
