"""docs/models.md says how model types are served; a few drawn ones, and those that once were wrong, are tried again."""

import random
import re

import pytest

from tests.models.served import ENCODER, NATIVE, REFUSED, WIDE, outcome
from tools.architectures import BEGIN, END, PAGE, TITLES

ONCE_WRONG = ["inkling_text", "llama4_text", "phimoe", "roberta-prelayernorm"]


def listed() -> dict[str, str]:
    """How each type of the page is served."""
    made = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    parts = re.split(r"^## (.*?): \d+$", made, flags=re.M)[1:]
    how_of = {title: how for how, title in TITLES.items()}
    return {kind: how_of[title] for title, text in zip(parts[::2], parts[1::2], strict=True)
            for kind in re.findall(r"`([^`]+)`[,.\n]", text + "\n")}  # fmt: skip


def test_nothing_on_the_page_is_wrong():
    found = listed()
    assert set(found.values()) <= {NATIVE, WIDE, ENCODER, REFUSED, "not built"}
    assert found["llama"] == found["glm4_moe"] == NATIVE and found["gpt2"] == WIDE


@pytest.mark.parametrize("kind", ONCE_WRONG)
def test_those_that_were_wrong_are_right_or_refused(kind):
    assert outcome(kind).how == listed()[kind]


def test_a_few_drawn_types_are_served_as_the_page_says():
    seed = random.randrange(10**6)
    print("seed", seed)
    served = sorted(kind for kind, how in listed().items() if how in (NATIVE, WIDE))
    for kind in random.Random(seed).sample(served, 2):
        assert outcome(kind).how == listed()[kind], kind
