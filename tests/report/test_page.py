"""The page about runs: whole, without a network, safe with any name, small, and readable in a browser."""

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lorarecycle import RecycleConfig
from lorarecycle.cli.main import _parse
from lorarecycle.fewshot.evaluate import task_accuracies
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.report import page as module
from lorarecycle.report.command import command_of
from lorarecycle.report.measure import META_LORA, confusion
from lorarecycle.report.page import write_report
from lorarecycle.report.run import read_run

pytestmark = pytest.mark.medium
VOID = {"meta", "link", "br", "img"}


class Strict(HTMLParser):
    """Every element is closed in order; collects tags and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "action", "data", "poster", "srcset")]
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def both(inverted_run, painted_run, model, tmp_path_factory):
    return write_report([inverted_run, painted_run], tmp_path_factory.mktemp("page") / "report.html", backbone=model)


def test_it_is_one_whole_file_without_a_network(both):
    text = both.read_text(encoding="utf-8")
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids)) > 20
    assert all(address.startswith("data:") for address in parser.addresses)
    assert all(found.startswith("data:image/webp") for found in re.findall(r"url\(([^)]*)\)", text))
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert both.stat().st_size < module.LARGEST


def test_names_are_never_read_as_html(both):
    parser = Strict()
    parser.feed(both.read_text(encoding="utf-8"))
    assert "script" not in parser.tags
    assert "&lt;script&gt;" in both.read_text(encoding="utf-8")


def test_it_tells_what_the_run_holds(both, inverted_run):
    text = both.read_text(encoding="utf-8")
    row = inverted_run.accuracy["rows"][META_LORA]["1"]
    assert f"{row['accuracy']:.1f} % ± {row['interval']:.1f}" in text
    assert set(inverted_run.accuracy["rows"]) == {
        "plain ViT",
        "average of the adapters",
        "warm start alone",
        "meta-LoRA",
    }
    for heading in ("Side by side", "Which adapters matter", "Map of features", "How to repeat it"):
        assert heading in text
    assert inverted_run.meta_lora.digest() in text
    assert "cross-entropy of this image" in text
    assert "batch-norm prior of its batch" in text
    assert f"{inverted_run.losses[-1]:.3g}" in text


def test_it_shrinks_to_its_limit(inverted_run, model, tmp_path, monkeypatch):
    whole = write_report([inverted_run], tmp_path / "a.html", backbone=model).stat().st_size
    monkeypatch.setattr(module, "LARGEST", whole - 1)
    assert write_report([inverted_run], tmp_path / "b.html", backbone=model).stat().st_size < whole


def test_a_model_that_is_not_there_is_said(painted_run, tmp_path):
    text = write_report([painted_run], tmp_path / "a.html").read_text(encoding="utf-8")
    assert "the model tiny &amp; co could not be had here. Name it with --base, --weights and --image-size." in text
    assert "has not been measured" in text


def test_confusion_counts_what_accuracy_counts(unseen):
    features = torch.randn(88, 5, generator=torch.Generator().manual_seed(0)) + unseen.labels[:, None]
    tasks = sample_tasks(unseen.labels, n_way=4, n_shot=1, n_query=5, n_tasks=30, seed=0)
    shares = confusion(features, unseen.labels, tasks)
    torch.testing.assert_close(shares.sum(1), torch.ones(4, dtype=torch.float64))
    assert 100 * shares.diag().mean() == pytest.approx(float(task_accuracies(features, tasks).mean()), abs=1e-3)


def test_folders_that_are_no_finished_run(tmp_path, painted_run, model):
    with pytest.raises(
        FileNotFoundError, match=r"must be the `work_dir` of a run of `recycle`, got .* without run.json"
    ):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="must be finished"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="`runs` must hold at least one run"):
        write_report([], tmp_path / "x.html")


@pytest.mark.parametrize(
    "config",
    [
        RecycleConfig(),
        RecycleConfig.paper(),
        RecycleConfig.preset("paper").__class__(
            inversion=RecycleConfig.paper().inversion.__class__(prune={1: 0.5, 2: 0.25}, prior=None, flip=False),
            meta=RecycleConfig().meta.__class__(sites=("q", "k"), lr=0.25, sparsity=0.5),
            seed=3,
        ),
    ],
)
def test_the_command_leads_to_the_same_settings(config):
    base = {"name": "a model's name", "weights": "its weights.safetensors", "image_size": 112}
    words = shlex.split(command_of(config, {"base": base, "dtype": "float32", "images": "all"}, "folder of adapters"))
    assert words[:2] == ["lorarecycle", "recycle"]
    parsed = _parse(words[1:])
    assert parsed.config == config
    assert parsed.adapters == ("folder of adapters",)
    machine = parsed.machine
    assert (machine.base, machine.weights, machine.image_size) == ("a model's name", Path(base["weights"]), 112)
    assert (machine.dtype, parsed.images) == ("float32", "all")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 390)])
def test_in_a_browser(both, browser, scheme, width, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(both.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert (red + green + blue > 600) == (scheme == "light")
    page.locator(".tile button").first.click()
    assert page.locator("[popover]:popover-open svg path.line").count() == 2
    page.keyboard.press("Escape")
    assert page.locator("[popover]:popover-open").count() == 0
    assert page.screenshot(full_page=True, path=tmp_path / "page.png")
    assert said == []
    page.close()
