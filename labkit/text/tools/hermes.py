"""Calls as Hermes, Qwen 2.5 and Qwen 3 write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>"""

from __future__ import annotations

from labkit.text.reader import Reader, Steps

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(Reader):
    tags = (BEGIN, END)

    def read(self) -> Steps[None]:
        while (yield from self.until("content", BEGIN, strip=True)):
            if (yield from self.attempt(self.call_object())):
                yield from self._close()

    def _close(self) -> Steps[None]:
        """The closing tag may be missing, as a stop string."""
        yield from self.space()
        if not (yield from self.starts(END)):
            self.at = self.mark
