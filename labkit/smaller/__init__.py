"""Objects for `SamplingParams(kv=...)`: which keys of a request stay. Each is short, and one of your own looks the
same; the contract is `labkit.core.smaller.SmallerKV`."""

from labkit.smaller.h2o import H2O
from labkit.smaller.pyramid import PyramidKV
from labkit.smaller.rkv import RKV
from labkit.smaller.snapkv import SnapKV
from labkit.smaller.streaming import StreamingLLM

__all__ = ["H2O", "RKV", "PyramidKV", "SnapKV", "StreamingLLM"]
