"""How a model's hidden states become one vector: what a sentence model's own files say, or the server's setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from labkit.core.options import choose, flag
from labkit.engine.engine import Engine
from labkit.server.errors import ApiError

POOLERS = {
    "LAST": lambda hidden: hidden[-1],
    "CLS": lambda hidden: hidden[0],
    "MEAN": lambda hidden: hidden.mean(0),
}
NAMES = dict.fromkeys(("pooling_type", "seq_pooling_type", "normalize", "use_activation", "dimensions"))
FILES = {  # of sentence-transformers' 1_Pooling/config.json
    "pooling_mode_lasttoken": "LAST",
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_mean_tokens": "MEAN",
}


class Pooling(NamedTuple):
    """`layer` is where the hidden states are taken: after the final norm. `sizes` are the lengths that vectors may be
    cut to; None: any, () : none."""

    layer: int
    size: int
    kind: str = "LAST"
    normalizes: bool = True
    sizes: tuple[int, ...] | None = ()

    @classmethod
    def of(cls, engine: Engine, given: Mapping[str, Any]) -> Pooling:
        model: Any = getattr(engine.runner, "model", None)
        if model is None or not hasattr(engine.runner, "num_layers"):
            raise ApiError("embeddings need a model with hidden states; this engine has none")
        kind, normalizes, sizes = of_folder(model.folder)
        kind = str(given.get("seq_pooling_type", given.get("pooling_type", kind))).upper()
        normalizes = given.get("normalize", given.get("use_activation", normalizes))
        return cls(engine.runner.num_layers, model.hidden_size, kind, normalizes, given.get("dimensions", sizes))

    def size_for(self, wanted: int | None) -> int:
        """The length of the vectors."""
        if wanted is None:
            return self.size
        if self.sizes == ():
            raise ApiError("this model's vectors cannot be shortened: leave out dimensions", param="dimensions")
        fits = wanted <= self.size if self.sizes is None else wanted in self.sizes
        if not fits:
            told = f"at most {self.size}" if self.sizes is None else f"one of {', '.join(map(str, self.sizes))}"
            raise ApiError(f"dimensions must be {told}, got {wanted}", param="dimensions")
        return wanted

    def vector(self, hidden: Any, size: int, normalizes: bool) -> Any:
        """[tokens, hidden size] -> [size]."""
        found = POOLERS[self.kind](hidden)[:size]
        return found / found.norm().clamp_min(1e-12) if normalizes else found


def check_pooling(given: Mapping[str, Any]) -> None:
    """Raises a ValueError if these are no settings of a pooler."""
    for name in given:
        choose("pooler_config", name, NAMES)
    for name in ("pooling_type", "seq_pooling_type"):
        if name in given:
            choose(f"pooler_config: {name}", str(given[name]).upper(), POOLERS)
    for name in ("normalize", "use_activation"):
        if name in given:
            flag(f"pooler_config: {name}", given[name])
    if given.get("dimensions") is not None:
        sizes = given["dimensions"]
        if not isinstance(sizes, (list, tuple)) or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"pooler_config: dimensions is a list of lengths, got {sizes!r}")


def of_folder(folder: Path | None) -> tuple[str, bool, tuple[int, ...] | None]:
    """Pooler, normalization and lengths that a checkpoint's files name. Without such files: the last token, normalized,
    in full length."""
    if folder is None or not Path(folder).is_dir():
        return "LAST", True, ()
    config = _read(Path(folder) / "config.json")
    sizes: tuple[int, ...] | None = ()
    if config.get("matryoshka_dimensions"):
        sizes = tuple(config["matryoshka_dimensions"])
    elif config.get("is_matryoshka"):
        sizes = None
    modules = _read(Path(folder) / "modules.json")
    if not isinstance(modules, list):
        return "LAST", True, sizes
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules if isinstance(module, dict)}
    pooler = _read(Path(folder) / str(kinds.get("Pooling", {}).get("path", "1_Pooling")) / "config.json")
    named = [kind for key, kind in FILES.items() if isinstance(pooler, dict) and pooler.get(key)]
    return (named[0] if named else "MEAN"), "Normalize" in kinds, sizes


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
