"""The scheduler of a model that keeps no keys and values: each prompt takes one step, and blocks are only counted."""

from __future__ import annotations

from typing import Any

from labkit.core.blocks.manager import BlockManager
from labkit.core.options import whole
from labkit.core.scheduling.scheduler import Scheduler

USUAL_BUDGET = 2048  # that of `Options`


def scheduler_of(runner: Any, options: Any, scheduling: dict[str, Any]) -> Scheduler:
    """One block a request, with nothing behind it. The longest prompt fits into a step, unless the caller has chosen a
    smaller budget: then no prompt is longer than that."""
    if options.draft is not None or options.speculative_config is not None:
        raise ValueError("draft and speculative_config are for models that generate; this one pools whole prompts")
    if options.has_adapters:
        raise ValueError("adapters are not served with a model that sees its prompts in both directions")
    budget, length = options.max_num_batched_tokens, runner.max_model_len
    if budget == USUAL_BUDGET:
        budget = max(budget, length)
    length = min(length, budget)
    blocks = BlockManager(2 * options.max_num_seqs + 2, length, prefix_caching=False)
    own = {"max_num_batched_tokens": budget, "max_in_flight": options.max_in_flight, "max_prefill_chunk": None}
    if own["max_in_flight"] is None:
        own["max_in_flight"] = int(runner.device.type == "cuda")
    return Scheduler(blocks, max_model_len=max(length, 2), **{**scheduling, **own})


def token_ids(given: Any, tokenizer: Any) -> tuple[tuple[int, str], ...] | None:
    """Tokens, as text or ids, as (id, text)."""
    if given is None:
        return None
    if isinstance(given, (str, int)) or not given:
        raise ValueError(f"classifier_from_token is a list of tokens, got {given!r}")
    found = []
    for token in given:
        id = token
        if isinstance(token, str):
            if not hasattr(tokenizer, "encode"):
                raise ValueError(f"classifier_from_token: {token!r} needs a tokenizer: give token ids")
            ids = tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"classifier_from_token: {token!r} is {len(ids)} tokens for this model, not one")
            id = ids[0]
        found.append((whole("classifier_from_token", id, least=0), str(token)))
    return tuple(found)
