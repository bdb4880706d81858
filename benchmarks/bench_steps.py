"""Whole training steps beside the plain ways: LoRA Inversion with its prior, meta-training, tasks through a classifier.

    pytest benchmarks/bench_steps.py --benchmark-only --models vit_base

Random weights at 224 x 224; inversion with a ResNet-50 prior. "plain" is `best_plain.py`, in the precision that the
library picks for the machine; "published" is `baseline.py`, in float32. Ours: "eager" without compiled blocks and
graphs, "compiled" with the former, "graph" with the latter, "ours" with both, as `recycle` does it on a GPU.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lorarecycle import Backbone, BatchNormPrior, FewShotClassifier, Head, InversionConfig, MetaConfig
from lorarecycle.inversion.optimise import BatchOptimiser
from lorarecycle.meta.bank import Bank
from lorarecycle.meta.draws import Draws
from lorarecycle.meta.shares import Share
from lorarecycle.meta.step import EpisodeStep
from lorarecycle.runtime.device import default_dtype
from lorarecycle.runtime.graphs import Step, adam
from lorarecycle.runtime.steps import compiling
from lorarecycle.vit.lora import LoRA

sys.path.insert(0, str(Path(__file__).parent))  # tests and benchmarks are no packages
import baseline
import best_plain

ARCHITECTURES = {"ViT-Tiny/16": "vit_tiny_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
CUDA = torch.cuda.is_available()
DRY_RUN = bool(os.environ.get("LORARECYCLE_DRY_RUN"))
"""Whether the code is only to run, on the smallest sizes: the figures then mean nothing."""
N_WAY, N_SHOT, N_QUERY = (2, 1, 1) if DRY_RUN else (5, 5 if CUDA else 1, 15)
BATCHES = [2] if DRY_RUN else [25, 100] if CUDA else [5]
PRUNE = {6: 0.75}
STEPS = 10_000
"""More than are taken: the tables of draws have a row for each."""
WAYS = {"eager": (False, False), "compiled": (True, False), "graph": (False, None), "ours": (None, None)}
"""compile and graphs of each form."""


@pytest.fixture(scope="module")
def place() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def vit(model) -> Any:
    if model.name not in ARCHITECTURES:
        pytest.skip(f"steps are measured at {' and '.join(ARCHITECTURES)}")
    return network(ARCHITECTURES[model.name], 0)


@cache
def made(name: str, num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes)


def network(name: str, num_classes: int = 5) -> nn.Module:
    """A network of its own, on the CPU; its random weights are drawn once."""
    return copy.deepcopy(made(name, num_classes))


@pytest.fixture
def time_step(benchmark, ceilings) -> Callable[..., None]:
    def run(step: Callable[[], Any], rounds: int = 2) -> None:
        def finished() -> None:
            step()
            if CUDA:
                torch.cuda.synchronize()

        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        finished()
        benchmark.extra_info["first_step_s"] = time.perf_counter() - start
        if DRY_RUN:
            benchmark.pedantic(finished, rounds=1)
        else:
            benchmark.pedantic(finished, rounds=20 if CUDA else rounds, warmup_rounds=3 if CUDA else 1)
        benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads(), **ceilings}
        benchmark.extra_info["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
        if CUDA:
            benchmark.extra_info["peak_memory_GB"] = torch.cuda.max_memory_allocated() / 1e9

    return run


INVERSIONS = ["published", "plain", "eager", "compiled", "graph", "ours"]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", [*INVERSIONS, "plain_pruned", "ours_pruned", "ours_without_prior"])
def bench_inversion_step(form, batch, model, vit, place, time_step, benchmark):
    benchmark.group = f"inversion step, {model.name}, batch {batch}"
    resnet, dtype = network("resnet50"), default_dtype(place)
    name, _, kind = form.partition("_")
    prune = PRUNE if kind == "pruned" else {}
    if name == "published":
        plain = baseline.PlainViT(vit, freeze=False).to(place)
        linear, prior = nn.Linear(model.width, 5).to(place), baseline.PlainPrior(resnet).to(place)
        images = torch.randn(batch, 3, 224, 224, device=place).requires_grad_()
        optimizer = torch.optim.Adam([images], lr=0.25, betas=(0.5, 0.99))
        labels = torch.arange(batch, device=place) % 5
        time_step(lambda: baseline.inversion_step(plain, linear, prior, images, labels, optimizer, prune))
        return
    if name == "plain":
        frozen = vit.to(place, dtype).eval().requires_grad_(False)
        linear = nn.Linear(model.width, 5).to(place, dtype).requires_grad_(False)
        hooked = best_plain.HookedPrior(resnet, dtype).to(place)
        time_step(best_plain.inversion_step(frozen, linear, hooked, batch, prune))
        return
    compile, graphs = WAYS[name]
    teacher, head = Backbone(vit).to(place, dtype), Head(torch.randn(5, model.width)).to(place)
    natural = None if kind == "without_prior" else BatchNormPrior(resnet, dtype=dtype).to(place)
    config = InversionConfig(steps=STEPS, init="noise", batch_size=batch, prune=prune)
    optimiser = BatchOptimiser(teacher, head, batch, config, natural, graphs)
    step = optimiser.pruned if prune else optimiser.dense
    with compiling(compile, place):
        time_step(step)


@pytest.mark.parametrize("form", ["plain", "eager", "ours"])
@pytest.mark.parametrize("prior", ["resnet50", "tf_efficientnet_lite0"])
def bench_prior_alone(form, prior, place, time_step, benchmark):
    """Value and gradient of the prior for a batch of images; the model does not matter."""
    batch, dtype = BATCHES[0], default_dtype(place)
    benchmark.group = f"prior {prior}, batch {batch}"
    frozen = network(prior)
    images = torch.randn(batch, 3, 224, 224, device=place).requires_grad_()
    gradient = torch.zeros_like(images)
    plain, ours = best_plain.HookedPrior(frozen, dtype).to(place), BatchNormPrior(frozen, dtype=dtype).to(place)

    def value() -> torch.Tensor:
        return plain(images) if form == "plain" else ours(images, ours.mean, ours.std)

    def step() -> None:
        gradient.copy_(torch.autograd.grad(value(), images)[0])

    time_step(Step(step, lambda: [gradient], place, None if form == "ours" else False))


SPARSITIES = {"dense": None, "sparse_50": 0.5, "sparse_75": 0.75}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("form", ["published", "plain", "eager", "compiled", "graph", "ours"])
def bench_meta_step(form, sparsity, model, vit, place, time_step, benchmark):
    count, dtype = N_WAY * (N_SHOT + N_QUERY), default_dtype(place)
    benchmark.group = f"meta-training step, {model.name}, {count} images, {sparsity}"
    kept, share = None, SPARSITIES[sparsity]
    if share is not None:
        n = model.patches - int(model.patches * share)
        kept = torch.stack([torch.randperm(model.patches)[:n].sort().values for _ in range(count)]).to(place)
    if form == "published":
        if kept is not None:
            pytest.skip("the published code always sees all tokens")
        images = torch.randn(count, 3, 224, 224, device=place)
        student, teacher = (baseline.PlainViT(vit, freeze=True).to(place) for _ in range(2))
        head = nn.Linear(model.width, N_WAY).to(place)
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=1e-3)
        time_step(lambda: baseline.meta_step(student, teacher, head, images, N_WAY, N_SHOT, optimizer))
        return
    if form == "plain":
        images = torch.randn(count, 3, 224, 224, device=place, dtype=dtype)
        frozen = vit.to(place, dtype).eval().requires_grad_(False)
        time_step(best_plain.meta_step(frozen, images, N_WAY, N_SHOT, r=4, kept=kept))
        return
    compile, graphs = WAYS[form]
    settings = {"r": 4, "lora_alpha": 4.0, "init": "random", "guide_weight": 0.0}
    config = MetaConfig(steps=STEPS, n_way=N_WAY, n_shot=N_SHOT, n_query=N_QUERY, **settings)
    backbone = Backbone(vit).to(place, dtype)
    lora = LoRA.random(backbone, generator=torch.Generator().manual_seed(0))
    pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=place)
    bank = Bank(pixels, torch.randn(count, N_WAY, device=place), kept, 224 // model.patch)
    draws = Draws(
        torch.arange(count, device=place).expand(STEPS, -1).contiguous(),
        torch.zeros(STEPS, count, dtype=torch.bool, device=place),
        torch.zeros(STEPS, count, dtype=torch.int64, device=place),
        torch.arange(N_WAY, device=place).expand(STEPS, -1).contiguous(),
        torch.zeros(STEPS, dtype=torch.bool, device=place),
    )
    rates, losses = torch.full((STEPS,), 1e-3, device=place), torch.zeros(STEPS, device=place)
    optimizer = adam(lora.parameters(), place)
    shares = [Share(draws, 1)]
    step = EpisodeStep(backbone, lora, bank, shares, rates, config, optimizer=optimizer, losses=losses, graphs=graphs)
    with compiling(compile, place):
        time_step(step)


@pytest.mark.parametrize("form", ["plain", "eager", "ours", "onnx_cuda"])
def bench_tasks(form, model, vit, place, time_step, benchmark, tmp_path):
    """One 5-way 1-shot task of 80 images, uint8 in memory: fit and predict."""
    dtype = default_dtype(place)
    benchmark.group = f"5-way 1-shot task of 80 images, {model.name}"
    support, query = (torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8) for n in (5, 75))
    labels = list(range(5))
    if form == "plain":
        frozen = vit.to(place, dtype).eval().requires_grad_(False)

        @torch.inference_mode()
        def solve() -> None:
            pixels = torch.cat([support, query]).to(place)
            features = frozen(((pixels.float() / 255 - 0.5) / 0.5).to(dtype)).float()
            torch.cdist(features[5:], features[:5]).argmin(dim=1).cpu()

        time_step(solve)
        return
    if form == "onnx_cuda":
        runtime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            pytest.skip("onnxruntime-gpu is not installed")
        from lorarecycle.export import ExportConfig, FewShotSession, export_onnx

        export_onnx(Backbone(vit), tmp_path / "exported", None, ExportConfig(dtype="fp16"))
        session = FewShotSession(tmp_path / "exported", providers=["CUDAExecutionProvider"])
        pixels = [images.permute(0, 2, 3, 1).contiguous().numpy() for images in (support, query)]
        time_step(lambda: session.fit(pixels[0], labels).predict(pixels[1]))
        return
    classifier = FewShotClassifier(Backbone(vit).to(place, dtype), batch_size=75, compile=form == "ours")
    time_step(lambda: classifier.fit(support, labels).predict(query))


def bench_prototype_head(model, place, time_step, benchmark):
    """What a fused prototype head could save of a meta-training step at most: all of this."""
    benchmark.group = f"prototype head, {model.name}, {N_WAY * (N_SHOT + N_QUERY)} images"
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
