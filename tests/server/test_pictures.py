"""Images over HTTP: what reaches the engine, a fake that records, and what is refused with which field."""

import asyncio
import json
import re
import threading

import httpx
import pytest

import labkit as lk
from labkit.images import ImageUrls, Limits, read_image
from labkit.images.decode import decode
from labkit.images.fetch import Answer
from labkit.server import pictures
from tests.images.pictures import bomb, data_url, file_of, picture
from tests.server.talk import events

ONE, OTHER = file_of(picture(seed=1)), file_of(picture(20, 30, seed=2), "JPEG")
FIRST, SECOND = data_url(ONE), data_url(OTHER, "image/jpeg")


class Sight:
    """What stands for a model's image processor."""

    most = None

    def check_none(self, ids):
        """Any prompt will do."""


class Seeing(lk.Engine):
    """Writes <image> where an image is, and notes what it is handed."""

    def chat_prompt(self, messages, *, tokenizer, **more):
        self.messages, self.more, found, plain = messages, more, [], []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                found += [part["image"] for part in content if part["type"] == "image"]
                content = "".join("<image>" if part["type"] == "image" else part["text"] for part in content)
            plain.append({**message, "content": content})
        self.text = tokenizer.chat_text(plain, **more)
        ids = tokenizer.encode(self.text, add_special_tokens=False)
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": found}}

    def submit(self, prompt, params=None, **more):
        self.submitted.append(prompt)
        return super().submit(prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt, params, **more)


@pytest.fixture(scope="module")
def seeing():
    scheduler = lk.Scheduler(lk.BlockManager(256, 4), max_num_batched_tokens=512)
    tokenizer = lk.Tokenizer.load(lk.assets.path("tiny"))
    runner = lk.FakeRunner(seed=1, vocab_size=tokenizer.vocab_size)
    engine = Seeing(scheduler=scheduler, runner=runner, tokenizer=tokenizer)
    with lk.serve(engine, allowed_media_domains=["images.test"]) as server:
        yield server
    assert engine.close().ok


@pytest.fixture
def engine(seeing):
    engine = seeing.engine
    engine.images, engine.submitted = Sight(), []
    return engine


@pytest.fixture
def http(seeing):
    with httpx.Client(base_url=seeing.url, timeout=30) as client:
        yield client


