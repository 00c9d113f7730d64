"""Buttons, sliders and menus of a dashboard, as ipywidgets. Changes go to the player or to `engine.control`, and take
effect at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ORDERS = ("fcfs", "priority", "sjf", "lpm")
PREEMPTIONS = ("recompute", "swap", "auto")
EVICTIONS = ("lru", "fifo", "lfu", "slru", "s3-fifo", "ttl", "cost", "hinted")
WIDE = {"description_width": "76px"}
PACES = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 6.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


def controls(dashboard: Any) -> dict[str, Any]:
    """The widgets by name; "box" contains them all, "refresh" is a function that updates them."""
    import ipywidgets as w

    found: dict[str, Any] = {name: w.HTML() for name in ("strip", "machine", "trouble", "only")}
    live, still = f"labkit-live-{id(dashboard):x}", f"labkit-still-{id(dashboard):x}"
    found["only"].value = f"<style>body:has(.{live}) .{still}{{display:none}}</style>"  # the copy, where this is shown
    for widget in found.values():
        widget.layout.margin = "0"
    player = dashboard.player
    bar, refresh = (_scrubber if player is None else _transport)(dashboard, w)
    settings, follow = (None, refresh) if player is None else _settings(dashboard, w)
    figure = dashboard._figure
    figure.layout.autosize = True
    shown = [
        bar,
        found["trouble"],
        found["strip"],
        figure,
        *([settings] if settings else []),
        found["machine"],
        found["only"],
    ]
    found["refresh"] = lambda: (refresh(), follow())
    found["box"] = w.VBox(shown)
    found["box"].layout = w.Layout(width="100%", min_width="720px", overflow="hidden")
    found["box"].add_class("labkit-dashboard")
    found["box"].add_class(live)
    return found


def _transport(dashboard: Any, w: Any) -> tuple[Any, Callable[[], None]]:
    """Play, pause, one step, stop; the state; and, on a virtual clock, the pace."""
    player = dashboard.player
    buttons = {
        "play": w.Button(description="Play", icon="play", tooltip="play until everything is served"),
        "pause": w.Button(description="Pause", icon="pause", tooltip="pause after the current step"),
        "step": w.Button(description="Step", icon="step-forward", tooltip="pause, and take one step"),
        "stop": w.Button(description="Stop", icon="stop", tooltip="stop; the figure stays"),
    }
    for name, button in buttons.items():
        button.layout.width = "88px"
        button.add_class(f"labkit-{name}")
        act = getattr(dashboard, name)
        button.on_click(lambda _, act=act: _guarded(dashboard, act))
    state = w.HTML(layout=w.Layout(margin="0 12px"))
    parts: list[Any] = [*buttons.values(), state]
    if not player.real_time:
        paces = sorted({*PACES, player.speed})  # exact values: a slider rounds what it is given
        speed = w.SelectionSlider(options=[(f"{pace:g}x", pace) for pace in paces], value=player.speed,
                                  description="pace", tooltip="virtual seconds a second", style=WIDE)  # fmt: skip
        speed.observe(lambda change: setattr(player, "speed", float(change.new)), "value")
        parts.append(speed)

    def refresh() -> None:
        now = player.state
        over = player.engine.is_closed
        buttons["play"].disabled = over or now == "playing"
        buttons["pause"].disabled = over or now != "playing"
        buttons["step"].disabled = over
        buttons["stop"].disabled = over or now == "stopped"
        now = "engine closed" if over else now
        shown = f'<span class="labkit-state" style="font-weight:600">{now}</span>'
        if state.value != shown:
            state.value = shown

    return w.HBox(parts, layout=w.Layout(align_items="center", flex_flow="row wrap")), refresh


def _scrubber(dashboard: Any, w: Any) -> tuple[Any, Callable[[], None]]:
    """A slider over the steps of a saved log."""
    feed = dashboard.feed
    first, last = min(feed.first, feed.num_steps), feed.num_steps
    slider = w.IntSlider(value=last, min=first, max=last, description="step", continuous_update=True, style=WIDE,
                         layout=w.Layout(width="60%"))  # fmt: skip
    play = w.Play(value=last, min=first, max=last, step=max(1, (last - first) // 200), interval=200)
    w.jslink((play, "value"), (slider, "value"))
    slider.observe(lambda change: _guarded(dashboard, lambda: dashboard.show(int(change.new))), "value")

    def refresh() -> None:
        play.max = slider.max = feed.num_steps  # the log may still be written, and grow
        at = feed.num_steps if dashboard.shown is None else dashboard.shown
        if slider.value != at:
            slider.value = at

    return w.HBox([play, slider], layout=w.Layout(align_items="center")), refresh


def _settings(dashboard: Any, w: Any) -> tuple[Any, Callable[[], None]]:
    """Widgets for the load and the engine's settings, and a function that shows the current settings, whoever changed
    them."""
    player = dashboard.player
    engine, scheduler, blocks = player.engine, player.engine.scheduler, player.engine.blocks
    wide = w.Layout(width="98%")
    following = False

    def slider(kind: Any, description: str, low: float, high: float, **more: Any) -> Any:
        return kind(
            min=low, max=high, description=description, style=WIDE, layout=wide, continuous_update=False, **more
        )

    def menu(description: str, names: tuple[str, ...]) -> Any:
        return w.Dropdown(options=[(name, name) for name in names], description=description, style=WIDE, layout=wide)

    most = max(100.0, 2 * player.load.rate) if player.load else 100.0
    rate = slider(w.FloatSlider, "requests/s", 0.0, most, step=0.1, readout_format=".3g")
    budget = slider(w.IntSlider, "budget", 1, max(2048, scheduler.max_num_batched_tokens))
    rows = slider(w.IntSlider, "rows", 1, scheduler.width)
    mix, order = menu("prompts", tuple(player.mixes)), menu("order", ORDERS)
    eviction, preemption = menu("eviction", EVICTIONS), menu("preemption", PREEMPTIONS)
    caching = w.Checkbox(description="prefix cache", indent=False, layout=wide)
    settings: tuple[tuple[Any, Callable[[], Any], Callable[[Any], Any]], ...] = (  # widget, what is set, how to set it
        (rate, lambda: player.load.rate if player.load else 0.0, lambda x: player.change_load(rate=float(x))),
        (mix, lambda: player.load.mix if player.load else "mixed", lambda x: player.change_load(mix=x)),
        (caching, lambda: blocks.prefix_caching, lambda x: engine.control(prefix_caching=bool(x))),
        (budget, lambda: scheduler.max_num_batched_tokens, lambda x: engine.control(budget=int(x))),
        (rows, lambda: scheduler.max_num_seqs, lambda x: engine.control(rows=int(x))),
        (order, lambda: _plain(scheduler.queue.order, ORDERS), lambda x: engine.control(order=x)),
        (eviction, lambda: _plain(blocks.eviction, EVICTIONS), lambda x: engine.control(eviction=x)),
        (preemption, lambda: scheduler.preemption, lambda x: engine.control(preemption=x)),
    )

    def refresh() -> None:
        nonlocal following
        following = True
        try:
            for widget, read, _ in settings:
                _show(widget, read())
        finally:
            following = False

    def changes(widget: Any, act: Callable[[Any], Any]) -> None:
        def changed(change: Any) -> None:
            if not following:
                _guarded(dashboard, lambda: act(change.new))
                if dashboard.trouble:
                    refresh()  # nothing was changed

        widget.observe(changed, "value")

    refresh()
    for widget, _, act in settings:
        changes(widget, act)
    parts = ([rate, mix, caching], [budget, rows, order], [eviction, preemption])
    box = w.HBox([w.VBox(part, layout=w.Layout(width="33%")) for part in parts], layout=w.Layout(width="100%"))
    return box, refresh


def _plain(value: Any, names: tuple[str, ...]) -> Any:
    """A built-in policy by its name; any other policy as it is."""
    name = _name_of(value)
    return name if name in names else value


def _name_of(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else str(getattr(value, "name", None) or getattr(value, "__name__", repr(value)))
    )


def _show(widget: Any, value: Any) -> None:
    """Show the current value, and widen the widget's range for it if needed."""
    if hasattr(widget, "options"):
        if value not in [option for _, option in widget.options]:
            widget.options = [*widget.options, (_name_of(value), value)]
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and value > widget.max:
        widget.max = value
    if widget.value != value:
        widget.value = value


def _guarded(dashboard: Any, act: Callable[[], Any]) -> None:
    """Run what a click asked for; an error is shown below the buttons."""
    try:
        act()
    except Exception as error:  # a click has no caller to raise to
        dashboard.say(f"{type(error).__name__}: {error}")
    else:
        dashboard.say()
