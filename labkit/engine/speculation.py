"""Speculative decoding as options: vLLM's `speculative_config`, or a draft, as the objects that scheduler and runner
need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from labkit.core.options import choose, closest
from labkit.core.scheduling.drafting import Draft, draft_of

OF_ALL = ("method", "num_speculative_tokens", "adaptive")
METHODS: dict[str, tuple[str, ...]] = {  # method -> its own keys
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
    "suffix": ("suffix_decoding_max_cached_requests",),
    "draft_model": ("model", "quantization", "max_model_len", "draft_tensor_parallel_size"),
    "eagle": ("model", "quantization", "draft_tensor_parallel_size"),
    "eagle3": ("model", "quantization", "draft_tensor_parallel_size"),
}


def speculation(config: Any, draft: Any) -> Draft | None:
    """The draft that `speculative_config` or `draft` asks for; None for none. Loads nothing.

    >>> speculation({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}, None)
    NGramDraft(4 tokens after 2 to 3)
    """
    if config is None:
        return draft_of(draft)
    if draft is not None:
        raise ValueError("speculative_config and draft both say who guesses: leave one of them out")
    if not isinstance(config, Mapping):
        return draft_of(config)
    given = {key: value for key, value in config.items() if value is not None}
    method = given["method"] if "method" in given else _method_of(given)
    own = choose("method of speculative_config", method, METHODS)
    for key in given:
        if key not in (*OF_ALL, *own):
            raise ValueError(
                f"speculative_config has no {key!r} for method {method!r}; {closest(key, (*OF_ALL, *own))}"
            )
    made: Draft = _MAKE[method](given)
    return made


def _method_of(given: Mapping[str, Any]) -> str:
    """The only method that knows one of these keys; vLLM does not ask for a method then, either."""
    if given.get("model") in ("ngram", "[ngram]"):
        raise ValueError("speculative_config: write {'method': 'ngram', ...} without a model")
    heads = ("eagle", "eagle3")  # of a model without a method, as vLLM takes it, only the whole ones are meant
    found = [name for name, keys in METHODS.items() if name not in heads and any(key in given for key in keys)]
    if len(found) != 1:
        raise ValueError(f"speculative_config needs a method, one of {', '.join(METHODS)}; got {dict(given)!r}")
    return found[0]


def _ngram(given: Mapping[str, Any]) -> Any:
    from labkit.sampling.drafts import NGramDraft

    most = given.get("prompt_lookup_max", max(5, given.get("prompt_lookup_min", 5)))
    least = given.get("prompt_lookup_min", min(2, most) if isinstance(most, int) else most)
    if isinstance(most, int) and isinstance(least, int) and least > most:
        raise ValueError(f"prompt_lookup_min ({least}) must not exceed prompt_lookup_max ({most})")
    return NGramDraft(**_common(given), lookup_min=least, lookup_max=most)


def _suffix(given: Mapping[str, Any]) -> Any:
    from labkit.sampling.drafts import SuffixDraft

    texts = given.get("suffix_decoding_max_cached_requests")
    return SuffixDraft(**_common(given), **({} if texts is None else {"num_texts": texts}))


def _draft_model(given: Mapping[str, Any]) -> Any:
    from labkit.sampling.drafts import ModelDraft

    more = {name: given[name] for name in ("quantization", "max_model_len") if name in given}
    return ModelDraft(_model_of(given, "draft_model", "such as 'tiny-draft'"), **_common(given), **more)


def _eagle(given: Mapping[str, Any]) -> Any:
    from labkit.sampling.drafts import EagleDraft

    method = given["method"]
    folder = _model_of(given, method, "the folder of a head")
    return EagleDraft(folder, **_common(given), layout=method, quantization=given.get("quantization"))


def _model_of(given: Mapping[str, Any], method: str, such: str) -> Any:
    if "model" not in given:
        raise ValueError(f"speculative_config: method {method!r} needs a model, {such}")
    if given.get("draft_tensor_parallel_size", 1) != 1:
        raise ValueError("draft_tensor_parallel_size must be 1: the draft model is not split")
    return given["model"]


_MAKE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "ngram": _ngram, "suffix": _suffix, "draft_model": _draft_model, "eagle": _eagle, "eagle3": _eagle,
}  # fmt: skip


def _common(given: Mapping[str, Any]) -> dict[str, Any]:
    names = {"num_speculative_tokens": "num_tokens", "adaptive": "adaptive"}
    return {ours: given[theirs] for theirs, ours in names.items() if theirs in given}


def draft_on_ranks(draft: Draft | None, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """How each rank loads the draft model, as plain data; None for drafts that the scheduler asks. Every rank has the
    whole draft model: it is small, and equal guesses need not travel."""
    if draft is None or not draft.by_runner:
        return None
    if hasattr(draft, "layout"):
        raise ValueError("an EAGLE head is not served by several processes: use method 'draft_model' or 'ngram'")
    wanted = getattr(draft, "model", None)
    if not isinstance(wanted, (str, Path)):
        raise ValueError(f"{draft!r}: a loaded model cannot be sent to several processes: give its folder or name")
    dtype = options["dtype"] if isinstance(options["dtype"], str) else str(options["dtype"]).removeprefix("torch.")
    plain = {**options, "dtype": dtype, "quantization": getattr(draft, "quantization", None)}
    return {"source": str(_source_of(wanted)), **plain}


def check_on_ranks(draft: Draft | None, loading: Mapping[str, Any] | None, runner: Any, tokenizer: Any) -> None:
    """As `load_draft`: the ranks' draft model must know the same tokens, and may be made for shorter requests."""
    if loading is None:
        return
    found = SimpleNamespace(**runner.facts[0]["draft"])
    check_vocabulary(found, runner, Path(loading["source"]), tokenizer)
    _limit(draft, found, runner)


