"""Whole training steps beside the plain way of `baseline.py`: LoRA Inversion with its prior, and meta-training.

    pytest benchmarks/bench_steps.py --benchmark-only --models vit_base

Random weights at 224 x 224; inversion with a ResNet-50 prior. Our precision is the one that the library picks for the
machine, the plain way's is float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lorarecycle import Backbone, BatchNormPrior, Head, MetaConfig
from lorarecycle.inversion.objective import inversion_loss
from lorarecycle.meta.loss import query_loss
from lorarecycle.runtime.device import default_dtype
from lorarecycle.runtime.steps import compiled
from lorarecycle.vit.lora import LoRA

sys.path.insert(0, str(Path(__file__).parent))  # tests and benchmarks are no packages
import baseline

ARCHITECTURES = {"ViT-Tiny/16": "vit_tiny_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
CUDA = torch.cuda.is_available()
N_WAY, N_SHOT, N_QUERY = 5, 5 if CUDA else 1, 15
PRUNE = {6: 0.75}


@pytest.fixture(scope="module")
def place() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def vit(model) -> Any:
    if model.name not in ARCHITECTURES:
        pytest.skip(f"steps are measured at {' and '.join(ARCHITECTURES)}")
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURES[model.name], num_classes=0)


@pytest.fixture
def time_step(benchmark, ceilings) -> Callable[[Callable[[], None]], None]:
    def run(step: Callable[[], None], rounds: int = 2) -> None:
        def finished() -> None:
            step()
            if CUDA:
                torch.cuda.synchronize()

        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(finished, rounds=20 if CUDA else rounds, warmup_rounds=3 if CUDA else 1)
        benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads(), **ceilings}
        benchmark.extra_info["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
        if CUDA:
            benchmark.extra_info["peak_memory_GB"] = torch.cuda.max_memory_allocated() / 1e9

    return run


@pytest.mark.parametrize(
    "form", ["plain", "plain_pruned", "ours", "ours_pruned", "ours_without_prior", "compiled", "compiled_pruned"]
)
def bench_inversion_step(form, model, vit, place, time_step, benchmark):
    benchmark.group = f"inversion step, {model.name}, batch {25 if CUDA else 5}"
    B = 25 if CUDA else 5
    resnet = timm.create_model("resnet50", num_classes=5)
    images = torch.randn(B, 3, 224, 224).to(place).requires_grad_()
    labels = torch.arange(B, device=place) % 5
    optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99))
    prune = PRUNE if form.endswith("pruned") else None
    if form.startswith("plain"):
        plain = baseline.PlainViT(vit, freeze=False).to(place)
        linear = nn.Linear(model.width, 5).to(place)
        prior = baseline.PlainPrior(resnet).to(place)
        time_step(lambda: baseline.inversion_step(plain, linear, prior, images, labels, optimizer, prune), rounds=5)
        return
    dtype = default_dtype(place)
    teacher = Backbone(vit).to(place, dtype)
    head = Head(torch.randn(5, model.width)).to(place)
    natural = None if form == "ours_without_prior" else BatchNormPrior(resnet, dtype=dtype).to(place)
    loss_of = compiled(inversion_loss, True if form.startswith("compiled") else None, place)
    time_step(lambda: inversion_step(loss_of, teacher, head, natural, images, labels, optimizer, prune), rounds=5)


def inversion_step(
    loss_of: Callable[..., Tensor],
    teacher: Backbone,
    head: Head,
    prior: BatchNormPrior | None,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    prune: dict[int, float] | None = None,
) -> None:
    """What `invert` does at each step, less its bookkeeping."""
    seen = images.roll((3, -2), dims=(2, 3))
    loss = loss_of(teacher, head, seen, labels, prune, prior, 0.01, 224)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        images.clamp_(-1, 1)


@pytest.mark.parametrize("form", ["plain", "dense", "sparse_25", "sparse_50", "sparse_75", "compiled_sparse_75"])
def bench_meta_step(form, model, vit, place, time_step, benchmark):
    benchmark.group = f"meta-training step, {model.name}, {N_WAY * (N_SHOT + N_QUERY)} images"
    images = torch.randn(N_WAY * (N_SHOT + N_QUERY), 3, 224, 224).to(place)
    if form == "plain":
        student, teacher = (baseline.PlainViT(vit, freeze=True).to(place) for _ in range(2))
        head = nn.Linear(model.width, N_WAY).to(place)
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-3)
        time_step(lambda: baseline.meta_step(student, teacher, head, images, N_WAY, N_SHOT, optimizer))
        return
    config = MetaConfig(n_way=N_WAY, n_shot=N_SHOT, n_query=N_QUERY)
    backbone = Backbone(vit).to(place, default_dtype(place))
    lora = LoRA.random(backbone, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(lora.parameters(), lr=1e-3)
    targets = torch.rand(N_WAY * N_QUERY, N_WAY, device=place).softmax(dim=-1)
    kept = None
    if "sparse" in form:
        n = model.patches - model.patches * int(form[-2:]) // 100
        kept = torch.stack([torch.randperm(model.patches)[:n].sort().values for _ in images]).to(place)
    loss_of = compiled(query_loss, True if form.startswith("compiled") else None, place)

    def step() -> None:
        loss = loss_of(backbone, lora, images.to(backbone.dtype), kept, targets, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    time_step(step)


def bench_prototype_head(model, place, time_step, benchmark):
    """What a fused prototype head could save of a meta-training step at most: all of this."""
    benchmark.group = f"meta-training step, {model.name}, {N_WAY * (N_SHOT + N_QUERY)} images"
    from lorarecycle.meta.prototypes import distance_logits

    features = torch.randn(N_WAY * (N_SHOT + N_QUERY), model.width, device=place, requires_grad=True)
    targets = torch.rand(N_WAY * N_QUERY, N_WAY, device=place).softmax(dim=-1)

    def step() -> None:
        support, query = features.split([N_WAY * N_SHOT, N_WAY * N_QUERY])
        centres = support.unflatten(0, (N_WAY, N_SHOT)).mean(dim=1)
        log_p = distance_logits(query, centres).log_softmax(dim=-1)
        nn.functional.kl_div(log_p, targets, reduction="batchmean").backward()
        features.grad = None

    time_step(step)
