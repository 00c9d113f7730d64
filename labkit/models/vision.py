"""Models that see: transformers' vision tower and projector before our native decoder.

The tower makes an image's features from what the model's image processor made of it; the decoder takes them as inputs
at the image's positions, as it takes any embeddings. Knows no requests and no text.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.loading.checkpoint import Source
from labkit.loading.formats import declared
from labkit.loading.internvl import Renamed
from labkit.loading.stored import FLOATS
from labkit.loading.towers import TEXT_ALONE
from labkit.models.decoder import FAMILIES, Decoder
from labkit.transfer import put

SEEING = (
    "internvl", "llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3",
    "smolvlm",
)  # fmt: skip
ALIASES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}

# Where checkpoints keep the language model, the longest prefix first; what follows is named as in a text model.
LANGUAGE = ("model.language_model.model.", "language_model.model.", "model.language_model.", "model.text_model.")
OWN = ("model.layers.", "model.embed_tokens.", "model.norm.")  # a checkpoint whose tower is outside of `model`
HEADS = ("lm_head.", "language_model.lm_head.", "model.lm_head.")


def sees(config: Any) -> bool:
    return getattr(config, "vision_config", None) is not None and config.model_type not in TEXT_ALONE


def load_seeing(
    config: Any, source: Source, dtype: torch.dtype, device: torch.device, max_model_len: int, deterministic: bool,
    quantization: Any, place: Any,
) -> Decoder:  # fmt: skip
    """A native decoder with `vision`, its tower, which the first stage has. Refuses by name what it cannot compute."""
    text = language_config(config, source)
    decoder = Decoder(text, Language(source), dtype, device, max_model_len, deterministic, quantization, place)
    decoder.name = config.architectures[0] if config.architectures else config.model_type
    decoder.sees = True
    if place.is_first:
        _check_first_stage(config, len(decoder.layers))
        decoder.vision = Tower(config, source, dtype, device)
    axis_of = axes_of(text, decoder.shape.head_size)
    decoder.axis_of = None if axis_of is None else axis_of.to(decoder.device)  # a captured step cannot copy it
    return decoder


def _check_first_stage(config: Any, num_layers: int) -> None:
    """Qwen3-VL's tower also adds to what the first layers put out."""
    levels = len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
    if levels > num_layers:
        raise ValueError(
            f"{config.model_type!r}: images are added to the outputs of the first {levels} layers, and the first stage "
            f"has {num_layers}: give it more with pp_layer_partition, or use tensor_parallel_size"
        )


def language_config(config: Any, source: Source) -> Any:
    """The language model's config, as the native decoder reads it."""
    if config.model_type not in SEEING:
        raise ValueError(f"{config.model_type!r} is not served: models with images are {', '.join(SEEING)}")
    text = copy.deepcopy(config.text_config)
    if (found := declared(config) or declared(text)) is not None:
        _check_tower_is_dense(source)
        text.quantization_config = {name: _under_own_names(value) for name, value in found.items()}
    family = ALIASES.get(text.model_type, text.model_type)
    if family not in FAMILIES:
        raise ValueError(
            f"{config.model_type!r} has a language model of type {family!r}, which has no native decoder: images need "
            f"one of {', '.join(sorted(FAMILIES))}"
        )
    text.tie_word_embeddings = not any(name.startswith(HEADS) for name in source.shapes)
    return text


def _check_tower_is_dense(source: Source) -> None:
    """Of quantized checkpoints the language model alone is read as such: a tower in 8 bits without its scales would be
    another tower."""
    for name in source.shapes:
        if language_name(name) is not None or not name.endswith(("weight", "weight_packed")):
            continue
        nothing = (slice(0, 0),) if source.shapes[name] else ()
        if name.endswith(("qweight", "weight_packed")) or (
            source.read(name, None, torch.device("cpu"), nothing).dtype not in FLOATS
        ):
            raise ValueError(
                f"{source!r}: tensor {name!r} of the vision tower is quantized: checkpoints are read whose language "
                f"model alone is"
            )


