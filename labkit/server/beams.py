"""`use_beam_search` in completions: the n likeliest continuations of each prompt.

Searched in a thread of its own, whose single steps are requests like any other. Ends when the client leaves or the
server stops.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from labkit.engine.beams import MOST_BEAMS, Beam, BeamSearchParams, SearchStopped, beam_search
from labkit.server.calls import compile_form, room_for
from labkit.server.errors import ApiError, ClientGone, clean, engine_dead, overloaded
from labkit.server.http import answer
from labkit.server.sampling import Sampling
from labkit.server.service import Service, new_id


async def search(
    service: Service,
    request: Request,
    body: Sampling,
    prompts: list[list[int]],
    echoes: list[str],
    length_penalty: float | None,
) -> Response:
    """`echoes` go before the answers of each prompt."""
    params = _params(service, body, prompts, 1.0 if length_penalty is None else length_penalty)
    grammar = await compile_form(service, body)
    service.check_queue(params.beam_width * len(prompts))
    service.hub()  # starts the engine
    gone = threading.Event()

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone.set()

    def should_stop() -> bool:
        return gone.is_set() or service.is_dead or service.is_stopping

    adapter = service.adapter_of(service.check_model(body.model))
    watching = asyncio.ensure_future(watch())
    try:
        found = await asyncio.to_thread(beam_search, service.engine, prompts, params, should_stop, grammar, adapter)
    except SearchStopped:
        raise ClientGone if gone.is_set() else overloaded("the server is shutting down", 5, "stopping") from None
    except ValueError as error:  # the text came to where its form cannot be followed
        raise ApiError(clean(str(error)), param=body.form_field()) from None
    except RuntimeError as error:
        raise engine_dead(clean(str(error))) from None
    finally:
        watching.cancel()
    return answer(_written(service, body, prompts, echoes, found))


def _params(service: Service, body: Sampling, prompts: list[list[int]], length_penalty: float) -> BeamSearchParams:
    """Checked like any completion's."""
    most = 16 if body.max_tokens is None else body.max_tokens
    for ids in prompts:
        if not ids:
            raise ApiError("prompt is empty: a request needs at least one token", param="prompt")
        room_for(service, len(ids), most, "prompt")
    width = body.n or 1
    for name, wrong in (
        ("stream", body.stream),
        ("logprobs", body.wanted_logprobs()[0] is not None),
        ("max_tokens", most < 1),
        ("return_weight_versions", body.return_weight_versions),
        ("edit", body.edit is not None),
        ("capture", body.capture is not None),
    ):
        if wrong:
            raise ApiError(f"{name} cannot go with use_beam_search", param=name)
    if width > MOST_BEAMS:
        raise ApiError(f"n must be at most {MOST_BEAMS} with use_beam_search, got {width}", param="n")
    return BeamSearchParams(
        beam_width=width, max_tokens=most, ignore_eos=bool(body.ignore_eos), length_penalty=length_penalty
    )


def _written(
    service: Service, body: Sampling, prompts: list[list[int]], echoes: list[str], found: list[list[Beam]]
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    num_output = 0
    for ids, before, beams in zip(prompts, echoes, found, strict=True):
        for beam in beams:
            num_output += len(beam.token_ids)
            choices.append(
                {
                    "index": len(choices),
                    "text": before + (beam.text or ""),
                    "logprobs": None,
                    "finish_reason": beam.finish_reason,
                    "stop_reason": None,
                    "prompt_logprobs": None,
                }
            )
            if body.return_token_ids:
                choices[-1] |= {"prompt_token_ids": ids, "token_ids": list(beam.token_ids)}
    num_prompt = sum(map(len, prompts))
    usage = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time())}
    return {**head, "model": service.check_model(body.model), "choices": choices, "usage": usage}
