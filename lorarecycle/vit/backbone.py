"""A frozen timm Vision Transformer (or EVA model) that takes adapters."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..adapters.adapter import SITE_PATTERN, Adapter
from ..adapters.stored import head_of, shapes_of
from ..data.images import Fit
from .attention import AttentionKind
from .forward import Encoder
from .support import share

CLASSIFIERS = ("head.", "head_dist.", "aux_head.")
"""Keys of timm's modules that no feature comes from."""


class Backbone(Encoder):
    """A frozen `timm.models.VisionTransformer`, or `Eva` with one layer for queries, keys and values.

    The features are what the model itself pools: the class token after the final norm, with timm's
    `global_pool="avg"` the mean patch token, with "map" what a learnt query attends to (SigLIP). Models without a class
    token drop the patches that all tokens attend to least. A model of one channel reads the luminance of RGB. Images
    are float [B, 3, H, W] normalised with `mean` and `std`; any height and width that the patch size divides (the
    position embedding is resampled). The weights never train; `merge` gives a copy that shares every tensor it does not
    change.

    Args:
        vit: the module; its tensors are shared, not copied, and it is left as it is.
        name: what to call it; adapters name it as their base model.
        image_size: side in pixels that preprocessing resizes to; the module's own when None.
        mean, std: input normalisation per RGB channel for pixels in [0, 1]; one number stands for all three.
        resize, crop_pct: how images of other sizes are brought to `image_size`, see `Fit`; what timm's `pretrained_cfg`
            says when None.
        family: "vit", "deit", "dinov2" or "clip" for a checkpoint of transformers; "" when unknown.
        attention: "sdpa" (PyTorch's `scaled_dot_product_attention`) or "xformers" (its
            `memory_efficient_attention`; an extra, CUDA only).

    Raises:
        TypeError: not a timm VisionTransformer or Eva.
        ValueError: a variant whose forward pass this class does not know, named: other patches or blocks, other
            channels than 1 or 3, pooling by maximum; images that are not square, unless `image_size` is given;
            unknown `attention`.
        ImportError: xformers is asked for and not installed.
    """

    weights_file: str | None = None
    """Name of the local file that `load` took the weights from, where `weights` named one."""
    _unmerged: tuple[Backbone, ...] = ()  # a tuple, so that it is no submodule

    @classmethod
    def load(
        cls,
        base: str | PathLike[str] | nn.Module,
        *,
        weights: str | PathLike[str] | None = None,
        image_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        resize: Literal["crop", "squash"] | None = None,
        crop_pct: float | None = None,
        attention: AttentionKind = "sdpa",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Backbone:
        """Load a Vision Transformer.

        Args:
            base: a timm model name; a Hub id ("google/vit-base-patch16-224"); a directory of a transformers
                checkpoint (ViT, DeiT, DINOv2, CLIP vision) or of a timm one, as snapshots of the Hub are; a
                safetensors file whose metadata names its timm `architecture`; "demo", the small ViT that comes with
                the package; or a module of timm or transformers.
            weights: local safetensors file for the architecture that `base` names, under timm's or transformers'
                keys; a classifier in it is left out. Fetched from the Hub when None. Not for "demo", a directory or a
                safetensors file, which have their own.
            image_size: side in pixels that images are resized to; the pre-training size when None.
            mean, std: input normalisation; the checkpoint's own when None.
            resize, crop_pct: how images come to that size, see `Fit`; what the checkpoint's own processor does when
                None: transformers' ViT squashes, timm crops.
            attention: see the class.
            device, dtype: where and in which precision it runs.

        Raises:
            FileNotFoundError, ValueError: the model or its weights cannot be had; the message says how.
        """
        from .sources import find_vit

        vit, facts = find_vit(base, weights)
        given = {"mean": mean, "std": std, "resize": resize, "crop_pct": crop_pct}
        facts = {**facts, **{key: value for key, value in given.items() if value is not None}}
        made = cls(vit, image_size=image_size, attention=attention, **facts).to(device=device, dtype=dtype)
        made.weights_file = None if weights is None else Path(weights).name
        return made

    def digest(self) -> str:
        """SHA-256 (hex) over the weights that features come from, and the preparation of images: no classifier's."""
        fit = "" if self.fit == Fit(self.image_size) else f" {self.fit.resize} {self.fit.crop_pct}"
        sha = hashlib.sha256(f"{self.image_size} {self.mean} {self.std}{fit}".encode())
        rotation = getattr(self.vit, "rotation", None)
        if rotation is not None:
            table = rotation.table((2, 3), torch.device("cpu"))
            sha.update(f"{rotation.half}".encode() + table.numpy().tobytes())
        for name, tensor in sorted(self.vit.state_dict().items()):
            if name.startswith(CLASSIFIERS):
                continue
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            sha.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def site_shape(self, site: str) -> tuple[int, int]:
        """(out, in) of a site's weight.

        Raises:
            ValueError: the backbone has no such site.
        """
        out, width = self.site_weight(site).shape
        return out, width

    def site_weight(self, site: str) -> torch.Tensor:
        """A site's frozen weight, [out, in], a view.

        Raises:
            ValueError: the backbone has no such site.
        """
        weight, rows = self._site_weight(site)
        return weight.detach()[rows]

    def check(self, adapter: Adapter) -> None:
        """Make sure that an adapter fits.

        Raises:
            TypeError: no `Adapter`.
            ValueError: other depth, width or sites; the message names adapter, site and both shapes.
        """
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"`adapter` must be an Adapter, got {type(adapter).__name__}; `Adapter.load` reads PEFT folders, Hub "
                "ids and PEFT models."
            )
        for site, own in shapes_of(adapter).items():
            try:
                shape = self.site_shape(site)
            except ValueError as error:
                raise ValueError(
                    f"adapter {adapter.name!r} must have sites of backbone {self.name!r} only: {error} Choose the base "
                    f"that it was tuned on ({adapter.base_model or 'unknown'})."
                ) from None
            if (own.out, own.width) != shape:
                raise ValueError(
                    f"adapter {adapter.name!r} must fit backbone {self.name!r}: at {site} it is for a weight "
                    f"{[own.out, own.width]}, the backbone has {list(shape)}. Choose the base that it "
                    f"was tuned on ({adapter.base_model or 'unknown'})."
                )
        head = head_of(adapter)
        if head is not None:
            try:
                self.check_pool(head.pool)
            except ValueError as error:
                raise ValueError(
                    f"the head of adapter {adapter.name!r} must read what the backbone has: {error}"
                ) from None
            width = self.feature_width(head.pool)
            if head.features != width:
                raise ValueError(
                    f"the head of adapter {adapter.name!r} must read {width} features of backbone {self.name!r}, "
                    f"got weight {[len(head.class_names), head.features]}; `adapter.with_head(None)` leaves it out."
                )

    def merge(self, adapter: Adapter) -> Backbone:
        """A backbone whose weights hold the adapter: `W + scaling * B A`, added in float32.

        It shares every tensor that the adapter does not touch; this one is left as it is.

        Raises:
            ValueError: the adapter does not fit (see `check`).
        """
        self.check(adapter)
        merged = self.clone()
        changed: set[int] = set()
        for site in adapter.sites:
            weight, rows = merged._site_weight(site)
            if id(weight) not in changed:
                weight.data = weight.data.clone()
                changed.add(id(weight))
            part = weight.data[rows]
            part.copy_(part.float() + adapter.delta(site).to(weight.device))
        merged._unmerged = (self,)
        return merged

    def clone(self) -> Backbone:
        """A backbone over the same storage; moving or casting it leaves this one as it is."""
        origin, self._unmerged = self._unmerged, ()
        try:
            return share(self)
        finally:
            self._unmerged = origin

    def __sklearn_clone__(self) -> Backbone:
        """Itself: scikit-learn's searches hand a frozen model on instead of copying its weights."""
        return self

    def unmerge(self) -> Backbone:
        """The backbone that `merge` was called on, to the bit.

        Raises:
            ValueError: nothing is merged.
        """
        if not self._unmerged:
            raise ValueError(f"backbone {self.name!r} must hold a merged adapter, got none; call `merge` first.")
        return self._unmerged[0]

    def __repr__(self) -> str:
        return f"Backbone({self.name!r}, {self.num_blocks} blocks, width {self.embed_dim}, {self.image_size} pixels)"

    def _site_weight(self, site: str) -> tuple[Any, slice]:
        match = SITE_PATTERN.fullmatch(site)
        if match is None or int(match[1]) >= self.num_blocks:
            raise ValueError(f"no site {site!r} among {self.num_blocks} blocks.")
        block, name = self.vit.blocks[int(match[1])], match[2]
        if name in ("attn.q", "attn.k", "attn.v"):
            weight = block.attn.qkv.weight
            third = weight.shape[0] // 3
            start = "qkv".index(name[-1]) * third
            return weight, slice(start, start + third)
        layer = getattr(block.attn if name == "attn.proj" else block.mlp, name.partition(".")[2], None)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"no site {site!r}: its MLP is a {type(block.mlp).__name__}.")
        return layer.weight, slice(None)
