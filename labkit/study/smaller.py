"""What smaller KV costs and saves: perplexity, agreement, a needle, memory and decode speed of each way, in a table.

Everything is measured through the engine, on texts that the caller gives. The text that follows a prompt is fed to the
model as if it had drawn it, so that every way is judged on the same tokens.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import labkit.study.tables as tables
from labkit.core.events.types import Compacted
from labkit.core.options import whole
from labkit.core.params import SamplingParams
from labkit.core.smaller import SmallerKV

if TYPE_CHECKING:
    import pandas

    from labkit.engine.engine import Engine


def smaller_kv(
    engine: Engine,
    ways: Mapping[str, SmallerKV | None],
    texts: Sequence[str],
    *,
    num_prompt: int = 512,
    num_output: int = 64,
    needles: int = 4,
    rounds: int = 3,
    seed: int = 0,
) -> pandas.DataFrame:
    """Serve the beginning of each text in each of these `ways`; None is the whole cache, and comes first.

    Columns: `perplexity` of the `num_output` tokens that follow the `num_prompt` first ones; `agreement`: how often the
    likeliest token is that of the whole cache; `needle`: how many tokens of a random word, hidden in the first quarter
    of a prompt and asked for at its end, come out right; `keys`: the share of tokens that have keys when the last one
    is drawn, on average over layers. Then all texts decode at once: `blocks` and `mib` (None: the runner has no bytes)
    are what they hold at most; `speed` is output tokens for the same processor time, compactions included, whole = 1:
    the median of `rounds`, in each of which every way takes its turn. 0 leaves it out.

    >>> lk.study.smaller_kv(eng, {"half": lk.SnapKV(0.5)}, [text], num_prompt=200, num_output=20)
    """
    whole("num_prompt", num_prompt, least=8)
    whole("num_output", num_output, least=1)
    whole("needles", needles, least=0)
    whole("rounds", rounds, least=0)
    encode = getattr(engine.tokenizer, "encode", None)
    if encode is None:
        raise ValueError("smaller_kv measures on text: give the Engine a tokenizer")
    if isinstance(texts, str) or not texts:
        raise ValueError("texts are a list of strings, each longer than num_prompt + num_output tokens")
    ids = [encode(text) for text in texts]
    if len(texts) > (rows := engine.scheduler.max_num_seqs):
        raise ValueError(f"{len(texts)} texts decode at once, and this engine has {rows} rows: raise max_num_seqs")
    if engine.is_running:
        raise ValueError("this engine runs in the background, and its steps are timed here: pause() it first")
    for text in ids:
        if len(text) < num_prompt + num_output:
            raise ValueError(f"a text has {len(text)} tokens, num_prompt + num_output are {num_prompt + num_output}")
    cases = [(text[:num_prompt], text[num_prompt : num_prompt + num_output]) for text in ids]
    hidden = [_needle(encode, ids[i % len(ids)], num_prompt, random.Random(f"{seed}:{i}")) for i in range(needles)]
    asked: dict[str, SmallerKV | None] = {"whole": None, **{name: kv for name, kv in ways.items() if kv is not None}}
    found, whole_cache = [], None
    for name, kv in asked.items():
        given = _follow(engine, cases, kv)
        best = [token for one in given for token in one.best]
        whole_cache = best if whole_cache is None else whole_cache
        looked = _follow(engine, hidden, kv)
        right = [a == b for one in looked for a, b in zip(one.best, one.tokens, strict=True)]
        found.append(
            {
                "kv": name,
                "perplexity": math.exp(sum(sum(one.lost) for one in given) / len(best)),
                "agreement": sum(a == b for a, b in zip(best, whole_cache, strict=True)) / len(best),
                "needle": sum(right) / len(right) if right else None,
            }
        )
    prompts, seconds = [prompt for prompt, _ in cases], []
    for turn in range(max(rounds, 1)):
        served = [_serve(engine, prompts, num_output, kv) for kv in asked.values()]
        seconds.append([one.seconds for one in served])
        for line, one in zip(found, served, strict=True) if turn == 0 else ():
            line |= {"keys": one.keys, "blocks": one.blocks, "mib": _mib(engine, one.blocks)}
    for i, line in enumerate(found):
        line["speed"] = statistics.median(turn[0] / turn[i] for turn in seconds) if rounds else None
    return tables.pandas().DataFrame(found).set_index("kv")


class Follow:
    """A logits processor that draws given tokens, and notes how likely each was and which one was likeliest."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.lost: list[float] = []
        self.best: list[int] = []

    def __call__(self, prompt: list[int], output: list[int], logits: Any) -> Any:
        token = self.tokens[len(output)]
        if len(output) == len(self.best):  # else it was preempted, and is drawn again
            self.lost.append(float(-logits.float().log_softmax(-1)[token]))
            self.best.append(int(logits.argmax()))
        drawn = logits.new_full(logits.shape, -math.inf)
        drawn[token] = 0.0
        return drawn


def _follow(engine: Engine, cases: Sequence[tuple[list[int], list[int]]], kv: SmallerKV | None) -> list[Follow]:
    follows = [Follow(tokens) for _, tokens in cases]
    handles = [
        engine.submit(
            prompt,
            SamplingParams(
                max_tokens=len(follow.tokens), temperature=0, ignore_eos=True, detokenize=False, kv=kv,
                logits_processors=(follow,),
            ),
        )
        for (prompt, _), follow in zip(cases, follows, strict=True)
    ]  # fmt: skip
    for handle in handles:
        handle.wait()
    return follows


def _needle(encode: Any, text: list[int], num_prompt: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """A prompt with a random word in its first quarter that asks for it in the end, and the word."""
    word = "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(5))
    line, ask = encode(f'\nSECRET_NAME = "{word}"\n'), encode('\nSECRET_NAME = "')
    room = num_prompt - len(line) - len(ask)
    at = room // 8 + rng.randrange(max(1, room // 8))
    answer = line[len(ask) :][: -len(encode('"\n'))] if line[: len(ask)] == ask else encode(word)
    return text[:at] + line + text[at:room] + ask, answer


class Served(NamedTuple):
    """Of texts that decode at once."""

    blocks: int  # in use, at most
    keys: float  # the share of tokens that have keys in the end
    seconds: float  # of processor time


def _serve(engine: Engine, prompts: list[list[int]], num: int, kv: SmallerKV | None) -> Served:
    params = SamplingParams(max_tokens=num, temperature=0, ignore_eos=True, detokenize=False, kv=kv)
    scheduler = engine.scheduler
    handles = [engine.submit(prompt, params) for prompt in prompts]
    engine.step()  # what was submitted is in the queue
    while scheduler.num_waiting or scheduler.prefilling:
        engine.step()
    first, begin = scheduler.step, time.process_time()
    while engine.step() is not None:
        pass
    seconds = time.process_time() - begin
    steps = engine.log.frame("Step")
    blocks = int(steps[steps.step >= first].used_blocks.max())
    dropped = {handle.id: 0 for handle in handles}
    for event in engine.log.events("Compacted"):
        if isinstance(event, Compacted) and event.request in dropped:
            dropped[event.request] += event.num_keys - event.num_kept
    return Served(blocks, 1 - sum(dropped.values()) / sum(handle.num_tokens for handle in handles), seconds)


def _mib(engine: Engine, num_blocks: int) -> float | None:
    bytes_per_block = getattr(engine.runner, "bytes_per_block", None)
    return None if bytes_per_block is None else num_blocks * bytes_per_block(engine.blocks.block_size) / 2**20
