"""What a request wants of a model that pools: a vector of a text, its classes, a score, or a line for each token. Knows
no tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from labkit.core.options import choose, flag, named_options, text, whole

TASKS = {
    "embed": "a vector of the whole prompt",
    "classify": "a number for each class",
    "score": "one number: how well two texts fit",
    "token_embed": "a vector of each token",
    "token_classify": "a number for each class, of each token",
}
OF_TOKENS = ("token_embed", "token_classify")
POOLINGS = {"LAST": "the last token's state", "CLS": "the first token's state", "MEAN": "the mean of all states"}


@named_options
@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What to make of the states that a model computes of a prompt. A request with these draws no token.

    `task` is one of "embed", "classify", "score", "token_embed" and "token_classify"; None is what the model was made
    for. `dimensions` shortens the vectors of models that are made for it. `use_activation=False` leaves out the last
    step: vectors are not normalized, classes are logits and not probabilities; None is what the model's files say.
    `pooling` is "LAST", "CLS" or "MEAN" in place of the model's own. `second_from` is where the second of two texts
    begins, for models with token types.

    >>> PoolingParams(task="embed", dimensions=64)
    PoolingParams(task='embed', dimensions=64)
    """

    task: str | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    pooling: str | None = None
    second_from: int | None = None
    truncate_prompt_tokens: int | None = None  # -1: to what the model takes
    truncation_side: str = "right"

    def __post_init__(self) -> None:
        if self.task is not None:
            choose("task", self.task, TASKS)
        if self.dimensions is not None:
            whole("dimensions", self.dimensions, least=1)
        if self.use_activation is not None:
            flag("use_activation", self.use_activation)
        if self.pooling is not None:
            choose("pooling", text("pooling", self.pooling).upper(), POOLINGS)
            object.__setattr__(self, "pooling", self.pooling.upper())
        if self.second_from is not None:
            whole("second_from", self.second_from, least=0)
        if self.truncate_prompt_tokens is not None:
            whole("truncate_prompt_tokens", self.truncate_prompt_tokens, least=-1)
        choose("truncation_side", self.truncation_side, {"left": None, "right": None})

    def __repr__(self) -> str:
        changed = (f"{f.name}={own!r}" for f in fields(self) if (own := getattr(self, f.name)) != f.default)
        return f"PoolingParams({', '.join(changed)})"


class PoolingSpec(NamedTuple):
    """What a model makes of the states of a prompt, and how it does so for requests that say nothing. `sizes` are the
    lengths that vectors may be cut to; None: any, (): none. `labels` are the names of its classes, if it has any;
    `of_tokens`: it was made to classify single tokens. `generates`: it also draws tokens. `whole`: it computes each
    prompt in one step."""

    size: int
    pooling: str = "LAST"
    normalizes: bool = True
    sizes: tuple[int, ...] | None = ()
    labels: tuple[str, ...] = ()
    of_tokens: bool = False
    generates: bool = False
    whole: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it can do; the first is what the model was made for."""
        if not self.labels:
            return ("embed", "token_embed")
        if self.of_tokens:
            return ("token_classify",)
        score = ("score",) if len(self.labels) == 1 else ()
        return ("classify", *score, "token_classify")

    def fitted(self, params: PoolingParams) -> PoolingParams:
        """The parameters with everything filled in, or a ValueError that says why this model cannot follow them."""
        task = params.task or self.tasks[0]
        if task not in self.tasks:
            raise ValueError(f"task {task!r} is not what this model does: it does {', '.join(self.tasks)}")
        embeds = task in ("embed", "token_embed")
        if params.dimensions is not None:
            self._check_size(params.dimensions, embeds)
        active = params.use_activation
        if active is None:
            active = self.normalizes if embeds else True
        return replace(params, task=task, use_activation=active, pooling=params.pooling or self.pooling)

    def _check_size(self, wanted: int, embeds: bool) -> None:
        if not embeds:
            raise ValueError("dimensions are of vectors, and this model has classes: leave them out")
        if self.sizes == ():
            raise ValueError("dimensions: this model's vectors cannot be shortened, leave them out")
        fits = wanted <= self.size if self.sizes is None else wanted in self.sizes
        if not fits:
            told = f"at most {self.size}" if self.sizes is None else f"one of {', '.join(map(str, self.sizes))}"
            raise ValueError(f"dimensions must be {told}, got {wanted}")
