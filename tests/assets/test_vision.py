"""The embedded vision-language model: small, in ordinary files, right about held-out drawings, made by a script."""

import base64
import io
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch

pytest.importorskip("PIL")

import labkit as lk
from labkit.assets import drawings, path, train_vision, vision_batches, vision_files


@pytest.fixture(scope="module")
def parts():
    return vision_files.load(path("tiny-vision"))


def test_the_files_are_ordinary_and_small(parts):
    model, _, tokenizer = parts
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert sum(file.stat().st_size for file in path("tiny-vision").iterdir()) < 10e6
    assert len(tokenizer) == model.config.text_config.vocab_size
    assert tokenizer.convert_ids_to_tokens(model.config.image_token_id) == "<image>"
    assert model.generation_config.eos_token_id == [0, tokenizer.convert_tokens_to_ids("<|end|>")]


def test_transformers_processor_reads_them(parts):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(path("tiny-vision"))
    image = drawings.drawing(1).image
    content = [{"type": "text", "text": "Is it?"}, {"type": "image", "image": image}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<|user|><image>Is it?<|end|><|assistant|>"
    inputs = processor(images=[image], text=text, return_tensors="pt")
    assert (inputs["input_ids"] == parts[0].config.image_token_id).sum() == vision_files.PATCHES
    assert inputs["pixel_values"].shape == (1, 3, vision_files.SIDE, vision_files.SIDE)


def test_training_sees_what_the_processor_makes(parts):
    for seed in range(4):
        image = drawings.drawing(seed).image
        theirs = parts[1]([image], return_tensors="np")["pixel_values"][0]
        assert (theirs == vision_files.pixels_of(image)).all()


@pytest.fixture(scope="module")
def asked():
    """(image, question, answer) of drawings that neither training nor the card has used."""
    made = [drawings.drawing(1000 + seed, kind) for seed in range(12) for kind in drawings.KINDS]
    return [(one.image, question, answer) for one in made for _, question, answer in one.questions[:4]]


@pytest.fixture(scope="module")
def said(asked):
    prompts = [
        {"prompt": f"<|user|><image>{question}<|end|><|assistant|>", "multi_modal_data": {"image": image}}
        for image, question, _ in asked
    ]
    with lk.Engine("tiny-vision", dtype="float32", num_blocks=512) as eng:
        return [handle.text for handle in eng.generate(prompts, lk.SamplingParams(temperature=0, max_tokens=8))]


def card() -> dict[str, float]:
    """Share of right answers by kind of picture, and of all, as the card says."""
    text = path("tiny-vision").joinpath("README.md").read_text()
    rows = re.findall(r"\| \*{0,2}([a-z]+)\*{0,2} \| \d+ \| ([\d.]+)% \|", text)
    return {name: float(value) / 100 for name, value in rows}


def test_held_out_questions_are_answered_as_often_as_the_card_says(asked, said):
    right = np.mean([answer == one for (_, _, answer), one in zip(asked, said, strict=True)])
    assert set(card()) == {"all", *drawings.KINDS} and len(asked) > 180
    assert right > 0.95 and abs(right - card()["all"]) < 0.03


def test_the_answers_depend_on_the_picture(asked, said):
    """The commonest answer to each topic, which needs no picture, is right less often."""
    topics = [topic for seed in range(12) for kind in drawings.KINDS
              for topic, _, _ in drawings.drawing(1000 + seed, kind).questions[:4]]  # fmt: skip
    known: dict[str, Counter] = {}
    for topic, (_, _, answer) in zip(topics, asked, strict=True):
        known.setdefault(topic, Counter())[answer] += 1
    blind = sum(counts.most_common(1)[0][1] for counts in known.values())
    assert sum(answer == one for (_, _, answer), one in zip(asked, said, strict=True)) > blind


def test_the_engine_says_what_transformers_says(parts, asked, said):
    assert vision_files.answers(*parts, [(image, question) for image, question, _ in asked[:48]]) == said[:48]


def test_the_server_says_what_the_engine_says(asked, said):
    def ask(image, question):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}]
        found = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)
        return found.choices[0].message.content

    with lk.Engine("tiny-vision", dtype="float32", num_blocks=512) as eng, lk.serve(eng) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda one: ask(*one[:2]), asked[:64])) == said[:64]


