"""Where loading an offloaded prefix breaks even: on a simulator the answer follows from its costs."""

import pytest

import labkit as lk


def simulated(disk=0, **costs):
    bm = lk.BlockManager(64, num_host_blocks=64, kv_offloading=True, num_disk_blocks=disk)
    runner = lk.SimRunner(**{"constant": 0.001, "per_token": 1e-3, "per_context": 0.0, **costs})
    return lk.Engine(scheduler=lk.Scheduler(bm), runner=runner, clock=lk.VirtualClock())


def test_the_break_even_follows_from_the_costs():
    found = lk.study.swap_or_recompute(simulated(disk=200, per_block=1e-3, per_disk_block=2e-3), (16, 128, 512))
    assert found.seconds["recomputed"] == pytest.approx([0.001 + 1e-3 * (n + 8) for n in (16, 128, 512)])
    assert found.seconds["device"] == pytest.approx([0.009] * 3)
    assert found.seconds["host"] == pytest.approx([0.009 + 1e-3 * n / 16 for n in (16, 128, 512)])
    assert found.seconds["disk"] == pytest.approx([0.009 + 3e-3 * n / 16 for n in (16, 128, 512)])
    assert found.break_even("host") == 16 == found.break_even("disk")
    assert set(found.frame().prefix) == {"recomputed", "device", "host", "disk"} and len(found.frame()) == 12
    assert "host 16" in repr(found) and "device" in repr(found.lines())


def test_loading_may_never_pay():
    found = lk.study.swap_or_recompute(simulated(per_block=0.1), (16, 128))
    assert found.break_even() is None and "host never" in repr(found)
    with pytest.raises(ValueError, match="'disk' was not measured"):
        found.break_even("disk")


def test_the_embedded_model_is_measured_and_left_as_it_was():
    eng = lk.Engine(num_blocks=40, num_host_blocks=40, kv_offloading=True, max_num_seqs=2)
    found = lk.study.swap_or_recompute(eng, (64, 256), repeats=1)
    assert all(second > 0 for each in found.seconds.values() for second in each)
    assert eng.scheduler.kv_loading == "auto" and eng.blocks.offload.num_loaded == 4 + 16
    eng.check()
    eng.close()
    with pytest.raises(ValueError, match="kv_offloading=True"):
        lk.study.swap_or_recompute(lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(8)), runner=lk.FakeRunner()))
