"""Buttons, sliders and menus of a dashboard. Knows ipywidgets; every change goes to the player or through
`engine.control`, and acts on the running engine at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ORDERS = ("fcfs", "priority", "sjf", "lpm")
EVICTIONS = ("lru", "fifo", "lfu", "slru", "s3-fifo", "ttl", "cost")
WIDE = {"description_width": "76px"}


def controls(dashboard: Any) -> dict[str, Any]:
    """The widgets by name; "box" holds them all, "refresh" is a function that brings them up to date."""
    import ipywidgets as w

    found: dict[str, Any] = {name: w.HTML() for name in ("strip", "machine", "trouble")}
    for widget in found.values():
        widget.layout.margin = "0"
    player = dashboard.player
    bar, refresh = (_scrubber if player is None else _transport)(dashboard, w)
    settings = [] if player is None else [_settings(dashboard, w)]
    figure = dashboard._figure
    figure.layout.autosize = True
    found["refresh"] = refresh
    found["box"] = w.VBox([bar, found["trouble"], found["strip"], figure, *settings, found["machine"]])
    found["box"].layout = w.Layout(width="100%", min_width="720px", overflow="hidden")
    found["box"].add_class("labkit-dashboard")
    return found


def _transport(dashboard: Any, w: Any) -> tuple[Any, Callable[[], None]]:
    """Play, pause, one step, stop; the state; and, on a virtual clock, the pace."""
    player = dashboard.player
    buttons = {
        "play": w.Button(description="Play", icon="play", tooltip="go on until all is served"),
        "pause": w.Button(description="Pause", icon="pause", tooltip="hold after the current step"),
        "step": w.Button(description="Step", icon="step-forward", tooltip="pause, and take one step"),
        "stop": w.Button(description="Stop", icon="stop", tooltip="the end; the picture stays"),
    }
    for name, button in buttons.items():
        button.layout.width = "88px"
        button.add_class(f"labkit-{name}")
        act = getattr(dashboard, name)
        button.on_click(lambda _, act=act: _guarded(dashboard, act))
    state = w.HTML(layout=w.Layout(margin="0 12px"))
    parts: list[Any] = [*buttons.values(), state]
    if not player.real_time:
        speed = w.FloatLogSlider(value=player.speed, base=10, min=-2, max=4, step=0.1, description="pace",
                                 tooltip="virtual seconds a second", readout_format=".3g", style=WIDE)  # fmt: skip
        speed.observe(lambda change: setattr(player, "speed", float(change.new)), "value")
        parts.append(speed)

    def refresh() -> None:
        now = player.state
        buttons["play"].disabled = now in ("playing", "stopped")
        buttons["pause"].disabled = now != "playing"
        buttons["step"].disabled = buttons["stop"].disabled = now == "stopped"
        shown = f'<span class="labkit-state" style="font-weight:600">{now}</span>'
        if state.value != shown:
            state.value = shown

    return w.HBox(parts, layout=w.Layout(align_items="center", flex_flow="row wrap")), refresh


def _scrubber(dashboard: Any, w: Any) -> tuple[Any, Callable[[], None]]:
    """Any step of a saved log, forwards and back."""
    feed = dashboard.feed
    first, last = min(feed.first, feed.num_steps), feed.num_steps
    slider = w.IntSlider(value=last, min=first, max=last, description="step", continuous_update=True, style=WIDE,
                         layout=w.Layout(width="60%"))  # fmt: skip
    play = w.Play(value=last, min=first, max=last, step=max(1, (last - first) // 200), interval=200)
    w.jslink((play, "value"), (slider, "value"))
    slider.observe(lambda change: _guarded(dashboard, lambda: dashboard.show(int(change.new))), "value")

    def refresh() -> None:
        play.max = slider.max = feed.num_steps  # a log may grow: somebody may be writing it
        at = feed.num_steps if dashboard.shown is None else dashboard.shown
        if slider.value != at:
            slider.value = at

    return w.HBox([play, slider], layout=w.Layout(align_items="center")), refresh


def _settings(dashboard: Any, w: Any) -> Any:
    """What comes, and how it is served."""
    player = dashboard.player
    engine, scheduler, blocks = player.engine, player.engine.scheduler, player.engine.blocks
    load = player.load
    wide = w.Layout(width="98%")

    def name_of(value: Any) -> str:
        return (
            value if isinstance(value, str) else getattr(value, "name", None) or getattr(value, "__name__", str(value))
        )

    def menu(description: str, names: tuple[str, ...], value: str) -> Any:
        options = list(names) if value in names else [value, *names]
        return w.Dropdown(options=options, value=value, description=description, style=WIDE, layout=wide)

    rate = w.FloatSlider(value=load.rate if load else 0, min=0, max=100, step=0.5, description="requests/s", style=WIDE,
                         readout_format=".3g", layout=wide, continuous_update=False)  # fmt: skip
    mix = menu("prompts", tuple(player.mixes), load.mix_name if load else "mixed")
    budget = w.IntSlider(value=scheduler.max_num_batched_tokens, min=1, max=max(2048, scheduler.max_num_batched_tokens),
                         description="budget", style=WIDE, layout=wide, continuous_update=False)  # fmt: skip
    rows = w.IntSlider(value=scheduler.max_num_seqs, min=1, max=scheduler.width, description="rows", style=WIDE,
                       layout=wide, continuous_update=False)  # fmt: skip
    order = menu("order", ORDERS, name_of(scheduler.queue.order))
    eviction = menu("eviction", EVICTIONS, name_of(blocks.eviction))
    preemption = menu("preemption", ("recompute", "swap", "auto"), scheduler.preemption)
    caching = w.Checkbox(value=blocks.prefix_caching, description="prefix cache", indent=False, layout=wide)

    def changes(widget: Any, act: Callable[[Any], Any]) -> None:
        widget.observe(lambda change: _guarded(dashboard, lambda: act(change.new)), "value")

    changes(rate, lambda value: player.change_load(rate=float(value)))
    changes(mix, lambda value: player.change_load(mix=value if value in player.mixes or load is None else load.mix))
    changes(budget, lambda value: engine.control(budget=int(value)))
    changes(rows, lambda value: engine.control(rows=int(value)))
    changes(order, lambda value: engine.control(order=value))
    changes(eviction, lambda value: engine.control(eviction=value))
    changes(preemption, lambda value: engine.control(preemption=value))
    changes(caching, lambda value: engine.control(prefix_caching=bool(value)))
    columns = [w.VBox(part, layout=w.Layout(width="33%")) for part in ([rate, mix, caching], [budget, rows, order],
                                                                         [eviction, preemption])]  # fmt: skip
    return w.HBox(columns, layout=w.Layout(width="100%"))


def _guarded(dashboard: Any, act: Callable[[], Any]) -> None:
    """Do what a click asked for; what went wrong is said below the buttons."""
    try:
        act()
    except Exception as error:
        dashboard.say(f"{type(error).__name__}: {error}")
    else:
        dashboard.say()
