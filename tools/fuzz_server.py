"""Sends requests that Schemathesis makes from /openapi.json to a server over the embedded model.

    python tools/fuzz_server.py [--examples 500] [--seed 0] [--st PATH]

A server error, an answer that the description does not allow, or a header that is missing ends it with status 1.
Schemathesis needs packages that labkit does not, so it is called as a program: `pipx install schemathesis`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not checked: positive_data_acceptance, since a description cannot tell which combinations of fields are refused, and
# negative_data_rejection, since "5" is taken for 5 and 0 for false, as vLLM does.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "unsupported_method",
)  # fmt: skip


def command(st: str, url: str, examples: int, seed: int) -> list[str]:
    """Schemathesis's command line."""
    return [
        st, "run", f"{url}/openapi.json", "--url", url, "--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing",
        "--max-examples", str(examples), "--seed", str(seed), "--generation-database", "none", "--continue-on-failure",
        "--suppress-health-check", "all", "--request-timeout", "60", "--no-color",
    ]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Send requests made from /openapi.json to a server.")
    parser.add_argument("--examples", type=int, default=500, help="for each route with a body")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--st", default="st", help="Schemathesis's program")
    given = parser.parse_args(words)
    st = shutil.which(given.st)
    if st is None:
        parser.error(f"there is no program {given.st}: pipx install schemathesis, or name it with --st")
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    import labkit as lk

    with (
        lk.Engine(num_blocks=512, max_model_len=128) as engine,
        lk.serve(engine, max_seconds_to_compile=2.0, log_requests=False) as server,
    ):
        with tempfile.TemporaryDirectory() as folder:  # it writes files where it runs
            status = subprocess.run(command(st, server.url, given.examples, given.seed), cwd=folder).returncode
        server.stop()
        engine.check()
        left = engine.blocks.stats().used_blocks
    print(f"afterwards: {left} blocks in use, {len(engine.scheduler.requests)} requests")
    return status or bool(left)


if __name__ == "__main__":
    raise SystemExit(main())
