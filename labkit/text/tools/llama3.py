"""Calls as Llama 3 writes them: {"name": ..., "parameters": {...}} at the beginning of the answer, several with ";"
between, or behind <|python_tag|> anywhere. JSON without a name and parameters is text."""

from __future__ import annotations

from labkit.text.reader import Reader, Steps

TAG = "<|python_tag|>"


class Llama3Parser(Reader):
    tags = (TAG,)

    def read(self) -> Steps[None]:
        if (yield from self.space()) == "{":
            yield from self._calls()
        else:
            self.at = 0
        while (yield from self.until("content", TAG, strip=True)):
            yield from self._calls()

    def _calls(self) -> Steps[None]:
        while (yield from self.attempt(self.call_object(needs_arguments=True))):
            if (yield from self.space()) in (";", ","):
                self.at += 1
                if (yield from self.space()) == "{":
                    continue
            self.at = self.mark
            return
