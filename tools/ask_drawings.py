"""Asks `tiny-vision` held-out questions over HTTP, as clients do: the openai package, pictures as data: URLs.

    python tools/ask_drawings.py                                  # 800 questions of 200 drawings, in-process server
    python tools/ask_drawings.py --url http://localhost:8000/v1   # a running `labkit serve tiny-vision`

Prints the share of right answers by kind of picture. Exit status 1 if it is below --at-least.
"""

from __future__ import annotations

import argparse
import base64
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import labkit as lk
from labkit.assets import drawings


def ask(client, model: str, made: drawings.Drawing, question: str) -> str:
    url = "data:image/png;base64," + base64.b64encode(made._repr_png_()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=8
    )
    return answer.choices[0].message.content


@contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    if args.url:
        yield args.url
        return
    with lk.Engine("tiny-vision", dtype=args.dtype, num_blocks=512) as engine, lk.serve(engine) as started:
        yield f"{started.url}/v1"


def main() -> None:
    import openai

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server's, ending in /v1; default: one started here")
    parser.add_argument("--drawings", type=int, default=200, help="of a quarter each kind, up to four questions each")
    parser.add_argument("--first", type=int, default=0, help="seed of the first drawing; the card's are 0 to 799")
    parser.add_argument("--dtype", default="bfloat16", help="of the server started here")
    parser.add_argument("--at-least", type=float, default=0.0, help="share of right answers")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.drawings)
    asked = [
        (made, question, answer)
        for made in (drawings.drawing(seed, drawings.KINDS[seed % len(drawings.KINDS)]) for seed in seeds)
        for _, question, answer in made.questions[:4]
    ]
    with server(args) as url, ThreadPoolExecutor(8) as pool:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        said = list(pool.map(lambda one: ask(client, model, *one[:2]), asked))
    right = defaultdict(list)
    for (made, _, answer), found in zip(asked, said, strict=True):
        for name in ("all", made.scene.kind):
            right[name].append(found == answer)
    for name, values in right.items():
        print(f"{name:8} {sum(values):5} of {len(values):5} right: {sum(values) / len(values):.1%}")
    sys.exit(sum(right["all"]) / len(asked) < args.at_least)


if __name__ == "__main__":
    main()
