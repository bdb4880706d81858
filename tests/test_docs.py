"""docs/read_and_refused.md: each row names a test that is there."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "read_and_refused.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", TEXT)))


@pytest.mark.parametrize("named", NAMED)
def test_a_named_test_is_there(named):
    file, _, name = named.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_one():
    rows = [
        line for line in TEXT.splitlines() if line.startswith("| ") and "---" not in line and "| test |" not in line
    ]
    assert len(rows) > 45
    bare = [row for row in rows if not re.search(r"`tests/[\w/]+\.py(?:::\w+)?` \|$", row)]
    assert not bare, bare


def test_the_chart_is_drawn_from_the_results():
    spec = importlib.util.spec_from_file_location("chart", ROOT / "docs" / "hooks" / "chart.py")
    chart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chart)
    assert chart.FILE.read_text(encoding="utf-8") == chart.chart(), "run `python docs/hooks/chart.py`"


def test_the_readme_is_a_landing_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (ROOT / target).exists(), target
