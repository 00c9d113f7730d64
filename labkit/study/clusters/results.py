"""The figures of one served workload: from a cluster's requests and replicas to numbers and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from labkit.bench.metrics import Timed, latencies
from labkit.core.options import closest, real
from labkit.study.clusters.cluster import Cluster, Tracked

SLO = {"ttft": 1.0, "tpot": 0.1}  # seconds; used where none is given
OBJECTIVES = ("ttft", "tpot", "e2e")
QUANTILES = ("p50", "p90", "p99")


def check_slo(slo: Mapping[str, float] | None) -> dict[str, float]:
    """A service level objective: the most seconds for each of ttft, tpot and e2e."""
    given = SLO if slo is None else slo
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f'slo= is a dict of seconds, such as {{"ttft": 1.0, "tpot": 0.05}}, got {slo!r}')
    for name in given:
        if name not in OBJECTIVES:
            raise ValueError(f"slo= has no {name!r}; {closest(str(name), OBJECTIVES)}")
    return {name: real(f"slo[{name!r}]", value, least=0.0, open_left=True) for name, value in given.items()}


def metrics_of(cluster: Cluster, slo: Mapping[str, float], since: int = 0) -> dict[str, float]:
    """Figures of the requests from the `since`-th on. Requests that did not finish miss the objective."""
    tracked = cluster.tracked[since:]
    timed = [_timed(one) for one in tracked if one.status == "finished"]
    found: dict[str, float] = {
        "requests": len(timed),
        "rejected": sum(one.status == "rejected" for one in tracked),
        "aborted": sum(one.status == "aborted" for one in tracked),
    }
    begin = min((one.incoming.arrival for one in tracked), default=0.0)
    span = max((one.done for one in timed), default=begin) - begin
    output = sum(one.num_output for one in timed)
    met = sum(_meets(one, slo) for one in timed)
    found |= {
        "makespan": span,
        "output_tokens_per_s": output / span if span else 0.0,
        "goodput": met / span if span else 0.0,
        "attained": met / len(tracked) if tracked else 0.0,
    }
    for name, values in latencies(timed).items():
        found |= {f"{name}_{which}": values[which] for which in QUANTILES}
    prompts = sum(one.incoming.num_prompt for one in tracked if one.admitted_at is not None)
    cached = sum(one.num_cached for one in tracked)
    busy = np.array([replica.busy for replica in cluster.replicas], float)
    found |= {
        "hit_rate": cached / prompts if prompts else 0.0,
        "imbalance": float(busy.max() / busy.mean()) if busy.any() else 1.0,
        "preemptions": sum(one.preemptions for one in tracked),
        "evictions": sum(replica.blocks.num_evicted for replica in cluster.replicas),
    }
    return found


def columns_of(cluster: Cluster, since: int = 0) -> dict[str, list[Any]]:
    """One entry per request: where it went, and its times in seconds."""
    rows = [_row(one) for one in sorted(cluster.tracked[since:], key=lambda one: one.place)]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _timed(one: Tracked) -> Timed:
    assert one.first_token_at is not None and one.finished_at is not None
    incoming = one.incoming
    return Timed(
        incoming.arrival, one.first_token_at / 1e9, one.finished_at / 1e9, incoming.num_prompt, incoming.num_output
    )


def _meets(one: Timed, slo: Mapping[str, float]) -> bool:
    return all((getattr(one, name) or 0.0) <= most for name, most in slo.items())


def _row(one: Tracked) -> dict[str, Any]:
    return {
        "request": one.place, "replica": one.replica, "decode_replica": one.decode_replica, "status": one.status,
        "arrival": one.incoming.arrival, "session": one.incoming.session, "priority": one.incoming.priority,
        "waited": _between(one.arrival, one.admitted_at), "ttft": _between(one.arrival, one.first_token_at),
        "tpot": _each(one), "e2e": _between(one.arrival, one.finished_at),
        "num_prompt": one.incoming.num_prompt, "num_cached": one.num_cached, "num_output": one.incoming.num_output,
        "preemptions": one.preemptions,
    }  # fmt: skip


def _between(start: int, end: int | None) -> float | None:
    return None if end is None else (end - start) / 1e9


def _each(one: Tracked) -> float | None:
    if one.first_token_at is None or one.finished_at is None or one.incoming.num_output < 2:
        return None
    return (one.finished_at - one.first_token_at) / 1e9 / (one.incoming.num_output - 1)
