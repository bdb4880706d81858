"""timm's EVA models (EVA-02, DINOv3) as plain blocks with rotary positions, and the rotation of queries and keys."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, RotaryEmbeddingCat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

_KEPT = ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "norm", "fc_norm", "attn_pool")
_FACTS = ("embed_dim", "num_prefix_tokens", "no_embed_class", "global_pool")


class PlainEva(nn.Module):
    """What `Backbone` reads of an `Eva`: its parts, blocks as timm's `Block`, and where its rotation comes from.

    Weights are those of the model, under the names of a VisionTransformer; the bias of queries, keys and values is
    one tensor, with zeros for the keys. It has no forward pass of its own.
    """

    def __init__(self, eva: Any) -> None:
        super().__init__()
        for name in (*_KEPT, *_FACTS):
            setattr(self, name, getattr(eva, name))
        self.pretrained_cfg: Any = getattr(eva, "pretrained_cfg", None)
        self.pool_include_prefix: bool = eva.global_pool == "map"
        self.rotation: RotaryPositions | None = (
            None if eva.rope is None else RotaryPositions(eva.rope, eva.blocks[0].attn)
        )
        self.blocks: nn.ModuleList = nn.ModuleList(_plain_block(block) for block in eva.blocks)


class RotaryPositions:
    """Sines and cosines for grids of patches, in float32 whatever the model's dtype.

    Args:
        rope: timm's module.
        attention: one of the model's, which says how channels are paired.
    """

    def __init__(self, rope: nn.Module, attention: Any) -> None:
        self._rope: Any = copy.deepcopy(rope).float().eval()
        self.half: bool = bool(getattr(attention, "rotate_half", False))
        self._tables: dict[tuple[tuple[int, int], torch.device], Tensor] = {}

    @torch.no_grad()
    def table(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """[N, 2 d]: sines beside cosines of the patches of a grid (rows, columns); kept for later calls."""
        if (grid, device) not in self._tables:
            rope: Any = copy.deepcopy(self._rope)
            if getattr(rope, "feat_shape", None) is not None:
                rope.update_feat_shape(list(grid))
            self._tables[grid, device] = rope.get_embed(shape=list(grid)).detach().float().to(device)
        return self._tables[grid, device]


class Rotation(NamedTuple):
    """How the patch tokens of a batch are turned."""

    table: Tensor
    """[N, 2 d], or [B, 1, N, 2 d] where images keep different patches."""
    num_prefix: int
    half: bool

    def select(self, index: Tensor) -> Rotation:
        """The rotation of the patches at `index`, int64 [B, k]."""
        table = self.table.expand(index.shape[0], 1, *self.table.shape[-2:])  # `len` would fix the batch of an export
        rows = index[:, None, :, None].expand(-1, -1, -1, table.shape[-1])
        return self._replace(table=table.gather(2, rows))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys [B, H, P + N, d] with their patches turned by position (RoFormer, Eq. 34), in their own dtype."""
    patches = x[:, :, rotation.num_prefix :].float()
    sine, cosine = rotation.table.chunk(2, dim=-1)
    if rotation.half:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    patches = patches * cosine + turned * sine
    return torch.cat([x[:, :, : rotation.num_prefix], patches.to(x.dtype)], dim=2)


def require_plain_eva(eva: Any) -> None:
    """Make sure that an `Eva` has a plain form.

    Raises:
        ValueError: other blocks, separate projections of queries, keys and values, learnt rotations; named.
    """
    for i, block in enumerate(eva.blocks):
        attn = getattr(block, "attn", None)
        if type(block) is not EvaBlock or type(attn) is not EvaAttention or getattr(attn, "gate", None) is not None:
            raise ValueError(
                f"the backbone must be built of plain timm blocks, got {type(block).__name__} with "
                f"{type(attn).__name__} at blocks.{i}."
            )
        if attn.qkv is None:
            raise ValueError(
                "the backbone must have one layer for queries, keys and values, got separate ones at "
                f"blocks.{i}.attn.q_proj: adapters written for it would name a layer `attn.qkv` that it lacks; choose "
                "a model with qkv_fused=True, such as eva02_small_patch14_224 or vit_small_patch16_dinov3."
            )
    if eva.rope is not None and not isinstance(eva.rope, _fixed_rotations()):
        raise ValueError(
            f"the backbone must turn queries and keys alike in all blocks, got {type(eva.rope).__name__}; choose a "
            "model with rope_type 'cat' or 'dinov3'."
        )


def is_eva(vit: nn.Module) -> bool:
    """Whether a module is timm's `Eva`, which `PlainEva` reads."""
    return isinstance(vit, Eva)


def _fixed_rotations() -> tuple[type, ...]:
    try:
        from timm.layers import RotaryEmbeddingDinoV3
    except ImportError:  # timm before 1.0.20
        return (RotaryEmbeddingCat,)
    return (RotaryEmbeddingCat, RotaryEmbeddingDinoV3)


def _plain_block(block: Any) -> Block:
    """timm's `Block` over the weights of an `EvaBlock`."""
    attn = block.attn
    with torch.device("meta"):
        plain: Any = Block(attn.qkv.in_features, attn.num_heads)
    assert isinstance(plain.attn, Attention)
    plain.norm1, plain.norm2, plain.mlp = block.norm1, block.norm2, block.mlp
    plain.attn.qkv = _with_bias(attn.qkv, attn.q_bias, attn.v_bias)
    plain.attn.q_norm, plain.attn.k_norm = attn.q_norm, attn.k_norm
    plain.attn.norm, plain.attn.proj = attn.norm, attn.proj
    plain.ls1, plain.ls2 = _scale(block.gamma_1), _scale(block.gamma_2)
    return plain


def _with_bias(qkv: nn.Linear, q_bias: Tensor | None, v_bias: Tensor | None) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, qkv.in_features, qkv.out_features, bias=q_bias is not None, device="meta")
    layer.weight = qkv.weight
    if q_bias is not None and v_bias is not None:
        layer.bias = nn.Parameter(torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]).detach(), requires_grad=False)
    return layer


def _scale(gamma: Tensor | None) -> nn.Module:
    if gamma is None:
        return nn.Identity()
    with torch.device("meta"):
        scale = LayerScale(len(gamma))
    scale.gamma = nn.Parameter(gamma.detach(), requires_grad=False)
    return scale
