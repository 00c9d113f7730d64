"""Text to token ids and back, from a model's own files.

If a folder has a `tokenizer.json`, it is read directly: importing transformers for it would double the start-up time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from labkit.files import json_object
from labkit.text import internvl
from labkit.text.limits import render

HALF = "\ufffd"  # what a decoder writes for a character that is not complete yet
LONGEST = 4  # bytes of a character
CONTEXT = 6  # prompt tokens that a stream is shown, so that a first space or a joined character comes out right

Message = Mapping[str, Any]


class Decoder(Protocol):
    """What an engine needs to show text."""

    def decode(self, ids: list[int]) -> str: ...


class TextStream(Protocol):
    """Takes tokens, returns complete characters."""

    def feed(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """Token ids are bytes: enough to read a fake runner's output as text, and to try stop strings. Ids above 255 become
    the replacement character."""

    vocab_size = 256

    def __repr__(self) -> str:
        return "ByteTokenizer(vocab 256)"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(min(id, 255) for id in ids).decode("utf-8", errors="replace")


class Tokenizer:
    """A model's tokenizer and chat template.

    >>> import labkit as lk
    >>> tokenizer = lk.Tokenizer.load(lk.assets.path("tiny"))
    >>> tokenizer.decode(tokenizer.encode("def f(x):"))
    'def f(x):'
    """

    def __init__(self, backend: Any, config: Mapping[str, Any] | None = None, template: str | None = None) -> None:
        self.backend = backend  # tokenizers.Tokenizer
        self.config = dict(config or {})
        self.template = template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._compiled: Any = None

    def __repr__(self) -> str:
        chat = "with a chat template" if self.template else "no chat template"
        return f"Tokenizer({self.vocab_size} tokens, {chat})"

    @classmethod
    def load(cls, folder: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
        folder = Path(folder)
        config = json_object(folder / "tokenizer_config.json")
        template = _template(folder, config)
        if internvl.fields_of(folder) is not None:
            template, trust_remote_code = template or internvl.CHATML, False  # its code is never run
        if (folder / "tokenizer.json").exists():
            from tokenizers import Tokenizer as Backend

            try:
                read: Any = Backend.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # tokenizers raises bare Exception
                raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
            read.no_padding()  # sentence models have both in their files
            read.no_truncation()
            return cls(read, config, template)
        from transformers import AutoTokenizer

        try:
            slow = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"{folder} holds no tokenizer that can be read: {error} (skip_tokenizer_init=True goes without one)"
            ) from error
        backend: Any = getattr(slow, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{folder} has only a slow tokenizer: save a fast one (tokenizer.json) there")
        return cls(backend, config, template or slow.chat_template)

    @property
    def eos_token(self) -> str | None:
        return self.special("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    def special(self, name: str) -> str | None:
        token = self.config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_within(self, text: str, most: int, side: str = "right") -> list[int]:
        """At most so many tokens: text is cut off at this side, the special tokens around it stay."""
        found = self.backend.encode(text, add_special_tokens=False)
        found.truncate(max(most - self.backend.num_special_tokens_to_add(False), 0), direction=side)
        ids: list[int] = self.backend.post_process(found).ids
        return ids

    def encode_pair(
        self, first: str, second: str, most: int | None = None, side: str = "right"
    ) -> tuple[list[int], int | None]:
        """Two texts as a cross-encoder reads them, and where the second begins if the tokenizer gives the two token
        types. With `most`, the longer one is cut."""
        pair = [self.backend.encode(text, add_special_tokens=False) for text in (first, second)]
        if most is not None:
            room = most - (special := self.backend.num_special_tokens_to_add(True))
            if room < 0:
                raise ValueError(
                    f"truncate_prompt_tokens: two texts have {special} special tokens around them, got {most}"
                )
            for one, length in zip(pair, _shared(len(pair[0]), len(pair[1]), room), strict=True):
                one.truncate(length, direction=side)
        found = self.backend.post_process(*pair)
        return found.ids, found.type_ids.index(1) if 1 in found.type_ids else None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, id: int) -> str:
        """One token as text."""
        return self.decode([id], skip_special_tokens=False)

    def stream(self, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> TextStream:
        return _BackendStream(self.backend, [int(i) for i in prompt[-CONTEXT:]], skip_special_tokens)

    # -- chat ----------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **more: Any,
    ) -> list[int]:
        """Token ids of a conversation formatted with the chat template, up to where the assistant speaks next. With
        `continue_final_message`, up to the end of what the last message says."""
        text = self.chat_text(messages, add_generation_prompt=add_generation_prompt, **more)
        if continue_final_message:
            text = unfinished(text, str(messages[-1].get("content") or ""))
        return self.encode(text, add_special_tokens=False)

    def chat_text(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **more: Any) -> str:
        if self.template is None:
            raise ValueError(
                "this model's tokenizer has no chat template: give it one (tokenizer.template = ...), or write the "
                "prompt as text"
            )
        _check_messages(messages)
        if self._compiled is None:
            self._compiled = _compile(self.template)
        specials = {name: self.special(name) for name in self.config if name.endswith("_token")}
        from jinja2 import TemplateError

        try:
            given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
            return render(self._compiled, given | specials | more)
        except TemplateError as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error


def _shared(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts in this room. The longer one is cut first, then both."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if first <= second else (longer, shorter)


def unfinished(text: str, content: str) -> str:
    """A conversation up to the end of the last message's content, without what the template puts behind it."""
    content = content.strip()
    at = text.rfind(content)
    if at < 0:
        raise ValueError("continue_final_message: the chat template changes the last message")
    return text[: at + len(content)]


