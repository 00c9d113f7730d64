"""`from vllm import ...` without vLLM, in processes of their own: what is imported stays imported."""

import subprocess
import sys
from pathlib import Path

import pytest

SNIPPET = """
import labkit.compat.vllm
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.llm_engine import LLMEngine
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.utils import random_uuid
from vllm.lora.request import LoRARequest
from vllm import EmbeddingRequestOutput, PoolingParams, ScoringRequestOutput
import vllm, labkit as lk
assert LLM is lk.LLM and AsyncLLM is AsyncLLMEngine is lk.AsyncLLMEngine and vllm.__version__ == lk.__version__
assert random_uuid() != random_uuid()
try:
    from vllm import ModelRegistry
except ImportError as error:
    assert "ModelRegistry" in str(error)
else:
    raise AssertionError
try:
    import vllm.distributed
except ModuleNotFoundError:
    print("fine")
"""


def run(script: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_modules_of_tutorials_are_there(tmp_path):
    assert run(SNIPPET, tmp_path) == "fine"


def test_only_when_asked_for(tmp_path):
    script = "import labkit as lk; lk.LLM\ntry:\n    import vllm\nexcept ModuleNotFoundError:\n    print('absent')"
    assert run(script, tmp_path) == "absent"


@pytest.mark.parametrize("order", ["import labkit.compat.vllm, vllm", "import vllm, labkit.compat.vllm"])
def test_an_installed_vllm_is_never_shadowed(tmp_path, order):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("LLM = 'the real one'\n")
    more = "try:\n    import vllm.sampling_params\nexcept ModuleNotFoundError:\n    print(vllm.LLM)"
    assert run(f"import sys; sys.path.insert(0, '.')\n{order}\n{more}", tmp_path) == "the real one"
