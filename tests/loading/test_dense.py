"""Whatever a machine multiplies with, the layer is the same."""

import pytest
import torch
import torch.nn.functional as F

from labkit.loading import dense, gated


class Norm:
    eps = 1e-5
    bias = None
    weight = torch.linspace(0.5, 1.5, 48).bfloat16()

    def __call__(self, x):
        return F.rms_norm(x.float(), (48,), self.weight.float(), self.eps).to(x.dtype)


KINDS = {"as it is": dense.DenseLinear, "reordered": dense.ReorderedLinear, "invariant": dense.InvariantLinear,
         "tiles": dense.TiledLinear}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 5, 600])
@pytest.mark.parametrize("kind", KINDS)
def test_norm_product_bias_and_residual(kind, rows):
    if kind == "reordered" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN multiplies no bfloat16 on this processor")
    torch.manual_seed(0)
    x, residual = torch.randn(rows, 48).bfloat16(), torch.randn(rows, 80).bfloat16()
    weight, bias = torch.randn(80, 48).bfloat16() / 7, torch.randn(80).bfloat16()
    layer = KINDS[kind](weight.clone(), bias)
    assert layer.shape == (48, 80) and repr(layer).endswith("(48 -> 80, bias)")
    expected = Norm()(x).float() @ weight.float().T + bias.float() + residual.float()
    torch.testing.assert_close(layer(x, Norm(), residual).float(), expected, rtol=2e-2, atol=6e-2)
    plain = layer(x, dtype=torch.float32)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, x.float() @ weight.float().T + bias.float(), rtol=2e-2, atol=6e-2)


def test_the_layer_is_chosen_by_what_there_is(monkeypatch):
    weight = torch.randn(32, 32)
    assert type(dense.linear(weight)) is dense.DenseLinear
    monkeypatch.setattr(dense, "_is_packed", lambda dtype: True)
    assert type(dense.linear(weight.bfloat16())) is dense.TiledLinear
    assert type(dense.linear(weight.bfloat16(), deterministic=True)) is dense.TiledLinear
    monkeypatch.setattr(dense, "_is_packed", lambda dtype: False)
    reorders = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert type(dense.linear(weight.bfloat16())) is (dense.ReorderedLinear if reorders else dense.DenseLinear)
    assert type(dense.linear(weight.bfloat16(), deterministic=True)) is dense.InvariantLinear


def test_a_gated_mlp_is_one_call_where_its_layers_are_tiles():
    up, down = dense.TiledLinear(torch.randn(64, 48).bfloat16()), dense.TiledLinear(torch.randn(48, 32).bfloat16())
    assert gated.gated_mlp(up, down, "silu") is not None
    assert gated.gated_mlp(up, down, "relu") is None
    assert gated.gated_mlp(dense.DenseLinear(torch.randn(64, 48)), down, "silu") is None
    odd = dense.TiledLinear(torch.randn(48, 24).bfloat16())
    assert gated.gated_mlp(dense.TiledLinear(torch.randn(48, 48).bfloat16()), odd, "silu") is None
