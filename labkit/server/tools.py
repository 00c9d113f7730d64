"""The tools of a request: their form, which of them the answer must call, and how its text is constrained and read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from labkit.server.errors import ApiError
from labkit.server.sampling import Text
from labkit.server.service import new_id
from labkit.server.settings import Settings
from labkit.text.reader import Reader
from labkit.text.tools import PARSERS
from labkit.text.tools.forced import ForcedParser, NamedParser, list_schema, schema_of

MOST_TOOLS = 512
FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


class Function(BaseModel):
    """`parameters` is the JSON schema of its arguments."""

    model_config = ConfigDict(extra="allow")

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Function


class Named(BaseModel):
    name: FunctionName


class NamedTool(BaseModel):
    """The one function that must be called."""

    type: Literal["function"] = "function"
    function: Named


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS)]
Choice = Literal["none", "auto", "required"] | NamedTool


class Calling(NamedTuple):
    """The tools that an answer may call, and whether it must: `choice` is none, auto, required or a function's name."""

    tools: list[Tool]
    choice: str
    is_named: bool = False
    is_parallel: bool = True

    @property
    def is_forced(self) -> bool:
        return self.is_named or self.choice == "required"

    def form(self) -> dict[str, Any] | None:
        """What the text must be."""
        functions = [tool.function for tool in self.tools]
        if self.is_named:
            (parameters,) = [function.parameters for function in functions if function.name == self.choice][:1]
            return {"json": schema_of(parameters)}
        if self.choice != "required":
            return None
        try:
            schema = list_schema([(f.name, f.parameters) for f in functions], None if self.is_parallel else 1)
        except ValueError as error:
            raise ApiError(str(error), param="tools") from None
        return {"json": schema}

    def reader(self, settings: Settings) -> Reader | None:
        """What reads the calls of one answer."""
        if self.is_named:
            return NamedParser(self.choice)
        if self.choice == "required":
            return ForcedParser()
        parser = settings.tool_call_parser
        return PARSERS[parser]() if self.choice == "auto" and parser is not None else None

    def shown(self, settings: Settings) -> list[dict[str, Any]] | None:
        """The tools as the chat template gets them."""
        if not self.tools or (self.choice == "none" and settings.exclude_tools_when_tool_choice_none):
            return None
        return dumped(self.tools)


def dumped(tools: list[Tool] | None) -> list[dict[str, Any]]:
    """Tools as chat templates get them."""
    return [tool.model_dump(exclude_none=True) for tool in tools or ()]


def calling_of(
    tools: list[Tool] | None, choice: str | NamedTool | None, is_parallel: bool | None, settings: Settings
) -> Calling:
    """Check the tools of a request against its choice and against what the server reads."""
    tools = tools or []
    if choice is None:
        choice = "auto" if tools else "none"
    elif choice != "none" and not tools:
        raise ApiError("tool_choice needs tools", param="tool_choice")
    name = choice.function.name if isinstance(choice, NamedTool) else choice
    if isinstance(choice, NamedTool) and name not in [tool.function.name for tool in tools]:
        raise ApiError(f"tool_choice names {name!r}, which is not one of the tools", param="tool_choice")
    if choice == "auto" and not settings.reads_calls:
        raise ApiError(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set; without them, '
            'tool_choice may be "required", a function, or "none"',
            param="tool_choice",
        )
    return Calling(tools, name, isinstance(choice, NamedTool), is_parallel is not False)


def new_call_id(settings: Settings) -> str:
    parser = settings.tool_call_parser
    is_short = parser is not None and PARSERS[parser].short_ids
    return new_id("x")[2:11] if is_short else new_id("chatcmpl-tool")
