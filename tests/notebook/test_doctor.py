"""labkit doctor: each row is ok or says what to do, and a probe that fails does not hide the others."""

import json
import socket
import sys
import tomllib
from pathlib import Path

import pytest

from labkit.cli import main
from labkit.notebook import doctor
from labkit.notebook.doctor import FAIL, GIB, OK, WARN, Report, Row

ROOT = Path(__file__).parents[2]


def only(probe) -> list[Row]:
    return list(doctor.examine({"it": probe}).rows)


def test_this_machine_can_be_looked_at_and_every_problem_has_a_fix():
    report = doctor.examine()
    assert report.ok, report
    names = [row.name for row in report.rows]
    for name in ("python", "packages", "gpu", "ipykernel", "CPU kernels", "cpu", "memory", "port", "embedded model"):
        assert name in names, name
    assert all(row.fix for row in report.rows if row.state != OK)
    assert len(set(names)) == len(names)


def test_a_report_reads_as_lines_as_json_and_as_a_table():
    report = Report(
        (Row("a", OK, "1 < 2"), Row("long name", WARN, "old", "make it new"), Row("c", FAIL, "gone", "find"))
    )
    lines = repr(report).splitlines()
    assert lines[0] == "ok    a          1 < 2" and lines[2].strip() == "make it new"
    assert lines[3].startswith("FAIL  c") and lines[-1] == "1 ok, 1 warnings, 1 failures"
    assert json.loads(report.as_json())["rows"][1] == {
        "name": "long name", "state": "warn", "found": "old", "fix": "make it new",
    }  # fmt: skip
    assert not report.ok and Report(report.rows[:2]).ok
    html = report._repr_html_()
    assert "1 &lt; 2" in html and "make it new" in html and "<script" not in html


def test_the_command_s_exit_code_says_whether_something_failed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", {"a": lambda: [Row("a", WARN, "old", "renew")]})
    assert main(["doctor"]) == 0 and "warn  a" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "PROBES", {"a": lambda: [Row("a", FAIL, "gone", "find")]})
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["labkit_doctor"] == 1


def test_a_look_that_fails_is_a_row_and_hides_no_other():
    def broken():
        yield Row("half", OK, "seen")
        raise OSError("no such thing")

    report = doctor.examine({"broken": broken, "fine": lambda: [Row("fine", OK, "yes")]})
    assert [row.state for row in report.rows] == [FAIL, OK] or [row.state for row in report.rows] == [OK, FAIL, OK]
    assert "OSError: no such thing" in repr(report) and not report.ok


def test_a_python_that_is_too_old_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert only(doctor.python)[0].state == FAIL
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (low, high) = doctor.PYTHONS
    assert project["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"


def test_missing_and_old_packages_are_named_with_what_brings_them(monkeypatch):
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda name: ["torch>=99", "numpy>=2", 'plotly<1; extra == "lab"', 'llguidance>=1; extra == "structured"'],
    )
    versions = {"torch": "2.13", "numpy": "2.4", "plotly": "7.1"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    base, lab, *_, structured = only(doctor.packages)
    assert base.state == FAIL and "torch>=99" in base.fix and "numpy 2.4" in base.found and "numpy" not in base.fix
    assert lab.state == WARN and "pip install 'labkit[lab]'" in lab.fix
    assert structured.state == WARN and "llguidance missing" in structured.found


def test_every_extra_that_people_install_is_looked_at():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) <= set(extras)


def test_a_gpu_that_torch_does_not_see_is_a_warning(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(doctor, "nvidia_devices", lambda: ["NVIDIA H200"])
    (row,) = only(doctor.gpu)
    assert row.state == WARN and "NVIDIA H200" in row.found and "CUDA" in row.fix
    monkeypatch.setattr(doctor, "nvidia_devices", list)
    assert only(doctor.gpu)[0].state == OK


@pytest.mark.parametrize(
    ("capability", "free", "state", "said"),
    [((9, 0), 100, OK, "sm_90"), ((7, 5), 10, WARN, "sm_80 or newer"), ((8, 0), 1, WARN, "nvidia-smi")],
)
def test_a_gpu_s_age_and_memory_are_looked_at(monkeypatch, capability, free, state, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda i: "a GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: capability)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: (free * GIB, 140 * GIB))
    row, triton = only(doctor.gpu)
    assert row.state == state and said in row.found + row.fix
    assert triton.name == "triton"
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert only(doctor.gpu)[1].state == FAIL


def test_a_driver_that_is_not_there_lists_nothing(monkeypatch):
    class Nvml:
        NVMLError = RuntimeError

        @staticmethod
        def nvmlInit():
            raise RuntimeError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", Nvml)
    assert doctor.nvidia_devices() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor.nvidia_devices() == []


def test_an_old_kernel_and_widgets_that_the_server_does_not_see(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_version", lambda name: "6.29.5")
    monkeypatch.setattr(doctor, "labextensions", lambda: [tmp_path])
    kernel, anywidget, manager = only(doctor.jupyter)
    assert kernel.state == WARN and "ipykernel>=7.1" in kernel.fix
    assert anywidget.state == manager.state == WARN and "labkit[lab]" in anywidget.fix
    (tmp_path / "anywidget").mkdir()
    monkeypatch.setattr(doctor, "_version", lambda name: "7.10.0")
    kernel, anywidget, manager = only(doctor.jupyter)
    assert (kernel.state, anywidget.state, manager.state) == (OK, OK, WARN)


def test_no_compiler_is_a_warning_and_so_is_a_kernel_that_cannot_be_built(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (row,) = only(doctor.compiler)
    assert row.state == WARN and "no-such-compiler" in row.found and "plain torch" in row.fix
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    rows = only(doctor.compiler)
    assert rows[0].state == OK and rows[-1].state == WARN and rows[-1].found.startswith("0 of ")
    assert all(row.state == WARN for row in rows[1:]) and len(rows) > 3


def test_little_memory_and_a_plain_processor_are_warnings(monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: GIB)
    assert only(doctor.memory)[0].state == WARN
    monkeypatch.setattr(doctor, "free_memory", lambda: None)
    assert only(doctor.memory)[0].state == OK
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset(["sse2"]))
    assert only(doctor.cpu)[0].state == WARN
    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset(["avx2", "amx_bf16"]))
    row = only(doctor.cpu)[0]
    assert row.state == OK and "avx2, amx_bf16" in row.found


def test_a_cache_that_cannot_be_written_names_what_moves_it(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file" / "inside"))
    kernels, *others = only(doctor.folders)
    assert kernels.state == WARN and "is no folder" in kernels.found and "LABKIT_CACHE" in kernels.fix
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert all(row.state == WARN and "no permission to write" in row.found for row in only(doctor.folders)[1:])
    assert len(others) == 2


def test_a_missing_browser_is_a_warning_and_no_port_a_failure(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (row,) = only(doctor.browser)
    assert row.state == WARN and "chromium" in row.fix
    monkeypatch.setattr(doctor, "is_free", lambda number: False)
    assert only(doctor.port)[0].state == FAIL
    monkeypatch.setattr(doctor, "is_free", lambda number: number != 8888)
    row = only(doctor.port)[0]
    assert row.state == OK and "8888 taken" in row.found


def test_a_port_in_use_is_seen():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        assert not doctor.is_free(one.getsockname()[1])


def test_a_model_that_does_not_load_fails(monkeypatch):
    monkeypatch.setattr("labkit.assets.path", lambda name: Path("/no/such/folder"))
    (row,) = only(doctor.model)
    assert row.state == FAIL and "/no/such/folder" in row.found
