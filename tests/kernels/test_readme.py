"""The examples in the kernels' README work as shown."""

import re
from pathlib import Path

import labkit_kernels
import pytest
from labkit_kernels import OPS, rms_norm
from labkit_kernels.__main__ import COMMANDS

README = (Path(labkit_kernels.__file__).parents[1] / "README.md").read_text()


@pytest.fixture
def variants():
    kept = dict(rms_norm.variants)
    yield
    rms_norm.variants.clear()
    rms_norm.variants.update(kept)


def test_the_example_of_a_variant_runs_and_prints_what_it_says(variants, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    timed = []
    monkeypatch.setattr(labkit_kernels, "bench", lambda *args: timed.append(args))  # large cases: seconds
    rms_norm.load_all()
    known = {}
    exec(code, known)
    (line, said) = re.search(r"^(check\(.*?\)) +#> (.*)$", code, re.MULTILINE).groups()
    assert repr(eval(line, known)) == said
    assert timed == [(rms_norm, ["reference", "cpu", "mine"])]


def test_every_op_and_every_subcommand_is_named():
    for name in [*OPS, *(f"labkit_kernels {command}" for command in COMMANDS)]:
        assert name in README
