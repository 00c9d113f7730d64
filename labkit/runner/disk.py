"""Keys and values of offloaded blocks as files in a folder, one a block, written and read by a thread of its own.

Knows how a file is laid out and when it is not to be trusted. Which blocks are kept is decided by `core.blocks.tiers`.
A file holds a header (JSON), the block's token ids, and its bytes as they lie in host memory, under a checksum.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.blocks.stubs import DiskWrite, Stub
from labkit.core.plan import Plan
from labkit.core.shown import Shown
from labkit.models.base import Model

MAGIC = b"LABKITKV"
VERSION = 1
MOST_HEADER = 4096  # bytes of a file beside the keys, values and token ids
MOST_WAITING = 256 * 2**20  # bytes that wait to be written before a step waits for the disk
SECONDS_OLD = 60.0  # a temporary file older than this was left by a process that ended

Job = Callable[[], None]


class Untrusted(Exception):
    """A file that is not what its name says."""


class DiskStore(Shown):
    """Files of one model's blocks in `folder`. Others' files there are left alone.

    `tensors` are the host memory's keys and values, [blocks, ...] each.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, tensors: list[Tensor]) -> None:
        self.folder, self.fingerprint = Path(folder).expanduser(), fingerprint
        self.tensors = tensors
        self.form = {"dtype": str(tensors[0].dtype)[6:], "shapes": [list(tensor.shape[1:]) for tensor in tensors]}
        self.num_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
        self.num_ignored = 0  # files of other models, formats or programs, or damaged ones
        self.num_failed = 0  # files that could not be written
        self._done: list[tuple[bytes, bool]] = []
        self._num_reading = 0
        self._waiting = 0
        self._lock = threading.Lock()
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ValueError(f"kv_disk_path {str(folder)!r} cannot be made a folder: {error.strerror}") from None
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"kv_disk_path {str(folder)!r} cannot be written to")
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="labkit-disk", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._jobs.put, None)

    def __repr__(self) -> str:
        ignored = f", {self.num_ignored} files ignored" if self.num_ignored else ""
        return f"DiskStore({str(self.folder)!r}, {self.num_bytes} bytes a block{ignored})"

    def path(self, digest: bytes) -> Path:
        return self.folder / f"{self.fingerprint[:16]}-{digest.hex()}.kv"

    # -- what is there -------------------------------------------------------------------------------------------

    def scan(self) -> list[Stub]:
        """The blocks in the folder, the longest unused first. Files that cannot be ours are counted and left alone."""
        found: list[tuple[float, Stub]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.startswith(f".{self.fingerprint[:16]}-") and entry.name.endswith(".tmp"):
                    self._remove_old(entry)
                    continue
                try:
                    with open(entry.path, "rb") as file:
                        stub, _ = self._read_header(file, entry.name, entry.stat().st_size)
                        found.append((entry.stat().st_mtime, stub))
                except (Untrusted, OSError):
                    self.num_ignored += 1
        return [stub for _, stub in sorted(found, key=lambda each: (each[0], each[1].depth))]

    def _remove_old(self, entry: os.DirEntry[str]) -> None:
        try:
            if time.time() - entry.stat().st_mtime > SECONDS_OLD:
                os.unlink(entry.path)
        except OSError:
            self.num_ignored += 1

    def _read_header(self, file: Any, name: str, size: int) -> tuple[Stub, int]:
        """The block of a file that is open at its start, and its checksum; leaves it at the keys and values."""
        start = file.read(len(MAGIC) + 4)
        length = int.from_bytes(start[len(MAGIC) :], "little")
        if start[: len(MAGIC)] != MAGIC or not 0 < length <= MOST_HEADER:
            raise Untrusted("no header")
        try:
            header = json.loads(file.read(length))
            digest, parent = bytes.fromhex(header["hash"]), bytes.fromhex(header["parent"])
            depth, num_tokens, crc = header["depth"], header["num_tokens"], header["crc32"]
        except (ValueError, KeyError, TypeError):
            raise Untrusted("a header that cannot be read") from None
        expected = {"version": VERSION, "fingerprint": self.fingerprint, "num_bytes": self.num_bytes, **self.form}
        if any(header.get(key) != value for key, value in expected.items()):
            raise Untrusted("another model, dtype, shape or version")
        numbers_fit = all(type(number) is int and 0 <= number < 2**62 for number in (depth, num_tokens, crc))
        if not numbers_fit or num_tokens != self.tensors[0].shape[2]:  # [blocks, heads, block size, width]
            raise Untrusted("a header with wrong numbers")
        if len(digest) != 32 or len(parent) != 32 or self.path(digest).name != name:
            raise Untrusted("another block than its name says")
        if size != file.tell() + 4 * num_tokens + self.num_bytes:
            raise Untrusted("another length than its header says")
        return Stub(digest, parent, depth, np.frombuffer(file.read(4 * num_tokens), np.int32).copy()), crc

    # -- moves ---------------------------------------------------------------------------------------------------

    def write_all(self, plan: Plan, device: torch.device) -> None:
        """The plan's drops and writes. What the host blocks hold was copied there by earlier plans."""
        if plan.reset:
            self.forget_reads()
        for digest in plan.disk.drops:
            self.drop(digest)
        if (plan.disk.writes or plan.disk.reads) and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # copies to and from host blocks may still be under way
        for move in plan.disk.writes:
            self.write(move)

    def write(self, move: DiskWrite) -> None:
        """Copy a host block now, and write it soon."""
        while self._waiting > MOST_WAITING:
            self.settle()
        parts = [view.tobytes() for view in self._views(move.host_block)]
        with self._lock:
            self._waiting += self.num_bytes
        self._jobs.put(lambda: self._write(move.stub, parts))

    def read(self, digest: bytes, host_block: int) -> None:
        """Read into a host block soon; `done` says when."""
        self._num_reading += 1
        self._jobs.put(lambda: self._read(digest, host_block))

    def drop(self, digest: bytes) -> None:
        self._jobs.put(lambda: self.path(digest).unlink(missing_ok=True))

    def done(self, wait: bool = False) -> dict[bytes, bool]:
        """The reads that have ended since the last call, and whether the file was good."""
        if wait and self._num_reading:
            self.settle()
        with self._lock:
            found, self._done = self._done, []
        self._num_reading -= len(found)
        return dict(found)

    def settle(self) -> None:
        """Wait until all that was asked for is done."""
        self._jobs.join()

    def forget_reads(self) -> None:
        """Nobody waits for them any more."""
        self.settle()
        self.done()

    def close(self) -> None:
        self.settle()
        self._end()
        self._thread.join(10.0)
        self.tensors = []

    # -- in the thread: bytes and files, no torch operations -----------------------------------------------------

    def _views(self, host_block: int) -> Iterator[np.ndarray]:
        for tensor in self.tensors:
            yield tensor[host_block].view(torch.uint8).numpy().reshape(-1)

    def _write(self, stub: Stub, parts: list[bytes]) -> None:
        tokens = stub.tokens.astype(np.int32).tobytes()
        crc = 0
        for part in (tokens, *parts):
            crc = zlib.crc32(part, crc)
        header = json.dumps(
            {
                "version": VERSION, "fingerprint": self.fingerprint, **self.form, "num_bytes": self.num_bytes,
                "hash": stub.digest.hex(), "parent": stub.parent.hex(), "depth": stub.depth,
                "num_tokens": len(stub.tokens), "crc32": crc,
            }
        ).encode()  # fmt: skip
        path = self.path(stub.digest)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.writelines((MAGIC, len(header).to_bytes(4, "little"), header, tokens, *parts))
            os.replace(temporary, path)  # a reader sees the whole file or none
        except OSError:
            self.num_failed += 1
            temporary.unlink(missing_ok=True)
        finally:
            with self._lock:
                self._waiting -= self.num_bytes

    def _read(self, digest: bytes, host_block: int) -> None:
        ok = False
        try:
            path = self.path(digest)
            with open(path, "rb") as file:
                stub, expected = self._read_header(file, path.name, os.fstat(file.fileno()).st_size)
                crc = zlib.crc32(stub.tokens.tobytes())
                for view in self._views(host_block):
                    file.readinto(view)  # type: ignore[arg-type]
                    crc = zlib.crc32(view.data, crc)
                ok = crc == expected
            os.utime(path)
        except (Untrusted, OSError):
            pass  # reported as not good: the prefix is computed again
        with self._lock:
            self._done.append((digest, ok))


def _work(jobs: queue.Queue[Job | None]) -> None:
    """The thread. Holds no reference to the store while it waits."""
    while (job := jobs.get()) is not None:
        try:
            job()
        except OSError:
            pass  # a file that cannot be removed
        finally:
            del job
            jobs.task_done()


def fingerprint(model: Model, dtype: torch.dtype, block_size: int) -> str:
    """What keys and values depend on besides the tokens: the weights (256 bytes of each), the config, dtype and block
    size."""
    found = sha256(f"labkit {VERSION} {dtype} {block_size} {model.dtype} {model.kv}".encode())
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        kept = {name: value for name, value in config.to_dict().items() if name not in _NOT_THE_MODEL}
        found.update(json.dumps(kept, sort_keys=True, default=str).encode())
    slots = getattr(model, "adapters", None)
    of_adapters = set(map(id, slots.tensors())) if slots is not None else set()  # blocks name theirs in their hashes
    for tensor in (tensor for tensor in model.tensors() if id(tensor) not in of_adapters):
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.is_contiguous() and tensor.numel():
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            at = torch.linspace(0, len(flat) - 1, 256, dtype=torch.float64).long()
            found.update(flat[at.to(flat.device)].cpu().numpy().tobytes())
    return found.hexdigest()


_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")
