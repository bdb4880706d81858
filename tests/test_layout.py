"""The arrows between the folders, and what importing the package must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def imported_names(file: Path) -> set[str]:
    """Absolute names of everything a file imports, relative imports resolved against the package map."""
    folder = file.relative_to(ROOT).parts[0]
    package = [
        "lorarecycle",
        *([folder] if folder != "lorarecycle" else []),
        *file.relative_to(ROOT).parts[1:-1],
    ]
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, node.module or ""]).strip("."))
    return names


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("file", files("kernels"), ids=str)
def test_kernels_know_nothing_else_of_the_project(file):
    own = {n for n in imported_names(file) if n.startswith("lorarecycle")}
    assert all(n.startswith("lorarecycle.kernels") for n in own), own


@pytest.mark.parametrize("file", files("lorarecycle"), ids=str)
def test_the_library_does_not_import_the_export(file):
    assert not {n for n in imported_names(file) if n.startswith(("lorarecycle.export", "onnx"))}


def test_importing_the_package_is_light():
    code = (
        "import sys, lorarecycle\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "assert 'sklearn' not in sys.modules, 'sklearn'\n"
        "import lorarecycle.kernels, torch\n"
        "assert 'triton' not in sys.modules, 'triton'\n"
        "import lorarecycle.pipeline\n"
        "assert callable(lorarecycle.recycle), 'a module lies over the function'\n"
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


@pytest.mark.parametrize("folder", ["kernels", "export"])
def test_mapped_folders_refuse_their_short_name(folder):
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert f"import `lorarecycle.{folder}`" in done.stderr
