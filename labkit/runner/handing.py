"""A model's blocks as bytes, out to another engine and in from there. Knows the tensors of a block; which blocks go
where is decided by plans and by the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.core.blocks.exported import Form
from labkit.core.plan import Plan
from labkit.runner.disk import fingerprint


class Hands:
    """A runner that can hand blocks over; it has a `model`, a `store` and a `host`. Keys and values of a draft model
    stay behind: the other engine's draft, if it has one, computes its own."""

    model: Any
    layout: Any
    groups: Any
    kv_dtype: torch.dtype
    device: torch.device
    store: Any
    host: Any

    def block_form(self) -> Form:
        """What must be the same in engines that hand blocks to each other."""
        size = self.layout.block_size
        tensors = self._of_model(self.store.flat)
        shapes = [list(tensor.shape[1:]) for tensor in tensors]
        same = all(shape == shapes[0] for shape in shapes)
        said = f"{len(shapes)} x {shapes[0]}" if same else str(shapes)
        num_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
        model = f"{fingerprint(self.model, self.kv_dtype, size)}:{total(self.model)}"
        return Form(size, str(self.kv_dtype)[6:], said, model, num_bytes)

    def _of_model(self, flat: list[Tensor]) -> list[Tensor]:
        """Without those of a draft model, which come last."""
        return flat[: 2 * self.groups.size]

    @torch.inference_mode()
    def read_blocks(self, blocks: Sequence[int], *, in_host: bool = False) -> np.ndarray:
        """The bytes of these blocks [blocks, bytes], of the device or of host memory."""
        if in_host and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # copies there may still be under way
        index = torch.tensor(list(blocks), dtype=torch.int64)
        parts = []
        for tensor in self._of_model((self.host if in_host else self.store).flat):
            taken = tensor[index.to(tensor.device)].cpu()
            parts.append(taken.view(torch.uint8).reshape(len(blocks), -1).numpy())
        return np.concatenate(parts, axis=1)

    def write_arrivals(self, plan: Plan) -> None:
        """Into host memory. What is behind the model's part belongs to a draft model, which fills it anew."""
        for host_block, data in plan.arrivals:
            self.host.touched[host_block] = True
            at = 0
            for view in self._views(host_block):
                view[:] = data[at : at + len(view)]
                at += len(view)

    def _views(self, host_block: int) -> Iterator[np.ndarray]:
        for tensor in self._of_model(self.host.flat):
            yield tensor[host_block].view(torch.uint8).numpy().reshape(-1)


@torch.inference_mode()
def total(model: Any) -> str:
    """A hash of sums over all bytes of each weight. A fingerprint takes a sample, which does not notice when a few
    numbers of a large weight are replaced while another engine keeps the old ones."""
    slots = getattr(model, "adapters", None)
    of_adapters = set(map(id, slots.tensors())) if slots is not None else set()  # blocks name theirs in their hashes
    sums = [_sum(tensor) for tensor in model.tensors() if id(tensor) not in of_adapters and tensor.numel()]
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in sums:
        by_device.setdefault(one.device, []).append(one)
    found = sha256()
    for some in by_device.values():
        found.update(torch.stack(some).cpu().numpy().tobytes())  # one wait for the device
    return found.hexdigest()


def _sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = flat[: len(flat) // 8 * 8]
    if words.storage_offset() % 8 == 0:
        return words.view(torch.int64).sum() + flat[len(words) :].sum(dtype=torch.int64)
    return flat.sum(dtype=torch.int64)
