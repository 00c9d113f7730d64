"""The figures of a layer and their pictures."""

import pytest
import torch

import labkit as lk
from labkit.loading.awq import AWQ
from labkit.loading.bitsandbytes import BitsAndBytes
from labkit.loading.dense import DenseLinear
from labkit.loading.fp8 import FP8
from tests.loading.packers import bitsandbytes4, fp8, int8, quantize_model
from tests.loading.quantizers import awq
from tests.loading.test_experts import METHODS
from tests.loading.test_quantized import layer_of
from tests.models.configs import config, reference_model


def test_the_error_of_a_layer_is_that_of_each_output_and_input():
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    tensors, stands_for = awq(weight, group=32)
    error = layer_of(AWQ(False, 32), tensors, 64, 96).error(weight)
    gap = stands_for - weight
    assert error.relative == pytest.approx(float(gap.norm() / weight.norm()), rel=1e-5)
    torch.testing.assert_close(error.by_output, gap.norm(dim=1) / weight.norm(dim=1))
    torch.testing.assert_close(error.by_input, gap.norm(dim=0) / weight.norm(dim=0))
    assert error.largest == pytest.approx(float(gap.abs().max()), rel=1e-5)
    assert error.decibels == pytest.approx(-20 * float((gap.norm() / weight.norm()).log10()), rel=1e-4)
    assert f"WeightError({error.relative:.3%} of the weight, " in repr(error)
    assert f"worst output {int(error.by_output.argmax())}: " in repr(error)


def test_no_error_is_no_error():
    weight = torch.randn(5, 7)
    weight[2] = 0
    error = DenseLinear(weight).error(weight)
    assert error.relative == 0 and error.decibels == float("inf") and not error.by_output.any()
    with pytest.raises(ValueError, match=r"the layer's weight is \(5, 7\) \[out, in\], the one given \(7, 5\)"):
        DenseLinear(weight).error(weight.T)
    assert "<svg" in error._repr_html_()


def test_outliers_are_found():
    weight = torch.randn(40, 64) * 0.1
    weight[7, 11] = 6.0
    stats = layer_of(BitsAndBytes(), bitsandbytes4(weight)[0], 40, 64).stats()
    assert stats.outputs[0].index == 7 and stats.inputs[0].index == 11 and stats.outputs[0].largest == 6.0
    assert stats.outputs[0].times > 20 and stats.num_zero_scales == 0
    low, high, counts = stats.scales
    assert sum(counts) == 40 and high == 6.0 and low < 0.5


@pytest.mark.parametrize("kind", ["awq", "fp8", "nf4"])
def test_a_quantized_layer_shows_what_it_is_made_of(kind):
    weight = torch.randn(64, 96)
    format, tensors = {
        "awq": (AWQ(False, 32), awq(weight, group=32)[0]),
        "nf4": (BitsAndBytes(), bitsandbytes4(weight)[0]),
        "fp8": (FP8(False, (16, 16)), fp8(weight)[0]),
    }[kind]
    layer = layer_of(format, tensors, 64, 96)
    html = layer._repr_html_()
    known = {"awq": "4 bits in groups of 32, zero points", "nf4": "NF4 in groups of 64",
             "fp8": "float8_e4m3fn, a scale for 16 x 16"}  # fmt: skip
    for text in (known[kind], "bits a weight", "scales (logarithmic axis)", "Outputs with the largest weights", "<svg"):
        assert text in html
    assert ("meant to be quantized by group" in html) == (kind == "fp8")
    assert "one" in html  # its name
    shown = layer.error(weight)._repr_html_()
    for text in ("64 outputs by relative error", "96 inputs by relative error", "dB", "one"):
        assert text in shown


def test_a_layer_of_a_checkpoint_in_a_cell(tmp_path):
    theirs = reference_model(config("llama"))
    quantize_model(tmp_path, theirs, int8, METHODS["compressed-tensors int8"][0])
    name = "model.layers.1.mlp.up_proj"
    layer = lk.load_linear(tmp_path, name)
    assert name in layer._repr_html_() and "meant to be quantized by token" in layer._repr_html_()
    error = layer.error(theirs.model.layers[1].mlp.up_proj.weight)
    assert error.relative < 1e-6 and error.name == name


def test_names_in_a_picture_are_escaped():
    weight = torch.randn(8, 64)
    layer = layer_of(BitsAndBytes(), bitsandbytes4(weight)[0], 8, 64)
    layer.name = "<script>"
    assert "<script>" not in layer._repr_html_() and "<script>" not in layer.error(weight)._repr_html_()
