"""The direction of imports, read from the source, and the cost of `import labkit`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)

# Each part of the house and what it may import of labkit, the standard library apart.
MAY_IMPORT = {
    "core": {"core"},
    "clock": {"core"},
    "transfer": set(),
    "files": set(),
    "images": {"core", "images"},
    "assets": {"assets", "core"},
    "text": {"core", "files", "text"},
    "sampling": {"core", "sampling", "transfer"},
    "loading": {"core", "files", "loading"},
    "models": {"core", "models", "loading", "transfer"},
    "runner": {"core", "runner", "models", "sampling", "transfer"},
    "smaller": {"core", "smaller"},
    "parallel": {"core", "loading", "models", "parallel", "runner", "text"},
    "engine": {
        "assets",
        "clock",
        "core",
        "engine",
        "files",
        "images",
        "loading",
        "models",
        "notebook",
        "parallel",
        "runner",
        "sampling",
        "text",
        "widgets",
    },
    "policies": {"clock", "core", "engine", "policies", "runner"},
    "replicas": {"assets", "clock", "core", "engine", "loading", "parallel", "replicas", "study", "widgets"},
    "llm": {"core", "engine", "images", "llm", "replicas", "text"},
    "compat": {"core", "llm"},
    "server": {"core", "engine", "images", "replicas", "server", "text"},
    "widgets": {"core", "widgets"},
    "lab": {"core", "engine", "lab", "models", "widgets"},  # engines are made and watched from outside
    "training": {"assets", "core", "models", "text", "training"},
    "study": {"bench", "clock", "core", "engine", "runner", "study", "widgets"},
    "quantization": {"assets", "core", "engine", "loading", "models", "quantization", "runner", "text", "widgets"},
    "bench": {"", "assets", "bench", "clock", "core", "engine", "loading", "models", "runner", "text", "widgets"},
    "notebook": {"", "bench", "clock", "core", "engine", "notebook", "runner", "widgets"},
    "cli": {"", "bench", "core", "notebook", "server", "study"},
    "__init__": {
        "assets",
        "bench",
        "clock",
        "core",
        "engine",
        "lab",
        "llm",
        "loading",
        "models",
        "notebook",
        "parallel",
        "policies",
        "quantization",
        "replicas",
        "runner",
        "sampling",
        "server",
        "smaller",
        "study",
        "text",
        "training",
        "widgets",
    },
}
THIRD_PARTY = {  # pandas inside functions only; everything else: numpy
    "core": {"numpy", "pandas"},
    "models": {"torch", "numpy", "transformers", "labkit_kernels"},
    "loading": {"torch", "numpy", "transformers", "safetensors", "huggingface_hub", "modelscope", "labkit_kernels"},
    "runner": {"torch", "numpy", "labkit_kernels"},
    "smaller": {"torch", "numpy"},
    "parallel": {"torch", "numpy", "transformers", "labkit_kernels", "ray"},
    "replicas": {"torch", "numpy", "transformers"},
    "sampling": {"torch", "numpy"},
    "transfer": {"torch", "numpy"},
    "llm": {"numpy", "torch"},
    "images": {"PIL", "numpy"},
    "text": {"numpy", "tokenizers", "transformers", "jinja2", "torch", "llguidance"},
    "assets": {"PIL", "torch", "numpy", "tokenizers", "transformers"},
    "engine": {"numpy", "torch", "pandas", "safetensors", "labkit_kernels", "huggingface_hub", "zmq"},
    "lab": {"labkit_kernels", "torch", "pandas", "plotly", "ipywidgets", "IPython"},
    "bench": {"numpy", "torch", "transformers", "triton", "tqdm", "labkit_kernels"},
    "server": {
        "numpy",
        "starlette",
        "pydantic",
        "uvicorn",
        "yaml",
        "huggingface_hub",
        "prometheus_client",
        "opentelemetry",
        "ray",
        "labkit_kernels",
    },  # fmt: skip,
    "cli": {"labkit_kernels"},
    "widgets": {"numpy", "pandas", "plotly", "ipywidgets", "IPython", "anywidget", "pynvml"},
    "notebook": {"nbformat", "torch", "packaging", "pynvml", "jupyter_core", "labkit_kernels", "IPython", "numpy"},
    "training": {"torch", "safetensors", "transformers"},
    "quantization": {"torch", "pandas", "plotly", "safetensors", "tqdm"},
    "study": {"labkit_kernels", "torch", "numpy", "pandas", "plotly", "tqdm", "IPython", "anywidget", "ray"},
}
LAZY = {"PIL", "ray", "pandas", "plotly", "anywidget", "ipywidgets", "llguidance", "IPython", "tqdm", "pynvml"}


def modules() -> list[Path]:
    return sorted((ROOT / "labkit").rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "labkit").parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module imported, is it at the top of the file)."""
    package = [part for part in path.relative_to(ROOT).parent.parts if part != "kernels"]
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.append((name, id(node) in top))
            if not node.module:
                found[-1:] = [(f"{name}.{alias.name}", id(node) in top) for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path):
    part = part_of(path)
    if path.name.startswith("peer_"):  # run by interpreters that may have no labkit
        assert not [name for name, top in imports(path) if name.startswith("labkit") and top]
        return
    for name, _ in imports(path):
        head, *rest = name.split(".")
        if head == "labkit":
            assert (rest[0] if rest else "") in MAY_IMPORT[part], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_other_packages_are_few_and_the_heavy_ones_are_imported_where_used(path: Path):
    part = part_of(path)
    allowed = THIRD_PARTY.get(part, {"numpy"})
    if path.name.startswith("peer_"):
        return
    for name, top in imports(path):
        head = name.split(".")[0]
        if head not in STANDARD and head != "labkit":
            assert head in allowed, f"{path.name} imports {name}"
            assert not (top and head in LAZY), f"{path.name} imports {name} at its top"


