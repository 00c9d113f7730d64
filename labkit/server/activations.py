"""The fields `edit` and `capture` of a body: what a request changes in the model's states, and which it gets back.

Open only where the server was started with `enable_activations`, since both cost more than other fields: an edited
prompt has blocks of its own in the cache, and what is captured is kept until it is answered.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from labkit.core import edits
from labkit.core.captures import keys_of
from labkit.engine.activations import read_tensors
from labkit.engine.handle import Handle
from labkit.server.errors import ApiError, clean

MOST_EDITS = 256
LARGEST = 1e30
MOST_SHOWN = 64 * 2**20  # bytes of activations in an answer
CLOSED = "this server neither changes nor shows activations: start it with --enable-activations"

Layer = Annotated[int, Field(ge=-1, le=2**16)]
Layers = Literal["all"] | Annotated[list[Layer], Field(min_length=1, max_length=2**12)]
Real = Annotated[float, Field(allow_inf_nan=False, ge=-LARGEST, le=LARGEST)]
Position = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


class Edit(BaseModel):
    """One change of the states behind a layer. `vector` is the numbers or a name of `edit_vectors`; `scale` is of add,
    `least` and `most` are of clamp."""

    model_config = ConfigDict(extra="forbid")

    layer: Layer
    vector: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Real], Field(min_length=1, max_length=2**17)]
    )
    kind: Literal["add", "project", "clamp", "replace"] = "add"
    positions: Literal["all", "last"] | Annotated[list[Position], Field(min_length=1, max_length=2**16)] = "all"
    scale: Real | None = None
    least: Real | None = None
    most: Real | None = None

    @field_validator("vector", mode="before")
    @classmethod
    def _of_numbers(cls, given: Any) -> Any:
        """One message, where each alternative by itself would say that it is not the other."""
        numbers = isinstance(given, list) and all(type(one) in (int, float) and abs(one) <= LARGEST for one in given)
        if not isinstance(given, str) and not numbers:
            raise ValueError(f"a list of numbers up to {LARGEST:g}, or the name of a vector")
        return given

    def made(self, vectors: Mapping[str, Any]) -> edits.Edit:
        for name, kind in (("scale", "add"), ("least", "clamp"), ("most", "clamp")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"{name} goes with kind {kind!r}, not with {self.kind!r}")
        if isinstance(self.vector, str) and self.vector not in vectors:
            known = ", ".join(sorted(vectors)[:20]) or "none"
            raise ValueError(f"there is no vector {self.vector!r} here; there are: {known}")
        vector = vectors[self.vector] if isinstance(self.vector, str) else self.vector
        made = {"add": edits.Add, "project": edits.Project, "clamp": edits.Clamp, "replace": edits.Replace}[self.kind]
        given = {name: getattr(self, name) for name in ("scale", "least", "most")}
        more = {name: value for name, value in given.items() if value is not None}
        return made(vector, positions=self.positions, **more)  # type: ignore[no-any-return]


class Capture(BaseModel):
    """Layers by kind, as `SamplingParams(capture=)` takes them."""

    model_config = ConfigDict(extra="forbid")

    hidden: Layers | None = None
    attention_output: Layers | None = None
    mlp_output: Layers | None = None
    positions: Literal["all", "last"] = "all"


# one or several
Edits = Annotated[
    list[Edit],
    Field(min_length=1, max_length=MOST_EDITS),
    BeforeValidator(lambda given: [given] if isinstance(given, dict) else given),
]


class Asking(Protocol):
    edit: Edits | None
    capture: Capture | None
    stream: bool | None
    n: int | None


def read_vectors(given: Any) -> dict[str, Any]:
    """Names to vectors: of a mapping, or of a file of safetensors."""
    if isinstance(given, str):
        try:
            given = read_tensors(given)
        except ValueError as error:
            raise ValueError(f"edit_vectors: {error}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"edit_vectors maps names to vectors, or is a file of safetensors; got {given!r}")
    found = {str(name): edits.vector_of(f"edit_vectors[{name!r}]", vector) for name, vector in given.items()}
    for name, vector in found.items():
        if vector.ndim != 1:
            raise ValueError(f"edit_vectors[{name!r}] is a vector [hidden size], got shape {vector.shape}")
    return found


def asked_of(body: Asking, settings: Any, runner: Any, lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """What the body's `edit` and `capture` are in `SamplingParams`. `lengths` are the tokens of each prompt, and those
    that it may produce."""
    found: dict[str, Any] = {}
    for name in ("edit", "capture"):
        if getattr(body, name) is not None and not settings.enable_activations:
            raise ApiError(f"{name}: {CLOSED}", param=name)
    if body.edit is not None:
        by_layer: dict[int, list[edits.Edit]] = {}
        for i, one in enumerate(body.edit):
            try:
                by_layer.setdefault(one.layer, []).append(one.made(settings.edit_vectors))
            except ValueError as error:
                raise ApiError(f"edit.{i}: {clean(str(error))}", param=f"edit.{i}") from None
        found["edit"] = by_layer
    if body.capture is not None:
        if body.stream:
            raise ApiError("capture cannot be streamed: activations come with a whole answer", param="capture")
        found["capture"] = capture = body.capture.model_dump(exclude_none=True)
        num_layers, size = getattr(runner, "num_layers", 0), getattr(runner, "hidden_size", None) or 0
        all_layers = {name: list(range(num_layers)) if which == "all" else which for name, which in capture.items()}
        num_keys = len(keys_of({**all_layers, "positions": body.capture.positions}))
        lines = sum(out + (num_prompt if body.capture.positions == "all" else 0) for num_prompt, out in lengths)
        if (num := 4 * num_keys * size * lines * (body.n or 1)) > MOST_SHOWN:
            raise ApiError(
                f"capture asks for {num / 2**20:.0f} MiB of activations, and {MOST_SHOWN // 2**20} are answered at "
                'most: name fewer layers, ask for fewer tokens, or use positions="last"',
                param="capture",
            )
    return found


def shown(handles: list[Handle], body: Asking) -> list[dict[str, Any]]:
    """What each answer's choice has besides. Activations are written as base64 of float32, little-endian; afterwards
    nobody keeps them."""
    found: list[dict[str, Any]] = [{} for _ in handles]
    for handle, into in zip(handles, found, strict=True):
        if body.edit is not None:
            into["num_edited"] = handle.num_edited
        if body.capture is not None:
            acts = handle.activations
            into["activations"] = written = {"positions": acts.positions.tolist(), "tokens": acts.tokens.tolist()}
            for kind, layer in acts.keys:
                array = acts[kind, layer].numpy().astype("<f4")
                data = base64.b64encode(array.tobytes()).decode()
                written.setdefault(kind, {})[str(layer)] = {"shape": list(array.shape), "data": data}
    if body.capture is not None:
        for handle in handles:  # after all of them: samples share lines of their parent
            handle.captures = []
    return found
