"""Prefill and decode in different processes: a prefill engine holds the blocks of a prompt until a decode engine has
pulled them, over a connection whose two ends know one key.

The flow is that of vLLM's P/D disaggregation: a request and its answer carry `kv_transfer_params`. Whatever fails, the
decode engine computes what it did not get. Knows nothing of HTTP.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from labkit.core.blocks.exported import Form
from labkit.core.blocks.prefix import hash_blocks, root_hash, span_keys
from labkit.core.blocks.table import Pin
from labkit.core.messagepack import pack, unpack
from labkit.core.options import choose, named_options, real, text, whole
from labkit.core.plan import Outputs
from labkit.core.shown import Shown
from labkit.engine.handing import PIECE, Chain, Handing
from labkit.engine.kv_settings import ROLES, read_config, read_key
from labkit.parallel.sealed import Sealed

MOST_ASKED = 32 * 2**20  # bytes of a request for blocks: their hashes
MOST_AT_ONCE = 16  # connections that a prefill engine serves
SECONDS_PROOF = 5.0  # for one that has connected
SECONDS_LOOK = 0.25  # between two looks at what is held too long


class Held(NamedTuple):
    """Blocks of a prompt that wait to be pulled."""

    chain: Chain
    pin: Pin
    until: float  # of time.monotonic


class Fetched(NamedTuple):
    """What a pull brought. `reason` says why it is not all of it; the rest of the prompt is computed."""

    num_blocks: int
    num_bytes: int
    seconds: float
    reason: str | None


class Gone(Exception):
    """The prefill engine said why it does not send."""


@named_options
class KVConnector(Shown):
    """One engine's side of prefill and decode in several processes. `role` is "kv_producer" (computes prompts),
    "kv_consumer" (decodes) or "kv_both". A producer listens on `host` and `port` (0: any free one), and holds the
    blocks of a prompt until they are pulled, but at most `hold` seconds. A consumer waits `timeout` seconds for blocks,
    from this machine and from the hosts in `peers`. All sides read the same `key_file`; without one, a file of this
    user's that the first engine makes.

    >>> connector = lk.KVConnector(prefill, role="kv_producer")
    >>> params = connector.prefill(prompt)                  # what a decode engine needs to know
    >>> lk.KVConnector(decode, role="kv_consumer").fetch(params, decode.chain_of(prompt))
    """

    def __init__(
        self, engine: Handing, *, role: str = "kv_both", host: str = "127.0.0.1", port: int = 0,
        key_file: str | os.PathLike[str] | None = None, timeout: float = 10.0, hold: float = 60.0,
        peers: Sequence[str] = (), engine_id: str | None = None,
    ) -> None:  # fmt: skip
        self.produces, self.consumes = choose("kv_role", role, ROLES)
        self.role, self.engine, self.host = role, engine, text("kv_ip", host)
        self.timeout = real("timeout", timeout, least=0.0, open_left=True)
        self.hold = real("hold", hold, least=0.0, open_left=True)
        self.peers = frozenset(text("a host in peers", peer) for peer in peers)
        self.engine_id = engine_id if engine_id is not None else uuid.uuid4().hex
        self.key = read_key(key_file)
        self.num_fetched = self.num_failed = self.num_released = self.num_expired = 0
        self.held: dict[str, Held] = {}
        engine.own_thread()  # blocks are held and copied there, whoever asks for them
        self.form: Form = engine.block_form
        engine._check_groups()
        if self.consumes:
            engine.check_import(self.form, None)
        self.threads = ThreadPoolExecutor(MOST_AT_ONCE, "labkit-kv")  # for those who wait for blocks
        self._expected: dict[str, float] = {}  # request -> when it was announced
        self._lock = threading.Lock()
        self._room = threading.Semaphore(MOST_AT_ONCE)
        self._is_over = False
        self._listener: socket.socket | None = None
        engine.listeners.insert(0, self._on_outputs)  # blocks are held before others hear that a request has ended
        if self.produces:
            self._listener = _listen(host, whole("kv_port", port, least=0, most=65535))
            threading.Thread(target=_accept, args=(weakref.ref(self), self._listener), daemon=True).start()
        engine.kv_connector = self

    def __repr__(self) -> str:
        at = f" at {self.host}:{self.port}, {len(self.held)} prompts held" if self.produces else ""
        got = f", {self.num_fetched} fetched, {self.num_failed} failed" if self.consumes else ""
        return f"KVConnector({self.role}{at}{got})"

    @property
    def port(self) -> int:
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    # -- prefill -------------------------------------------------------------------------------------------------

    def prefill(self, prompt: Any, params: Any = None, **options: Any) -> dict[str, Any]:
        """Compute a prompt and hold its blocks; `kv_transfer_params` for the decode engine."""
        from labkit.core.params import SamplingParams

        engine: Any = self.engine
        id = engine.new_id()
        self.expect(id)
        try:
            engine.generate(prompt, params or SamplingParams(max_tokens=1), id=id, **options)
            return self.params_of(id)
        finally:
            self.forget(id)

    def expect(self, id: str) -> None:
        """Hold the blocks of this request's prompt when it has ended."""
        if not self.produces:
            raise ValueError(f"do_remote_decode: this engine is a {self.role} and holds no blocks for others")
        self._expected[id] = time.monotonic()

    def forget(self, id: str) -> None:
        self._expected.pop(id, None)

    def _on_outputs(self, outputs: Outputs) -> None:
        """In the engine's thread, right after the step: what has ended is still in the cache."""
        if not self._expected:
            return
        for request in outputs.ended:
            if request.id not in self._expected:
                continue
            self.forget(request.id)
            if request.error is not None:
                continue
            size = self.engine.blocks.block_size
            keys = span_keys(request.spans, size, request.num_prompt)
            root = root_hash(request.salt, request.adapter_key)
            hashes = hash_blocks(request.prompt, size, root, keys)
            hashes = hashes[: self.engine._num_known(hashes)]
            chain = Chain(request.prompt, hashes, request.salt, request.adapter_key, keys)
            pin = self.engine._hold(hashes)
            with self._lock:
                self.held[request.id] = Held(chain, pin, time.monotonic() + self.hold)

    def params_of(self, id: str) -> dict[str, Any]:
        """`kv_transfer_params` of a request that has ended, for the decode server."""
        held = self.held.get(id)
        return {
            "do_remote_prefill": held is not None, "do_remote_decode": False, "remote_engine_id": self.engine_id,
            "remote_request_id": id, "remote_block_ids": [] if held is None else list(held.pin.blocks),
            "remote_host": self.host, "remote_port": self.port, "tp_size": 1,
        }  # fmt: skip

    def release(self, id: str) -> bool:
        """Blocks that are held for this request need not stay; returns whether there were any."""
        with self._lock:
            held = self.held.pop(id, None)
        if held is None:
            return False
        with suppress(RuntimeError):  # the engine was closed
            self.engine._call(lambda: self.engine._let_go(held.pin))
        return True

    def _look(self) -> None:
        """Release what was held for too long, and forget requests that never came or were aborted."""
        now = time.monotonic()
        engine: Any = self.engine
        live = (engine.scheduler.requests, engine.arriving)
        for id, since in list(self._expected.items()):
            if since + self.hold < now and not any(id in requests for requests in live):
                self.forget(id)
        for id in [id for id, held in list(self.held.items()) if held.until < now]:
            self.num_expired += self.release(id)

    def _serve(self, sock: socket.socket) -> None:
        link = Sealed(sock, self.key, time.monotonic() + SECONDS_PROOF)
        asked: str | None = None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.demand()
            link.deadline = time.monotonic() + self.timeout
            kind, data = link.receive(MOST_ASKED)
            ask = _read_ask(kind, bytes(data))
            asked = ask["id"]
            try:
                num, num_bytes = self._send(link, ask)
            except Gone as error:
                link.send("N", str(error).encode())
                return
            link.send("E")
            if link.receive(0)[0] == "A" and num:
                self.engine.note_transfer("Exported", num, num_bytes, ask["peer"])
        except (OSError, ValueError, RuntimeError):
            pass  # the other side computes the prompt; a stranger was turned away
        finally:
            if asked is not None:  # pulled, or the one that wanted it has gone
                self.num_released += self.release(asked)
            link.close()
            self._room.release()

    def _send(self, link: Sealed, ask: dict[str, Any]) -> tuple[int, int]:
        held = self.held.get(ask["id"])
        if held is None:
            raise Gone("the blocks are not held: they were pulled, or held for too long")
        try:
            self.engine.check_export()
        except ValueError as error:
            raise Gone(str(error)) from None
        form = self.engine.block_form
        if (reason := Form(*ask["form"]).why_not(form)) is not None:
            raise Gone(reason)
        wanted = [ask["hashes"][at : at + 32] for at in range(0, len(ask["hashes"]), 32)]
        same = next((i for i, (a, b) in enumerate(zip(held.chain.hashes, wanted, strict=False)) if a != b), None)
        if same == 0:
            raise Gone("the prompt, its salt or its adapter's weights are others")
        most = min(len(held.chain.hashes), len(wanted)) if same is None else same
        num = 0
        for piece in self.engine.pieces(held.chain._replace(hashes=held.chain.hashes[:most]), ask["first"]):
            link.send("B", memoryview(np.ascontiguousarray(piece.data).reshape(-1)))  # type: ignore[arg-type]
            num += len(piece)
        return num, num * form.num_bytes

    # -- decode --------------------------------------------------------------------------------------------------

    def check_params(self, params: Mapping[str, Any]) -> tuple[str, int, str]:
        """The address to pull from and the request there; a ValueError names what is wrong."""
        if not self.consumes:
            raise ValueError(f"do_remote_prefill: this engine is a {self.role} and takes no blocks of others")
        host, port, id = (params.get(name) for name in ("remote_host", "remote_port", "remote_request_id"))
        if not isinstance(host, str) or not isinstance(id, str):
            raise ValueError("do_remote_prefill needs remote_host, remote_port and remote_request_id of the prefill")
        whole("remote_port", port, least=1, most=65535)
        if host not in self.peers and host not in ("127.0.0.1", "::1", "localhost", self.host):
            raise ValueError(f"remote_host {host[:200]!r} is not among the peers of this engine: name it in peers")
        return host, int(port), id  # type: ignore[arg-type]

    def fetch(self, params: Mapping[str, Any], chain: Chain, request: str = "", since: float | None = None) -> Fetched:
        """Pull the blocks of a prompt from where `kv_transfer_params` say, into host memory, where the request will
        find them. It does not raise if they do not come: see `reason`. `since` is when they were asked for (of
        `time.monotonic`; None: now), from which the timeout counts."""
        host, port, id = self.check_params(params)
        begin = time.monotonic() if since is None else since
        usable = max(len(chain.tokens) - 1, 0) // self.engine.blocks.block_size
        chain = chain._replace(hashes=chain.hashes[:usable])
        num, reason = 0, None
        try:
            num, reason = self._pull((host, port), id, chain, begin + self.timeout)
        except TimeoutError:
            reason = f"the blocks did not come within {self.timeout:g} s"
        except OSError as error:
            reason = str(error)
        except _Partly as error:
            num, reason = error.num, error.reason
        seconds, num_bytes = time.monotonic() - begin, num * self.form.num_bytes
        if num:
            self.engine.note_transfer("Imported", num, num_bytes, str(params.get("remote_engine_id")))
        if reason is None:
            self.num_fetched += 1
        else:
            self.num_failed += 1
            self.engine.note_failure(request, f"{host}:{port}", reason)
        return Fetched(num, num_bytes, seconds, reason)

    def _pull(self, address: tuple[str, int], id: str, chain: Chain, deadline: float) -> tuple[int, str | None]:
        engine, form = self.engine, self.engine.block_form
        first = engine.num_known(chain)
        num = 0
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError  # it waited for a thread all the time
        sock = socket.create_connection(address, timeout=left)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Sealed(sock, self.key, deadline)
        try:
            link.prove()
            ask = {
                "id": id,
                "first": first,
                "hashes": b"".join(chain.hashes),
                "form": list(form),
                "peer": self.engine_id,
            }
            link.send("Q", pack(ask))
            while True:
                kind, data = link.receive(max(PIECE, form.num_bytes))
                if kind == "N":
                    return num, bytes(data[:500]).decode(errors="replace")
                if kind == "E":
                    link.send("A")
                    known = first + num
                    return num, None if known >= len(
                        chain.hashes
                    ) else f"{known} of {len(chain.hashes)} blocks were there"
                if kind != "B" or not len(data) or len(data) % form.num_bytes:
                    return num, "the prefill engine sent what no block is"
                piece = np.frombuffer(data, np.uint8).reshape(-1, form.num_bytes)
                if first + num + len(piece) > len(chain.hashes):
                    return num, "the prefill engine sent more blocks than the prompt has"
                fresh, had, left = engine.take_in(chain.blocks(form, first + num, piece), 0, len(piece))
                num += fresh + had
                if left:
                    return num, "there is no room in host memory"
        except (OSError, ValueError, RuntimeError) as error:
            told = (
                f"the blocks did not come within {self.timeout:g} s" if isinstance(error, TimeoutError) else str(error)
            )
            raise _Partly(num, told) from error
        finally:
            link.close()

    def close(self) -> None:
        """Hold nothing any more, and listen no more. The engine stays open."""
        self._is_over = True
        self.threads.shutdown(wait=False, cancel_futures=True)
        if self._on_outputs in self.engine.listeners:
            self.engine.listeners.remove(self._on_outputs)
        if self._listener is not None:
            self._listener.close()
        for id in list(self.held):
            self.release(id)
        if self.engine.kv_connector is self:
            self.engine.kv_connector = None