def _under_own_names(value: Any) -> Any:
    """Layers that a quantization config lists, as a text model names them."""
    if not isinstance(value, (list, tuple)):
        return value
    return [
        (language_name(f"{one}.weight") or f"{one}.weight").removesuffix(".weight") if isinstance(one, str) else one
        for one in value
    ]


def axes_of(text: Any, head_size: int) -> Tensor | None:
    """Which of the axes time, height and width each frequency of the rotary embedding turns with; None: there is one
    position, and no axes."""
    parameters = getattr(text, "rope_parameters", None) or {}
    sections = parameters.get("mrope_section")
    if sections is None:
        return None
    if not (parameters.get("mrope_interleaved") or text.model_type.startswith("qwen3_vl")):
        return torch.cat([torch.full((size,), i % 3) for i, size in enumerate(sections)])
    axis = torch.zeros(head_size // 2, dtype=torch.int64)
    for i in (1, 2):
        axis[i : sections[i] * 3 : 3] = i
    return axis


def language_name(name: str) -> str | None:
    """A stored tensor's name in a text model; None if it is not of the language model."""
    for prefix in HEADS:
        if name.startswith(prefix):
            return "lm_head." + name[len(prefix) :]
    for prefix in LANGUAGE:
        if name.startswith(prefix):
            return "model." + name[len(prefix) :]
    return name if name.startswith(OWN) else None


class Language:
    """The language model's part of a checkpoint, under a text model's names."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.folder = getattr(source, "folder", None)
        self.stored = {new: old for old in source.shapes if (new := language_name(old)) is not None}
        self.shapes = {new: source.shapes[old] for new, old in self.stored.items()}

    def __repr__(self) -> str:
        return f"the language model of {self.source!r}"

    def close(self) -> None:
        self.source.close()

    def read(self, name: str, dtype: torch.dtype | None, device: torch.device, part: tuple[slice, ...] = ()) -> Tensor:
        if name not in self.stored:
            raise ValueError(f"{self!r} lacks tensor {name!r}")
        return self.source.read(self.stored[name], dtype, device, part)


class Tower:
    """The vision tower and projector, without the language model."""

    def __init__(self, config: Any, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        model = _load(_blind(config), source, dtype)
        model.set_input_embeddings(nn.Embedding(1, 1))
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.dtype, self.device = dtype, device
        self.inputs = tuple(inspect.signature(self.model.get_image_features).parameters)
        self.num_forwards = 0

    def __repr__(self) -> str:
        size = sum(tensor.numel() for tensor in self.tensors())
        return f"Tower({type(self.model).__name__}: {size / 1e6:.1f}M parameters)"

    def tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()

    def replacement(self, source: Source) -> Replacement:
        """The language model's part of other weights, and the tower that the rest of them makes."""
        of_tower = [name for name in source.shapes if language_name(name) is None]
        return Replacement(source, Tower(self.config, source, self.dtype, self.device) if of_tower else None)

    def take(self, other: Tower) -> None:
        """The other's weights, in the memory of these."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)

    def encode(self, images: Sequence[Mapping[str, Any]]) -> list[Tensor | str]:
        """Each image's features [places, size], or why it has none. Images whose arrays fit together are computed
        together."""
        alike: dict[Any, list[int]] = {}
        for i, image in enumerate(images):
            alike.setdefault(tuple((name, array.shape[1:]) for name, array in image.items()), []).append(i)
        found: list[Tensor | str] = [""] * len(images)
        for group in alike.values():
            for i, features in zip(group, self._encode([images[i] for i in group]), strict=True):
                found[i] = features
        return found

    def _encode(self, images: list[Mapping[str, Any]]) -> Sequence[Tensor | str]:
        given = {
            name: self._put(torch.from_numpy(np.concatenate([image[name] for image in images])))
            for name in images[0]
            if name in self.inputs
        }
        try:
            self.num_forwards += 1
            out = self.model.get_image_features(**given)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if len(images) == 1:
                return [f"the vision tower refused the image: {error}"]
            return [self._encode([image])[0] for image in images]
        features = _parts(getattr(out, "pooler_output", out), [len(next(iter(image.values()))) for image in images])
        if features is None:
            if len(images) == 1:
                return ["the vision tower gave no features for the image"]
            return [self._encode([image])[0] for image in images]
        deep = [torch.cat(list(level)) for level in getattr(out, "deepstack_features", None) or ()]
        if deep:  # Qwen3-VL: what is added to the outputs of the first layers, beside the inputs
            sizes = [len(one) for one in features]
            features = list(torch.cat((torch.cat(features), *deep), -1).split(sizes))
        return features

    def _put(self, array: Tensor) -> Tensor:
        return put(array.numpy(), self.device).to(self.dtype if array.is_floating_point() else array.dtype)


class Replacement(Language):
    """Other weights for a model that sees; without a `tower` its own stays."""

    def __init__(self, source: Source, tower: Tower | None) -> None:
        super().__init__(source)
        self.tower = tower


def _parts(features: Any, tiles: list[int]) -> list[Tensor] | None:
    """Features by image, [places, size] each. A tower gives them by image or by tile, as a list or as one tensor."""
    if len(features) == len(tiles):
        return [one.reshape(-1, one.shape[-1]) for one in features]
    if len(features) != sum(tiles):
        return None
    flat, found, at = [one.reshape(-1, one.shape[-1]) for one in features], [], 0
    for num in tiles:
        found.append(torch.cat(flat[at : at + num]))
        at += num
    return found


def _blind(config: Any) -> Any:
    """The config with a language model of no layers and hardly a vocabulary."""
    blind = copy.deepcopy(config)
    text = blind.text_config
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 8, None
    for part in (blind, text):
        vars(part).pop("quantization_config", None)
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = []
    return blind


def _load(config: Any, source: Source, dtype: torch.dtype) -> Any:
    import transformers

    folder = getattr(source, "folder", None)
    with _quiet():
        if folder is None:
            model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
            _fill(model, source)
        else:
            kind: Any = transformers.AutoModelForImageTextToText
            given: dict[str, Any] = {}
            if isinstance(source, Renamed):
                kind = transformers.InternVLForConditionalGeneration
                names = [name for name in source.shapes if language_name(name) is None]
                given = {"state_dict": {name: source.read(name, None, torch.device("cpu")) for name in names}}
            model, info = kind.from_pretrained(
                None if given else folder, config=config, dtype=dtype, ignore_mismatched_sizes=True,
                output_loading_info=True, **given,
            )  # fmt: skip
            wrong = [name for name, *_ in info["mismatched_keys"]] + list(info["missing_keys"])
            if lost := sorted(name for name in wrong if language_name(name) is None):
                raise ValueError(f"{folder} lacks {len(lost)} tensors of the vision tower, {lost[0]!r} first")
    model.lm_head = nn.Identity()
    return model


@torch.no_grad()
def _fill(model: Any, source: Source) -> None:
    """Copy the tower's tensors, which the source names as transformers does in memory."""
    values = {name: value for name, value in model.state_dict().items() if language_name(name) is None}
    for name, shape in source.shapes.items():
        if language_name(name) is None and name not in values:
            raise ValueError(f"{source!r}: tensor {name!r} has no place in {type(model).__name__}")
        if name in values and shape != tuple(values[name].shape):
            told = f"has shape {shape}, {type(model).__name__}'s has {tuple(values[name].shape)}"
            raise ValueError(f"{source!r}: tensor {name!r} {told}")
    for name, value in values.items():
        if name not in source.shapes:
            raise ValueError(f"{source!r} lacks tensor {name!r} of the vision tower")
        value.copy_(source.read(name, value.dtype, value.device))


@contextmanager
def _quiet() -> Iterator[None]:
    """The language model is left out on purpose: transformers need not report it, nor show a bar for the rest."""
    from transformers.utils import logging

    before, with_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if with_bar:
            logging.enable_progress_bar()
