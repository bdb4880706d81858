"""A backbone's forward pass for many batches: compiled blocks, and one launch for each shape that comes again."""

from __future__ import annotations

import threading
from collections import Counter
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

    On a GPU a shape that comes again is captured as a CUDA graph. The backbone's weights stay where they are: what is
    written into them counts, moving or casting it asks for a new object. Threads take turns, on one stream.

    Args:
        backbone: frozen.
        compile: whether its blocks run through `torch.compile`; on a GPU only when None.
        graphs: whether shapes are captured; on a GPU only when None.
        after: times that a shape comes before it is captured, which takes as long as several passes.
    """

    def __init__(self, backbone: Backbone, *, compile: Compile = None, graphs: Graphs = None, after: int = 1) -> None:
        self._backbone = backbone
        self._compile = check_compile(compile, backbone.device)
        self._graphs = backbone.device.type == "cuda" and graphs is not False
        self._after = after
        self._seen: Counter[Hashable] = Counter()
        self._steps: dict[Hashable, tuple[Tensor, Tensor, Step]] = {}
        self._turn = threading.Lock()

    @torch.no_grad()
    def __call__(self, images: Tensor, pool: str = "pooled") -> Tensor:
        """Features [B, D] of images [B, 3, H, W]; they are the caller's own."""
        key = (tuple(images.shape), images.dtype, pool)
        with compiling(self._compile, images.device):
            if not self._graphs:
                return self._backbone(images, pool=pool)
            with self._turn:  # one buffer for all who ask
                self._seen[key] += 1
                room = key in self._steps or len(self._steps) < SHAPES
                if self._seen[key] > self._after and room:
                    if key not in self._steps:
                        self._steps[key] = self._static(images, pool)
                    there, features, step = self._steps[key]
                    there.copy_(images)
                    step()
                    return features.clone()
            return self._backbone(images, pool=pool)

    def _static(self, images: Tensor, pool: str) -> tuple[Tensor, Tensor, Step]:
        backbone = self._backbone
        found = backbone(images, pool=pool)
        with torch.inference_mode(False), torch.no_grad():  # buffers that may be written outside of it too
            there, features = torch.empty_like(images), torch.empty_like(found)

        def run() -> None:
            features.copy_(backbone(there, pool=pool))

        return there, features, Step(run, lambda: [features], images.device)
