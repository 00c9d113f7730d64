"""What the lines of each trace format mean. A parser turns one line's fields into a request or raises; it does not
open files, and what all formats have in common is checked by the trace."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import IO, Any

from labkit.core.blocks.sessions import Hint
from labkit.core.events.log import EventLog
from labkit.study.rebuild import rebuild
from labkit.study.traces.hashing import token_hashes
from labkit.study.traces.trace import BadRequestError, TraceRequest

Row = Mapping[str, Any]
Parser = Callable[[Row], "TraceRequest | None"]  # None: a line that is no request
Parsed = Iterator["tuple[str, TraceRequest | BadRequestError]"]
MOST_CHATS = 2**20  # conversations that are remembered
NAMES = ("id", "session", "tenant", "parent", "kind", "parent_session")


def json_lines(file: IO[str], parse: Parser) -> Parsed:
    loads = json.loads
    for number, line in enumerate(file, 1):
        place = f"line {number}"
        try:
            row = loads(line)
        except (ValueError, RecursionError) as error:
            if line.strip():
                yield place, BadRequestError("not JSON", str(error))
            continue
        if not isinstance(row, dict):
            yield place, BadRequestError("not an object", line[:40].strip())
        elif (found := parsed(parse, row)) is not None:
            yield place, found


def csv_lines(file: IO[str], parse: Parser) -> Parsed:
    rows = csv.DictReader(file, skipinitialspace=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield f"line {rows.line_num}", BadRequestError("not CSV", str(error))
            continue
        if row is None:
            return
        if (found := parsed(parse, row)) is not None:
            yield f"line {rows.line_num}", found


def parsed(parse: Parser, row: Row) -> TraceRequest | BadRequestError | None:
    try:
        return parse(row)
    except BadRequestError as error:
        return error
    except KeyError as error:
        return BadRequestError("missing field", str(error).strip("'"))
    except (TypeError, ValueError, OverflowError) as error:
        return BadRequestError("malformed field", str(error))


def number(row: Row, name: str) -> int:
    value = row[name]
    if type(value) is not int:
        raise BadRequestError("malformed field", f"{name} must be a whole number, got {value!r}")
    return value


def seconds(row: Row, name: str) -> float:
    value = row[name]
    if type(value) not in (int, float):
        raise BadRequestError("malformed field", f"{name} must be a number, got {value!r}")
    return float(value)


def hashes(row: Row, name: str = "hash_ids") -> array[int]:
    found = row[name]
    if not isinstance(found, list):
        raise BadRequestError("malformed field", f"{name} must be a list, got {found!r}")
    try:
        return array("q", found)
    except (TypeError, OverflowError):
        raise BadRequestError("malformed field", f"{name} must be 64-bit whole numbers") from None


def mooncake(row: Row) -> TraceRequest:
    time = seconds(row, "timestamp") / 1e3
    return TraceRequest(time, number(row, "input_length"), number(row, "output_length"), hashes(row))


class Bailian:
    """Qwen's traces from Alibaba's Bailian. A chat's first request names the session of all later turns."""

    def __init__(self) -> None:
        self.root: OrderedDict[str, str] = OrderedDict()  # chat -> the first of its conversation

    def __call__(self, row: Row) -> TraceRequest:
        id, parent = str(row["chat_id"]), str(row["parent_chat_id"])
        before = None if parent in ("-1", "None", "") else parent
        session = id if before is None else self.root.get(before, before)
        self.root[id] = session
        if len(self.root) > MOST_CHATS:
            self.root.popitem(last=False)
        kind = row.get("type")
        return TraceRequest(
            seconds(row, "timestamp"), number(row, "input_length"), number(row, "output_length"), hashes(row),
            id=id, session=session, parent=before, kind=None if kind is None else str(kind),
        )  # fmt: skip


class Azure:
    """Times are dates, and become seconds after the first."""

    def __init__(self) -> None:
        self.first: datetime | None = None

    def __call__(self, row: Row) -> TraceRequest:
        time = datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=None)
        self.first = self.first or time
        after = (time - self.first).total_seconds()
        return TraceRequest(after, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def burstgpt(row: Row) -> TraceRequest:
    session, kind = row.get("Session ID"), row.get("Log Type")
    return TraceRequest(
        float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]),
        session=session or None, kind=kind or None,
    )  # fmt: skip


class Own:
    """labkit's JSON lines: a header, then requests with the fields of `TraceRequest` that they have."""

    def __init__(self, block_size: int | None) -> None:
        self.block_size = block_size

    def __call__(self, row: Row) -> TraceRequest | None:
        if "labkit_trace" in row:
            if row["labkit_trace"] != 1:
                raise BadRequestError("unknown version", f"{row['labkit_trace']!r}; this labkit reads 1")
            self.block_size = self.block_size or row.get("block_size")
            return None
        tokens = None if row.get("tokens") is None else array("i", row["tokens"])
        own = hashes(row, "hashes") if row.get("hashes") is not None else array("q")
        if tokens is not None and not own and self.block_size:
            own = token_hashes(tokens, self.block_size)
        names = {name: row.get(name) for name in NAMES}
        if odd := [name for name, value in names.items() if not (value is None or isinstance(value, str))]:
            raise BadRequestError("malformed field", f"{odd[0]} must be a string, got {names[odd[0]]!r}")
        think = None if row.get("think") is None else seconds(row, "think")
        try:
            hint = None if row.get("hint") is None else Hint.of(row["hint"])
        except ValueError as error:
            raise BadRequestError("malformed field", str(error)) from None
        return TraceRequest(
            seconds(row, "arrival"), number(row, "prompt"), number(row, "output"), own, tokens, think=think, hint=hint,
            **names,
        )  # fmt: skip


