"""The checks after writing: ONNX checker, shape inference, standard operations only, and equality with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import normalize, to_uint8
from ..meta.prototypes import class_centres, distance_logits
from ..runtime.seeds import stream
from ..vit.backbone import Backbone
from .config import ATOL, MAX_LOGIT_ERROR, MIN_COSINE, MIN_COSINE_PRUNED, ExportConfig
from .graphs import EncoderGraph
from .real_images import handwritten_digits
from .runtime import Graph

BATCH_SIZES = (1, 2, 7, 64)
"""Sizes at which a dynamic batch is tried."""
TASKS = ((2, 1, 1), (5, 1, 7), (3, 4, 9), (1, 1, 2))
"""(classes, shots, queries) at which an episode is tried."""
_PROVIDERS = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}


@dataclass(frozen=True)
class Parity:
    """How far a file is from PyTorch, over all batches tried."""

    file: str
    max_error: float
    """Largest absolute difference; of squared distances, and of an episode in reduced precision, relative to the
    largest logit."""
    cosine: float
    """Smallest cosine of a row with PyTorch's."""
    reference: str = "float32"
    """PyTorch's precision: "float32", or "float64" where its float32 was too far off."""

    def __str__(self) -> str:
        against = "" if self.reference == "float32" else f" against PyTorch in {self.reference}"
        return f"{self.file}: max error {self.max_error:.2e}, cosine error {1 - self.cosine:.2e}{against}"


