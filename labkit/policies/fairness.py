"""Fair service between tenants: the Virtual Token Counter (Sheng et al., OSDI 2024)."""

from __future__ import annotations

from typing import Any

from labkit.core.scheduling.views import Progress, RequestView


class VTC:
    """The tenant with the least service first. Service is `prompt` for each prompt token and `output` for each output
    token, divided by the tenant's `shares` (1 if it has none). A request names its tenant in `extra_args={"tenant":
    ..}`.

    A tenant that comes back from a pause is lifted to the least service among those who wait, so that nobody saves up.
    While two tenants always have requests waiting, their service differs by at most 2 max(prompt * longest prompt,
    output * tokens that fit in memory), the paper's bound, if `victim` is this policy's, too:

    >>> import labkit as lk
    >>> fair = lk.policies.VTC()
    >>> eng = lk.Engine(num_blocks=64, order=fair, victim=fair.victim)
    >>> eng.close()
    """

    growing = True  # service never falls

    def __init__(self, *, prompt: float = 1.0, output: float = 2.0, shares: dict[Any, float] | None = None) -> None:
        self.prompt, self.output, self.shares = prompt, output, shares or {}
        self.service: dict[Any, float] = {}
        self.waiting: dict[Any, set[str]] = {}  # tenant -> ids of requests that were never admitted
        self.tenant_of: dict[int, Any] = {}  # serial of an admitted request -> its tenant
        self.last: float = 0.0  # service of the tenant that was served last: where the queue stood when it ran empty

    def __call__(self, request: RequestView, now: int) -> tuple[float, int]:
        tenant = request.extra.get("tenant")
        if request.serial < 0:  # at submission
            if not self.waiting.get(tenant):
                others = [self.service[other] for other, ids in self.waiting.items() if ids and other != tenant]
                self.service[tenant] = max(self.service.get(tenant, 0.0), min(others, default=self.last))
            self.waiting.setdefault(tenant, set()).add(request.id)
        return (self.service.setdefault(tenant, self.last), request.arrival)

    def victim(self, request: RequestView, now: int) -> tuple[float, int]:
        """Of the tenant with the most service, the latest."""
        return (self.service.get(request.extra.get("tenant"), 0.0), request.arrival)

    def admitted(self, request: RequestView, now: int) -> None:
        tenant = request.extra.get("tenant")
        self._no_longer_waits(request)
        self.tenant_of[request.serial] = tenant
        if request.sample == 0:  # further samples share its prompt
            self._charge(tenant, self.prompt * request.num_prompt)
        self.last = self.service[tenant]

    def progress(self, step: Progress) -> None:
        for serial, num in zip(step.serials.tolist(), step.output_tokens.tolist(), strict=True):
            if num and serial in self.tenant_of:
                self._charge(self.tenant_of[serial], self.output * num)
        for request in step.ended:
            self.tenant_of.pop(request.serial, None)
            self._no_longer_waits(request)

    def _charge(self, tenant: Any, tokens: float) -> None:
        self.service[tenant] = self.service.get(tenant, 0.0) + tokens / self.shares.get(tenant, 1.0)

    def _no_longer_waits(self, request: RequestView) -> None:
        tenant = request.extra.get("tenant")
        ids = self.waiting.get(tenant, set())
        ids.discard(request.id)
        if not ids:
            self.waiting.pop(tenant, None)
