"""Images in the engine: greedy tokens equal transformers' own, however the work is cut, cached or thrown away."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

import labkit as lk
from labkit.runner.features import Features
from tests.seeing import Theirs, picture, theirs

PARAMS = lk.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
CASES = [
    ("what is in <image>?", [picture(1)]),
    ("a <image> b <image> which?", [picture(2, 90, 20), picture(1)]),
    ("no image here", []),
    ("<image>", [picture(3)]),
    ("what is in <image>?", [picture(4)]),  # of the same size as the first
]


@pytest.fixture(scope="module", params=["llava"])
def their(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    return theirs(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def answers(their: Theirs) -> list[list[int]]:
    found = [their.answer(text, images, 8) for text, images in CASES]
    assert found[0] != found[4], "the model does not look at its image"
    return found


def prompt(text: str, images: list[Any]) -> dict[str, Any]:
    return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}


@contextmanager
def engine(their: Theirs, **options: Any) -> Iterator[lk.Engine]:
    """Without a thread: what is generated together is in the queue before the first step."""
    eng = lk.Engine(their.folder, dtype="float32", **{"num_blocks": 256, "block_size": 4} | options)
    yield eng
    eng.close()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_caching": False},
        {"max_num_batched_tokens": 7, "max_num_seqs": 4},
        {"num_blocks": 13, "max_num_seqs": 4, "max_num_batched_tokens": 24, "watermark": 0.0},
    ],
    ids=["plain", "no cache", "chunks", "preemption"],
)
def test_tokens_are_those_of_transformers(their: Theirs, answers: list[list[int]], options: dict[str, Any]) -> None:
    with engine(their, **options) as eng:
        for _ in range(2):
            handles = eng.generate([prompt(*case) for case in CASES], PARAMS)
            assert [handle.output_ids for handle in handles] == answers
            eng.check()
        for (text, images), handle in zip(CASES, handles, strict=True):
            assert handle.prompt.tolist() == their.inputs(text, images)["input_ids"][0].tolist()
        if "num_blocks" in options:
            assert eng.scheduler.num_preempted, "nothing was preempted"
    assert eng.closed is not None and eng.closed.ok


def test_a_repeated_image_is_neither_encoded_nor_prefilled_again(their: Theirs) -> None:
    with engine(their) as eng:
        first, again = (eng.generate(prompt(*CASES[0]), PARAMS) for _ in range(2))
        other = eng.generate(prompt(*CASES[4]), PARAMS)
        tower, features = eng.runner.model.vision, eng.runner.features
        assert first.num_cached == 0 and again.num_cached >= (first.num_prompt - 1) // 4 * 4
        assert tower.num_forwards == 2 == features.num_encoded  # the second image is of the same size, and another one
        before = eng.images.token_id == first.prompt
        assert other.num_cached <= int(np.argmax(before)), "blocks of one image served another"
        assert eng.images.num_processed == 2
        features.check()


def test_caches_have_the_sizes_that_the_options_say(their: Theirs) -> None:
    options = {"mm_encoder_cache_gb": 2500 / 2**30, "mm_processor_cache_gb": 0, "prefix_caching": False}
    with engine(their, **options) as eng:  # features of an image take 9 x 64 x 4 bytes
        for case in (CASES[0], CASES[0], CASES[4], CASES[0]):
            eng.generate(prompt(*case), PARAMS)
            eng.runner.features.check()
        features = eng.runner.features
        assert (features.num_encoded, features.num_hits, features.encoded_bytes) == (3, 1, 3 * 2304)
        assert (eng.images.num_processed, eng.images.num_found) == (4, 0)
        assert "3 encoded, 1 found" in eng._repr_html_() and "4 processed, 0 found" in eng._repr_html_()
    with engine(their, mm_encoder_cache_gb=0, prefix_caching=False) as eng:
        eng.generate([prompt(*CASES[1])] * 2, PARAMS)
        assert not eng.runner.features.kept
    with pytest.raises(ValueError, match="mm_encoder_cache_gb"):
        lk.Engine(their.folder, mm_encoder_cache_gb=-1)


def test_a_request_shows_its_pictures_also_after_its_end(their: Theirs) -> None:
    with engine(their) as eng:
        handle = eng.generate(prompt(*CASES[1]), PARAMS)
        html = handle._repr_html_()
        assert html.count('<img src="data:image/png;base64,') == 2
        for span in handle.spans:
            assert f"image {span.short}" in html and f"{span.start}\u2013{span.end - 1}" in html
            assert span.num_bytes == 0 and len(eng.images.thumbnail(span.key)) < 20_000
        assert [event.digest for event in eng.log.events("Spanned")] == [span.short for span in handle.spans]


def test_an_engine_refuses_more_processed_images_than_may_wait(their: Theirs) -> None:
    with engine(their, max_waiting_image_gb=70_000 / 2**30) as eng:  # one of them takes 21,168 bytes
        waiting = [eng.submit(prompt("<image>?", [picture(seed)]), PARAMS) for seed in (5, 6, 7)]
        with pytest.raises(lk.RejectedError, match="84,672 bytes of processed images"):
            eng.submit(prompt("<image>?", [picture(8)]), PARAMS)
        eng.run()
        assert all(handle.finish_reason == "length" for handle in waiting)
        eng.generate(prompt("<image>?", [picture(8)]), PARAMS)


def test_images_of_several_requests_are_encoded_together(their: Theirs) -> None:
    with engine(their, prefix_caching=False) as eng:
        eng.generate([prompt("<image>?", [picture(seed)]) for seed in range(5, 9)], PARAMS)
        assert eng.runner.model.vision.num_forwards == 1


def test_preprocessing_is_the_processors_bit_for_bit(their: Theirs) -> None:
    with engine(their) as eng:
        for text, images in CASES[:2]:
            handle = eng.submit(prompt(text, images), PARAMS)
            mine = np.concatenate([span.pixels["pixel_values"] for span in handle.spans])
            handle.wait()
            assert (mine == their.inputs(text, images)["pixel_values"].numpy()).all()


def test_chat_takes_images_as_parts_urls_and_paths(their: Theirs, tmp_path: Any) -> None:
    data = io.BytesIO()
    picture(1).save(data, "png")
    (tmp_path / "one.png").write_bytes(data.getvalue())
    url = f"data:image/png;base64,{b64encode(data.getvalue()).decode()}"
    parts = [
        {"type": "image", "image": picture(1)},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image", "image": data.getvalue()},
        {"type": "image", "image": tmp_path / "one.png"},
    ]
    wanted = their.answer("u:<image>what?~a:", [picture(1)], 8)
    with engine(their) as eng:
        for part in parts:
            messages = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
            assert eng.chat(messages, PARAMS).output_ids == wanted
        assert eng.images.num_processed == 1
    with lk.LLM(their.folder, dtype="float32", num_blocks=64, block_size=4, limit_mm_per_prompt={"image": 1}) as llm:
        assert llm.chat(messages, PARAMS)[0].outputs[0].token_ids == wanted
        found = llm.generate([prompt("u:<image>what?~a:", [picture(1)])], PARAMS)[0]
        assert found.outputs[0].token_ids == wanted
        with pytest.raises(ValueError, match="2 images, limit_mm_per_prompt allows 1"):
            llm.generate([prompt(*CASES[1])], PARAMS)


def test_bad_images_are_refused_by_name_and_leave_no_trace(their: Theirs) -> None:
    cases = [
        ({"prompt": "<image><image>", "multi_modal_data": {"image": picture(1)}}, "has 2 image tokens .* 1 images"),
        ({"prompt": "none", "multi_modal_data": {"image": picture(1)}}, "has 0 image tokens .* 1 images"),
        ({"prompt": "<image>"}, "has 1 image tokens .* 0 images"),
        ({"prompt_token_ids": [3, 96, 96, 4], "multi_modal_data": {"image": picture(1)}}, "image tokens"),
        ({"prompt": "a", "multi_modal_data": {"video": picture(1)}}, "'video': images are served"),
        ({"prompt": "a", "multi_modal_data": {"audio": b""}}, "'audio': images are served"),
        ({"prompt": "a", "multi_modal_data": {"picture": b""}}, "did you mean|picture"),
        ({"prompt": "<image>", "multi_modal_data": {"image": []}}, "no image in the list"),
        ({"prompt": "<image>", "multi_modal_data": {"image": 3}}, "PIL image, a path, bytes .*got int"),
        ({"prompt": "<image>", "multi_modal_data": [1]}, "multi_modal_data is"),
        ({"prompt": "<image>", "mm_processor_kwargs": {"size": 3}}, "no multi_modal_data"),
    ]
    with engine(their) as eng:
        for given, error in cases:
            with pytest.raises((ValueError, TypeError), match=error):
                eng.submit(given, PARAMS)
        part = {"type": "video_url", "video_url": {"url": "x"}}
        with pytest.raises(ValueError, match=r"messages\[0\].content\[0\] is 'video_url'"):
            eng.chat([{"role": "user", "content": [part]}], PARAMS)
        assert eng.scheduler.num_submitted == 0
    with lk.Engine(num_blocks=16) as text:
        with pytest.raises(ValueError, match="takes text only"):
            text.submit({"prompt": "a", "multi_modal_data": {"image": picture(1)}})
        with pytest.raises(ValueError, match="takes text only"):
            text.chat([{"role": "user", "content": [{"type": "image", "image": picture(1)}]}])


def test_an_image_without_features_fails_its_own_request_alone(
    their: Theirs, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(their) as eng:
        encode = eng.runner.model.vision.encode
        bad = eng.images.place(*reversed(({"image": picture(9)}, "<image>")), eng.tokenizer.encode)[1][0].pixels

        def encoded(images: list[Any]) -> list[Any]:
            same = [(image["pixel_values"] == bad["pixel_values"]).all() for image in images]
            return [one[:-1] if is_bad else one for one, is_bad in zip(encode(images), same, strict=True)]

        monkeypatch.setattr(eng.runner.features.tower, "encode", encoded)
        failing, going = eng.generate([prompt("<image>", [picture(9)]), prompt(*CASES[0])], PARAMS)
        assert failing.finish_reason == "error" and "features and the prompt" in failing.error
        assert going.output_ids == answers[0]
        eng.check()


def test_snapshots_and_forks_go_on_with_their_images(their: Theirs, answers: list[list[int]]) -> None:
    with engine(their, max_num_batched_tokens=17, max_num_seqs=4) as eng:
        handles = [eng.submit(prompt(*case), PARAMS) for case in CASES]
        eng.step()
        snapshot, fork = eng.snapshot(), eng.fork()
        for run in (eng, fork, eng):
            run.run()
            assert [run.request(handle.id).output_ids for handle in handles] == answers
            if run is eng:
                eng.restore(snapshot)
        fork.close()


def test_features_are_bounded_in_bytes_and_the_longest_unused_go_first() -> None:
    torch = pytest.importorskip("torch")

    class Tower:
        def encode(self, images: list[Any]) -> list[Any]:
            return [torch.zeros(4, 8) + image["x"] for image in images]

    spans = {name: lk.Span(0, 4, name.encode(), pixels={"x": i}) for i, name in enumerate("abc")}
    features = Features(Tower(), most_bytes=2 * 4 * 8 * 4)
    for names in ("a", "b", "a", "c"):
        features.of([spans[names]])
        features.check()
    assert list(features.kept) == [b"a", b"c"] and features.num_encoded == 3
    assert set(features.of(spans.values())) == {b"a", b"b", b"c"}  # more than are kept
    features.check()
