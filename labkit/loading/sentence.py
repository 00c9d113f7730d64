"""What the files of a sentence model say besides its weights: how states become a vector, which layers follow, and how
long a text may be. Knows no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILES = {  # of 1_Pooling/config.json
    "pooling_mode_lasttoken": "LAST",
    "pooling_mode_cls_token": "CLS",
    "pooling_mode_mean_tokens": "MEAN",
}
SHORT = {"lasttoken": "LAST", "cls": "CLS", "mean": "MEAN"}
NO_ACTIVATION = "torch.nn.modules.linear.Identity"


class DenseLayer(NamedTuple):
    """A linear layer behind the pooling: where its weights are, and the name of what is applied to its output."""

    folder: Path
    activation: str

    def read(self) -> tuple[Any, Any]:
        """Weight and bias in float32: they are small. No bias is None."""
        from safetensors.torch import load_file

        path = self.folder / "model.safetensors"
        if not path.exists():
            raise ValueError(f"{self.folder} lacks model.safetensors, the weights of a layer behind the pooling")
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        return tensors["linear.weight"], tensors.get("linear.bias")


class Sentence(NamedTuple):
    """None where a folder says nothing. `sizes` are the lengths that vectors may be cut to; None: any, (): none."""

    pooling: str | None = None
    normalizes: bool | None = None
    sizes: tuple[int, ...] | None = ()
    dense: tuple[DenseLayer, ...] = ()
    max_length: int | None = None


def read_sentence(folder: Path | None) -> Sentence:
    """The files of a folder; those of a model that is no sentence model say nothing."""
    if folder is None or not Path(folder).is_dir():
        return Sentence()
    folder = Path(folder)
    config = _read(folder / "config.json")
    sizes: tuple[int, ...] | None = ()
    if config.get("matryoshka_dimensions"):
        sizes = tuple(config["matryoshka_dimensions"])
    elif config.get("is_matryoshka"):
        sizes = None
    modules = _read(folder / "modules.json")
    if not isinstance(modules, list):
        return Sentence(sizes=sizes)
    kinds: dict[str, str] = {}
    dense = []
    for module in modules:
        if not isinstance(module, dict):
            continue
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        kinds[kind] = path
        if kind == "Dense":
            options = _read(folder / path / "config.json")
            dense.append(DenseLayer(folder / path, str(options.get("activation_function", NO_ACTIVATION))))
        elif kind not in KNOWN:
            raise ValueError(f"{folder / 'modules.json'} names a {kind!r}: known are {', '.join(KNOWN)}")
    length = _read(folder / kinds.get("Transformer", "") / "sentence_bert_config.json").get("max_seq_length")
    pooling = _pooling(folder / kinds.get("Pooling", "1_Pooling") / "config.json")
    return Sentence(pooling, "Normalize" in kinds, sizes, tuple(dense), length if isinstance(length, int) else None)


KNOWN = ("Transformer", "Pooling", "Dense", "Normalize", "Dropout")


def _pooling(path: Path) -> str:
    options = _read(path)
    given = options.get("pooling_mode")
    named = [kind for key, kind in FILES.items() if options.get(key)]
    if not named and given is not None:
        named = [SHORT[given]] if given in SHORT else ["", ""]
    others = [name for name in options if name.startswith("pooling_mode_") and options[name] and name not in FILES]
    if len(named) > 1 or others:
        raise ValueError(f"{path} joins several kinds of pooling: one of lasttoken, cls and mean is served")
    return named[0] if named else "MEAN"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