def _source_of(wanted: str | Path) -> Path:
    from labkit.assets import EMBEDDED, path
    from labkit.loading.checkpoint import resolve

    return resolve(path(str(wanted)) if str(wanted) in EMBEDDED else wanted)


def _limit(draft: Any, model: Any, target: Any) -> None:
    """Requests longer than the draft model was made for go on without drafts."""
    if model.max_model_len < target.max_model_len:
        asked = getattr(draft, "max_model_len", None) or model.max_model_len
        draft.max_model_len = min(asked, model.max_model_len)


def load_draft(draft: Draft | None, target: Any, folder: Path | None, tokenizer: Any, **options: Any) -> Any:
    """The model of a `ModelDraft`, on the target's device; None for other drafts."""
    if draft is None or not draft.by_runner:
        return None
    from labkit.models import load_model

    wanted = getattr(draft, "model", None)
    if wanted is None:
        raise ValueError(f"{draft!r} names no model: lk.ModelDraft('tiny-draft', ...)")
    if not isinstance(wanted, (str, Path)):
        check_vocabulary(wanted, target, None, tokenizer)
        return wanted
    source = _source_of(wanted)
    options["quantization"] = getattr(draft, "quantization", None)
    if hasattr(draft, "layout"):
        return _load_head(source, target, draft.layout, options, tokenizer)
    model = load_model(source, device=target.device, **options)
    check_vocabulary(model, target, source, tokenizer)
    _limit(draft, model, target)
    return model


def _load_head(folder: Path, target: Any, layout: str | None, options: dict[str, Any], tokenizer: Any) -> Any:
    from labkit.models.eagle import load_head

    taken = {name: options[name] for name in ("deterministic", "quantization") if name in options}
    head = load_head(folder, target, layout, **taken)
    check_vocabulary(head, target, folder, tokenizer)
    return head


def check_vocabulary(model: Any, target: Any, folder: Path | None, tokenizer: Any) -> None:
    """A draft's token ids must mean what they mean to the target."""
    ours = getattr(getattr(tokenizer, "backend", None), "get_vocab", None)
    file = None if folder is None else Path(folder) / "tokenizer.json"
    if ours is not None and file is not None and file.exists():
        from labkit.text.tokenizer import Tokenizer

        theirs, own = Tokenizer.load(Path(folder)).backend.get_vocab(), ours()  # type: ignore[arg-type]
        if theirs != own:
            word = next((w for w in own if theirs.get(w) != own[w]), None) or next(w for w in theirs if w not in own)
            raise ValueError(
                f"the draft model {model.name} in {folder} has another vocabulary than {target.name}: token {word!r} "
                f"is {theirs.get(word, 'unknown')} there and {own.get(word, 'unknown')} here; its guesses would be "
                "meaningless"
            )
    elif model.vocab_size != target.vocab_size:
        raise ValueError(
            f"the draft model {model.name} has another vocabulary: {model.vocab_size} tokens, {target.name} has "
            f"{target.vocab_size}"
        )