class References:
    """PyTorch's answers on 32 random and 32 real images, computed once for all files of an export.

    Args:
        backbone: float32, adapter merged, at the export's image size.
        config: the export's settings.
        device: "cpu" or "cuda".
        images: real images, of any kind that `to_uint8` takes; handwritten digits when None.

    Raises:
        ValueError: no such device here, unreadable images.
    """

    def __init__(self, backbone: Backbone, config: ExportConfig, device: str = "cpu", images: Any = None) -> None:
        self.providers: list[str] = check_device(device)
        self.config = config
        self.device = device
        self.atol: float | None = config.atol if config.atol is not None else ATOL.get(config.dtype)
        self.graph: EncoderGraph = EncoderGraph(backbone, uint8_input=config.uint8_input, prune=config.prune)
        self.pixels: Tensor = trial_pixels(self.graph, max(BATCH_SIZES), images)

    @cached_property
    def embeddings(self) -> Tensor:
        """float32 [64, D], as PyTorch computes them."""
        return self._embed(torch.float32)

    @cached_property
    def exact(self) -> Tensor:
        """float32 [64, D], computed in float64 on the CPU: what rounding has left alone."""
        return self._embed(torch.float64)

    def check_encoder(self, path: Path) -> Parity:
        """All checks of an encoder; a fixed batch is tried at its size.

        Raises:
            ValueError: a check fails.
        """
        check_file(path)
        graph = Graph(path, providers=self.providers)
        batch = graph.inputs["pixel_values"].shape[0]
        chosen, ours = [], []
        for size in BATCH_SIZES if isinstance(batch, str) else (batch,):
            for shift in (0, 1) if size == 1 else (0,):  # one random, one real
                chosen.append((torch.arange(size) + shift) % len(self.pixels))
                ours.append(graph.run({"pixel_values": self.pixels[chosen[-1]].numpy()})["embeddings"].numpy())
        limits = MIN_COSINE_PRUNED if self.config.prune else MIN_COSINE
        min_cosine = limits[self.config.dtype] if self.atol is None else None
        return self.judge(path, ours, lambda features: [features[index] for index in chosen], self.atol, min_cosine)

    def check_episode(self, path: Path) -> Parity:
        """All checks of an episode, on tasks of several shapes.

        Raises:
            ValueError: a check fails.
        """
        check_file(path)
        graph = Graph(path, providers=self.providers)
        tasks, ours = [], []
        for n_way, n_shot, n_query in TASKS:
            n = n_way * n_shot
            tasks.append((torch.arange(n_way).repeat(n_shot), slice(0, n), slice(n, n + n_query)))
        for labels, support, query in tasks:
            feeds = {"support_images": self.pixels[support], "query_images": self.pixels[query]}
            arrays = {name: x.numpy() for name, x in {**feeds, "support_labels": labels}.items()}
            ours.append(graph.run(arrays)["logits"].numpy())

        def expect(features: Tensor) -> list[Tensor]:
            centres = [class_centres(features[support], labels, len(labels.unique())) for labels, support, _ in tasks]
            queries = [features[query] for _, _, query in tasks]
            return [distance_logits(q, c, self.config.distance) for q, c in zip(queries, centres, strict=True)]

        relative = self.atol is None or self.config.distance == "sqeuclidean"
        limit = MAX_LOGIT_ERROR[self.config.dtype] if self.atol is None else self.atol
        return self.judge(path, ours, expect, limit, relative=relative)

    def judge(
        self,
        path: Path,
        ours: list[np.ndarray],
        expect: Callable[[Tensor], list[Tensor]],
        atol: float | None,
        min_cosine: float | None = None,
        relative: bool = False,
    ) -> Parity:
        """Compare with PyTorch in float32; where that is too far off, with float64: it may be PyTorch that rounded.

        Raises:
            ValueError: further apart than allowed from both.
        """

        def against(features: Tensor) -> Parity:
            expected = [rows.numpy() for rows in expect(features)]
            return judge(path, list(zip(ours, expected, strict=True)), atol, min_cosine, relative)

        try:
            return against(self.embeddings)
        except ValueError:
            return replace(against(self.exact), reference="float64")

    @torch.no_grad()
    def _embed(self, dtype: torch.dtype) -> Tensor:
        device = self.device if dtype == torch.float32 else "cpu"
        graph = EncoderGraph(self.graph.backbone.clone().to(device, dtype), prune=self.graph.prune)
        backbone, pixels = graph.backbone, self.pixels
        if self.config.uint8_input:
            pixels = normalize(pixels, backbone.mean, backbone.std)
        with full_float32(device):
            return torch.cat([graph(part.to(device, dtype)).float().cpu() for part in pixels.split(8)])


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """On a GPU without TF32, whose products and convolutions are further off than a file may be."""
    backends: Any = torch.backends  # its stubs lack the switch of the convolutions
    switches = (backends.cuda.matmul, backends.cudnn.conv) if device == "cuda" else ()
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def trial_pixels(graph: EncoderGraph, n: int, images: Any = None) -> Tensor:
    """What goes into the encoder, [n, 3, H, W]: noise and real images by turns, digits when `images` is None."""
    backbone = graph.backbone
    real = to_uint8(handwritten_digits()[0][::6] if images is None else images, backbone.fit)
    real = real[torch.arange((n + 1) // 2) % len(real)]
    noise = torch.randint(0, 256, real.shape, generator=stream(0, "export check"), dtype=torch.uint8)
    pixels = torch.stack([noise, real], dim=1).flatten(0, 1)[:n]  # every batch from 2 on has both
    return pixels if graph.uint8_input else normalize(pixels, backbone.mean, backbone.std)


def check_head(path: Path, config: ExportConfig, embed_dim: int, device: str = "cpu") -> Parity:
    """All checks of a head, on random features.

    Raises:
        ValueError: a check fails.
    """
    check_file(path)
    graph = Graph(path, providers=check_device(device))
    generator = stream(0, "export check", "head")
    logits, probabilities = [], []
    for n_query, n_way in ((1, 1), (1, 5), (75, 5), (7, 20)):
        features = torch.randn(n_query, embed_dim, generator=generator)
        centres = torch.randn(n_way, embed_dim, generator=generator)
        ours = graph.run({"embeddings": features.numpy(), "prototypes": centres.numpy()})
        expected = distance_logits(features, centres, config.distance)
        logits.append((ours["logits"].numpy(), expected.numpy()))
        probabilities.append((ours["probabilities"].numpy(), expected.softmax(dim=-1).numpy()))
    atol = config.atol if config.atol is not None else ATOL["fp32"]
    judge(path, probabilities, max(atol, 1e-3) if config.distance == "sqeuclidean" else atol, None)
    return judge(path, logits, atol, None, relative=config.distance == "sqeuclidean")


def check_file(path: Path) -> None:
    """ONNX checker, strict shape inference, and no operation from outside the standard.

    Raises:
        ValueError: one of them fails.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ValueError(f"{path.name} must pass the ONNX checker, got {str(error).strip()[:600]}.") from error
    model = onnx.load(path, load_external_data=False)
    foreign = sorted({f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        raise ValueError(f"{path.name} must hold standard ONNX operations only, got {foreign or 'functions'}.")


def check_device(device: str) -> list[str]:
    """The providers for a device.

    Raises:
        ValueError: the device is unknown, or not there.
    """
    if device not in _PROVIDERS:
        raise ValueError(f"`device` must be one of {tuple(_PROVIDERS)}, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`device` must be one that this machine has, got 'cuda' without a GPU; use 'cpu'.")
    return _PROVIDERS[device]


def judge(
    path: Path,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    atol: float | None,
    min_cosine: float | None,
    relative: bool = False,
) -> Parity:
    """Compare arrays [n, D] with the expected ones.

    Raises:
        ValueError: other shapes, NaN or infinite values, or further apart than allowed.
    """
    error, cosine = 0.0, 1.0
    for ours, expected in pairs:
        if ours.shape != expected.shape:
            raise ValueError(f"{path.name} must give {list(expected.shape)}, got {list(ours.shape)}.")
        if not np.isfinite(ours).all():
            wrong = int((~np.isfinite(ours)).sum())
            raise ValueError(f"{path.name} must give finite values, got {wrong} NaN or infinite; nothing was kept.")
        scale = max(1.0, float(np.abs(expected).max())) if relative else 1.0
        difference = np.abs(ours - expected).max() / scale
        error = max(error, float(difference) if np.isfinite(difference) else float("inf"))
        a, b = ours.astype(np.float64), expected.astype(np.float64)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        smallest = float(((a * b).sum(axis=-1) / np.maximum(lengths, 1e-300)).min())
        cosine = min(cosine, smallest if np.isfinite(smallest) else -1.0)
    parity = Parity(path.name, error, cosine)
    if atol is not None and not error <= atol:
        raise ValueError(f"{parity}: the error must be at most `atol` {atol:g}; nothing was kept.")
    if min_cosine is not None and not cosine >= min_cosine:
        raise ValueError(
            f"{parity}: the cosine must be at least {min_cosine:g}; nothing was kept. Use dtype fp32, or set `atol`."
        )
    return parity
