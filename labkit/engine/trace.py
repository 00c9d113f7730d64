"""A block that reads and changes the states of one request, in the manner of nnsight. It knows no model: everything is
translated to `capture=` and `edit=`, the request runs when the block ends, and what has no translation raises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from labkit.core.edits import Add, Edit, Function, Replace
from labkit.core.params import SamplingParams
from labkit.engine.handle import Handle

EDITS = "+= and -= add a vector, and = takes a vector, a function of (states, positions) or an edit of lk.edit"


class Trace:
    """What `Engine.trace` returns. `layers[i]` are the layers, `embeddings` and `norm` (the final one) what lies
    before and behind them; `handle` is the request once the block has ended."""

    def __init__(
        self, engine: Any, prompt: Any, params: SamplingParams | None, num_layers: int, options: dict[str, Any]
    ) -> None:
        self.params = SamplingParams(max_tokens=1, temperature=0) if params is None else params
        if self.params.capture or self.params.edit:
            raise ValueError(
                "the parameters of a trace have no capture= and edit= of their own: write them in its block"
            )
        self.engine, self.prompt, self.options = engine, prompt, options
        self.layers = tuple(Layer(self, i, f"layers[{i}]") for i in range(num_layers))
        self.embeddings, self.norm = Part(self, "hidden", -1, "embeddings"), Part(self, "hidden", num_layers, "norm")
        self.edits: dict[int, list[Edit]] = {}
        self.saved: set[tuple[str, int]] = set()
        self.handle: Handle | None = None

    def __repr__(self) -> str:
        num = sum(map(len, self.edits.values()))
        return f"Trace({len(self.saved)} outputs saved, {num} edits: {self.handle or 'has not run'})"

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            capture: dict[str, list[int]] = {}
            for what, layer in sorted(self.saved):
                capture.setdefault(what, []).append(layer)
            params = replace(self.params, capture=capture or None, edit=self.edits or None)
            self.handle = self.engine.generate(self.prompt, params, **self.options).raise_failure()


class Part:
    """A part of the model with an output."""

    def __init__(self, trace: Trace, kind: str, layer: int, name: str) -> None:
        self._trace, self._kind, self._layer, self._name = trace, kind, layer, name

    @property
    def output(self) -> States:
        return States(self._trace, self._kind, self._layer, self._name)

    @output.setter
    def output(self, given: Any) -> None:
        self.output[:] = given


class Layer(Part):
    """A layer, whose attention and MLP have outputs of their own."""

    def __init__(self, trace: Trace, layer: int, name: str) -> None:
        super().__init__(trace, "hidden", layer, name)
        self.attention = Part(trace, "attention_output", layer, f"{name}.attention")
        self.mlp = Part(trace, "mlp_output", layer, f"{name}.mlp")


class Sum(NamedTuple):
    """What `output += vector` assigns back."""

    states: States
    vector: Any
    scale: float


class States:
    """The output [tokens, hidden size] of a part: of every token, or of those at some positions of the prompt."""

    def __init__(self, trace: Trace, kind: str, layer: int, name: str, positions: Any = "all") -> None:
        self._trace, self._key, self._name, self._positions = trace, (kind, layer), name, positions

    def __repr__(self) -> str:
        return f"States(output of {self._name})"

    def save(self) -> States:
        """Keep it: `value` is there when the block has ended, for every token that was computed."""
        if self._positions != "all":
            self._refuse("save() of some positions", "save() all, and index its value")
        self._trace.saved.add(self._key)
        return self

    @property
    def value(self) -> Any:
        if self._trace.handle is None:
            raise RuntimeError(f"the output of {self._name} is computed when the block ends: read its value after that")
        if self._key not in self._trace.saved:
            raise RuntimeError(f"the output of {self._name} was not saved: call save() within the block")
        return self._trace.handle.captured(*self._key)

    def __getitem__(self, at: Any) -> States:
        if isinstance(at, slice) and at == slice(None):
            return self
        positions = [at] if hasattr(at, "__index__") else at
        if self._positions != "all" or not isinstance(positions, list):
            self._refuse(f"[{at!r}]", "an index is a position in the prompt, a list of them, or [:]")
        return States(self._trace, *self._key, self._name, positions)

    def __setitem__(self, at: Any, given: Any) -> None:
        kind, layer = self._key
        if kind != "hidden":
            self._refuse("a change", f"edits are made behind layers: layers[{layer}].output")
        if self._key in self._trace.saved:
            self._refuse("a change after save()", "what is saved is the state behind all edits: save it after them")
        self._trace.edits.setdefault(layer, []).append(self[at]._edit(given))

    def _edit(self, given: Any) -> Edit:
        if isinstance(given, Sum):
            of, vector, scale = given
            if of._key != self._key or of._positions != self._positions or isinstance(vector, States):
                self._refuse("a sum with another output", "run that trace first, and add its value")
            return Add(vector, scale, self._positions)
        if isinstance(given, States):
            self._refuse("another output", "run that trace first, and assign its value")
        if isinstance(given, Edit):
            if self._positions != "all":
                self._refuse("an edit at an index", "edits of lk.edit take positions=")
            return given
        return (Function if callable(given) and not hasattr(given, "detach") else Replace)(given, self._positions)

    def __iadd__(self, vector: Any) -> Any:
        return Sum(self, vector, 1.0)

    def __isub__(self, vector: Any) -> Any:
        return Sum(self, vector, -1.0)

    def _refuse(self, what: str, instead: str = EDITS) -> NoReturn:
        raise TypeError(f"{what} on the output of {self._name} has no translation: {instead}")


for _name in ("imul", "itruediv", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "rmatmul", "neg"):
    setattr(States, f"__{_name}__", lambda self, *other, name=_name: self._refuse(f"__{name}__"))