def events(file: IO[str]) -> Parsed:
    """A saved event log: when requests came, how long they and their answers were. Prompts are rebuilt from the blocks
    that the log shows being stored, and have tokens of their own elsewhere; with the prefix cache off there are no
    hashes. The whole log is read at once."""
    lines = list(file)
    prompts = _prompts(lines)
    waiting: deque[list[Any]] = deque()  # [place, id, fields, answer], in order of submission
    of: dict[str, list[Any]] = {}

    def out(final: bool = False) -> Parsed:
        while waiting and (final or waiting[0][3] is not None):
            place, id, fields, answer = waiting.popleft()
            of.pop(id, None)
            if answer is None:
                answer = BadRequestError("never ended", f"request {id!r}")
            if isinstance(answer, BadRequestError):
                yield place, answer
            else:
                now, num_prompt, parent, session, above, hint = fields
                own, tokens = prompts.get(id, ((), None))
                yield place, TraceRequest(
                    now / 1e9, num_prompt, answer, own, tokens, id=id, parent=parent, session=session,
                    parent_session=above, hint=hint,
                )  # fmt: skip

    def read(row: Row) -> None:
        kind = row.get("event")
        if kind == "Submitted":
            fields = [row["now"], row["num_prompt"], row["parent"], None, None, None]
            waiting.append([place, row["request"], fields, None])
            of[row["request"]] = waiting[-1]
        elif kind == "InSession" and row["request"] in of:
            of[row["request"]][2][3:5] = row["session"], row["parent"]
        elif kind == "Hinted" and row["request"] in of:
            after = row["after"]
            of[row["request"]][2][5] = Hint(row["hint"], None if after is None else after / 1e9)
        elif kind in ("Finished", "Aborted") and row["request"] in of:
            of[row["request"]][3] = row["num_output"]
        elif kind == "Rejected" and row["request"] in of:
            of[row["request"]][3] = BadRequestError("rejected", f"request {row['request']!r}")

    for at, line in enumerate(lines, 1):
        place = f"line {at}"
        try:
            read(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield place, BadRequestError("not an event", f"{error}")
        yield from out()
    yield from out(final=True)


def stored_block_size(file: IO[str]) -> int | None:
    """Tokens of a block in a saved event log; None if nothing was stored."""
    for line in file:
        if '"Stored"' in line:
            try:
                return len(json.loads(line)["tokens"])
            except (ValueError, KeyError, TypeError):
                continue
    return None


def _prompts(lines: list[str]) -> dict[str, tuple[array[int], array[int]]]:
    """The hashes and tokens of each request's prompt; nothing if no blocks were stored."""
    size = stored_block_size(iter(lines))  # type: ignore[arg-type]
    if size is None:
        return {}
    events = filter(_is_event, lines[1:])
    try:
        found = rebuild(EventLog.load(io.StringIO("".join([*lines[:1], *events]))), aborted=True)
    except ValueError:  # no request ended, or a damaged event: the lines say so themselves
        return {}
    prompts = {}
    for name, request, root in zip(found.names, found.requests, found.roots, strict=True):
        tokens = array("i", request.prompt.tobytes())
        prompts[name] = token_hashes(tokens, size, salt=root), tokens
    return prompts


def _is_event(line: str) -> bool:
    try:
        return isinstance(json.loads(line).get("event"), str)
    except (ValueError, AttributeError):
        return False


def sharegpt(file: IO[str], tokenizer: Any, block_size: int) -> Parsed:
    """Conversations without times, one after the other: each answer that a model gave is a request, whose prompt is
    everything before it."""
    for i, entry in enumerate(json_array(file)):
        place = f"conversation {i}"
        if isinstance(entry, BadRequestError):
            yield place, entry
            continue
        turns = entry.get("conversations") or entry.get("conversation") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not turns:
            yield place, BadRequestError("no conversation", "")
            continue
        name = str(entry.get("id", i))
        tokens, before = array("i"), None
        for j, turn in enumerate(turns):
            if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
                yield place, BadRequestError("malformed turn", f"turn {j}")
                break
            ids = tokenizer.encode(turn["value"])
            if (
                tokens
                and ids
                and turn.get("from", "gpt" if j % 2 else "human") in ("gpt", "assistant", "chatgpt", "bard")
            ):
                id = f"{name}:{j}"
                yield place, TraceRequest(
                    0.0, len(tokens), len(ids), token_hashes(tokens, block_size), tokens[:],
                    id=id, session=name, parent=before, think=None if before is None else 0.0,
                )  # fmt: skip
                before = id
            tokens.extend(ids)


def json_array(file: IO[str], chunk: int = 1 << 20) -> Iterator[Any]:
    """The entries of a JSON array, one at a time, without reading all of it."""
    decoder, text, at, begun, ended = json.JSONDecoder(), "", 0, False, False
    while True:
        while at < len(text) and text[at] in " \t\r\n,[" and not (text[at] == "[" and begun):
            begun |= text[at] == "["
            at += 1
        if begun and text[at : at + 1] == "]":
            return
        if at < len(text) and not begun:
            yield BadRequestError("not a JSON array", text[at : at + 40])
            return
        try:
            entry, end = decoder.raw_decode(text, at) if at < len(text) else (None, -1)
            if end == len(text) and not ended:  # a number may go on
                raise ValueError("more to read")
        except ValueError as error:
            end = -1
            if ended:
                yield BadRequestError("not JSON", str(error))
                return
        if end >= 0:
            yield entry
            at = end
            continue
        more = file.read(max(chunk, len(text) - at))
        ended = not more
        if ended and at >= len(text):
            yield BadRequestError("not JSON", "the array does not end")
            return
        text, at = text[at:] + more, 0
