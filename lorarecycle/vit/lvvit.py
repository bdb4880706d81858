"""LV-ViT-M (Jiang et al., NeurIPS 2021), registered with timm: a plain ViT behind four convolutions, each block's two
updates halved (LoRA Recycle, Tab. 13)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {
        "lvvit_m.untrained": {
            "input_size": (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "num_classes": 1000,
            "first_conv": "patch_embed.conv1",
            "classifier": "head",
        }
    }
)
CHECKPOINT = "lvvit_m-56M-224-84.0.pth.tar of https://github.com/zihangJiang/TokenLabeling"


class ConvStem(nn.Module):
    """Three convolutions at half resolution with batch norm, and one that cuts patches; names are the checkpoint's.

    Args:
        img_size, patch_size: side in pixels; the patch is even.
        in_chans, embed_dim: 3 and D.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 512,
        **_: Any,
    ) -> None:
        super().__init__()
        width = 64
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.grid_size: tuple[int, int] = (img_size // patch_size, img_size // patch_size)
        self.num_patches: int = self.grid_size[0] * self.grid_size[1]
        self.conv1: nn.Conv2d = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False)
        self.bn1: nn.BatchNorm2d = nn.BatchNorm2d(width)
        self.conv2: nn.Conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2: nn.BatchNorm2d = nn.BatchNorm2d(width)
        self.conv3: nn.Conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3: nn.BatchNorm2d = nn.BatchNorm2d(width)
        self.proj: nn.Conv2d = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2)
        self.norm: nn.Identity = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[B, N, D] of images [B, 3, H, W]."""
        x = images
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = torch.relu(norm(conv(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class Scaled(nn.Module):
    """A block's update times a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """x times the factor."""
        return x * self.factor


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """LV-ViT-M: 20 blocks of width 512, 8 heads, no bias of queries, keys and values; 56 M parameters with its heads.

    Raises:
        ValueError: trained weights are asked for: the released ones are a pickle file.
    """
    if pretrained:
        raise ValueError(
            f"the released weights of lvvit_m are a pickle file ({CHECKPOINT}), which is not fetched; save what "
            "`torch.load(file, weights_only=True)` gives with safetensors and pass it as `weights`"
        )
    options = {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    sizes: dict[str, Any] = {"embed_dim": 512, "depth": 20, "num_heads": 8, "mlp_ratio": 3.0, **options}
    model = VisionTransformer(embed_layer=ConvStem, qkv_bias=False, norm_layer=partial(nn.LayerNorm, eps=1e-5), **sizes)
    for block in model.blocks:
        block.ls1, block.ls2 = Scaled(0.5), Scaled(0.5)
    model.pretrained_cfg = model.default_cfg = default_cfgs["lvvit_m"].default.to_dict()
    return model
