"""MessagePack: what is packed is read again, the bytes are those of the specification, damaged bytes are a
ValueError."""

import contextlib

import hypothesis.strategies as st
import pytest
from hypothesis import given

from labkit.core.messagepack import pack, unpack

LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20), max_leaves=30
)


@given(VALUES)
def test_values_come_back(value):
    assert unpack(pack(value)) == value


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "c0"), (True, "c3"), (0, "00"), (127, "7f"), (128, "cc80"), (256, "cd0100"), (65536, "ce00010000"),
        (2**32, "cf0000000100000000"), (-1, "ff"), (-32, "e0"), (-33, "d0df"), (-129, "d1ff7f"),
        (1.5, "cb3ff8000000000000"),
        ("a" * 32, "d920" + "61" * 32), (b"ab", "c4026162"), ([1] * 16, "dc0010" + "01" * 16), ({"a": 1}, "81a16101"),
    ],
)  # fmt: skip
def test_the_bytes_are_those_of_the_specification(value, written):
    assert pack(value).hex() == written


@given(st.binary(max_size=60))
def test_other_bytes_are_a_value_or_a_value_error(data):
    with contextlib.suppress(ValueError):
        unpack(data)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x92\x01", b"\x01\x01", b"\x91" * 100 + b"\x01", b"\xdd\xff\xff\xff\xff"]
)
def test_damaged_bytes_are_named(data):
    with pytest.raises(ValueError, match=r"too early|not read here|too many|too deeply"):
        unpack(data)


def test_what_has_no_form_is_refused():
    with pytest.raises(TypeError, match="no form for set"):
        pack(set())
    with pytest.raises(ValueError, match="more than 64 bits"):
        pack(2**64)
