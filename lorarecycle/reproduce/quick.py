"""`--quick`: every table at small size on a tiny ViT with random weights and images that are drawn, for a rehearsal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import InversionConfig
from ..data.lazy import Dataset, LazyImages
from ..data.splits import class_split
from ..fewshot.methods.recycled import LoRARecycle
from ..fewshot.methods.registry import make_method
from ..inversion.prior import BatchNormPrior
from ..runtime.seeds import stream
from ..vit.backbone import Backbone
from .settings import Settings, merge

TINY, DEEP = "tiny", "tiny, 12 blocks"
"""Models of a rehearsal: 2 blocks, and as many as the papers' where settings count them."""
SIDE, PER_CLASS, CLASSES = 32, 14, {"train": 8, "val": 6, "test": 6}
GENERATOR_SIZES: Settings = {
    "epochs": 1,
    "batch_size": 2,
    "kernel": 3,
    "latent": 8,
    "diffusion_steps": 4,
    "diffusion_epochs": 2,
    "hidden": 16,
    "conv_layers": 12,
}
FEWER_LAYERS = 8
"""Convolutions that generators have fewer in a rehearsal: each doubles the length of their vectors."""
SIZES: Settings = {
    "base": TINY,
    "weights": None,
    "adapters": {"count": 4, "tune": {"epochs": 1, "batch_size": 30}},
    "surrogates": {"inversion": {"steps": 2, "images_per_class": 6, "batch_size": 30, "prior": "resnet50"}},
    "meta": {"steps": 2, "n_query": 1},
    "tasks": {"n_query": 3, "n_tasks": 2, "n_tuned": 2, "n_validation_tasks": 1},
    "measure": {"steps": 2, "batch_size": 10},
    "generator": {
        "tasks": 2,
        "per_class": 6,
        "samples": 1,
        "tune": {"epochs": 2, "save_last": 1, "batch_size": 30},
        "config": GENERATOR_SIZES,
    },
    "language": {
        "model": {"width": 16, "blocks": 1, "heads": 2},
        "length": 16,
        "model_steps": 20,
        "steps": 6,
        "checkpoints": 2,
        "config": GENERATOR_SIZES,
    },
}
"""What a rehearsal makes small, whatever the file says; everything else is the file's."""
METHOD_SIZES: dict[str, Any] = {
    "steps": 2,
    "budget": 6,
    "episodes": 2,
    "meta_steps": 2,
    "batch": 2,
    "hidden": 16,
    "layers": 1,
    "views": 1,
    "rates": [0.01],
}
"""Options of methods that are made small where a method has them."""


def shrink(settings: Mapping[str, Any]) -> Settings:
    """A cell's settings at the size of a rehearsal."""
    sizes = {k: v for k, v in SIZES.items() if k in settings or k == "base"}
    small = merge(settings, sizes)
    small.pop("weights", None)
    if small["surrogates"]["inversion"].get("prune") or small["meta"].get("layers"):
        small["base"] = DEEP
    method = make_method(settings["method"])
    known = {name for name in METHOD_SIZES if hasattr(method, name)} - set(settings["options"])
    known -= {"steps"} if isinstance(method, LoRARecycle) else set()  # meta.steps says it
    small["options"] = {**small["options"], **{name: METHOD_SIZES[name] for name in sorted(known)}}
    if "steps" in settings["options"]:
        small["options"]["steps"] = min(2, settings["options"]["steps"])
    if small["adapters"].get("folder"):  # tuned here instead
        small["adapters"]["folder"] = ""
    for part in ("generator", "language"):
        if part in small:
            asked = settings[part].get("config", {}).get("conv_layers", 12)
            small[part]["config"]["conv_layers"] = asked - FEWER_LAYERS
    if settings["kind"] == "training":
        small["meta"] = merge(small["meta"], {"n_way": 2})
    return small


def tiny_backbone(base: str, weights: str | None = None, *, device: torch.device) -> Backbone:
    """A ViT of 2 or 12 blocks and width 16 over 16 patches, its weights drawn."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        depth = 12 if base == DEEP else 2
        vit = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=0)
        for parameter in vit.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return Backbone(vit.eval(), name=base).to(device)


def tiny_prior(config: InversionConfig, *, dtype: torch.dtype, device: torch.device) -> BatchNormPrior | None:
    """One convolution and batch norm, where the settings want a prior."""
    if config.prior is None or config.prior_weight == 0 or config.steps == 0:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    return BatchNormPrior(network, dtype=dtype).to(device)


@cache
def drawn_set(name: str, part: str) -> Dataset:
    """Classes of stripes in colours under noise: a stand-in for any set, its classes named as the set's are, as far
    as they are known."""
    count = CLASSES[part]
    generator = stream(0, name, part)
    colours = 255 * torch.rand(count, 3, 1, 1, generator=generator)
    waves = 60 * torch.sin(torch.arange(SIDE) * torch.arange(1, count + 1)[:, None] * 2 * math.pi / SIDE)
    labels = torch.arange(count).repeat_interleave(PER_CLASS)
    noise = 30 * torch.randn(len(labels), 3, SIDE, SIDE, generator=generator)
    images = ((colours + waves[:, None, None, :])[labels] + noise).clamp(0, 255).to(torch.uint8)
    return Dataset(
        LazyImages(images.__getitem__, torch.arange(len(labels))), labels, _names(name, part, count), name=name
    )


def _names(name: str, part: str, count: int) -> tuple[str, ...]:
    try:
        known = class_split(name.replace("-", "_"))[part]
    except ValueError:
        known = ()
    return tuple(known[:count]) if len(known) >= count else tuple(f"{name} {part} {c}" for c in range(count))


class Letters:
    """A text encoder that knows nothing: each name a drawn direction, each image a drawn projection."""

    scale = 10.0

    def digest(self) -> str:
        """There is one of them."""
        return "letters"

    def encode(self, class_names: Sequence[str]) -> Tensor:
        """Unit vectors, float32 [C, 8]."""
        return F.normalize(torch.stack([torch.randn(8, generator=stream(0, "word", n)) for n in class_names]), dim=-1)

    def project(self, features: Tensor) -> Tensor:
        """float32 [n, 8]."""
        return features.float() @ torch.randn(features.shape[-1], 8, generator=stream(0, "eye")).to(features.device)


@cache
def drawn_text(name: str) -> str:
    """Some thousand letters of a chain whose next letter depends on the last one, other for each name."""
    letters = "abcdefghij "
    generator = stream(0, "text", name)
    likely = torch.softmax(3 * torch.randn(len(letters), len(letters), generator=generator), dim=1)
    found, last = [], 0
    for _ in range(1500):
        last = int(torch.multinomial(likely[last], 1, generator=generator))
        found.append(letters[last])
    return "".join(found)
