"""The docs: rows that name a test that is there, a chart of the results, pages that read easily."""

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


GUIDES = [ROOT / "README.md", ROOT / "docs" / "quick_start.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]


def prose(text: str) -> str:
    """Sentences of a page: without code, headings, tables, pictures and the addresses of links."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    items = [item.strip() for item in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)]
    items = [" ".join(item.split()) for item in items if item and item[0] not in "#|!"]
    text = "\n".join(item if item[-1] in ".:?" else f"{item}." for item in items)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "")


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
@pytest.mark.medium
def test_pages_read_easily(page):
    """The Flesch reading ease; from 70 (quick start) to 85 (recycle) when this was written."""
    textstat = pytest.importorskip("textstat", reason="the extra `docs` is not installed")
    assert textstat.flesch_reading_ease(prose(page.read_text(encoding="utf-8"))) > 50


def test_sentences_of_the_first_screen_are_short():
    screen = prose("\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40]))
    sentences = re.split(r"(?<=[.?:])\s+", screen)
    assert len(sentences) > 8
    assert max(len(sentence.split()) for sentence in sentences) <= 35
