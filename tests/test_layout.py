"""The house: which room may import which, no circles, small files, and what importing the package must not do."""

import ast
import statistics
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "__main__",
    "cli",
    "demo",
    "reproduce",
    "serve",
    "report",
    "pipeline",
    "job",
    "image_stage",
    "summary",
    "work_dir",
    "plan",
    "checks",
    "stages",
    "costs",
    "generate",
    "fewshot",
    "meta",
    "inversion",
    "tuning",
    "vit",
    "adapters",
    "data",
    "config",
    "runtime",
)
"""From the top down: a room may import itself and what stands below."""
PACKAGES = {"kernels": "lorarecycle/kernels", "export": "lorarecycle/export"}
"""Folders of the top level that are mapped into the package."""


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = (*PACKAGES[parts[0]].split("/"), *parts[1:]) if parts[0] in PACKAGES else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its name."""
    found = [file for folder in ("lorarecycle", *PACKAGES) for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(found) > 80
    return {module_name(file): file for file in found}


@cache
def arrows() -> dict[str, set[str]]:
    """Module -> modules that it imports, anywhere in it: inside functions and under TYPE_CHECKING too."""
    return {name: imports(name, file) for name, file in modules().items()}


def imports(name: str, file: Path) -> set[str]:
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= {one if one in modules() else source for one in inner}
    return {one for one in found if one in modules() and one != name}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_circles():
    graph = {name: {one for one in found if one != "lorarecycle"} for name, found in arrows().items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")
    print(f"{len(order)} modules, {sum(map(len, graph.values()))} imports, no circle")


def test_arrows_run_downwards():
    known = {room(name) for name in modules()} - {"", "kernels", "export"}
    assert known == set(ROOMS), "the list of rooms and the folders differ"
    upward = [
        f"{name} -> {one}"
        for name, found in arrows().items()
        for one in found
        if room(name) in ROOMS and room(one) in ROOMS and ROOMS.index(room(one)) < ROOMS.index(room(name))
    ]
    assert not upward, upward
    print(f"{len(ROOMS)} rooms, no upward arrow")


def test_the_package_itself_is_imported_by_nobody():
    assert not [name for name, found in arrows().items() if "lorarecycle" in found and name != "lorarecycle.__main__"]


def test_kernels_know_nothing_else_of_the_project():
    foreign = [f"{n} -> {o}" for n, found in arrows().items() for o in found if room(n) == "kernels" != room(o)]
    assert not foreign, foreign


def test_the_library_does_not_import_the_export():
    above = ("export", "serve")  # a server stands above both: it answers from whatever it is given
    bad = [
        f"{n} -> {o}" for n, found in arrows().items() for o in found if room(o) == "export" and room(n) not in above
    ]
    assert not bad, bad


def test_packages_are_listed():
    """pyproject.toml names every folder of the package: one that is left out is missing from the wheel."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name.rpartition(".")[0] if file.name != "__init__.py" else name for name, file in modules().items()}
    data = {"lorarecycle.csrc"}
    assert set(setuptools["packages"]) == folders | data
    mapped = {name: folder for name, folder in setuptools["package-dir"].items() if name != "lorarecycle"}
    assert mapped == {f"lorarecycle.{folder}": folder for folder in ("kernels", "export", "csrc")}


def test_files_are_small():
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()}
    long = {name: n for name, n in lengths.items() if n > 400}
    assert not long, long
    library = [n for name, n in lengths.items() if room(name) in ROOMS]
    assert statistics.median(library) < 150
    print(f"{len(library)} files of the library, median {statistics.median(library):.0f} lines, at most {max(library)}")


def test_every_file_says_what_it_is():
    silent = [name for name, file in modules().items() if not ast.get_docstring(ast.parse(file.read_text("utf-8")))]
    assert not silent, silent


@pytest.mark.medium
def test_importing_the_package_is_light():
    code = (
        "import sys, lorarecycle\n"
        "for heavy in ('torch', 'sklearn', 'transformers'):\n"
        "    assert heavy not in sys.modules, heavy\n"
        "import lorarecycle.kernels, torch\n"
        "assert 'triton' not in sys.modules, 'triton'\n"
        "import lorarecycle.pipeline, lorarecycle.meta.warm_start\n"
        "assert callable(lorarecycle.recycle), 'a module lies over the function'\n"
        "assert callable(lorarecycle.warm_start), 'a module lies over the function'\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_load():
    import lorarecycle

    for name in lorarecycle.__all__:
        assert getattr(lorarecycle, name).__module__.startswith("lorarecycle."), name
    assert set(lorarecycle.__all__) <= set(dir(lorarecycle))
    with pytest.raises(AttributeError, match="nothing"):
        _ = lorarecycle.nothing


@pytest.mark.parametrize("name", ["LoRAStack", "invert_together"])
def test_names_that_are_gone_say_why(name):
    with pytest.raises(ImportError, match=rf"`lorarecycle.{name}` was removed in 0.2: several adapters in one batch"):
        exec(f"from lorarecycle import {name}")


@pytest.mark.parametrize("folder", ["kernels", "export"])
def test_mapped_folders_refuse_their_short_name(folder):
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"import `lorarecycle.{folder}`" in done.stderr
