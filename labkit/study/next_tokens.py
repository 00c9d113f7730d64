"""A model's next-token distribution, and what sampling parameters leave of it. Nothing is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import labkit.study.tables as tables
from labkit.core.options import check_names, whole
from labkit.core.params import SamplingParams
from labkit.widgets import charts, style

if TYPE_CHECKING:
    import pandas

    from labkit.engine.engine import Engine

FILTERS = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class NextTokens:
    """The probability of every possible next token; one column per view, the model's own first.

    `under(temperature=0.5)` adds a view with these sampling parameters.
    """

    logits: NDArray[np.float32]  # [vocabulary]
    texts: dict[int, str]  # of the likeliest tokens
    views: tuple[tuple[str, NDArray[np.float64]], ...]

    def under(self, **filters: float) -> NextTokens:
        """Add a view with temperature, top_k, top_p and min_p applied as the sampler does."""
        check_names("NextTokens.under", filters, FILTERS)
        params = SamplingParams(**filters)  # type: ignore[arg-type]
        name = ", ".join(f"{name}={value:g}" for name, value in filters.items()) or "as it is"
        return NextTokens(self.logits, self.texts, (*self.views, (name, _kept(self.logits, params))))

    @property
    def kept(self) -> int:
        """Number of tokens that the latest view can still draw."""
        return int((self.views[-1][1] > 0).sum())

    def probability(self, token: int) -> float:
        """The probability of a token id in the latest view."""
        return float(self.views[-1][1][token])

    def frame(self) -> pandas.DataFrame:
        """A row for each of the likeliest tokens: its id, its text, and its probability in each view."""
        pd = tables.pandas()
        columns = {name: [float(p[token]) for token in self.texts] for name, p in self.views}
        return pd.DataFrame({"token": list(self.texts), "text": list(self.texts.values()), **columns})

    def __repr__(self) -> str:
        name, p = self.views[-1]
        first = [f"{text!r} {p[token]:.0%}" for token, text in list(self.texts.items())[:3]]
        return f"NextTokens({name}: {', '.join(first)}; {self.kept} of {len(p)} tokens left)"

    def _repr_html_(self) -> str:
        parts = []
        most = 100 * max(float(p.max()) for _, p in self.views)  # one scale for all of them
        for i, (name, p) in enumerate(self.views):
            color = style.HUES[6 if i == 0 else (i - 1) % 6]
            bars = [
                charts.Bar(repr(text), round(100 * float(p[token]), 2), color=color)
                for token, text in self.texts.items()
            ]
            rest = f"{int((p > 0).sum()):,} tokens left"
            parts.append(style.title(f"{name} [%]") + charts.bars(bars, width=280, most=most) + style.note(rest))
        return style.page(style.side_by_side(*parts, least=240))


def next_tokens(engine: Engine, prompt: Any, *, show: int = 10) -> NextTokens:
    """Ask a model once, and keep its logits.

    >>> import labkit as lk
    >>> with lk.Engine(num_blocks=16) as eng:
    ...     found = lk.next_tokens(eng, "import ").under(top_k=2)
    >>> found.kept
    2
    """
    whole("show", show, least=1, most=50)
    seen: list[Any] = []

    def keep(prompt_ids: list[int], output_ids: list[int], logits: Any) -> Any:
        seen.append(logits.detach().float().cpu().numpy().copy())
        return logits

    ask = SamplingParams(max_tokens=1, temperature=0, logits_processors=[keep], detokenize=False)
    handle = engine.generate(prompt, ask)
    if isinstance(handle, list):
        raise TypeError(f"next_tokens looks at one prompt, got {len(handle)}")
    if not seen:
        raise ValueError(f"{engine.runner!r} has no logits: this needs an engine with a model")
    logits = seen[0]
    likeliest = np.argsort(-logits, kind="stable")[:show].tolist()
    decode = engine.tokenizer.decode if engine.tokenizer is not None else str
    texts = {token: decode([token]) for token in likeliest}
    return NextTokens(logits, texts, (("the model", _kept(logits, SamplingParams())),))


def _kept(logits: NDArray[np.float32], params: SamplingParams) -> NDArray[np.float64]:
    """Probabilities of what the sampler draws from."""
    import torch
    from labkit_kernels.sampling.reference import filtered

    row = torch.from_numpy(logits)[None]
    if params.temperature == 0:
        found: NDArray[np.float64] = np.eye(len(logits))[int(logits.argmax())]
        return found
    columns = (torch.tensor([params.top_k]), torch.tensor([params.top_p]), torch.tensor([params.min_p]))
    kept = filtered(row / params.temperature, *columns)
    return kept.double().softmax(-1)[0].numpy()