def part(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def ask(http, *messages, status=200, path="/v1/chat/completions", **more):
    answer = http.post(path, json={"messages": messages, "max_tokens": 3, "temperature": 0, **more})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def respond(http, *items, status=200, **more):
    answer = http.post("/v1/responses", json={"input": items, "max_output_tokens": 3, "temperature": 0, **more})
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


# -- what arrives ----------------------------------------------------------------------------------------------------


def test_the_engine_is_handed_decoded_images_in_order_and_parts_for_the_template(http, engine):
    found = ask(
        http,
        {"role": "system", "content": "Look."},
        user(text("What is"), part(FIRST, detail="high"), text("?")),
        {"role": "assistant", "content": "A square."},
        user({"type": "image_url", "image_url": SECOND}, part(FIRST), text("And these?")),
    )
    one, other = read_image(ONE), read_image(OTHER)
    (prompt,) = engine.submitted
    assert prompt["multi_modal_data"] == {"image": [one, other, one]}
    assert [message["content"] for message in engine.messages] == [
        "Look.",
        [text("What is"), {"type": "image", "image": one}, text("?")],
        "A square.",
        [{"type": "image", "image": other}, {"type": "image", "image": one}, text("And these?")],
    ]
    assert "What is<image>?" in engine.text and "<image><image>And these?" in engine.text
    assert engine.more["add_generation_prompt"] is True
    assert found["usage"]["prompt_tokens"] == len(prompt["prompt_token_ids"])
    assert len(found["choices"][0]["message"]["content"]) > 0


def test_streams_samples_and_tokenize_take_images_too(http, engine):
    answer = http.post(
        "/v1/chat/completions",
        json={"messages": [user(part(FIRST), text("x"))], "max_tokens": 3, "stream": True, "n": 2},
    )
    chunks = events(answer.text)
    assert chunks[-1] == "[DONE]" and {chunk["choices"][0]["index"] for chunk in chunks[:-1]} == {0, 1}
    assert len(engine.submitted) == 1 and len(engine.submitted[0]["multi_modal_data"]["image"]) == 1
    count = ask(http, user(part(FIRST), text("x")), path="/tokenize")["count"]
    assert count == len(engine.submitted[0]["prompt_token_ids"])


def test_a_chat_without_images_is_as_before(http, engine):
    ask(http, user(text("a"), text("b")), {"role": "assistant", "content": None}, {"role": "user", "content": "c"})
    (prompt,) = engine.submitted
    assert isinstance(prompt, list) and all(isinstance(id, int) for id in prompt)


def test_responses_take_images_also_in_conversations_that_go_on(http, engine):
    item = {"role": "user", "content": [{"type": "input_image", "image_url": FIRST, "detail": "auto"}]}
    item["content"].append({"type": "input_text", "text": "What?"})
    first = respond(http, item, instructions="Look.")
    assert engine.submitted[-1]["multi_modal_data"] == {"image": [read_image(ONE)]}
    shown = {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": SECOND}]}
    call = {"type": "function_call", "call_id": "1", "name": "draw", "arguments": "{}"}
    respond(http, call, shown, previous_response_id=first["id"])
    assert engine.submitted[-1]["multi_modal_data"] == {"image": [read_image(ONE), read_image(OTHER)]}
    assert [message["role"] for message in engine.messages] == ["user", "assistant", "assistant", "tool"]


def test_anthropics_messages_have_images_and_errors_name_their_place(http, engine):
    def source(data, kind="image/png"):
        return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data.partition(",")[2]}}

    shown = {"type": "tool_result", "tool_use_id": "1", "content": [source(SECOND, "image/jpeg")]}
    by_url = {"type": "image", "source": {"type": "url", "url": FIRST}}
    turns = [
        {"role": "user", "content": [text("What?"), source(FIRST)]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "draw", "input": {}}]},
        {"role": "user", "content": [shown, text("And?"), by_url]},
    ]
    body = {"messages": turns, "max_tokens": 2, "system": "Look."}
    found = http.post("/v1/messages", json=body)
    assert found.status_code == 200, found.text
    one, other = read_image(ONE), read_image(OTHER)
    assert engine.submitted[0]["multi_modal_data"] == {"image": [one, other, one]}
    count = http.post("/v1/messages/count_tokens", json={"messages": turns, "system": "Look."}).json()["input_tokens"]
    assert count == len(engine.submitted[0]["prompt_token_ids"])
    turns[2]["content"][2] = source(SECOND)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        wrong = http.post(path, json=body)
        message = wrong.json()["error"]["message"]
        assert wrong.status_code == 400 and message.startswith("messages.2.content: its type is declared as image/png")


def test_an_openai_client_sends_images(seeing, engine):
    import openai

    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="x", max_retries=0)
    found = client.chat.completions.create(
        model=seeing.service.name, messages=[user(part(FIRST), text("?"))], max_tokens=2
    )
    assert found.choices[0].message.content is not None
    content = [{"type": "input_image", "image_url": SECOND}, {"type": "input_text", "text": "?"}]
    client.responses.create(
        model=seeing.service.name, input=[{"role": "user", "content": content}], max_output_tokens=2
    )
    handed = [prompt["multi_modal_data"]["image"] for prompt in engine.submitted]
    assert handed == [[read_image(ONE)], [read_image(OTHER)]]


