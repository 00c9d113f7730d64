"""Hooks on the layers of a transformers model, for one forward: they show what goes through, and change it. Knows how
such models name their parts, and no requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from labkit.models.base import Capture

PARTS = {
    "attention_output": ("self_attn", "attn", "attention", "self_attention"),
    "mlp_output": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
SHOWN = ("hidden", "attention", "q", "k", "v")  # of every layer, because attention is ours


class Layers:
    """The layers of a model's body, in order."""

    def __init__(self, body: nn.Module, num_layers: int) -> None:
        lists = (module for module in body.modules() if isinstance(module, nn.ModuleList))
        self.modules: list[nn.Module] = list(next((found for found in lists if len(found) == num_layers), ()))

    def why_no_capture(self, kind: str, layer: int) -> str | None:
        if kind == "attention":
            return None
        if not self.modules:
            return "the layers of this model of transformers are not one list"
        if kind in SHOWN or self._part(kind, layer) is not None:
            return None
        return f"this model of transformers has no part of that name (one of {', '.join(PARTS.get(kind, ('none',)))})"

    def _part(self, kind: str, layer: int) -> nn.Module | None:
        return next((part for name in PARTS.get(kind, ()) if (part := getattr(self.modules[layer], name, None))), None)

    @contextmanager
    def watched(self, capture: Capture | None) -> Iterator[None]:
        """Within the block, forwards fill the capture and make its edits; what is behind the last norm is not here."""
        if capture is None:
            yield
            return
        hooks: list[Any] = []
        try:
            for layer in capture.hidden_layers | set(capture.edits):
                if layer == -1:
                    hooks.append(self.modules[0].register_forward_pre_hook(_before(capture), with_kwargs=True))
                elif layer < len(self.modules):
                    hooks.append(self.modules[layer].register_forward_hook(_behind(capture, layer)))
            for kind, layer in capture.others:
                if kind in PARTS:
                    part = self._part(kind, layer)
                    assert part is not None
                    hooks.append(part.register_forward_hook(_of_part(capture, kind, layer)))
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _behind(capture: Capture, layer: int) -> Any:
    def run(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (capture.after(layer, out[0][0])[None], *out[1:])
        return capture.after(layer, out[0])[None]

    return run


def _before(capture: Capture) -> Any:
    def run(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args:
            return (capture.after(-1, args[0][0])[None], *args[1:]), options
        return args, options | {"hidden_states": capture.after(-1, options["hidden_states"][0])[None]}

    return run


def _of_part(capture: Capture, kind: str, layer: int) -> Any:
    def run(module: nn.Module, args: Any, out: Any) -> None:
        first: Tensor = out[0] if isinstance(out, tuple) else out
        capture.keep(kind, layer, first.flatten(0, -2))  # of one sequence, which some parts flatten

    return run
