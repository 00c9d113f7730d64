"""If a new transformers moved something, the error names it and the versions that work."""

import importlib
import re
from importlib import metadata

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from labkit import load_model
from labkit.models import adapters, hf
from tests.models.configs import config


def test_a_name_that_is_gone_is_said_with_the_versions_that_work(monkeypatch):
    monkeypatch.delattr(transformers.modeling_rope_utils, "ROPE_INIT_FUNCTIONS")
    version, (first, last) = re.escape(transformers.__version__), hf.TESTED
    expected = (
        f"transformers {version} changed transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS: it no longer exists"
    )
    with pytest.raises(ImportError, match=f"{expected}; labkit was tested with {first} to {last}: pip install"):
        importlib.reload(hf)
    monkeypatch.undo()
    importlib.reload(hf)


@pytest.mark.parametrize("part", ["query_key_value", "inv_norm_factor"])
def test_an_attention_that_lost_a_part_is_named(monkeypatch, part):
    module = importlib.import_module("transformers.models.bloom.modeling_bloom")
    made = module.BloomAttention.__init__

    def without(self, *args, **options):
        made(self, *args, **options)
        delattr(self, part)

    monkeypatch.setattr(module.BloomAttention, "__init__", without)
    with pytest.raises(ImportError, match=f"changed BloomAttention: it has no {part}; labkit was tested with"):
        load_model(config("bloom"), load_format="dummy", path="transformers")


def test_an_attention_that_was_renamed_is_named(monkeypatch):
    monkeypatch.setitem(adapters.ADAPTERS, "bloom", adapters.ADAPTERS["bloom"]._replace(attention="Renamed"))
    with pytest.raises(ImportError, match="changed BloomForCausalLM: it has no Renamed"):
        load_model(config("bloom"), load_format="dummy", path="transformers")


def test_the_versions_that_were_tested_hold_the_installed_one():
    first, last = (tuple(map(int, version.split("."))) for version in hf.TESTED)
    assert first <= tuple(map(int, transformers.__version__.split(".")[:2])) <= last


def test_pyproject_allows_the_versions_that_were_tested():
    (line,) = [one for one in metadata.requires("labkit") or () if one.startswith("transformers")]
    first, last = hf.TESTED
    major, minor = last.split(".")
    assert set(Requirement(line).specifier) == set(SpecifierSet(f">={first},<{major}.{int(minor) + 1}"))
