"""The whole GPU path without a GPU: every op a Triton variant, steps captured, and one in flight."""

import importlib.util
import json
import os
import random
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_engines_on_triton_kernels_give_the_tokens_of_the_references():
    seed = random.randrange(10**6)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runner.interpreted", "qwen3", str(seed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2000:]}"
    expected, *others = json.loads(done.stdout.splitlines()[-1]).items()
    assert [name for name, _ in others] == ["eager", "graphs", "deterministic"]
    for name, tokens in others:
        assert tokens == expected[1], f"{name}, seed {seed}"
