"""The script that runs Schemathesis: what it calls, and what it says without it. `make fuzz` runs it."""

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = str(Path(__file__).parents[2] / "tools")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.delitem(sys.modules, "fuzz_server", raising=False)
    yield importlib.import_module("fuzz_server")
    sys.modules.pop("fuzz_server", None)


def test_without_schemathesis_it_says_how_to_get_it(tool, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--st", "no-such-program"])
    assert "pipx install schemathesis" in capsys.readouterr().err


def test_errors_of_the_server_and_of_answers_are_looked_for_with_a_seed(tool):
    words = tool.command("st", "http://127.0.0.1:1", 7, 3)
    assert words[:3] == ["st", "run", "http://127.0.0.1:1/openapi.json"]
    checks = words[words.index("--checks") + 1].split(",")
    assert {"not_a_server_error", "response_schema_conformance", "status_code_conformance"} <= set(checks)
    assert words[words.index("--max-examples") + 1] == "7" and words[words.index("--seed") + 1] == "3"
