"""Exported encoders beside PyTorch: one image, a batch of 64, whole few-shot tasks, and the first prediction.

    pytest benchmarks/bench_export.py --benchmark-only --models vit_base

Random weights with a rank-4 adapter on q and v. Float32 on the CPU (bfloat16 for PyTorch on CUDA) except where a
form's name says otherwise. A task is 5-way 1-shot with 15 queries a class: 80 images, centres and distances; PyTorch
takes them as one batch, a session 8 at a time. `extra_info` holds images or tasks per second. CPU batches of
ViT-L/14 take minutes and are left out.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lorarecycle.export import ExportConfig, export_onnx
from lorarecycle.export.graphs import EncoderGraph, prepare_backbone
from lorarecycle.export.onnx_files import write_encoder
from lorarecycle.export.runtime import Graph

from lorarecycle import Adapter, Backbone
from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.meta.prototypes import class_centres, distance_logits

CUDA = torch.cuda.is_available()
ARCHITECTURES = {
    "ViT-Tiny/16": "vit_tiny_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/14": "vit_large_patch14_clip_224",
}
FORMS = ["peft", "eager", "compiled", "onnx-fp32", "onnx-fp16", "onnx-int8", "aoti"]
N_WAY, N_QUERY = 5, 75
SESSION_BATCH = 8


@functools.cache
def backbone_and_adapter(name: str) -> tuple[Backbone, Adapter]:
    torch.manual_seed(0)
    backbone = Backbone(timm.create_model(ARCHITECTURES[name], num_classes=0), name=name)
    width = backbone.embed_dim
    sites = [f"blocks.{block}.attn.{part}" for block in range(backbone.num_blocks) for part in "qv"]
    return backbone, Adapter(
        {s: LoRAFactors(torch.randn(4, width) / 50, torch.randn(width, 4) / 50, 1.0) for s in sites}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture
def encode(form, model, folder, device, dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Normalised images -> features, both on the CPU for ONNX Runtime, else on the device."""
    if model.name == "ViT-L/14" and not CUDA:
        pytest.skip("a batch of ViT-L/14 takes minutes on a CPU")
    backbone, adapter = backbone_and_adapter(model.name)
    if form == "peft":
        return _peft(backbone.vit, device, dtype)
    if form.startswith("onnx"):
        return _onnx(model.name, form.removeprefix("onnx-"), folder)
    merged = backbone.merge(adapter).to(device, dtype)
    if form == "aoti":
        return _aoti(model.name, merged, folder)
    return torch.compile(merged, dynamic=False) if form == "compiled" else merged


def _peft(vit: torch.nn.Module, device: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    peft = pytest.importorskip("peft")
    import copy

    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["qkv"], init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(vit), config).eval().to(device, dtype)


