"""Other weights for a runner's model, in the memory of those that are there."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from labkit.models.replace import check_weights, write_weights


def runners_of(model: Any) -> WeakSet[Any]:
    """The runners that compute with this model, and see it change."""
    found: WeakSet[Any] = vars(model).setdefault("runners", WeakSet())
    return found


class Replaces:
    """A runner whose weights can be replaced; it has a `model`, and maybe a `disk` and `features`."""

    model: Any
    disk: Any
    features: Any  # of images, or None

    @property
    def is_shared(self) -> bool:
        """Whether other runners compute with the same model, such as that of a fork."""
        return sum("model" in vars(runner) for runner in runners_of(self.model)) > 1  # closed ones have none

    def check_weights(self, weights: Any) -> Any:
        """The weights as a source, or a ValueError that says why they cannot take the place of those that are there."""
        if self.is_shared:
            raise ValueError("this model is shared with a fork of the engine, or another runner: close that one first")
        if self.disk is not None:
            raise ValueError("blocks in kv_disk_path are of the weights that were loaded first: leave it out")
        source = check_weights(self.model, weights)
        if self.model.adapters is not None:
            self.model.adapters.check_base_may_change()
        return source

    def replace_weights(self, weights: Any) -> tuple[int, int]:
        """Other weights, all or nothing; how many tensors, and how many bytes they take here."""
        source = self.check_weights(weights)
        try:
            write_weights(self.model, source)
        finally:
            source.close()
        if self.model.adapters is not None:
            self.model.adapters.base_changed()
        if self.features is not None:
            self.features.forget()
        return len(getattr(source, "source", source).shapes), sum(tensor.nbytes for tensor in self.model.tensors())
