"""vLLM's LoRARequest."""

import asyncio

import pytest

import labkit as lk
from labkit.llm import EngineArgs, LLMEngine
from tests.adapters import save

GREEDY = lk.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from labkit.models import hf

    root = tmp_path_factory.mktemp("adapters")
    model = hf.AutoModelForCausalLM.from_pretrained(lk.assets.path("tiny"))
    for seed in (0, 1):
        save(model, root / str(seed), rank=4, seed=seed, kinds=("q_proj", "down_proj"), size=3.0)
    return root


@pytest.fixture(scope="module")
def llm(folder):
    with lk.LLM(num_blocks=256, max_num_seqs=8, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        yield llm


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def test_one_request_for_all_prompts_or_one_for_each(llm, folder):
    zero, one = (lk.LoRARequest(f"a{i}", i + 1, str(folder / str(i))) for i in (0, 1))
    prompts = ["import os", "def f("]
    base, both = texts(llm.generate(prompts, GREEDY)), texts(llm.generate(prompts, GREEDY, lora_request=zero))
    assert base != both
    mixed = texts(llm.generate(prompts, GREEDY, lora_request=[None, zero]))
    assert mixed == [base[0], both[1]]
    assert texts(llm.generate(prompts, GREEDY, lora_request=one)) not in (base, both)
    assert [info.name for info in llm.engine.adapters.list()] == ["a0", "a1"]
    chat = llm.chat([{"role": "user", "content": "hi"}], GREEDY, lora_request=zero)
    assert texts(chat) != texts(llm.chat([{"role": "user", "content": "hi"}], GREEDY))
    beams = llm.beam_search(["import os"], lk.BeamSearchParams(beam_width=2, max_tokens=3), lora_request=zero)
    assert len(beams[0].sequences) == 2


def test_a_request_that_names_no_adapter_fails_alone(llm, folder):
    path = str(folder / "0")
    for given, message in (
        (lk.LoRARequest("other", 3), "no lora_path"),
        (lk.LoRARequest("other", 3, "/nowhere"), "other"),
        (["sql"], "must be a LoRARequest"),
        ("sql", "give one, or as many as prompts"),
        ([lk.LoRARequest("a0", 1, path)] * 3, "1 prompts and 3 lora_request"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate(["a"], GREEDY, lora_request=given)
    llm.generate(["a"], GREEDY, lora_request=lk.LoRARequest("a0", 1, path))
    with pytest.raises(ValueError, match="load_inplace"):
        llm.generate(["a"], GREEDY, lora_request=lk.LoRARequest("a0", 1, str(folder / "1")))
    before = texts(llm.generate(["a"], GREEDY, lora_request=lk.LoRARequest("a0", 1)))
    llm.generate(["a"], GREEDY, lora_request=lk.LoRARequest("a0", 1, str(folder / "1"), load_inplace=True))
    assert texts(llm.generate(["a"], GREEDY, lora_request=lk.LoRARequest("a0", 1))) != before
    with pytest.raises(ValueError, match="lora_int_id"):
        lk.LoRARequest("x", 0)


def test_step_by_step_and_asynchronous_engines_take_it_too(llm, folder):
    request = lk.LoRARequest("s", 1, str(folder / "0"))
    expected = texts(llm.generate(["import os"], GREEDY, lora_request=request))
    engine = LLMEngine(llm.engine)
    engine.add_request("0", "import os", GREEDY, lora_request=request)
    outputs = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert texts(outputs) == expected

    async def main():
        served = lk.AsyncLLMEngine(llm.engine)
        async for output in served.generate("import os", GREEDY, "async", lora_request=request):
            last = output
        return texts([last])

    assert asyncio.run(main()) == expected


def test_arguments_are_vllms(folder):
    path = str(folder / "0")
    args = EngineArgs(enable_lora=True, max_loras=1, max_lora_rank=4, lora_modules={"sql": path}, num_blocks=64)
    engine = LLMEngine.from_engine_args(args).engine
    assert engine.adapters["sql"].rank == 4 and engine.adapters.slots.num_slots == 1
    assert engine.close().ok
    with lk.LLM(num_blocks=64) as plain, pytest.raises(ValueError, match="enable_lora=True"):
        plain.generate("a", GREEDY, lora_request=lk.LoRARequest("x", 1, path))
    with pytest.raises(ValueError, match="without enable_lora"):
        lk.LLM(lora_modules=["sql=x"])