class _BackendStream:
    """The stream decoder of the tokenizers library."""

    def __init__(self, backend: Any, context: list[int], skip_special_tokens: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self.backend = backend
        self.make: Any = lambda: DecodeStream(skip_special_tokens=skip_special_tokens)
        self.stream = self.make()
        if context:
            self.stream.step(backend, context)

    def feed(self, ids: list[int]) -> str:
        try:
            if len(ids) == 1:  # nearly always
                return self.stream.step(self.backend, ids[0]) or ""
            return "".join(piece for id in ids if (piece := self.stream.step(self.backend, id)))
        except Exception:  # tokenizers raises a bare Exception on bytes that form no character; skip them
            self.stream = self.make()
            return ""


class DecodedStream:
    """A stream decoder for tokenizers that can only decode whole lists: text counts once it ends in a complete
    character."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.ids: list[int] = []
        self.shown = 0  # characters
        self.settled = 0  # tokens up to the last one that completed a character

    def feed(self, ids: list[int]) -> str:
        before = self.shown
        for id in ids:
            self.ids.append(id)
            text = self.decoder.decode(self.ids)
            complete = len(text.rstrip(HALF))
            if complete == len(text) or len(self.ids) - self.settled >= LONGEST:  # or never a character
                complete, self.settled = len(text), len(self.ids)
            elif complete > self.shown:
                self.settled = len(self.ids) - 1
            self.shown = max(self.shown, complete)
        piece = self.decoder.decode(self.ids)[before : self.shown] if ids else ""
        if len(self.ids) > 64 and self.settled == len(self.ids):  # nothing pending: start over
            self.ids, self.shown, self.settled = [], 0, 0
        return piece


def stream_of(decoder: Decoder, prompt: Sequence[int], skip_special_tokens: bool = True) -> TextStream:
    if isinstance(decoder, Tokenizer):
        return decoder.stream(prompt, skip_special_tokens)
    return DecodedStream(decoder)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError('messages is a list like [{"role": "user", "content": "..."}]')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'messages[{i}] needs a "role" and a "content", got {message!r}')


def _compile(template: str) -> Any:
    """As transformers does: sandboxed, blocks trimmed."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from error
