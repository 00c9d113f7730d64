"""Which models are served, natively or through transformers, and rightly? `python tools/architectures.py` builds a
small random model of each type that transformers knows, serves it and compares log-probabilities with transformers'."""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.models.served import CAUSAL, CRASHED, ENCODER, KINDS, NATIVE, REFUSED, UNBUILT, WIDE, WRONG, Outcome, outcome

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- made by tools/architectures.py -->", "<!-- end -->"
TITLES = {NATIVE: "Native", WIDE: "Through transformers", ENCODER: "Encoders", REFUSED: "Refused", WRONG: "Wrong",
          CRASHED: "Crashed", UNBUILT: "Not tried"}  # fmt: skip


def lists(found: Sequence[Outcome]) -> str:
    """The outcomes in Markdown."""
    parts = []
    for how, title in TITLES.items():
        why_to_kinds: dict[str, list[str]] = {}
        for one in found:
            if one.how == how and one.kind in CAUSAL:
                why_to_kinds.setdefault(reason(one), []).append(one.kind)
        if not why_to_kinds:
            continue
        total = sum(map(len, why_to_kinds.values()))
        parts.append(f"## {title}: {total}\n")
        for why, kinds in sorted(why_to_kinds.items(), key=lambda item: -len(item[1])):
            names = ", ".join(f"`{kind}`" for kind in kinds)
            parts.append(f"* {why}: {names}" if why else f"{names}.")
        parts.append("")
    return "\n".join(parts)


def reason(one: Outcome) -> str:
    """Why it is not served, without its own name, so that types are listed together."""
    if one.how == UNBUILT:
        return "transformers' class needs more than a config and tokens here"
    why = re.sub(r"^'[^']*' (is not supported: |is not served: )?", "", one.why)
    if "models with images are" in why:
        return "models with images or sound that have no tower here"
    why = re.sub(r"of its \S+ layers \d+ go", "not all of its layers go", why)
    return re.sub(r" \(.*", "", why) if why.startswith("its forward failed") else why


def write(found: Sequence[Outcome]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{lists(found)}{END}{rest.split(END)[1]}", encoding="utf-8")


def _quiet() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _pool() -> ProcessPoolExecutor:
    """One process, so that a crash ends one model and not the table."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_quiet)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types; all of transformers' if there are none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the lists into docs/models.md")
    given = parser.parse_args()
    found, begin = [], time.monotonic()
    pool = _pool()
    for kind in given.kinds or KINDS:
        try:
            found.append(pool.submit(outcome, kind, given.seed).result())
        except BrokenProcessPool:
            found.append(Outcome(kind, CRASHED))
            pool = _pool()
        print(found[-1], flush=True)
    if given.write:
        write(found)
    print(dict(Counter(one.how for one in found)), f"{time.monotonic() - begin:.0f} s")
    return 1 if any(one.how == WRONG for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
