"""What the config of a compressed-tensors checkpoint says of each layer: its config groups, targets and exceptions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labkit.core.options import whole
from labkit.loading.stored import names_of

STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block", "token")


@dataclass(frozen=True)
class Scheme:
    """The layers of one config group."""

    bits: int
    kind: str  # "int" or "float"
    group: int | None = None
    block: tuple[int, int] | None = None
    inputs: str | None = None  # "token", "group" or "tensor": see ScaledLinear
    static: bool = False  # the scale of the inputs is stored

    @classmethod
    def of(cls, where: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Scheme:
        bits = whole(f"num_bits of {where}", weights.get("num_bits", 8), least=1, most=8)
        kind = str(weights.get("type", "int")).lower()
        if kind not in ("int", "float"):
            raise ValueError(f"type of {where} is int or float, got {kind!r}")
        group = weights.get("group_size")
        group = None if group in (None, -1) else whole(f"group_size of {where}", group, least=1)
        block = weights.get("block_structure")
        if block is not None:
            if not isinstance(block, (list, tuple)) or len(block) != 2:
                raise ValueError(f"block_structure of {where} is two numbers, got {block!r}")
            block = tuple(whole(f"block_structure of {where}", size, least=1) for size in block)
        if inputs is None or whole(f"num_bits of {where}'s inputs", inputs.get("num_bits", 8), least=1) > 8:
            return cls(bits, kind, group, block)
        strategy = str(inputs.get("strategy") or "tensor")
        if strategy not in STRATEGIES:
            raise ValueError(f"{where} quantizes its inputs by {strategy!r}; known: {', '.join(STRATEGIES)}")
        by = {"tensor_group": "group", "block": "group", "channel": "token"}.get(strategy, strategy)
        return cls(bits, kind, group, block, by, not inputs.get("dynamic", False))


@dataclass(frozen=True)
class Schemes:
    """Config groups with their targets. A layer's name goes before a regular expression ("re:..."), and that before the
    name of a class; "Linear" are all linear layers."""

    targets: tuple[tuple[str, Scheme | None], ...] = ()  # a group may leave its weights as they are
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Schemes:
        groups, targets = config.get("config_groups") or {}, []
        if not isinstance(groups, Mapping):
            raise ValueError(f"config_groups of the quantization config must be a table of groups, got {groups!r}")
        for label, group in groups.items():
            keys, is_table = ("weights", "input_activations"), isinstance(group, Mapping)
            parts: list[Any] = [group.get(key) for key in keys] if is_table else []
            if not is_table or not all(part is None or isinstance(part, Mapping) for part in parts):
                raise ValueError(f"config group {label!r} must be a table with weights and targets, got {group!r}")
            where, (weights, inputs) = f"config group {label!r}", parts
            scheme = None if weights is None else Scheme.of(where, weights, inputs)
            targets += [(target, scheme) for target in names_of(group, "targets")]
        ignored = names_of(config, "ignore")
        for pattern in (*ignored, *(target for target, _ in targets)):
            _check_pattern(pattern)
        return cls(tuple(targets), ignored)

    def is_ignored(self, name: str) -> bool:
        return any(_names(pattern, name) for pattern in self.ignored)

    def of_layer(self, name: str) -> Scheme | None:
        """None if the config leaves the layer dense, or if no target is it."""
        if self.is_ignored(name):
            return None
        exact = [scheme for target, scheme in self.targets if target == name]
        regular = [scheme for target, scheme in self.targets if target.startswith("re:") and _names(target, name)]
        by_class = [scheme for target, scheme in self.targets if target == "Linear"]
        return next(iter((*exact, *regular, *by_class)), None)

    @property
    def has_weights(self) -> bool:
        return any(scheme is not None for _, scheme in self.targets)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
    except re.error as error:
        raise ValueError(f"the quantization config has the pattern {pattern!r}: {error}") from error


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern == name
