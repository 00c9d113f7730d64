"""Beam search finds what transformers' does, shares blocks, and names bad input."""

import pytest
import torch

import labkit as lk
from labkit.models import load_model
from tests.models.configs import config, reference_model
from tests.runner.test_torch import engine


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    theirs = reference_model(config("qwen3"))
    folder = tmp_path_factory.mktemp("qwen3")
    theirs.save_pretrained(folder)
    return load_model(folder, dtype="float32"), theirs


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_best_beam_is_that_of_transformers(pair, width):
    ours, theirs = pair
    prompts = [[3, 1, 4, 1, 5], list(range(20))]
    found = lk.beam_search(engine(ours, size=4), prompts, lk.BeamSearchParams(width, 8, length_penalty=0.0))
    for prompt, beams in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            best = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=width, do_sample=False,
                eos_token_id=None, pad_token_id=2, length_penalty=0.0,
            )  # fmt: skip
        assert list(beams[0].token_ids) == best[0, len(prompt) :].tolist()
        assert len({beam.token_ids for beam in beams}) == width
        scores = [beam.logprob for beam in beams]
        assert scores == sorted(scores, reverse=True)


def test_ended_hypotheses_compete_with_the_others(pair):
    ours, _ = pair
    eng = engine(ours)
    free = lk.beam_search(eng, [[1, 2, 3]], lk.BeamSearchParams(4, 6))[0]
    ends = lk.TorchRunner(ours, eos_token_ids=[free[0].token_ids[2]])
    eng = lk.Engine(scheduler=lk.Scheduler(lk.BlockManager(200, 16)), runner=ends)
    found = lk.beam_search(eng, [[1, 2, 3]], lk.BeamSearchParams(4, 6, length_penalty=0.0))[0]
    stopped = [beam for beam in found if beam.finish_reason == "stop"]
    assert stopped and all(beam.token_ids[-1] == free[0].token_ids[2] for beam in stopped)


@pytest.mark.parametrize(("width", "message"), [(0, "at least 1"), (100, "at most 64")])
def test_widths_are_bounded(width, message):
    with pytest.raises(ValueError, match=message):
        lk.BeamSearchParams(beam_width=width)


def test_samples_and_beams_of_a_long_prompt_share_its_blocks(pair):
    """The promise of paged attention: at least half of what separate tables would hold."""
    ours, _ = pair
    prompt = [i % 90 for i in range(160)]
    eng = engine(ours, size=16)
    eng.submit(prompt, lk.SamplingParams(n=8, max_tokens=32, temperature=1.0, ignore_eos=True))
    saved = []
    while eng.step():
        stats = eng.blocks.stats()
        if stats.num_tables == 8:
            saved.append(stats.saved_by_sharing)
    assert min(saved) >= 0.5, f"{min(saved):.0%} saved"
    beams = engine(ours, size=16)
    saved = []
    beams.listen(lambda outputs: saved.append(1.0))
    lk.beam_search(beams, [prompt], lk.BeamSearchParams(8, 20))
    assert beams.blocks.stats().hit_rate >= 0.5


def test_prompts_are_a_list_and_may_be_text():
    eng = lk.Engine(num_blocks=128)
    params = lk.BeamSearchParams(beam_width=2, max_tokens=3)
    ids = eng.tokenizer.encode("import ")
    text, same = lk.beam_search(eng, ["import ", list(ids)], params)
    assert [beam.token_ids for beam in text] == [beam.token_ids for beam in same] and text[0].text
    for wrong in ("import ", [1, 2, 3], {"prompt": "x"}):
        with pytest.raises(TypeError, match="prompts is a list of prompts: write"):
            lk.beam_search(eng, wrong, params)
    eng.close()


def test_the_best_beams_of_a_form_are_those_that_scoring_all_its_texts_finds():
    """One by one, in every way to cut them into tokens."""
    texts = {a + rest for a in "ab" for rest in [*"bcd", *(b + c for b in "bcd" for c in "bcd")]} | {"xyz"}
    with lk.Engine(num_blocks=256, dtype="float32") as eng:
        prompt, tokenizer = eng.tokenizer.encode("def f("), eng.tokenizer
        words = {
            i: text for i in range(6, eng.runner.vocab_size) if set(text := tokenizer.decode([i])) <= set("abcdxyz")
        }

        def cuts(text):
            if not text:
                return [[]]
            heads = [(i, text[len(word) :]) for i, word in words.items() if word and text.startswith(word)]
            return [[i, *rest] for i, left in heads for rest in cuts(left)]

        answers = [(*cut, end) for text in texts for cut in cuts(text) for end in eng.runner.eos_token_ids]
        asked = lk.SamplingParams(max_tokens=1, prompt_logprobs=0)
        scored = eng.generate([[*prompt, *answer] for answer in answers], asked)
        expected = {
            answer: sum(found.prompt_logprobs[len(prompt) + i].logprob for i in range(len(answer)))
            for answer, found in zip(answers, scored, strict=True)
        }
        best = sorted(expected, key=lambda answer: -expected[answer])
        for width in (32, 1):
            params = lk.BeamSearchParams(
                width, 5, length_penalty=0.0, structured_outputs={"regex": "(a|b)[b-d]{1,2}|xyz"}
            )
            beams, again = lk.beam_search(eng, [prompt, "def f("], params)
            assert beams == again and len(beams) == width and "mask" not in repr(beams)
            if width > 1:
                assert [beam.token_ids for beam in beams] == best[:width]
            for beam in beams:
                assert beam.finish_reason == "stop" and beam.text in texts
                assert beam.logprob == pytest.approx(expected[beam.token_ids], abs=1e-3)


def test_a_form_in_beam_search_is_checked_like_any():
    for wrong, message in (({"regex": 3}, "cannot be 3"), ({"regex": "a", "json": {}}, "names one form")):
        with pytest.raises(ValueError, match=message):
            lk.BeamSearchParams(structured_outputs=wrong)
    with pytest.raises(ValueError, match="cannot be combined with ignore_eos"):
        lk.BeamSearchParams(structured_outputs={"regex": "a"}, ignore_eos=True)
