"""Default configurations compile for GPUs that this machine does not have, without spills and within shared memory."""

import importlib.util
import subprocess
import sys

import pytest
from labkit_kernels import get
from labkit_kernels.compile import compile_config, compile_ops, configs
from labkit_kernels.compile import main as compile_main
from labkit_kernels.config import ARCHS, MOST_SHARED, Config

OPS_HERE = [
    "rms_norm",
    "layer_norm",
    "rope",
    "rope_kv",
    "silu_mul",
    "gelu_mul",
    "store_kv",
    "copy_blocks",
    "step_inputs",
]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize("name", OPS_HERE)
def test_default_configurations_have_no_spills_and_fit(name):
    report = compile_ops([name])
    assert report.ok, str(report)
    assert {row.arch for row in report} == {f"sm_{arch}" for arch in ARCHS}
    for row in report:
        assert row.spills == 0 and 0 < row.registers <= 255
        assert row.shared <= MOST_SHARED[int(row.arch.removeprefix("sm_"))]


def test_a_kernel_that_spills_is_said_to():
    from labkit_kernels.norm import triton as norm

    size = 2 * norm.MOST  # why that is the most
    config = Config(norm._rms_norm, norm._RMS, {"SIZE": size, "RESIDUAL": True, **norm.tile(size)})
    row = compile_config("rms_norm", config, 80)
    assert row.status == "FAILED" and row.spills > 0 and "spilled" in row.reason
    assert row.num_warps == 16


def test_a_configuration_that_does_not_match_its_kernel_is_data():
    (config,) = configs(get("layer_norm"))
    assert repr(config).startswith("bf16 SIZE=4096")
    short = Config(config.kernel, {"x": "*bf16", "y": "i32"}, config.constexprs)
    row = compile_config("layer_norm", short, 90)
    assert row.status == "raised" and "missing ['weight'" in row.reason and "unknown {'y'}" in row.reason


def test_an_op_without_kernels_compiles_nothing_and_the_command_line_says_so(capsys):
    assert not compile_ops(["swap_blocks"]).rows
    assert compile_main(["copy_blocks", "--arch", "90"]) == 0
    assert "sm_90" in capsys.readouterr().out


def test_asking_for_a_configuration_brings_no_triton():
    subprocess.run(
        [sys.executable, "-c", "import sys, labkit_kernels.compile; assert 'triton' not in sys.modules"], check=True
    )
