"""Calls as Mistral's models write them: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and since version 11 of
their tokenizer [TOOL_CALLS]name{...} or [TOOL_CALLS]name[ARGS]{...} for each call."""

from __future__ import annotations

import re

from labkit.text.reader import Broken, Reader, Steps

TAG, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = re.compile(r"[\w.:-]+")


class MistralParser(Reader):
    tags = (TAG, ID, ARGUMENTS)
    short_ids = True  # their templates take ids of nine letters and digits only

    def read(self) -> Steps[None]:
        while (yield from self.until("content", TAG, strip=True)):
            if (yield from self.space()) == "[":
                yield from self.call_list()
            else:
                yield from self.attempt(self._named())

    def _named(self) -> Steps[None]:
        name = yield from self._word()
        if (yield from self.starts(ID)):
            yield from self._word()
        yield from self.starts(ARGUMENTS)
        if (yield from self.space()) != "{":
            raise Broken
        yield from self.arguments(name)

    def _word(self) -> Steps[str]:
        begin = self.at
        while (yield from self.char()) and (word := _NAME.match(self.text, self.at)) is not None:
            self.at = word.end()
        if self.at == begin:
            raise Broken
        return self.text[begin : self.at]
