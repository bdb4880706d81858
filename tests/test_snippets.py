"""Every snippet of README and docs that is marked `<!-- run -->` runs as it stands, in the order of its page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"<!-- run(?:: (\w+))? -->\n```(python|bash)\n(.*?)```", re.DOTALL)
MARKED = [page for page in PAGES if SNIPPET.search(page.read_text(encoding="utf-8"))]


def test_pages_have_marked_snippets():
    assert len(MARKED) >= 4
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- run") == len(SNIPPET.findall(text)), f"a mark in {page.name} without a snippet"


@pytest.mark.slow
@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.stem)
def test_they_run(page, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    for needs, language, code in SNIPPET.findall(page.read_text(encoding="utf-8")):
        if needs == "served":
            serve_something(tmp_path)
        if language == "bash":
            code = re.sub(r"(?m)^lorarecycle ", f"{sys.executable} -m lorarecycle ", code)
        command = ["bash", "-ec", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip(), "it shows something"


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "results are not kept: whoever runs it sees their own"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    share = re.search(r"([\d.]+)% of the answers are those of PyTorch", done.stdout)
    assert share is not None
    assert float(share[1]) > 98
    assert (tmp_path / "report.html").is_file()


def serve_something(folder: Path) -> None:
    """What the snippets about deployment stand on: an export of the demo's model, and pictures."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lorarecycle.export import export_onnx

    from lorarecycle import Backbone

    export_onnx(Backbone.load("demo"), folder / "served")
    generator = np.random.default_rng(0)
    for name in ("cat", "dog", "new"):
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
