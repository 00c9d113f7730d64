"""Images in the messages of a conversation: OpenAI's content parts as a prompt of the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from labkit.engine.images import Images
from labkit.images import ImageError, ImageUrls

IMAGE_PARTS = {"image_url": "image_url", "image": "image", "input_image": "image_url", "image_pil": "image_pil"}
REFUSED_PARTS = ("video", "video_url", "audio", "audio_url", "input_audio")


class Server(Protocol):
    """What a conversation needs of an engine."""

    images: Images | None
    tokenizer: Any


def chat_prompt(
    engine: Server, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any], tokenizer: Any = None
) -> Any:
    """The prompt of a conversation: token ids, and with them the images that its messages hold."""
    plain, given = take_images(messages, ImageUrls() if engine.images is None else engine.images.urls)
    if given and engine.images is None:
        raise ValueError("messages hold an image, and this engine serves a model that takes text only")
    tokenizer = engine.tokenizer if tokenizer is None else tokenizer
    if not hasattr(tokenizer, "chat"):
        raise ValueError("chat needs a model's tokenizer with a chat template; this engine has none")
    if engine.images is None or not given:
        return {"prompt_token_ids": tokenizer.chat(messages, **more)}
    options = dict(more)
    if options.pop("continue_final_message", False):
        raise ValueError("continue_final_message: the last message of a chat with images cannot be continued")
    if not _reads_parts(tokenizer.template):
        plain = [flat(message, engine.images.token) for message in plain]
    text = tokenizer.chat_text(plain, **options)
    return engine.images.prompt_of(text, given, lambda one: tokenizer.encode(one, add_special_tokens=False))


def take_images(messages: Any, urls: ImageUrls) -> tuple[list[Any], list[Any]]:
    """The messages with {"type": "image"} for each image, as chat templates want them, and the images in order."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return [messages], []  # the chat template says what is wrong
    plain: list[Any] = []
    images: list[Any] = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            plain.append(message)
            continue
        parts: list[Any] = []
        for j, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else None
            where = f"messages[{i}].content[{j}]"
            if kind in REFUSED_PARTS:
                raise ValueError(f"{where} is {kind!r}: images are served, audio and video are not")
            if kind in IMAGE_PARTS:
                images.append(_image_of(part, IMAGE_PARTS[kind], where, urls))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        plain.append({**message, "content": parts})
    return (plain, images) if images else (list(messages), [])


def _image_of(part: Mapping[str, Any], field: str, where: str, urls: ImageUrls) -> Any:
    """What a part holds: an image, a path, bytes, or the URL of one."""
    given = part.get(field, part.get("image_url", part.get("url")))
    if isinstance(given, Mapping):
        given = given.get("url")
    if given is None:
        raise ValueError(f"{where} has no image in its field {field!r}")
    if field != "image_url":
        return given
    if not isinstance(given, str):
        raise ValueError(f"{where}: an image_url is a URL, got {type(given).__name__}")
    try:
        return urls.read_now(given)
    except ImageError as error:
        raise ValueError(f"{where}: {error}") from error


def _reads_parts(template: str | None) -> bool:
    """Whether a chat template goes through content parts, or wants content to be text."""
    return template is not None and ("'type'" in template or '"type"' in template or ".type" in template)


def flat(message: Any, token: str) -> Any:
    """The message with its content as text: the image token for each image, before what was said."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    images = [token for part in content if part.get("type") == "image"]
    texts = [str(part.get("text", "")) for part in content if part.get("type") != "image"]
    return {**message, "content": "\n".join([*images, *texts])}
