"""What is exported, as modules of standard operations: the encoder, the head, and an episode's part behind the encoder.

The forward pass is `Backbone.forward`; while exporting, its ops run their plain PyTorch form.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..config import MIDDLE, SHARPNESS
from ..vit.backbone import Backbone
from ..vit.base import warn_of_doubts


def prepare_backbone(backbone: Backbone, meta_lora: Adapter | None, image_size: int | None) -> Backbone:
    """A float32 backbone on the CPU that holds the adapter and reads images of `image_size`.

    Raises:
        TypeError: something else than a Backbone or an Adapter.
        ValueError: the adapter does not fit, or the patch size does not divide `image_size`.
    """
    if not isinstance(backbone, Backbone):
        raise TypeError(f"`backbone` must be a Backbone, got {type(backbone).__name__}; use `Backbone.load`.")
    if not isinstance(meta_lora, Adapter | None):
        raise TypeError(f"`meta_lora` must be an Adapter, got {type(meta_lora).__name__}; use `Adapter.load`.")
    size, patch = image_size or backbone.image_size, backbone.patch_size
    if size % patch:
        nearest = max(1, round(size / patch)) * patch
        raise ValueError(f"`img_size` must be a multiple of the patch size {patch}, got {size}; take {nearest}.")
    model = backbone.clone().to("cpu", torch.float32)
    if meta_lora is not None:
        warn_of_doubts(backbone, [meta_lora])
        model = model.merge(meta_lora)
    # built anew, so that the position embeddings are resampled here and not in the graph
    return Backbone(
        model.vit,
        name=backbone.name,
        image_size=size,
        mean=backbone.mean,
        std=backbone.std,
        resize=backbone.fit.resize,
        crop_pct=backbone.fit.crop_pct,
        family=backbone.family,
    )


class EncoderGraph(nn.Module):
    """`pixel_values` [B, 3, H, W] -> `embeddings` float32 [B, D].

    Args:
        backbone: float32, adapter merged.
        uint8_input: the pixels are uint8; scaling and normalisation come first.
        prune: `{layer: ratio}`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, *, uint8_input: bool = False, prune: Mapping[int, float] | None = None):
        super().__init__()
        backbone.kept_per_layer(prune or {}, backbone.num_patches(backbone.image_size))
        self.backbone = backbone
        self.uint8_input = uint8_input
        self.prune: dict[int, float] = dict(prune or {})
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1))
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.uint8_input:
            pixel_values = (pixel_values.float() * (1 / 255) - self.mean) / self.std
        return self.backbone(pixel_values, prune=self.prune)

    def example(self, batch_size: int) -> Tensor:
        """Pixels of the right shape and dtype."""
        size = self.backbone.image_size
        dtype = torch.uint8 if self.uint8_input else torch.float32
        return torch.zeros(batch_size, 3, size, size, dtype=dtype)


class HeadGraph(nn.Module):
    """`embeddings` [Q, D], `prototypes` [C, D] -> `logits`, `probabilities` [Q, C] (Eq. 3b)."""

    def __init__(self, distance: str = "euclidean"):
        super().__init__()
        self.distance = distance
        self.eval()

    def forward(self, embeddings: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(embeddings, prototypes)
        return logits, logits.softmax(dim=-1)

    def logits(self, embeddings: Tensor, prototypes: Tensor, mean: Tensor | None = None) -> Tensor:
        """Minus the distances; the same numbers as `distance_logits`.

        Args:
            mean: of the class centres, [1, D], where not all rows of `prototypes` count.
        """
        if self.distance == "centred_cosine":
            middle = MIDDLE * (prototypes.mean(dim=0, keepdim=True) if mean is None else mean)
            return SHARPNESS * _cosine(embeddings - middle, prototypes - middle)
        if self.distance == "cosine":
            return _cosine(embeddings, prototypes)
        squared = (embeddings.unsqueeze(1) - prototypes.unsqueeze(0)).square().sum(dim=-1)
        return -squared if self.distance == "sqeuclidean" else -squared.sqrt()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of each row of one with each of the other, minus one."""
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (a, b))
    return a @ b.transpose(0, 1) - 1


class PrototypeGraph(nn.Module):
    """Embeddings of the support images, then of the queries, [S + Q, D], and labels [S] -> `logits` [Q, C] (Eq. 3).

    C is the largest label plus one. A class without support images gets logits of minus infinity.
    """

    def __init__(self, distance: str = "euclidean"):
        super().__init__()
        self.head: HeadGraph = HeadGraph(distance)
        self.eval()

    def forward(self, embeddings: Tensor, support_labels: Tensor) -> Tensor:
        n_support = support_labels.shape[0]
        n_classes = support_labels.max().item() + 1
        torch._check(n_classes >= 1)
        torch._check(n_classes <= 2**31)
        classes = torch.arange(n_classes, device=embeddings.device)
        member = (support_labels.unsqueeze(0) == classes.unsqueeze(1)).float()  # [C, S]
        count = member.sum(dim=1, keepdim=True)
        centres = member @ embeddings[:n_support] / count.clamp_min(1)
        mean = centres.sum(dim=0, keepdim=True) / (count > 0).sum()
        logits = self.head.logits(embeddings[n_support:], centres, mean)
        return logits.masked_fill(count.transpose(0, 1) == 0, float("-inf"))
