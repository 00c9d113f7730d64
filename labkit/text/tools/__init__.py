"""Tool-call parsers by the names that vLLM gives them. A parser reads what one family of models writes."""

from __future__ import annotations

from labkit.text.reader import Reader
from labkit.text.tools.hermes import HermesParser
from labkit.text.tools.llama3 import Llama3Parser
from labkit.text.tools.mistral import MistralParser
from labkit.text.tools.pythonic import PythonicParser

PARSERS: dict[str, type[Reader]] = {
    "hermes": HermesParser,
    "qwen": HermesParser,
    "llama3_json": Llama3Parser,
    "llama4_json": Llama3Parser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "llama4_pythonic": PythonicParser,
}
