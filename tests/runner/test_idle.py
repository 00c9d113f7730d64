"""An idle engine does no work."""

import resource
import time

import labkit as lk


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def test_an_idle_engine_uses_no_cpu():
    with lk.Engine(num_blocks=50) as eng:
        eng.generate("x", lk.SamplingParams(max_tokens=3))
        time.sleep(0.5)  # threads that spin for a while before they sleep
        before = cpu_seconds()
        time.sleep(3)
        assert cpu_seconds() - before <= 0.02 * 3
        assert eng.generate("x", lk.SamplingParams(max_tokens=3)).num_output == 3
