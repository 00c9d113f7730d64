"""Shards of linear layers: together they are the whole layer, and each rank reads no more than its own."""

import pytest
import torch
from safetensors.torch import save_file

from labkit.loading.checkpoint import Checkpoint, Dummy
from labkit.loading.dense import Dense
from labkit.loading.format import Shard, Units
from labkit.loading.weights import Weights
from labkit.models import load_model
from labkit.models.decoder import Decoder
from labkit.models.experts import Experts
from labkit.models.layer import Attention
from labkit.models.mlp import MLP
from labkit.models.ops import Ops
from labkit.models.shape import Shape
from tests.models.configs import config, reference_model

CPU = torch.device("cpu")


class Tensors:
    """A checkpoint in memory that notes which part of each tensor was read."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.reads: dict[str, int] = {}

    def read(self, name, dtype, device, part=()):
        found = self.tensors[name][part]
        self.reads[name] = self.reads.get(name, 0) + found.numel()
        return found.to(device=device, dtype=dtype or found.dtype)


def shards(source, ranks: int) -> list[Weights]:
    return [Weights(source, torch.float32, CPU, Dense(), Shard(rank, ranks)) for rank in range(ranks)]


def stored(**shapes) -> Tensors:
    torch.manual_seed(0)
    return Tensors({name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()})


def tensors_of(options) -> dict[str, torch.Tensor]:
    return reference_model(options).state_dict()


HEADS, KEYS, HIDDEN = Units(12, 2), Units(3, 4, shared=True), Units(10)


@pytest.mark.parametrize("ranks", [1, 3, 6])
@pytest.mark.parametrize("fused", [False, True])
def test_columns_side_by_side_are_the_whole_layer(ranks, fused):
    source = stored(q__weight=(24, 10), k__weight=(12, 10), v__weight=(12, 10), q__bias=(24,), k__bias=(12,),
                    v__bias=(12,), qkv__weight=(48, 10), qkv__bias=(48,))  # fmt: skip
    parts = (HEADS, KEYS, KEYS)
    outputs = {"qkv": parts} if fused else {name: (units,) for name, units in zip("qkv", parts, strict=True)}
    x = torch.randn(7, 10)
    whole = Weights(source, torch.float32, CPU, Dense()).linear(outputs, HIDDEN, "column")(x)
    cut = []  # by rank: its queries, keys and values
    for weights in shards(source, ranks):
        sizes = [weights.shard.size("it", units) for units in parts]
        cut.append(weights.linear(outputs, HIDDEN, "column")(x).split(sizes, -1))
    copies = max(1, ranks // KEYS.count)  # of each key head
    q, k, v = ([each[i] for each in cut] for i in range(3))
    torch.testing.assert_close(torch.cat([*q, *k[::copies], *v[::copies]], -1), whole)
    assert all(torch.equal(k[i], k[i - i % copies]) for i in range(ranks))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_add_up_and_the_bias_is_added_once(ranks):
    source = stored(o__weight=(10, 24), o__bias=(10,))
    whole = Weights(source, torch.float32, CPU, Dense()).linear({"o": (HIDDEN,)}, HEADS, "row")
    source.reads.clear()
    x = torch.randn(5, 24)
    layers = [part.linear({"o": (HIDDEN,)}, HEADS, "row") for part in shards(source, ranks)]
    torch.testing.assert_close(
        sum(layer(part) for layer, part in zip(layers, x.chunk(ranks, -1), strict=True)), whole(x)
    )
    assert [layer.bias is not None for layer in layers] == [True] + [False] * (ranks - 1)
    assert source.reads == {"o.weight": 240, "o.bias": 10}  # each element by one rank


def test_a_rank_that_adds_no_bias_still_knows_the_tensor():
    weights = shards(stored(o__weight=(10, 24), o__bias=(10,)), 2)[1]
    weights.linear({"o": (HIDDEN,)}, HEADS, "row")
    assert weights.taken == {"o.weight", "o.bias"}


def test_a_bias_of_one_part_only_is_that_part_s():
    source = stored(q__weight=(24, 10), k__weight=(12, 10), k__bias=(12,))
    layer = Weights(source, torch.float32, CPU, Dense()).linear({"q": (HEADS,), "k": (KEYS,)}, HIDDEN, "column")
    assert torch.equal(layer.bias, torch.cat((torch.zeros(24), source.tensors["k.bias"])))


def test_a_layer_that_is_not_split_is_whole_on_every_rank():
    source = stored(gate__weight=(5, 10))
    assert {part.linear({"gate": (Units(5),)}, HIDDEN).shape for part in shards(source, 3)} == {(10, 5)}


@pytest.mark.parametrize(
    ("units", "ranks", "message"),
    [
        (
            Units(6, 4),
            4,
            "'q' cannot be split among 4 ranks: it has 6 units of 4; numbers of ranks that fit: 1, 2, 3, 6",
        ),
        (Units(10), 4, "'q' cannot be split among 4 ranks: it has 10 elements; numbers of ranks that fit: 1, 2, 5"),
        (Units(2, 8, shared=True), 3, "it has 2 units of 8; numbers of ranks that fit: 1, 2, 4"),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_can(units, ranks, message):
    with pytest.raises(ValueError) as error:
        Shard(0, ranks).part("q", units)
    assert message in str(error.value)


def test_a_shard_is_one_of_its_ranks():
    with pytest.raises(ValueError, match="rank"):
        Shard(2, 2)
    with pytest.raises(ValueError, match="ranks"):
        Shard(0, 0)


def test_the_stored_shape_must_be_the_configs():
    with pytest.raises(ValueError, match=r"tensor 'o.weight' has shape \(10, 24\), the config makes it \(9, 24\)"):
        Weights(stored(o__weight=(10, 24)), torch.float32, CPU, Dense()).linear({"o": (Units(9),)}, HEADS, "row")
    with pytest.raises(ValueError, match=r"lacks tensor 'p.weight'"):
        Weights(stored(o__weight=(10, 24)), torch.float32, CPU, Dense()).linear({"p": (HIDDEN,)}, HEADS)


def test_sources_read_a_part(tmp_path):
    tensor = torch.arange(60.0).reshape(6, 10)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for part in (
        (),
        (slice(2, 4),),
        (slice(None), slice(5, 10)),
        (slice(0, 3), slice(1, 2)),
        (slice(0, 6), slice(0, 10)),
    ):
        assert torch.equal(checkpoint.read("a", torch.float32, CPU, part), tensor[part])
    dummy = Dummy(config("llama"))
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = dummy.read(name, torch.float32, CPU)
    assert torch.equal(dummy.read(name, torch.float32, CPU, (slice(8, 16), slice(0, 4))), whole[8:16, :4])


@pytest.mark.parametrize(
    ("kind", "ranks"), [("llama", 3), ("phi3", 3), ("starcoder2", 3), ("mixtral", 3), ("qwen2_moe", 4)]
)
def test_a_models_mlp_is_the_sum_over_its_ranks(kind, ranks):
    """One rank's output is a summand: what a sum over ranks needs is there for gated, plain and mixed layers alike."""
    options = config(kind)
    if kind == "qwen2_moe":
        options.moe_intermediate_size, options.shared_expert_intermediate_size = 40, 56
    source = Tensors(tensors_of(options))
    shape, ops = Shape.of(options), Ops(CPU, torch.float32)
    index = 1
    name, kind_of = f"model.layers.{index}.mlp", MLP
    if f"{name}.gate.weight" in source.shapes:
        kind_of = Experts
    elif f"model.layers.{index}.block_sparse_moe.gate.weight" in source.shapes:
        name, kind_of = f"model.layers.{index}.block_sparse_moe", Experts
    whole = kind_of(Weights(source, torch.float32, CPU, Dense()), name, shape, ops)
    x = torch.randn(9, shape.hidden_size)
    with torch.inference_mode():
        expected = whole(x)
        source.reads.clear()
        parts = [kind_of(weights, name, shape, ops) for weights in shards(source, ranks)]
        torch.testing.assert_close(sum(part(x) for part in parts), expected, rtol=1e-4, atol=1e-5)
    split = {name: n for name, n in source.reads.items() if not name.endswith(("gate.weight", "bias"))}
    assert split and all(n == source.tensors[name].numel() for name, n in split.items())


def test_a_heads_attention_is_one_ranks():
    options = config("llama")  # 6 heads, 2 key heads
    weights = shards(Tensors(tensors_of(options)), 6)[5]
    attention = Attention(weights, "model.layers.0.self_attn", 0, Shape.of(options), 0, None, Ops(CPU, torch.float32))
    size = Shape.of(options).head_size
    assert attention.sizes == [size, size, size] and attention.qkv.shape == (48, 3 * size)
    assert attention.out.shape == (size, 48)


def test_parameters_are_counted_once(tmp_path):
    for kind in ("llama", "qwen2"):  # with a head of its own, and tied
        model = reference_model(config(kind))
        model.save_pretrained(tmp_path / kind)
        ours = load_model(str(tmp_path / kind), dtype="float32")
        assert isinstance(ours, Decoder)
        assert f"{model.num_parameters() / 1e6:.1f}M" in repr(ours)
