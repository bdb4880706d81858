"""export_onnx: a folder with encoder.onnx, head.onnx, episode.onnx and config.json, which `FewShotSession` reads."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..data.dataset import LabelledImages
from ..runtime.files import LEFTOVER, hash_file, require_place
from ..runtime.folders import atomic_folder
from ..vit.backbone import Backbone
from .accuracy import compare_accuracy, make_trial
from .check import Parity, References, check_head
from .config import ExportConfig
from .folder_config import CONFIG, FORMAT_VERSION
from .graphs import EncoderGraph, prepare_backbone
from .onnx_files import write_dynamic_episode, write_encoder, write_episode, write_head

OWN_FILES = ("encoder.onnx", "encoder.onnx.data", "head.onnx", "episode.onnx", "episode.onnx.data", "encoder.pt2")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and what its checks found.

    Attributes:
        folder: where the files are.
        parities: one for each file.
        accuracy: few-shot accuracy in percent, "float32" beside the reduced precision; {} for fp32.
    """

    folder: Path
    parities: tuple[Parity, ...]
    accuracy: dict[str, Any]

    def __str__(self) -> str:
        lines = [str(parity) for parity in self.parities]
        if self.accuracy:
            figures = ", ".join(f"{k} {v:.2f} %" for k, v in self.accuracy.items() if isinstance(v, float))
            lines.append(f"accuracy on {self.accuracy['tasks']}: {figures}")
        return "\n".join([*lines, str(self.folder)])


def export_onnx(
    backbone: Backbone,
    directory: str | PathLike[str],
    meta_lora: Adapter | None = None,
    config: ExportConfig | None = None,
    *,
    device: str = "cpu",
    images: Any = None,
    data: LabelledImages | None = None,
    force: bool = False,
) -> ExportReport:
    """Export everything that few-shot inference needs.

    Files are written into a hidden folder inside the output, checked (see `export_encoder`), and moved into place
    at the end: when anything fails, nothing is left.

    Args:
        backbone: the frozen ViT.
        directory: made if absent; must be empty unless `force`.
        meta_lora: adapter, merged in float32; the plain backbone when None.
        config: settings; the defaults when None.
        device: "cpu" or "cuda", where the files are compared with PyTorch.
        images: real images to compare on; handwritten digits when None.
        data: labelled images on which fp16 and int8 are compared with float32 by few-shot accuracy; handwritten
            digits when None.
        force: replace an earlier export; other files in the folder stay.

    Raises:
        FileExistsError: the directory is not empty and `force` is off.
        OSError: it cannot be written to.
        ImportError, ValueError: see `export_encoder`; too few images in a class of `data`.
    """
    config = config or ExportConfig()
    directory = Path(directory).expanduser()
    require_free(directory, force)
    trial = None if config.dtype == "fp32" else make_trial(data)
    references = References(prepare_backbone(backbone, meta_lora, config.img_size), config, device, images)
    graph, embed_dim = references.graph, backbone.embed_dim
    with atomic_folder(directory, last=(CONFIG,), stale=OWN_FILES) as folder:
        encoder, head, episode = (folder / f"{name}.onnx" for name in ("encoder", "head", "episode"))
        write_head(head, config, embed_dim)  # small, and so first: it shows what the exporter cannot write
        head_parity = check_head(head, config, embed_dim, device)
        write_encoder(graph, encoder, config)
        parities = [references.check_encoder(encoder), head_parity]
        if config.batch_size is None:
            write_episode(encoder, episode, config)
        else:  # an episode takes any number of images
            write_dynamic_episode(references, episode, config)
        parities.append(references.check_episode(episode))
        accuracy = {} if trial is None else compare_accuracy(graph, encoder, config, trial, device)
        content = _describe(graph, meta_lora, config, parities, accuracy, folder)
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return ExportReport(directory, tuple(parities), accuracy)


def require_free(directory: Path, force: bool) -> None:
    """Raise unless the export may write there."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"`directory` must be a folder, got the file {directory}.")
    if not force and directory.is_dir() and any(not file.name.startswith(LEFTOVER) for file in directory.iterdir()):
        raise FileExistsError(f"`directory` must be empty, got {directory} with files in it; pass `force` (--force).")
    require_place(directory, "directory", folder=True)


_FEATURES = {
    "token": "class token after the final norm",
    "avg": "mean patch token",
    "map": "patch tokens pooled by attention",
}


def _describe(
    graph: EncoderGraph,
    meta_lora: Adapter | None,
    config: ExportConfig,
    parities: list[Parity],
    accuracy: dict[str, Any],
    folder: Path,
) -> dict[str, Any]:
    backbone = graph.backbone
    packages = ("lorarecycle", "torch", "timm", "onnx", "onnxscript", "onnxruntime")
    return {
        "format_version": FORMAT_VERSION,
        "model": backbone.name,
        "meta_lora": None if meta_lora is None else {"name": meta_lora.name, "sha256": meta_lora.digest()},
        "image_size": backbone.image_size,
        "resize": backbone.fit.resize,
        "crop_pct": backbone.fit.crop_pct,
        "interpolation": "bicubic, antialiased",
        "scale": 1 / 255,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "input_dtype": "uint8" if config.uint8_input else "float32",
        "batch_size": config.batch_size or "dynamic",
        "feature": _FEATURES[backbone.own_pool],
        "embed_dim": backbone.embed_dim,
        "distance": config.distance,
        "dtype": config.dtype,
        "opset": config.opset,
        "prune": {str(layer): ratio for layer, ratio in config.prune.items()},
        "parity": [asdict(parity) for parity in parities],
        "accuracy": accuracy,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "sha256": {file.name: hash_file(file) for file in sorted(folder.iterdir())},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None