def _onnx(name: str, dtype: str, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    path = folder / f"{ARCHITECTURES[name]}-{dtype}.onnx"
    if not path.exists():
        write_encoder(
            EncoderGraph(prepare_backbone(*backbone_and_adapter(name), None)), path, ExportConfig(dtype=dtype)
        )
    graph = Graph(path, threads=torch.get_num_threads())
    return lambda x: torch.from_numpy(graph.run({"pixel_values": x.float().cpu().numpy()})["embeddings"].numpy())


def _aoti(name: str, merged: Backbone, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    path = folder / f"{ARCHITECTURES[name]}.pt2"
    if not path.exists():
        example = torch.zeros(2, 3, merged.image_size, merged.image_size, device=merged.device, dtype=merged.dtype)
        shapes = ({0: torch.export.Dim("batch_size", min=1, max=65536)},)
        program = torch.export.export(EncoderGraph(merged), (example,), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def _time(benchmark: Any, run: Callable[[], Any], rounds: int, unit: str, amount: int, warmup: int = 1) -> None:
    def synchronised() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark.pedantic(synchronised, rounds=rounds, iterations=1, warmup_rounds=warmup)
    median = benchmark.stats.stats.median if benchmark.stats else float("nan")
    benchmark.extra_info |= {f"{unit}_per_s": amount / median, "threads": torch.get_num_threads()}
    benchmark.extra_info |= {"torch": torch.__version__, "onnxruntime": __import__("onnxruntime").__version__}


@pytest.mark.parametrize("form", FORMS)
def bench_one_image(form, model, encode, device, dtype, benchmark):
    benchmark.group = f"one image {model.name}"
    x = torch.randn(1, 3, 224, 224, device=device, dtype=dtype)
    _time(benchmark, lambda: encode(x), 50 if CUDA else 10, "images", 1)


@pytest.mark.parametrize("form", FORMS)
def bench_batch_of_64(form, model, encode, device, dtype, benchmark):
    benchmark.group = f"batch of 64 {model.name}"
    x = torch.randn(64, 3, 224, 224, device=device, dtype=dtype)
    with torch.no_grad():
        encode(x[:2])
    # on a CPU one call takes seconds; only what compiles for this size needs another one before it
    _time(benchmark, lambda: encode(x), 20 if CUDA else 1, "images", 64, int(CUDA or form == "compiled"))


@pytest.mark.parametrize("form", FORMS)
def bench_tasks(form, model, encode, device, dtype, benchmark):
    benchmark.group = f"5-way 1-shot task {model.name}"
    x = torch.randn(N_WAY + N_QUERY, 3, 224, 224, device=device, dtype=dtype)
    labels = torch.arange(N_WAY)
    step = SESSION_BATCH if form.startswith("onnx") and not CUDA else len(x)

    def task() -> torch.Tensor:
        features = torch.cat([encode(part) for part in x.split(step)])
        centres = class_centres(features[:N_WAY], labels, N_WAY)
        return distance_logits(features[N_WAY:], centres).argmax(dim=-1)

    with torch.no_grad():
        encode(x[:2])
    _time(benchmark, task, 20 if CUDA else 1, "tasks", 1, int(CUDA or form == "compiled"))


SESSION = """
import numpy as np
from lorarecycle.export import FewShotSession
images = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 3), dtype=np.uint8)
session = FewShotSession({folder!r}, threads={threads})
assert session.fit(images[:5], list("abcde")).predict(images[5]).shape == (1,)
"""
SERVED = """
import numpy as np
from lorarecycle.export import FewShotSession
image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
session = FewShotSession({folder!r}, threads={threads}).load_prototypes({folder!r} + "/centres.npz")
assert session.predict(image).shape == (1,)
"""
TORCH = """
import numpy as np
from lorarecycle import Backbone, FewShotClassifier
images = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 3), dtype=np.uint8)
classifier = FewShotClassifier(Backbone.load("vit_tiny_patch16_224", weights={weights!r}))
assert classifier.fit(images[:5], list("abcde")).predict(images[5]).shape == (1,)
"""


@pytest.mark.parametrize("form", ["torch", "onnx-fp32", "onnx-int8", "onnx-fp32 with saved centres"])
def bench_first_prediction(form, folder, benchmark):
    """ViT-Tiny, from the start of the process: 5 support images and one query, or one query alone."""
    from lorarecycle.export import FewShotSession
    from safetensors.torch import save_file

    benchmark.group = "process start to first prediction, ViT-Tiny/16"
    backbone, adapter = backbone_and_adapter("ViT-Tiny/16")
    weights = folder / "tiny.safetensors"
    if form == "torch" and not weights.exists():
        save_file({key: value.contiguous() for key, value in backbone.vit.state_dict().items()}, weights)
    dtype = "int8" if "int8" in form else "fp32"
    exported = folder / dtype
    if form != "torch" and not exported.exists():
        export_onnx(backbone, exported, adapter, ExportConfig(dtype=dtype))
        images = np.zeros((5, 224, 224, 3), np.uint8)
        FewShotSession(exported).fit(images, list("abcde")).save_prototypes(exported / "centres.npz")
    code = TORCH if form == "torch" else SERVED if "saved" in form else SESSION
    filled = code.format(folder=str(exported), weights=str(weights), threads=torch.get_num_threads())
    command = [sys.executable, "-c", filled]
    run = functools.partial(subprocess.run, command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
