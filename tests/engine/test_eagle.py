"""EAGLE heads with random weights: their guesses are those of the published layouts, and the text is that of plain
decoding."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import labkit as lk
from labkit.models.eagle import load_head

SHAPE = {
    "hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip
PROMPTS = ["def read_lines(path):\n    with open(path) as f:\n", "for i in range(3):\n    x = i\nfor i in range(3):\n"]


def write_head(folder, layout, known=4096, seed=0, without=(), **fields):
    """A checkpoint of a head with random weights, as those who train heads publish it."""
    folder.mkdir()
    config = SHAPE | {
        "architectures": ["LlamaForCausalLM" if layout == "eagle" else "LlamaForCausalLMEagle3"],
        "model_type": "llama", "num_hidden_layers": 1, "vocab_size": 4096, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "dtype": "float32", "attention_bias": False, "mlp_bias": False, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **({"draft_vocab_size": known} if layout == "eagle3" else {}), **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    made = torch.Generator().manual_seed(seed)
    size, inner, heads, kv, head = SHAPE.values()

    def random(*shape):
        return torch.randn(*shape, generator=made) * 0.08

    def ones():
        return 1 + random(size)

    name, into = ("layers.0", size) if layout == "eagle" else ("midlayer", 2 * size)
    tensors = {
        "fc.weight": random(size, (2 if layout == "eagle" else 3) * size),
        f"{name}.self_attn.q_proj.weight": random(heads * head, into),
        f"{name}.self_attn.k_proj.weight": random(kv * head, into),
        f"{name}.self_attn.v_proj.weight": random(kv * head, into),
        f"{name}.self_attn.o_proj.weight": random(size, heads * head),
        f"{name}.mlp.gate_proj.weight": random(inner, size), f"{name}.mlp.up_proj.weight": random(inner, size),
        f"{name}.mlp.down_proj.weight": random(size, inner), f"{name}.post_attention_layernorm.weight": ones(),
    }  # fmt: skip
    if layout == "eagle":
        tensors["embed_tokens.weight"] = random(4096, size)
        tensors["fc.bias"] = random(size)
    else:
        tokens = torch.randperm(4096, generator=made)[:known].sort().values
        tensors |= {
            "midlayer.input_layernorm.weight": ones(), "midlayer.hidden_norm.weight": ones(), "norm.weight": ones(),
            "lm_head.weight": random(known, size), "d2t": tokens - torch.arange(known),
            "t2d": torch.zeros(4096, dtype=torch.bool).index_fill(0, tokens, True),
        }  # fmt: skip
    tensors = {key: value for key, value in tensors.items() if key not in without}
    save_file(tensors, folder / "model.safetensors")
    return folder, tensors


# -- the same in plain torch ---------------------------------------------------------------------------------------


def rms(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x):  # [tokens, heads, size]
    at = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    cos, sin = at.cos().repeat(1, 2)[:, None], at.sin().repeat(1, 2)[:, None]
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def attend(x, t, name):
    size, heads, kv = SHAPE["head_dim"], SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    q, k, v = (F.linear(x, t[f"{name}.self_attn.{part}_proj.weight"]).unflatten(-1, (-1, size)) for part in "qkv")
    q, k = rotate(q), rotate(k)
    k, v = (part.repeat_interleave(heads // kv, 1).transpose(0, 1) for part in (k, v))
    seen = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True)
    return F.linear(seen.transpose(0, 1).flatten(1), t[f"{name}.self_attn.o_proj.weight"])


def mlp(x, t, name):
    gate, up, down = (t[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def reference(layout, t, target, ids, states, num=1):
    """Guesses after `ids`, whose `states` (all but the last's) the target gave; the whole sequence each time."""
    ids, found = list(ids), []
    for _ in range(num):
        embedding = t["embed_tokens.weight"] if layout == "eagle" else target.embedding
        token = embedding[torch.tensor(ids[1:])]
        if layout == "eagle":
            x = F.linear(torch.cat((token, states), -1), t["fc.weight"], t["fc.bias"])
            x = x + attend(x, t, "layers.0")
            own = x + mlp(rms(x, t["layers.0.post_attention_layernorm.weight"]), t, "layers.0")
            guess = int(target.logits(own[-1:]).argmax())
        else:
            normed = rms(states, t["midlayer.hidden_norm.weight"])
            both = torch.cat((rms(token, t["midlayer.input_layernorm.weight"]), normed), -1)
            x = states + attend(both, t, "midlayer")
            own = x + mlp(rms(x, t["midlayer.post_attention_layernorm.weight"]), t, "midlayer")
            scores = rms(own[-1], t["norm.weight"]) @ t["lm_head.weight"].T
            guess = int(scores.argmax())
            guess += int(t["d2t"][guess])
        found.append(guess)
        ids.append(guess)
        states = torch.cat((states, own[-1:]))
    return found


def engine(folder=None, layout="eagle", num=3, **options):
    config = folder and {"method": layout, "model": str(folder), "num_speculative_tokens": num, "adaptive": False}
    options = {"num_blocks": 200, "block_size": 4, "dtype": "float32", **options}
    return lk.Engine(speculative_config=config, **options)


class Spy:
    """Notes what a head says first in each step, and makes two of three guesses right, so that some are accepted."""

    def __init__(self, eng, texts):
        self.drafter, self.draw, self.said = eng.runner.drafter, eng.runner.drafter._draw, []
        self.next = {tuple(text[:n]): text[n] for text in texts for n in range(1, len(text))}
        self.drafter._draw = self

    def __call__(self, hidden, rows, known, sample):
        found = self.draw(hidden, rows, known, sample)
        for i, (row, num) in enumerate(zip(rows.tolist(), known.tolist(), strict=True)):
            text = tuple(self.drafter.tokens[row, :num].tolist())
            if text in self.next:
                if self.drafter.sampler.cold[row]:
                    self.said.append((text, int(found[i])))
                if num % 3:
                    found[i] = self.next[text]
        return found


def states_of(layout, t, texts):
    """What the head reads of each text, from runs of the whole text without drafts."""
    layers = [8] if layout == "eagle" else [1, 3, 4]
    eng = engine(prefix_caching=False)
    found = {}
    for text in texts:
        handle = eng.generate(text, lk.SamplingParams(max_tokens=1, temperature=0, capture={"hidden": layers}))
        joined = torch.cat([torch.as_tensor(handle.captured("hidden", layer)) for layer in layers], -1)[: len(text)]
        found[tuple(text)] = joined if layout == "eagle" else F.linear(joined, t["fc.weight"])
    eng.close()
    return found


def share_as_reference(spy, layout, t, target, states):
    """Of what the head said, the share that the reference says, too."""
    right = 0
    assert spy.said
    for text, said in spy.said:
        whole = next(one for one in states if one[: len(text)] == text)
        right += said == reference(layout, t, target, text, states[whole][: len(text) - 1])[0]
    return right / len(spy.said)


def run(eng, num=16):
    cold = lk.SamplingParams(max_tokens=num, temperature=0, ignore_eos=True)
    warm = lk.SamplingParams(max_tokens=num, temperature=0.9, seed=7, n=2, ignore_eos=True)
    asked = [(PROMPTS[0], cold), (PROMPTS[1], warm), (PROMPTS[0] * 2, cold), (PROMPTS[1] * 2 + "x", cold)]
    handles = [eng.submit(prompt, params) for prompt, params in asked]
    for _ in range(3000):
        if eng.step() is None:
            break
        eng.check()
    assert eng.blocks.num_used == 0
    return [member.tokens.tolist()[: member.num_tokens] for handle in handles for member in handle.family]


@pytest.fixture(scope="module")
def plain():
    eng = engine()
    yield run(eng)
    eng.close()


@pytest.mark.parametrize("layout", ["eagle", "eagle3"])
def test_guesses_are_those_of_the_published_layout(tmp_path, layout, plain):
    folder, t = write_head(tmp_path / "head", layout, known=1000)
    eng = engine(folder, layout)
    spied, fill = [], eng.runner.drafter.fill

    def note(plan, tables, sample):
        filled = fill(plan, tables, sample)
        at = int(plan.indptr[0]) + 1
        spied.append(filled.tokens[at : at + int(plan.drafts[0])].tolist())
        return filled

    eng.runner.drafter.fill = note
    text = plain[0]
    num = len(text) - 16
    handle = eng.generate(text[:num], lk.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    assert handle.output_ids == text[num:]
    states = states_of(layout, t, [text])[tuple(text)]
    expected = [reference(layout, t, eng.runner.model, text[:n], states[: n - 1], 3) for n in range(num + 1, num + 4)]
    assert spied[:3] == expected
    assert len(set(map(tuple, expected))) > 1
    eng.close()


@pytest.fixture(scope="module")
def target():
    return lk.load_model(lk.assets.path("tiny"), dtype="float32")


SETTINGS = {
    "roomy": ("eagle3", {}),
    "swapped": ("eagle", {"num_host_blocks": 60, "preemption": "swap", "watermark": 0.0, "num_blocks": 24}),
    "in chunks": ("eagle3", {"preemption": "recompute", "max_num_batched_tokens": 13, "num_blocks": 24}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_text_is_that_of_plain_decoding_and_states_are_kept_in_order(tmp_path, setting, plain):
    """Also after rejections, forks, preemptions and prefix hits. What a head says is the reference's wherever states
    are known: not just after a row was swapped in, and not always behind blocks that another request left."""
    layout, options = SETTINGS[setting]
    folder, t = write_head(tmp_path / "head", layout)
    eng = engine(folder, layout, **options)
    spy = Spy(eng, plain)
    assert run(eng) == plain
    steps = eng.log.events("Step")
    assert 0 < sum(step.accepted_tokens for step in steps) < sum(step.draft_tokens for step in steps)
    if options:
        assert eng.scheduler.num_preempted
    states, model = states_of(layout, t, plain), eng.runner.model
    fresh = share_as_reference(spy, layout, t, model, states)
    assert fresh == 1 if setting != "swapped" else fresh > 0.8
    spy.said.clear()
    assert run(eng) == plain  # prefixes are hit
    again = share_as_reference(spy, layout, t, model, states)
    assert again == 1 if setting == "roomy" else again > 0.7
    eng.close()


def test_many_states_that_nobody_asks_for_are_computed_and_snapshots_hold_them(tmp_path, monkeypatch, plain):
    monkeypatch.setattr("labkit.runner.heads.MOST_AT_ONCE", 8)
    folder, t = write_head(tmp_path / "head", "eagle3")
    eng = engine(folder, "eagle3", max_num_batched_tokens=20)
    spy = Spy(eng, plain)
    prompt = plain[0][:-16]
    handle = eng.submit(prompt, lk.SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
    drafting, eng.scheduler.drafting = eng.scheduler.drafting, None
    for _ in range(9):
        eng.step()
        assert sum(len(states) for _, states in eng.runner.drafter.states.values()) <= 8 + 20
    eng.scheduler.drafting = drafting
    saved = eng.snapshot()
    eng.run()
    first, num = handle.output_ids, eng.scheduler.step
    states = states_of("eagle3", t, plain[:1])
    assert len(spy.said) > 2 and share_as_reference(spy, "eagle3", t, eng.runner.model, states) == 1
    eng.restore(saved)
    spy = Spy(eng, plain)
    eng.run()
    assert (handle.output_ids, eng.scheduler.step) == (first, num) and first == plain[0][-16:]
    assert share_as_reference(spy, "eagle3", t, eng.runner.model, states) == 1
    eng.close()


@pytest.mark.parametrize(
    ("made", "method", "message"),
    [
        ({"layout": "eagle"}, "eagle3", "holds an EAGLE-1 head: use method 'eagle', not 'eagle3'"),
        ({"layout": "eagle3", "without": ["fc.weight"]}, "eagle3", "not an EAGLE head, it lacks tensor 'fc.weight'"),
        ({"layout": "eagle3", "without": ["d2t"], "known": 100}, "eagle3", "has 100 of 4096 tokens, and no d2t"),
        ({"layout": "eagle", "vocab_size": 32000}, "eagle", "another vocabulary: 32000 tokens, .* has 4096"),
        ({"layout": "eagle", "hidden_size": 512}, "eagle", r"for another model: its fc joins 512 inputs to 256"),
        ({"layout": "eagle3", "eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "eagle3", r"0 to 7 .* \(1, 2, 9\)"),
        ({"layout": "eagle3", "without": ["midlayer.post_attention_layernorm.weight"]}, "eagle3", "lacks tensor"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path, target, made, method, message):
    folder, _ = write_head(tmp_path / "head", **made)
    with pytest.raises(ValueError, match=message):
        load_head(folder, target, method)
