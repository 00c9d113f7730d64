"""pyproject.toml is the only list of dependencies, and everything else agrees with it."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_holds_python_pip_and_the_dev_extra_only():
    text = (ROOT / "environment.yml").read_text()
    listed = re.findall(r"^ +- (.+)$", text, re.MULTILINE)
    assert listed == ["conda-forge", f"python{PROJECT['requires-python']}", "pip", "pip:", "-e .[dev]"]
    assert f"name: {PROJECT['name']}" in text


def test_the_base_needs_only_what_the_engine_needs():
    names = {re.split(r"[<>=;\[ ]", dependency)[0] for dependency in PROJECT["dependencies"]}
    assert names == {"torch", "triton", "transformers", "tokenizers", "safetensors", "numpy"}
    assert "torch>=2.11,<2.14" in PROJECT["dependencies"]
    assert "transformers>=5.17,<5.25" in PROJECT["dependencies"]  # what labkit/models/hf.py was tested with


def test_every_dependency_has_a_lower_and_an_upper_bound():
    extras = PROJECT["optional-dependencies"]
    assert {"lab", "server", "structured", "images", "study", "otel", "events", "dev"} <= set(extras)
    assert extras["dev"][0] == "labkit[lab,server,structured,images,study,otel,events]"
    for dependency in [
        *PROJECT["dependencies"],
        *extras["lab"],
        *extras["server"],
        *extras["study"],
        *extras["otel"],
        *extras["ray"],
        *extras["images"],
        *extras["dev"][1:],
    ]:
        assert re.search(r">=[\d.]+,<[\d.]+", dependency), dependency


def test_the_license_and_the_history_are_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    for name in ("README.md", "CHANGELOG.md", "LOG.md", "Makefile", ".ci/run"):
        assert (ROOT / name).stat().st_size > 100, name