def test_the_script_runs_and_writes_all_files(tmp_path):
    train_vision.main(["--quick", "--out", str(tmp_path)])
    made, shipped = tmp_path / "tiny-vision", path("tiny-vision")
    assert {file.name for file in made.iterdir()} == {file.name for file in shipped.iterdir()}
    assert (made / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
    loss = [value for _, value in json.loads((made / "training.json").read_text())["loss"]]
    assert loss[-1] < loss[0]


def test_training_that_was_interrupted_ends_the_same(tmp_path):
    tokenizer = lk.Tokenizer.load(path("tiny-vision")).backend

    def trained(steps, keep):
        learner, history = train_vision.train(tokenizer, 2, steps, keep, lambda model: None, 4, every=0)
        return learner.model.state_dict(), history

    whole, losses = trained(4, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_batches.Maker, "batch", until(2, vision_batches.Maker.batch))
        with pytest.raises(KeyboardInterrupt):
            trained(4, tmp_path / "state")
    again, resumed = trained(4, tmp_path / "state")
    assert resumed == losses
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def until(stop, batch):
    def interrupted(self, step, *rest):
        if step == stop:
            raise KeyboardInterrupt
        return batch(self, step, *rest)

    return interrupted


def test_a_batch_lets_each_question_see_only_its_picture():
    """The loss of several questions in one row is the loss of each asked alone."""
    torch.manual_seed(0)
    tokenizer = lk.Tokenizer.load(path("tiny-vision")).backend
    learner = train_vision.Learner(tokenizer).eval()
    batch = vision_batches.Maker(tokenizer).batch(3, 2, 3, drawings.TRIAL)
    before = torch.tensor([vision_files.USER, *[vision_files.IMAGE] * vision_files.PATCHES])
    losses = []
    with torch.no_grad():
        for i, n in np.ndindex(2, 3):
            mine = batch.segment[i] == n + 1
            ids = torch.cat((before, batch.tokens[i][mine]))[None]
            logits = learner.model(input_ids=ids, pixel_values=batch.pixels[i : i + 1]).logits[0, len(before) :]
            losses.append(torch.nn.functional.cross_entropy(logits, batch.wanted[i][mine], reduction="none"))
        together = learner(batch)[0].item()
    alone = torch.cat(losses)
    assert together == pytest.approx(alone[alone > 0].mean().item(), rel=1e-5)


def test_the_first_token_of_an_answer_is_wanted_from_the_last_thing_named_on():
    tokenizer = lk.Tokenizer.load(path("tiny-vision")).backend
    pairs = [("place", "Where do you see the red circle?", "top left"), ("tallest", "Which bar is tallest?", "blue")]
    tokens, _, _, wanted, early, place = vision_batches.Maker(tokenizer).row(pairs, apart=True)
    shown = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
    said = {n: [word for word, answer in zip(shown, early, strict=True) if answer == first]
            for n, first in enumerate([tokenizer.encode(answer).ids[0] for _, _, answer in pairs])}  # fmt: skip
    assert said == {0: [" circle", "?", "<|end|>"], 1: ["?", "<|end|>"]}
    assert not any(a >= 0 and b >= 0 for a, b in zip(early, wanted, strict=True)) and sum(n == 0 for n in place) == 3


def test_a_head_begins_by_looking_at_what_is_like_the_token_itself():
    torch.manual_seed(1)
    attention = train_vision.make_model().model.language_model.layers[0].self_attn
    train_vision.look_for_likeness(attention)
    tokens = torch.nn.functional.rms_norm(torch.randn(60, 128), (128,))
    tokens[40] = tokens[10]
    keys, queries = attention.k_proj(tokens)[:, :32], attention.q_proj(tokens)[:, :32]
    assert queries[40].dot(keys[10]) > 1.5 * (keys[:10] @ queries[40]).max()
