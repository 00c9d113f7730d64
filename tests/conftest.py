"""Small models on two cores: a second thread costs more than it brings. And what may not be skipped where it counts."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--must-run", action="append", default=[], metavar="TEXT", help="tests that may not be skipped")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and any(text in item.nodeid for text in item.config.getoption("--must-run")):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and must run here: {report.longrepr}"
    return report


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)
