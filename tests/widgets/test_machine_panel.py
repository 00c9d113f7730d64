"""What the machine panel says of GPUs, with a stub of nvidia-ml-py."""

import sys
import types

import pytest

from labkit.widgets.panels import Machine


def nvml(**answers):
    """A module with this GPU's answers; an exception is raised."""
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    given = {
        "Init": None,
        "DeviceGetCount": 1,
        "DeviceGetHandleByIndex": "gpu",
        "DeviceGetMemoryInfo": types.SimpleNamespace(used=3 * 2**30, total=80 * 2**30),
        "DeviceGetUtilizationRates": types.SimpleNamespace(gpu=97, memory=60),
        "DeviceGetPowerUsage": 612_345,
        "DeviceGetEnforcedPowerLimit": 700_000,
    }
    for name, answer in (given | answers).items():

        def call(*_, answer=answer):
            if answer is NotImplementedError:
                raise module.NVMLError("Not Supported")
            return answer

        setattr(module, f"nvml{name}", call)
    return module


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({}, "GPU 97%, 3 GiB of 80 GiB, 612 of 700 W"),
        ({"DeviceGetUtilizationRates": NotImplementedError}, "GPU 3 GiB of 80 GiB, 612 of 700 W"),
        ({"DeviceGetPowerUsage": NotImplementedError}, "GPU 97%, 3 GiB of 80 GiB"),
        ({"DeviceGetCount": 0}, None),
        ({"Init": NotImplementedError}, None),
    ],
)
def test_gpus_are_described_as_far_as_they_answer(monkeypatch, answers, said):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(**answers))
    html = Machine().html()
    assert "CPU " in html and (said in html if said else "GPU" not in html), html


def test_without_the_library_only_the_cpu_is_shown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "GPU" not in Machine().html()
