"""A backbone's forward pass for many batches: compiled blocks, and one launch for each shape that comes again."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ..runtime.graphs import Graphs, Step
from ..runtime.steps import Compile, check_compile, compiling
from .backbone import Backbone

SHAPES = 8
"""Shapes that are kept captured; others run as they are."""


class ReplayedForward:
    """Features of normalised batches, as `Backbone.forward` gives them without gradient.

    On a GPU a shape is captured as a CUDA graph when it comes for the second time. The backbone's weights stay where
    they are: what is written into them counts, moving or casting it asks for a new object.

    Args:
        backbone: frozen.
        compile: whether its blocks run through `torch.compile`; on a GPU only when None.
        graphs: whether shapes are captured; on a GPU only when None.
    """

    def __init__(self, backbone: Backbone, *, compile: Compile = None, graphs: Graphs = None) -> None:
        self._backbone = backbone
        self._compile = check_compile(compile, backbone.device)
        self._graphs = backbone.device.type == "cuda" and graphs is not False
        self._seen: set[Hashable] = set()
        self._steps: dict[Hashable, tuple[Tensor, Tensor, Step]] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, pool: str = "pooled") -> Tensor:
        """Features [B, D] of images [B, 3, H, W]; they are the caller's own."""
        key = (tuple(images.shape), images.dtype, pool)
        again = key in self._seen
        self._seen.add(key)
        with compiling(self._compile, images.device):
            if not (self._graphs and again and (key in self._steps or len(self._steps) < SHAPES)):
                return self._backbone(images, pool=pool)
            if key not in self._steps:
                self._steps[key] = self._static(images, pool)
            there, features, step = self._steps[key]
            there.copy_(images)
            step()
            return features.clone()

    def _static(self, images: Tensor, pool: str) -> tuple[Tensor, Tensor, Step]:
        there = images.clone()
        features = self._backbone(there, pool=pool)

        def run() -> None:
            features.copy_(self._backbone(there, pool=pool))

        return there, features, Step(run, lambda: [features], images.device)
