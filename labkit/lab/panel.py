"""The kernel lab as widgets: choose op, shapes, dtypes and variants, and run. Everything works by method calls as well.

A run has its own thread, so the notebook stays responsive. Results replace the previous ones. Each panel creates one
FigureWidget and reuses it, because every instance sends 5 MB to the browser.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from html import escape
from typing import Any, Protocol

from labkit_kernels import OPS, Op

from labkit.core.options import duration


class Lab(Protocol):
    """What the panel needs of a kernel lab."""

    op: Op
    shapes: list[str]
    variants: list[str]

    def of(self, name: str) -> Lab:
        """The lab of another op on the same machine, in the same panel."""
        ...

    def _repr_html_(self) -> str: ...


NOTHING = '<div style="opacity:.62">nothing was run yet</div>'


class Panel:
    """What `lab.panel()` shows. `choose(...)` and `run()` are the clicks.

    >>> import labkit as lk
    >>> panel = lk.kernel_lab("rms_norm").panel()
    >>> panel.choose(shapes=["1x4096"], dtypes=["float32"], variants=["reference"])
    Panel(rms_norm: 1 shapes, 1 dtypes, 1 variants; idle)
    """

    def __init__(self, lab: Lab) -> None:
        try:
            import ipywidgets
            import plotly.graph_objects as go

            self.figure = go.FigureWidget(layout={"template": "none", "height": 420, "margin": {"t": 20}})
        except ImportError as error:
            raise ImportError("the panel needs ipywidgets, anywidget and plotly: pip install 'labkit[lab]'") from error
        self.lab = lab
        self.error: BaseException | None = None  # the error of the latest run
        self.num_runs = 0  # number of runs that have ended
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        wide = {"style": {"description_width": "58px"}, "layout": {"width": "285px"}}
        self.op = ipywidgets.Dropdown(options=sorted(OPS), value=lab.op.name, description="op", **wide)
        self.shapes = ipywidgets.SelectMultiple(description="shapes", rows=6, **wide)
        self.dtypes = ipywidgets.SelectMultiple(
            options=["float32", "bfloat16", "float16"], value=["bfloat16"], rows=3, description="dtypes", **wide
        )
        self.variants = ipywidgets.SelectMultiple(description="variants", rows=6, **wide)
        self.button = ipywidgets.Button(description="Run", button_style="primary", icon="play")
        self.status = ipywidgets.HTML("")
        self.results = ipywidgets.HTML(NOTHING)
        self.box = ipywidgets.VBox(
            [
                ipywidgets.HBox(
                    [ipywidgets.VBox([self.op, self.dtypes]), self.shapes, self.variants],
                    layout={"flex_flow": "row wrap"},
                ),
                ipywidgets.HBox([self.button, self.status], layout={"align_items": "center"}),
                self.figure,
                self.results,
            ]
        )
        for name, part in (
            ("panel", self.box),
            ("run", self.button),
            ("status", self.status),
            ("results", self.results),
        ):
            part.add_class(f"labkit-kernel-{name}")
        self._offer()
        self.op.observe(lambda change: self._change_op(change["new"]), names="value")
        self.button.on_click(lambda _: self.start())

    def __repr__(self) -> str:
        parts = (self.shapes, self.dtypes, self.variants)
        chosen = ", ".join(f"{len(part.value)} {part.description}" for part in parts)
        return f"Panel({self.lab.op.name}: {chosen}; {'running' if self.is_running else 'idle'})"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The widgets, and the current results as HTML for a notebook that is opened without a kernel."""
        bundle: dict[str, Any] = dict(self.box._repr_mimebundle_(**options) or {})
        return bundle | {"text/plain": repr(self), "text/html": self.lab._repr_html_()}

    # -- choosing ------------------------------------------------------------------------------------------------

    def choose(
        self,
        op: str | None = None,
        shapes: Sequence[str] | None = None,
        dtypes: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
    ) -> Panel:
        """Set the lists as if by clicking; None leaves a list unchanged."""
        if op is not None:
            if op not in OPS:
                raise ValueError(f"there is no op {op!r}: there are {', '.join(sorted(OPS))}")
            self.op.value = op
        if variants is not None:
            self._offer_variants()  # a variant may have been added since
        for part, wanted in ((self.shapes, shapes), (self.dtypes, dtypes), (self.variants, variants)):
            if wanted is not None:
                wanted = [wanted] if isinstance(wanted, str) else list(wanted)
                unknown = [one for one in wanted if one not in part.options]
                if unknown:
                    raise ValueError(f"{part.description} has no {unknown[0]!r}: {', '.join(part.options)}")
                part.value = wanted
        return self

    def _change_op(self, name: str) -> None:
        """Switch to another op's lab; results of the previous op stay with its own lab."""
        if name != self.lab.op.name:
            self.lab = self.lab.of(name)
            self._offer()

    def _offer(self) -> None:
        self.shapes.options = self.lab.shapes
        self.shapes.value = self.lab.shapes[:2]
        self._offer_variants()
        self.variants.value = self.lab.variants

    def _offer_variants(self) -> None:
        chosen = self.variants.value
        self.variants.options = self.lab.variants
        self.variants.value = [name for name in chosen if name in self.lab.variants]

    # -- running -------------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> Panel:
        """Run the selection in the background; does nothing if a run is in progress."""
        with self._lock:
            if not self.is_running:
                self.error = None
                self.button.disabled = True
                self._thread = threading.Thread(target=self._run, name="labkit-kernel-lab", daemon=True)
                self._thread.start()
        return self

    def wait(self, timeout: float | None = None) -> Panel:
        """Wait until the run has ended; raises what the run raised."""
        if timeout is not None:
            duration("timeout", timeout)
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"{self!r} has not ended after {timeout:g} s")
        if self.error is not None:
            raise self.error
        return self

    def run(self) -> Panel:
        """Run the selection and wait."""
        return self.start().wait()

    def _run(self) -> None:
        try:
            self._measure()
            self.status.value = ""
        except Exception as error:  # a user's variant may raise anything: shown here, raised by wait()
            self.error = error
            self.status.value = f'<span style="color:#d55e00">{escape(f"{type(error).__name__}: {error}")}</span>'
        finally:
            self.num_runs += 1
            self.button.disabled = False

    def _measure(self) -> None:
        """Check and time the variants one by one, then draw."""
        lab, dtypes, shapes = self.lab, list(self.dtypes.value), list(self.shapes.value)
        for part in (self.shapes, self.dtypes, self.variants):
            if not part.value:
                raise ValueError(f"choose {part.description} first")
        self.status.value = f"checking and timing {escape(', '.join(self.variants.value))} ..."
        found = lab.bench(shapes, dtypes, list(self.variants.value))
        self.results.value = found._repr_html_()
        timed = [row for row in found if row.status == "ok" and row.flops_per_second and row.bytes_per_second]
        self.status.value = "measuring this machine's limits ..."
        drawn = lab.roofline() if timed else None
        with self.figure.batch_update():
            self.figure.data = ()
            if drawn is not None:
                self.figure.add_traces(drawn.traces())
                self.figure.update_layout(drawn.layout())
