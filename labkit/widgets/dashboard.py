"""A live dashboard of a run: figures, panels and controls, fed by events.

The engine's thread appends batches to a deque. One daemon thread draws at most five times a second, and less often if
drawing is slow.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from html import escape
from os import PathLike
from typing import Any

from labkit.core.events.log import EventLog
from labkit.widgets import figure, panels
from labkit.widgets.controls import controls
from labkit.widgets.feed import Feed

EVERY = 0.2  # seconds between two updates
FIT_EVERY = 4.0  # seconds between two checks of the width, when nothing else changes
REPEATS = 3  # of the last update, at those times, for pages that missed it
MOST_STEPS = 65_536  # steps of a log that are kept for viewing


class Dashboard:
    """What `engine.dashboard()` returns; for a saved log, use `labkit.dashboard(log)`.

    It is live when shown as a cell's result. `play`, `pause`, `step`, `stop`, `wait` and `await` work without clicking.
    A saved log has `show(step)` instead.
    """

    def __init__(self, log: EventLog, player: Any = None, feed: Any = None, machine: Any = None) -> None:
        self.log, self.player = log, player
        self.feed: Any = feed if feed is not None else Feed(log) if player is not None else Feed(log, keep=MOST_STEPS)
        if player is not None:
            self.feed.block_size = player.engine.blocks.block_size
        self.shown: int | None = None  # the step shown; None: the latest
        self.closed = False
        self.num_drawn = 0
        self.trouble = ""  # message: what a control could not do
        self._machine = machine if machine is not None else panels.Machine()
        self._lock = threading.RLock()  # held while writing to widgets
        self._wake = threading.Event()
        self._figure = figure.build()
        self._widgets = controls(self)
        self._still: Any = None  # the display with the static copy
        self._drawn: tuple[Any, ...] | None = None
        self._fitted = 0.0  # when the width was last checked
        self._repeated = 0  # repeats of the last update
        self._thread: threading.Thread | None = None
        self._finalizer = weakref.finalize(self, self._wake.set)
        if player is not None:
            player.at_end = weakref.WeakMethod(self._draw_end)
        self.draw()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.player.state if self.player is not None else "a saved log"
        return f"Dashboard({state}, {self.feed.num_steps} steps)"

    # -- as a cell's result --------------------------------------------------------------------------------------

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        with self._lock:
            bundle = self._widgets["box"]._repr_mimebundle_()
            bundle = bundle[0] if isinstance(bundle, tuple) else bundle
            display({**bundle, "text/plain": repr(self)}, raw=True)
            self._still = display(HTML(""), display_id=True)
            self._follow()
            if self.player is None:
                self._keep_still()

    def _follow(self) -> None:
        if self._thread is None and not self.closed:
            self._thread = threading.Thread(target=_draw_on, args=(weakref.ref(self), self._wake), daemon=True,
                                            name="labkit-dashboard")  # fmt: skip
            self._thread.start()

    # -- driving -------------------------------------------------------------------------------------------------

    def play(self) -> Any:
        """Continue. Returns the player: wait for it, or use `await live.play()` to keep the buttons working
        meanwhile."""
        player = self._driven()
        player.play()
        self._follow()
        self._keep_still("")
        self.draw()
        return player

    def pause(self) -> None:
        self._driven().pause()
        self.draw()

    def step(self, num: int = 1) -> None:
        self._driven().step(num)
        self.draw()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until everything is served. While a cell waits, the kernel does not process clicks; with `await` it
        does."""
        self._driven().wait(timeout)

    def __await__(self) -> Any:
        return self._driven().__await__()

    def stop(self) -> None:
        """Stop playing. The figure stays, and a static copy of it is saved with the notebook."""
        if self.player is not None:
            self.player.stop()
        self._draw_end()

    def _draw_end(self) -> None:
        self.draw()
        self._keep_still()

    def close(self) -> None:
        """Stop, and end the dashboard's threads. The engine continues as before."""
        if self.closed:
            return
        self.stop()
        self.closed = True
        self.feed.close()
        self._finalizer()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _driven(self) -> Any:
        if self.player is None:
            raise RuntimeError("a saved log cannot be played: show(step) shows any of its steps")
        return self.player

    # -- looking -------------------------------------------------------------------------------------------------

    def show(self, step: int | None = None) -> None:
        """Go to a step, in either direction; without an argument, to the latest."""
        first, last = self.feed.first, self.feed.num_steps
        if step is not None and not (isinstance(step, int) and first <= step <= last):
            raise ValueError(f"step must be between {first} and {last}, which are kept; got {step!r}")
        self.shown = None if step == last else step
        self.draw()

    def frame(self) -> Any:
        """The steps as a DataFrame."""
        return self.log.frame("Step")

    def snapshot(self) -> str:
        """The dashboard as HTML that needs neither a kernel nor a script."""
        with self._lock:
            self.feed.catch_up()
            return panels.snapshot(self.feed, self._title(), self.shown)

    def _title(self) -> str:
        at = self.feed.num_steps if self.shown is None else self.shown
        return f"Dashboard at step {at:,}"

    def say(self, trouble: object = "") -> None:
        """A message below the controls: what could not be done, and why."""
        self.trouble = str(trouble)
        self._widgets["trouble"].value = (
            f'<span style="color:#d55e00">{escape(self.trouble)}</span>' if self.trouble else ""
        )

    # -- drawing -------------------------------------------------------------------------------------------------

    def draw(self, force: bool = True) -> bool:
        """Update everything; False if nothing has changed."""
        with self._lock:
            self.feed.catch_up()
            state = (self.feed.num_steps, self.shown, self.feed.timeline.now, self.feed.counts.total(),
                     getattr(self.player, "state", None))  # fmt: skip
            if not force and state == self._drawn:
                self._set("machine", self._machine.html())
                return False
            self._drawn = state
            self.num_drawn += 1
            self._repeated = 0
            figure.update(self._figure, self.feed, self.shown)
            figure.refresh_traits(self._figure)
            self._set(
                "strip", panels.strip(panels.figures(self.feed, self.shown)) + panels.ranks(self.feed, self.shown)
            )
            self._set("machine", self._machine.html())
            self._widgets["refresh"]()
            return True

    def _set(self, name: str, html: str) -> None:
        if self._widgets[name].value != html:
            self._widgets[name].value = html

    def _keep_still(self, html: str | None = None) -> None:
        """Save a static copy with the notebook. A page with the live figure hides it (see controls); a page without a
        kernel shows only the copy. There is no copy while the engine plays."""
        if self._still is not None:
            from IPython.display import HTML

            shown = f'<div class="labkit-still-{id(self):x}">{self.snapshot()}</div>' if html is None else html
            self._still.update(HTML(shown))

    def _tick(self) -> float:
        """One iteration of the drawing thread; returns the seconds until the next."""
        begin = time.perf_counter()
        changed = self.draw(force=False)
        if not changed and begin - self._fitted > FIT_EVERY:
            self._fitted = begin
            with self._lock:
                if self._repeated < REPEATS:
                    self._repeated += 1
                    figure.repeat(self._figure)
                figure.fit(self._figure)
        if self.player is not None and self.player.engine.is_closed:
            self.close()  # no more events will come
        spent = time.perf_counter() - begin
        return max(EVERY, 6 * spent) if changed else EVERY


def _draw_on(dashboard: weakref.ref[Dashboard], wake: threading.Event) -> None:
    """The drawing thread; it must not keep an unused dashboard alive."""
    pause = EVERY
    while not wake.wait(pause):
        here = dashboard()
        if here is None or here.closed:
            return
        with contextlib.suppress(RuntimeError):  # the kernel is shutting down
            pause = here._tick()
        del here


def dashboard(source: Any, **options: Any) -> Dashboard:
    """The dashboard of an engine (the options are those of `Engine.dashboard`), of a log, or of a saved log's file.

    >>> dashboard("run.jsonl").show(10)
    """
    if isinstance(source, EventLog):
        log = source
    elif isinstance(source, (str, PathLike)):
        log = EventLog.load(source)
    elif hasattr(source, "dashboard"):
        found: Dashboard = source.dashboard(**options)
        return found
    else:
        raise TypeError(f"a dashboard shows an engine, an EventLog or the file of one, got {source!r}")
    if options:
        raise TypeError(f"a saved log takes no {', '.join(options)}: only an engine can be played")
    return Dashboard(log)