def test_allowed_hosts_are_asked_and_files_are_read(seeing, http, engine, tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(ONE)
    asked = []

    def fetch(target, limits):
        asked.append((target.host, target.path))
        return Answer(OTHER, "image/jpeg")

    urls = ImageUrls(local_path=tmp_path, domains=["images.test"], fetch=fetch)
    monkeypatch.setattr(seeing.service, "image_urls", urls)
    ask(http, user(part(f"file://{tmp_path}/x.png"), part("https://images.test/y.jpg?z=1")))
    assert engine.submitted[0]["multi_modal_data"] == {"image": [read_image(ONE), read_image(OTHER)]}
    assert asked == [("images.test", "/y.jpg?z=1")]


# -- what is refused -------------------------------------------------------------------------------------------------

CMYK = file_of(picture().convert("CMYK"), "JPEG")
MOVING = file_of(picture(), "GIF", save_all=True, append_images=[picture(seed=3)])
BAD_PARTS = {
    "not base64": (part("data:image/png;base64,@"), "image_url", "not valid base64"),
    "a lie": (part(data_url(ONE, "image/gif")), "image_url", "declared as image/gif, and it is image/png"),
    "broken": (part(data_url(ONE[:60])), "image_url", "the PNG image is broken"),
    "huge": (part(data_url(bomb("PNG"))), "image_url", "60000 x 60000"),
    "cmyk": (part(data_url(CMYK, "image/jpeg")), "image_url", "CMYK"),
    "animated": (part(data_url(MOVING, "image/gif")), "image_url", "animation"),
    "svg": (part(data_url(b"<svg/>", "image/svg+xml")), "image_url", "its type is 'image/svg+xml'"),
    "a path": (part("/etc/passwd"), "image_url", "an image is given by its URL"),
    "a file": (part("file:///etc/passwd"), "image_url", "--allowed-local-media-path"),
    "another host": (part("https://example.com/x.png"), "image_url", "--allowed-media-domains"),
    "loopback": (part("http://127.0.0.1:1/x.png"), "image_url", "--allowed-media-domains"),
    "a scheme": (part("ftp://images.test/x.png"), "image_url", "got ftp:"),
    "no host": (part("http:///x"), "image_url", "no host"),
    "no url": ({"type": "image_url"}, "image_url", "must be a URL"),
    "null": ({"type": "image_url", "image_url": None}, "image_url", "must be a URL"),
    "a number": (part(7), "image_url", "must be a URL"),
    "a list": ({"type": "image_url", "image_url": [FIRST]}, "image_url", "must be a URL"),
    "detail": (part(FIRST, detail="huge"), "image_url", "detail is one of auto, low, high, original"),
    "file id": ({"type": "input_image", "file_id": "f"}, "file_id", "files are not kept here"),
    "audio": (
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        "input_audio",
        "audio is not served",
    ),
    "audio url": ({"type": "audio_url", "audio_url": {"url": FIRST}}, "audio_url", "audio is not served"),
    "video": ({"type": "video_url", "video_url": {"url": FIRST}}, "video_url", "video is not served"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_an_image_that_cannot_be_read_is_a_400_that_names_its_field(http, engine, name):
    bad, field, words = BAD_PARTS[name]
    good = {"role": "user", "content": "x"}
    error = ask(http, good, user(text("look"), part(FIRST), bad), status=400)
    assert error["param"] == f"messages[1].content[2].{field}" and error["message"].startswith(error["param"])
    assert words in error["message"]
    error = respond(http, good, user({"type": "input_text", "text": "look"}, bad), status=400)
    assert error["param"] == f"input[1].content[1].{field}" and words in error["message"]
    assert not engine.submitted


@pytest.mark.parametrize(
    "bad", [{"type": "image_pil"}, {"type": "file", "file": {}}, {"type": 7}, {}, {"type": "text"}]
)
def test_other_parts_are_refused_by_their_place(http, engine, bad):
    error = ask(http, user(part(FIRST), bad), status=400)
    assert error["param"] == "messages[0].content[1]" and error["message"].startswith("messages[0].content[1]")
    assert respond(http, user(part(FIRST), bad), status=400)["param"] == "input"


def test_an_image_for_a_model_of_text_is_refused_before_it_is_read(seeing, http, engine, monkeypatch):
    engine.images = None
    monkeypatch.setattr(seeing.service, "image_urls", None)
    error = ask(http, user(text("x"), part(FIRST)), status=400)
    assert error["param"] == "messages[0].content[1].image_url"
    assert f"the model {seeing.service.name} takes text, no images" in error["message"]
    assert respond(http, user(part(FIRST)), status=400)["param"] == "input[0].content[0].image_url"


def test_more_images_than_allowed_are_refused_before_they_are_read(seeing, http, engine, monkeypatch):
    engine.images.most = 2
    ask(http, user(part(FIRST), part(SECOND)))
    monkeypatch.setattr(seeing.service, "image_urls", None)
    error = ask(http, user(part(FIRST)), user(part(SECOND), text("x"), part(FIRST)), status=400)
    assert error["param"] == "messages[1].content[2].image_url"
    assert "a prompt may have 2 images here (--limit-mm-per-prompt), this one has 3" in error["message"]
    engine.images.most = 0
    assert "may have 0 images" in ask(http, user(part(FIRST)), status=400)["message"]


def test_the_pixels_and_the_time_of_calls_are_bounded(seeing, http, engine, monkeypatch):
    monkeypatch.setattr(pictures, "MOST_PIXELS", 40)
    error = ask(http, user(part(FIRST), part(FIRST)), status=400)
    assert error["param"] == "messages[0].content[1].image_url" and "40 pixels together" in error["message"]
    monkeypatch.setattr(pictures, "MOST_HELD", 60)
    seeing.service.num_pixels += 30  # another call's
    error = ask(http, user(part(FIRST)), status=503)
    assert "too many images" in error["message"]
    assert seeing.service.num_pixels == 30
    seeing.service.num_pixels = 0
    ask(http, user(part(FIRST)))
    assert seeing.service.num_pixels == 0
    monkeypatch.setattr(pictures, "SECONDS", -1.0)
    assert "took longer" in ask(http, user(part(FIRST)), status=400)["message"]


def test_a_decoder_that_does_not_end_fails_its_call_while_others_are_served(seeing, http, engine, monkeypatch):
    release = threading.Event()

    def slow(data, limits):
        if data == OTHER:
            release.wait(20)
        return decode(data, limits)

    monkeypatch.setattr(seeing.service, "image_urls", ImageUrls(limits=Limits(seconds=0.3), decode=slow))

    async def main():
        async with httpx.AsyncClient(base_url=seeing.url, timeout=20) as client:
            asked = [
                client.post("/v1/chat/completions", json={"messages": [user(part(url))], "max_tokens": 2})
                for url in (SECOND, FIRST)
            ]
            return await asyncio.gather(*asked)

    late, good = asyncio.run(main())
    assert good.status_code == 200 and late.status_code == 400, late.text
    assert "could not be decoded within 0.3 s" in late.json()["error"]["message"]
    urls = seeing.service.image_urls
    urls.decoding.num = urls.decoding.num_busy  # all of them are stuck
    busy = http.post("/v1/chat/completions", json={"messages": [user(part(FIRST))]})
    assert busy.status_code == 503 and busy.headers["retry-after"] and "try again" in busy.json()["error"]["message"]
    release.set()


def test_what_cannot_go_with_images_is_named(http, engine):
    for field, value in (("continue_final_message", True), ("add_special_tokens", True), ("truncate_prompt_tokens", 2)):
        assert ask(http, user(part(FIRST), text("x")), status=400, **{field: value})["param"] == field
    known = {"kv_transfer_params": {"prompt_token_ids": [1, 2]}}
    assert ask(http, user(part(FIRST)), status=400, **known)["param"] == "messages[0].content[0].image_url"
    ask(http, user(part(FIRST)), truncate_prompt_tokens=-1)


def test_what_a_processor_says_is_told_without_paths(http, engine, monkeypatch):
    def failing(messages, **more):
        raise ValueError("LlavaProcessor of /home/me/model/x refuses the image: too thin")

    monkeypatch.setattr(engine, "chat_prompt", failing, raising=False)
    error = ask(http, user(part(FIRST)), status=400)
    assert "refuses the image: too thin" in error["message"] and "/home" not in error["message"]
    assert error["param"] == "messages"


def test_no_error_shows_the_image_or_the_machine(http, engine):
    for bad, _, _ in BAD_PARTS.values():
        answer = http.post("/v1/chat/completions", json={"messages": [user(bad)]})
        message = json.dumps(answer.json())
        assert len(message) < 700 and not re.search(r"0x[0-9a-f]{4,}|\.py\b|Traceback|/usr|/tmp", message), message