def test_every_part_of_the_house_is_listed():
    assert {part_of(path) for path in modules()} <= set(MAY_IMPORT)


def test_the_kernels_package_never_imports_labkit():
    paths = sorted((ROOT / "kernels").rglob("*.py"))
    assert paths
    for path in paths:
        assert "labkit" not in {name.split(".")[0] for name, _ in imports(path)}, path


@pytest.mark.alone
def test_importing_labkit_is_quick_and_brings_no_torch():
    script = (
        "import sys, time; begin = time.perf_counter(); import labkit; took = time.perf_counter() - begin\n"
        "labkit.Engine, labkit.FakeRunner, labkit.SimRunner, labkit.diff\n"
        "heavy = {'torch', 'transformers', 'triton', 'pandas', 'plotly', 'ipywidgets'} & set(sys.modules)\n"
        "assert not heavy, heavy\nprint(took)"
    )
    took: list[float] = []
    while len(took) < 3 and not (took and took[-1] < 0.3):  # one good round is enough
        took.append(float(subprocess.check_output([sys.executable, "-c", script])))
    assert min(took) < 0.3, f"import labkit took {min(took):.3f} s"


def test_every_public_name_resolves_and_files_open_with_what_they_know():
    import labkit

    for name in labkit.__all__:
        assert getattr(labkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Enginee'"):
        labkit.Enginee  # noqa: B018
    for path in modules():
        if path.read_text().strip():
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens without a word"


def circles(package: str, root: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or indirectly. Imports inside functions and for type checkers
    count."""
    name_of = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name_of[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in name_of.items():
        here = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            found: list[str] = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                found = [f"{origin}.{alias.name}" for alias in node.names] + [origin]
                found = found[:-1] if all(one in name_of for one in found[:-1]) else found
            graph[name] |= {one for one in found if one in name_of and one != name}
    order: list[str] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    groups: list[list[str]] = []

    def visit(name: str) -> None:  # Tarjan's strongly connected components
        index[name] = low[name] = len(index)
        order.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in order:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = order[order.index(name) :]
            del order[order.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in graph:
        if name not in index:
            visit(name)
    return groups


@pytest.mark.parametrize(("package", "root"), [("labkit", ROOT), ("labkit_kernels", ROOT / "kernels")])
def test_no_modules_import_each_other(package, root):
    found = circles(package, root)
    assert not found, "modules that import each other: " + "; ".join(", ".join(group) for group in found)


def test_a_circle_is_found_also_inside_functions(tmp_path):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").write_text("")
    (tmp_path / "house" / "a.py").write_text("from house import b\n")
    (tmp_path / "house" / "b.py").write_text("def late():\n    from . import c\n")
    (tmp_path / "house" / "c.py").write_text("from house.a import name\n")
    assert circles("house", tmp_path) == [["house.a", "house.b", "house.c"]]


@pytest.mark.parametrize("folder", ["labkit", "kernels"])
def test_no_file_is_over_450_lines(folder):
    """A longer one is usually two ideas."""
    long = {
        str(path.relative_to(ROOT)): length
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".cpp", ".h", ".js", ".css"}
        if (length := len(path.read_text().splitlines())) > 450
    }
    assert not long, f"files over 450 lines: {long}"