class _Partly(Exception):
    """A pull that ended early: its first `num` blocks are there."""

    def __init__(self, num: int, reason: str) -> None:
        super().__init__(reason)
        self.num, self.reason = num, reason


def _read_ask(kind: str, data: bytes) -> dict[str, Any]:
    ask = unpack(data)
    kinds = {"id": str, "first": int, "hashes": bytes, "form": list, "peer": str}
    if kind != "Q" or not isinstance(ask, dict) or any(type(ask.get(name)) is not of for name, of in kinds.items()):
        raise ValueError("no request for blocks")
    if len(ask["hashes"]) % 32 or len(ask["form"]) != len(Form._fields) or ask["first"] < 0:
        raise ValueError("a request for blocks that cannot be read")
    return ask


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"kv_ip {host!r} and kv_port {port} cannot be listened on: {error.strerror}") from None
    found.settimeout(SECONDS_LOOK)
    return found


def _accept(connector: weakref.ref[KVConnector], listener: socket.socket) -> None:
    """The thread of a producer. Holds no reference to the connector while it waits."""
    while True:
        sock = None
        with suppress(TimeoutError):
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                raise
            except OSError:  # closed; or no file descriptors are left, and blocks are released all the same
                time.sleep(SECONDS_LOOK)
        here = connector()
        if here is None or here._is_over:
            listener.close()
            return
        here._look()
        if sock is not None:
            if here._room.acquire(blocking=False):
                threading.Thread(target=here._serve, args=(sock,), daemon=True).start()
            else:
                sock.close()
        del here


def connector_of(engine: Any, config: Any) -> KVConnector:
    """The connector that `--kv-transfer-config` describes."""
    if hasattr(engine, "replicas"):
        raise ValueError(
            "kv-transfer-config: replicas behind a router hand no blocks over: leave out data_parallel_size"
        )
    options = read_config(config)
    options.pop("kv_buffer_size")
    return KVConnector(engine, **options)
