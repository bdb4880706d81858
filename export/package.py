"""export_aoti: the merged encoder compiled ahead of time, for C++ (`csrc/runner`) or for Python."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..runtime.folders import atomic_folder
from ..vit.backbone import Backbone
from .check import BATCH_SIZES, Parity, References
from .config import ExportConfig
from .graphs import EncoderGraph, prepare_backbone

SUFFIX = ".pt2"


def export_aoti(
    backbone: Backbone,
    path: str | PathLike[str],
    meta_lora: Adapter | None = None,
    config: ExportConfig | None = None,
    *,
    images: Any = None,
) -> Parity:
    """Compile the merged encoder into a package for CPUs of this kind.

    uint8 pixels [batch_size, 3, H, W] -> embeddings float32 [batch_size, D]; scaling and normalisation are inside.
    The package's metadata says what `lorarecycle-predict` needs. It is compared with PyTorch before it is put in
    place, at batch sizes 1, 2, 7 and 64 where the batch is dynamic.

    Args:
        backbone: the frozen ViT.
        path: the file, ending in .pt2.
        meta_lora: adapter, merged in float32; the plain backbone when None.
        config: its image size, batch size, pruning, distance and tolerance are used.
        images: real images to compare on; handwritten digits when None.

    Raises:
        ValueError: another suffix, a `dtype` other than fp32, an adapter that does not fit, a package too far off.
        RuntimeError: no C++ compiler, or it fails.
    """
    config = config or ExportConfig()
    path = Path(path).expanduser()
    if path.suffix != SUFFIX:
        raise ValueError(f"`path` of a package must end in {SUFFIX}, got {path.name!r}.")
    require_fp32(config)
    config = replace(config, uint8_input=True)
    references = References(prepare_backbone(backbone, meta_lora, config.img_size), config, images=images)
    with atomic_folder(path.parent) as folder:
        _compile(references.graph, folder / path.name, config)
        return _check(references, folder / path.name, config)


def require_fp32(config: ExportConfig) -> None:
    """Raise for settings that a package cannot have."""
    if config.dtype != "fp32":
        raise ValueError(f"`dtype` of a package must be 'fp32', got {config.dtype!r}; int8 and fp16 are for `--onnx`.")


def _compile(graph: EncoderGraph, path: Path, config: ExportConfig) -> None:
    backbone = graph.backbone
    shapes = ({0: torch.export.Dim("batch_size", min=1, max=65536)},) if config.batch_size is None else None
    metadata = {
        "image_size": str(backbone.image_size),
        "resize": backbone.fit.resize,
        "crop_pct": repr(backbone.fit.crop_pct),
        "embed_dim": str(backbone.embed_dim),
        "batch_size": str(config.batch_size or 0),
        "distance": config.distance,
        "model": json.dumps(backbone.name),
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, (graph.example(config.batch_size or 2),), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata}
        )


def _check(references: References, path: Path, config: ExportConfig) -> Parity:
    encoder = torch._inductor.aoti_load_package(str(path))
    sizes = BATCH_SIZES if config.batch_size is None else (config.batch_size,)
    chosen = [torch.arange(size) % len(references.pixels) for size in sizes]
    ours = [encoder(references.pixels[index]).numpy() for index in chosen]
    return references.judge(path, ours, lambda features: [features[index] for index in chosen], references.atol)
