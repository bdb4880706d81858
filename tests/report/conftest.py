"""Runs to report about, made once, and a browser where the machine has one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lorarecycle import Adapter, Backbone, BatchNormPrior, Head, LabelledImages, recycle
from lorarecycle.report.measure import measure_run
from lorarecycle.report.run import Run, read_run
from lorarecycle.vit.lora import LoRA

HOSTILE = "<script>alert('&\"x')</script>"
"""A name that must never be read as HTML."""


@pytest.fixture(scope="session")
def model() -> Backbone:
    torch.manual_seed(0)
    return Backbone(VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2), name="tiny & co")


@pytest.fixture(scope="session")
def adapters(model: Backbone) -> list[Adapter]:
    made = []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        lora = LoRA.random(model, generator=generator)
        for p in lora.lora_B.values():
            p.data = torch.randn(p.shape, generator=generator) * 0.1 * (1 + i)
        names = (HOSTILE, f"tree {i}", f"bird {i}")
        head = Head(torch.randn(3, 32, generator=generator), class_names=names)
        made.append(lora.to_adapter(name=HOSTILE if i == 0 else f"adapter {i}", like=model, head=head))
    return made


@pytest.fixture(scope="session")
def unseen() -> LabelledImages:
    generator = torch.Generator().manual_seed(1)
    clean = (torch.rand(4, 3, generator=generator) * 255)[:, :, None, None].expand(4, 3, 32, 32)
    labels = torch.arange(4).repeat_interleave(22)
    noisy = clean[labels] + 40 * torch.randn(88, 3, 32, 32, generator=generator)
    return LabelledImages(noisy.clamp(0, 255).to(torch.uint8), labels, (HOSTILE, "b", "c", "d"))


@pytest.fixture(scope="session")
def inverted_run(model: Backbone, adapters: list[Adapter], unseen: LabelledImages, tmp_path_factory: Any) -> Run:
    """Images inverted with a prior and pruning, accuracy measured."""
    torch.manual_seed(0)
    prior = BatchNormPrior(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
    folder = tmp_path_factory.mktemp("runs") / "inverted <b>"
    recycle(
        adapters,
        base=model,
        work_dir=folder,
        prior=prior,
        inversion={"images_per_class": 5, "steps": 12, "init": "noise", "prune": {1: 0.5}},
        meta={"steps": 8, "n_way": 3, "n_query": 3, "guide_weight": 0.0},
        quiet=True,
    )
    tasks = {"n_way": 3, "n_query": 5, "n_tasks": 10}
    measure_run(read_run(folder), model, unseen, adapters=adapters, config=tasks, name=HOSTILE, quiet=True)
    return read_run(folder)


@pytest.fixture(scope="session")
def painted_run(model: Backbone, adapters: list[Adapter], tmp_path_factory: Any) -> Run:
    """Painted pictures for all adapters, nothing measured."""
    folder = tmp_path_factory.mktemp("runs") / "painted"
    recycle(
        adapters,
        base=model,
        work_dir=folder,
        inversion={"pictures": 30},
        meta={"steps": 4, "sparsity": 0.5},
        quiet=True,
    )
    return read_run(folder)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests that ask for it are skipped where it or Playwright is absent."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or not Path(chromium).exists():
        pytest.skip("browser tests need Chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=[*flags, "--disable-sync"])
        yield found
        found.close()
