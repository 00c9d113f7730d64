"""Images from a client through the server to a real model with random weights, and transformers' own answer to them."""

import base64

import httpx
import openai
import pytest

import labkit as lk
from labkit.images import read_image
from labkit.server import command
from labkit.server.arguments import read
from labkit.server.service import Service
from labkit.server.settings import Settings
from tests.images.pictures import data_url, file_of
from tests.internvl import internvl, write_original
from tests.seeing import Theirs, picture, theirs
from tests.server.talk import until

PICTURES = [picture(1), picture(2, 90, 20)]
URLS = [data_url(file_of(one)) for one in PICTURES]


@pytest.fixture(scope="module")
def their(tmp_path_factory):
    return theirs("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def server(their):
    engine = lk.Engine(their.folder, dtype="float32", num_blocks=256, block_size=4, limit_mm_per_prompt={"image": 2})
    with lk.serve(engine, served_model_name="seeing") as server:
        yield server
        until(lambda: server.num_open == 0)
        engine.check()
    assert engine.close().ok


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


def part(url):
    return {"type": "image_url", "image_url": {"url": url}}


CHATS = [
    ([user(text("what is in "), part(URLS[0]), text("?"))], [PICTURES[0]]),
    ([user(part(URLS[0]), part(URLS[1]), text("which?"))], PICTURES),
    (
        [user(part(URLS[1])), {"role": "assistant", "content": "bars"}, user(text("and "), part(URLS[0]))],
        PICTURES[::-1],
    ),
]


@pytest.mark.parametrize("nth", range(len(CHATS)))
def test_chats_with_images_are_answered_as_transformers_answers_them(client, their, nth):
    messages, pictures = CHATS[nth]
    prompt = their.processor.tokenizer.apply_chat_template(
        messages_for(messages), tokenize=False, add_generation_prompt=True
    )
    asked = {"model": "seeing", "messages": messages, "temperature": 0, "max_tokens": 8}
    more = {"ignore_eos": True, "return_token_ids": True}
    found = client.chat.completions.create(**asked, extra_body=more)
    assert found.choices[0].token_ids == their.answer(prompt, pictures, 8)
    assert found.prompt_token_ids == their.inputs(prompt, pictures)["input_ids"][0].tolist()
    chunks = client.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.choices[0].message.content


@pytest.mark.parametrize("published", [False, True], ids=["transformers' layout", "published layout"])
def test_the_internvl_tutorial_works_as_written(tmp_path, published):
    """`labkit serve MODEL --trust_remote_code`, and a picture as base64 from the openai client."""
    prompt = "u:Describe this.<image>~a:"
    if published:
        (tmp_path / "hf").mkdir()
        their = Theirs("internvl", tmp_path / "hf", internvl())
        write_original(their, tmp_path)
        prompt = "<|im_start|>user<IMG_CONTEXT>\nDescribe this.<|im_end|><|im_start|>assistant"
    else:
        their = theirs("internvl", tmp_path)
    words = [str(tmp_path), "--trust_remote_code", "--dtype", "float32", "--block-size", "4"]
    words += [
        "--num-gpu-blocks-override",
        "128",
        "--served-model-name",
        "internvl",
        "--limit-mm-per-prompt",
        '{"image": 2}',
    ]
    arguments = read(words, {})
    engine = command._load(arguments, Service(Settings(**arguments.server)))
    with lk.serve(engine, **arguments.server) as server, httpx.Client() as http:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", http_client=http, max_retries=0)
        encoded = base64.b64encode(file_of(PICTURES[1], "JPEG")).decode()
        asked = [user(text("Describe this."), part(f"data:image/jpeg;base64,{encoded}"))]
        found = client.chat.completions.create(
            model="internvl", messages=asked, temperature=0, max_tokens=8,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
    seen = read_image(base64.b64decode(encoded)).pixels
    assert found.choices[0].token_ids == their.answer(prompt, [seen], 8)
    assert found.usage.prompt_tokens == their.inputs(prompt, [seen])["input_ids"].shape[1]
    assert engine.close().ok


def messages_for(messages):
    """The conversation as transformers' templates take it."""
    return [
        {**one, "content": [{"type": "image"} if part["type"] == "image_url" else part for part in one["content"]]}
        if isinstance(one["content"], list)
        else one
        for one in messages
    ]


def test_responses_see_the_same(client, server):
    content = [{"type": "input_text", "text": "what is in "}, {"type": "input_image", "image_url": URLS[0]}]
    asked = {"temperature": 0, "max_output_tokens": 6}
    found = client.responses.create(model="seeing", input=[{"role": "user", "content": content}], **asked)
    same = client.chat.completions.create(
        model="seeing", messages=[user(text("what is in "), part(URLS[0]))], temperature=0, max_tokens=6
    )
    assert found.output_text == same.choices[0].message.content
    again = client.responses.create(model="seeing", input="and now?", previous_response_id=found.id, **asked)
    assert again.usage.input_tokens > found.usage.input_tokens
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_chats_in_python_take_files_and_hosts_that_are_allowed(their, tmp_path):
    (tmp_path / "one.png").write_bytes(file_of(PICTURES[0]))
    messages = [user(part(f"file://{tmp_path}/one.png"), text("what?"))]
    params = lk.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options = {"dtype": "float32", "num_blocks": 64, "block_size": 4, "allowed_media_domains": None}
    with lk.LLM(their.folder, allowed_local_media_path=str(tmp_path), **options) as llm:
        found = llm.chat(messages, params)[0].outputs[0].token_ids
        assert found == their.answer("u:<image>what?~a:", PICTURES[:1], 4)
        for url, words in (("file:///etc/passwd", "does not lie below"), ("https://a.b/x", "--allowed-media-domains")):
            with pytest.raises(ValueError, match=rf"messages\[0\].content\[0\]: .*{words}"):
                llm.chat([user(part(url))], params)


def test_a_repeated_image_is_a_cache_hit_and_another_of_its_size_is_not(client, server):
    """Neither its blocks nor its features are computed again."""

    def ask(seed):
        asked = [user(part(data_url(file_of(picture(seed)))), text("what?"))]
        found = client.chat.completions.create(model="seeing", messages=asked, max_tokens=1)
        page = httpx.get(f"{server.url}/metrics").text.splitlines()
        encoded = next(line for line in page if line.startswith("labkit:images_encoded_total{"))
        return found.usage.prompt_tokens_details.cached_tokens, float(encoded.split()[-1])

    (first, one), (again, same), (other, two) = ask(11), ask(11), ask(12)
    assert again > first and other == first
    assert one == same == two - 1


@pytest.mark.parametrize(
    ("content", "field", "words"),
    [
        ([part(url) for url in [*URLS, URLS[0]]], "messages[0].content[2].image_url", "a prompt may have 2 images"),
        ([text("<image>")], None, "image token"),
        ([part(URLS[0]), text("a second <image>")], "messages", "image token"),
        ([part(data_url(file_of(picture(1, 400, 1))))], None, None),
    ],
)
def test_what_the_model_cannot_take_is_a_400(client, content, field, words):
    """A picture of 400 x 1 pixels may be taken; whatever happens is no failure of the server."""
    try:
        found = client.chat.completions.create(model="seeing", messages=[user(*content)], max_tokens=2)
    except openai.BadRequestError as error:
        assert field is None or error.param == field
        assert words is None or words in str(error)
    else:
        assert words is None and found.choices
