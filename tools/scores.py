"""Are scores generation's log-probabilities to the bit? `python tools/scores.py 2000` tries so many random settings, of
architecture, dtype, sampling, batch, chunks, blocks, preemption and prefix hits, and prints what has happened."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.engine.scores import KINDS, check_setting, model_of

PER_MODEL = 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=None)
    given = parser.parse_args()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    rng, seen, failed, begin = random.Random(seed), Counter[str](), 0, time.process_time()
    for done in range(given.settings):
        if done % PER_MODEL == 0:
            kind, dtype = KINDS[done // PER_MODEL % len(KINDS)], rng.choice(["float32", "bfloat16"])
            model = model_of(kind, dtype, seed=rng.randrange(1000))
        own = rng.randrange(10**9)
        try:
            seen.update(check_setting(model, random.Random(own)))
        except AssertionError as error:
            failed += 1
            print(f"setting {done} ({kind}, {dtype}, seed {own}): {str(error)[:200]}", flush=True)
        if done % 200 == 199:
            print(f"{done + 1} settings, {failed} differ so far", flush=True)
    print(
        f"{given.settings} settings, {failed} differ; {dict(seen)}; {time.process_time() - begin:.0f} s of processor "
        f"time, seed {seed}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
