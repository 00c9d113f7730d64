"""JupyterLab on a copy of the notebooks, and a browser that may only contact this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run", "--disable-quic", "--disable-dev-shm-usage",
)  # fmt: skip
FIGURE = ".jp-NotebookPanel:not(.lm-mod-hidden) .js-plotly-plot"


@contextmanager
def jupyter(folder: Path) -> Iterator[str]:
    """The address of a Jupyter server started for the test, with its token."""
    token = secrets.token_hex(16)
    homes = {
        name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        **homes,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root",
        f"--IdentityProvider.token={token}", f"--notebook-dir={folder / 'notebooks'}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    _settle(Path(homes["JUPYTER_CONFIG_DIR"]))
    log = open(folder / "jupyter.log", "w")  # noqa: SIM115  closed below
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _address(Path(homes["JUPYTER_RUNTIME_DIR"]), process, token, folder)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _settle(config: Path) -> None:
    """Cells that are out of sight are there too; nothing is looked for elsewhere."""
    wanted: dict[str, dict[str, Any]] = {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in wanted.items():
        path = config / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def _address(runtime: Path, process: Any, token: str, folder: Path) -> str:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            try:
                return f"{json.loads(file.read_text())['url']}lab/tree/{{name}}?reset&token={token}"
            except ValueError:
                pass  # half written
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {(folder / 'jupyter.log').read_text()[-2000:]}")


class Page:
    """A notebook in JupyterLab."""

    def __init__(self, page: Any, address: str, folder: Path) -> None:
        self.page, self.address, self.folder = page, address, folder
        self.errors: list[str] = []
        self.strayed: list[str] = []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, name: str) -> None:
        self.page.goto("about:blank")  # the page before may still complain
        self.errors.clear()
        self.strayed.clear()
        self.page.goto(self.address.format(name=name))
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)
        kernel = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"
        for _ in range(300):
            if self.page.evaluate(f"() => {kernel}?.status") == "idle":
                break
            if (button := self.page.locator(".jp-Dialog .jp-mod-accept")).count():
                button.first.click()  # the kernel it asks about is the only one
            self.page.wait_for_timeout(200)
        else:
            raise AssertionError("the notebook's kernel did not start")

    def command(self, name: str) -> None:
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name) }", name)

    def run_all(self) -> None:
        self.command("notebook:run-all-cells")

    def wait_until_ran(self, seconds: float = 120) -> None:
        """Every code cell has a number, and none is waiting."""
        self.page.wait_for_function(
            "() => { const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
            ".map(x => x.textContent); return prompts.length && prompts.every(x => /\\[\\d+\\]/.test(x)) }",
            timeout=seconds * 1e3,
        )

    def points(self, trace: str = "used") -> int:
        """How many points a trace of the live figure has."""
        return self.page.evaluate(
            "([figure, trace]) => { const plot = document.querySelector(figure);"
            " if (!plot || !plot._fullData) return -1; const found = plot._fullData.find(x => x.meta === trace);"
            " return found && found.x ? found.x.length : 0 }",
            [FIGURE, trace],
        )

    def last_time(self, trace: str = "used") -> float:
        return self.page.evaluate(
            "([figure, trace]) => { const plot = document.querySelector(figure);"
            " if (!plot || !plot._fullData) return -1; const found = plot._fullData.find(x => x.meta === trace);"
            " return found && found.x && found.x.length ? found.x[found.x.length - 1] : -1 }",
            [FIGURE, trace],
        )

    def blank(self) -> None:
        """Take the points out of the live figure, as if the page had missed the last update."""
        self.page.evaluate(
            "figure => { const plot = document.querySelector(figure);"
            " for (const trace of plot._fullData) { trace.x = []; trace.y = []; } }",
            FIGURE,
        )

    def is_still(self) -> bool:
        """The live figure has points, and no new ones come."""
        before = self.points(), self.last_time()
        self.wait(800)
        return self.points() > 0 and (self.points(), self.last_time()) == before

    def click(self, name: str) -> None:
        self.page.locator(f".labkit-{name}").first.click()

    def state(self) -> str:
        return self.page.locator(".labkit-state").first.inner_text()

    def step(self) -> int:
        """The step that the strip of figures names."""
        shown = self.page.locator(".labkit-dashboard .kpi", has_text="step").first.locator("b").inner_text()
        return int(shown.replace(",", ""))

    def wait(self, milliseconds: float) -> None:
        self.page.wait_for_timeout(milliseconds)

    def wait_for(self, what: Any, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                self.picture("failed")
                states = self.page.locator(".labkit-state").all_inner_texts()
                shown = self.points(), self.last_time(), states, self.errors, self.page.locator(FIGURE).count()
                raise AssertionError(f"not in {seconds} s: {shown}; the page is in {self.folder / 'failed.png'}")
            self.page.wait_for_timeout(100)

    def watch(self) -> None:
        """From now on the page itself notes each time that the live figure reaches further."""
        self.page.evaluate(
            "figure => { window.reached = []; clearInterval(window.watching); window.watching = setInterval(() => {"
            " const plot = document.querySelector(figure);"
            " const found = plot && plot._fullData && plot._fullData.find(x => x.meta === 'used');"
            " const at = found && found.x && found.x.length ? found.x[found.x.length - 1] : -1;"
            " if (at >= 0 && (!window.reached.length || at > window.reached[window.reached.length - 1]))"
            " window.reached.push(at) }, 30) }",
            FIGURE,
        )

    def seen_growing(self, times: int, again: Callable[[], None] | None = None) -> None:
        """The live figure reached further, so many times. On a busy machine a short run may be over before the page
        has loaded plotly: then `again` runs it once more, with plotly there."""

        def grown() -> bool:
            return self.page.evaluate("() => window.reached.length") > times

        if again is not None:
            try:
                self.wait_for(grown)
            except AssertionError:
                self.watch()
                again()
        self.wait_for(grown)

    def run_until(self, text: str) -> None:
        """All cells above the first one that holds this text."""
        self.page.evaluate(
            "text => { const book = window.jupyterapp.shell.currentWidget.content;"
            " book.activeCellIndex = book.widgets.findIndex(x => x.model.sharedModel.source.includes(text));"
            " window.jupyterapp.commands.execute('notebook:run-all-above') }",
            text,
        )

    def time_cell(self, code: str) -> float:
        """Seconds until the kernel has answered."""
        return self.page.evaluate(
            "async code => { const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;"
            " const begin = performance.now(); await kernel.requestExecute({code}).done;"
            " return (performance.now() - begin) / 1e3 }",
            code,
        )

    def reopen(self) -> None:
        """Save, end the kernel, and open the notebook again: what is shown now is in the file."""
        self.page.evaluate(
            "async () => { const panel = window.jupyterapp.shell.currentWidget; await panel.context.save();"
            " await panel.sessionContext.shutdown() }"
        )
        self.page.reload()
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=90_000)

    def overlaps(self) -> list[list[str]]:
        """Pairs of labels in the figure that lie on each other."""
        return self.page.evaluate(
            "figure => { const all = [...document.querySelectorAll(figure + ' text')].filter(x => x.textContent.trim())"
            ".map(x => [x.textContent, x.getBoundingClientRect()]).filter(([, r]) => r.width && r.height);"
            " const found = []; for (let i = 0; i < all.length; i++) for (let j = 0; j < i; j++) {"
            " const [a, r] = all[i], [b, s] = all[j];"
            " const wide = Math.min(r.right, s.right) - Math.max(r.left, s.left);"
            " const tall = Math.min(r.bottom, s.bottom) - Math.max(r.top, s.top);"
            " if (wide > 1 && tall > 3) found.push([a, b]) } return found }",
            FIGURE,
        )

    def theme(self, name: str) -> None:
        """Light or Dark."""
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {name}"
        )
        self.wait_for(lambda: self.page.locator(f"body[data-jp-theme-light='{str(name == 'Light').lower()}']").count())

    def faintest_text(self) -> float:
        """The least contrast of a text in the figure with the page behind it: 1 is invisible, 21 black on white."""
        return self.page.evaluate(
            "figure => { const light = color => {"
            " const [r, g, b] = color.match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)"
            ".map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);"
            " return 0.2126 * r + 0.7152 * g + 0.0722 * b };"
            " const behind = node => { for (; node; node = node.parentElement) {"
            " const color = getComputedStyle(node).backgroundColor;"
            " if (!/, 0\\)$|transparent/.test(color)) return color } return 'rgb(255, 255, 255)' };"
            " const plot = document.querySelector(figure), page = light(behind(plot)) + 0.05;"
            " return Math.min(...[...plot.querySelectorAll('text')].filter(x => x.textContent.trim())"
            ".map(x => light(getComputedStyle(x).fill) + 0.05).map(x => Math.max(x, page) / Math.min(x, page))) }",
            FIGURE,
        )

    def picture(self, name: str) -> Path:
        path = self.folder / f"{name}.png"
        self.page.screenshot(path=str(path))
        return path


@contextmanager
def browser(address: str, folder: Path) -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            context = chromium.new_context(viewport={"width": 1280, "height": 900})
            found = Page(context.new_page(), address, folder)

            def only_here(route: Any) -> None:
                url = route.request.url
                if url.startswith(("http://127.0.0.1", "http://localhost", "ws://127.0.0.1", "data:", "blob:")):
                    route.continue_()
                else:
                    found.strayed.append(url)
                    route.abort()

            context.route("**/*", only_here)
            yield found
        finally:
            chromium.close()


def has_playwright() -> bool:
    return importlib.util.find_spec("playwright") is not None


def write_notebook(folder: Path, name: str, cell: str) -> None:
    import nbformat

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip())])
    book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(book, folder / "notebooks" / name)


def copy_notebooks(folder: Path) -> None:
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
