"""transformers' ViT, DeiT, DINOv2 and CLIP vision checkpoints as timm Vision Transformers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters.peft.names import PARTS, find_layer, split_block
from ..runtime.files import load_tensors, naming, read_json, refuse_pickles
from .checkpoint_facts import DEFAULTS, Facts, read_config

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

logger: logging.Logger = logging.getLogger(__name__)

_PATCH_KEY = re.compile(r"(?P<prefix>(?:.*\.)?)embeddings\.patch_embeddings?(?:\.projection)?\.weight")
_TOP = {
    "embeddings.cls_token": "cls_token",
    "embeddings.class_embedding": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "pre_layrnorm.weight": "norm_pre.weight",  # spelt so in transformers
    "pre_layrnorm.bias": "norm_pre.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
    "layernorm_before.weight": "norm1.weight",
    "layernorm_before.bias": "norm1.bias",
    "layernorm_after.weight": "norm2.weight",
    "layernorm_after.bias": "norm2.bias",
    "layer_norm1.weight": "norm1.weight",
    "layer_norm1.bias": "norm1.bias",
    "layer_norm2.weight": "norm2.weight",
    "layer_norm2.bias": "norm2.bias",
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_LEFT_OUT = re.compile(
    r"(?:pooler|classifier|cls_classifier|distillation_classifier|decoder|text_model)\..*"
    r"|(?:visual_projection|text_projection)\.weight|logit_scale|(?:.*\.)?position_ids|embeddings\.mask_token"
)
"""No part of the class token's feature: heads, the text tower, masked-image training."""


def find_family(state_dict: Mapping[str, Tensor]) -> str:
    """Which family a state dict is of: "timm", "vit", "deit", "dinov2" or "clip".

    Raises:
        ValueError: none of these.
    """
    if any(key.endswith("patch_embed.proj.weight") for key in state_dict):
        return "timm"
    prefix = _prefix(state_dict)
    if prefix is None:
        raise ValueError(
            "a checkpoint must be of a timm ViT or of transformers' ViT, DeiT, DINOv2 or CLIP vision model, "
            f"got keys such as {sorted(state_dict)[:3]}; choose another checkpoint."
        )
    keys = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    if "embeddings.class_embedding" in keys:
        return "clip"
    if "embeddings.distillation_token" in keys:
        return "deit"
    return "dinov2" if any(key.endswith("layer_scale1.lambda1") for key in keys) else "vit"


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's key names for a checkpoint of transformers; a timm state dict comes back as it is.

    Knows the names of transformers 4 and 5 under any prefix. q, k and v become one fused `attn.qkv`; register
    tokens take timm's form, where the class token already holds its position (`no_embed_class=True`).
    Classifiers, poolers, projections, the text tower and the mask token are left out.

    Args:
        state_dict: tensors by name.

    Raises:
        ValueError: another architecture, an unknown key, or a block without all of q, k and v.
    """
    family = find_family(state_dict)
    if family == "timm":
        return dict(state_dict)
    prefix = _prefix(state_dict) or ""
    converted: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or _LEFT_OUT.fullmatch(name):
            continue
        converted[_timm_name(name, key)] = tensor
    _fuse(converted, "attn.qkv")
    _fuse(converted, "mlp.fc1")
    missing = {"cls_token", "pos_embed", "norm.weight", "norm.bias"} - set(converted)
    if missing:
        raise ValueError(f"a {family} checkpoint must hold {sorted(missing)}, got none; fetch it again.")
    if family == "clip":
        converted["cls_token"] = converted["cls_token"].reshape(1, 1, -1)
        converted["pos_embed"] = converted["pos_embed"].unsqueeze(0)
    if "reg_token" in converted:  # registers come after the position embedding, between class and patch tokens
        positions = converted["pos_embed"]
        converted["cls_token"] = converted["cls_token"] + positions[:, :1]
        converted["pos_embed"] = positions[:, 1:]
    return converted


def build_vit(state_dict: Mapping[str, Tensor], facts: Facts | None = None) -> VisionTransformer:
    """A timm VisionTransformer (float32, no classifier) with the weights of a transformers checkpoint.

    Args:
        state_dict: as transformers saves it.
        facts: of `read_config`; what is absent takes the family's default, and `num_heads` width / 64.

    Returns:
        `VisionTransformer`, or `VisionTransformerDistilled` for DeiT with a distillation token.

    Raises:
        ValueError: another architecture, or facts that do not fit the tensors.
    """
    from timm.layers import LayerNorm, SwiGLUPacked
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    family = find_family(state_dict)
    if family == "timm":
        raise ValueError(
            "`state_dict` must be of a transformers model, got timm's key names; give the timm architecture "
            "and the file: Backbone.load(architecture, weights=file)."
        )
    facts = {**DEFAULTS[family], **(facts or {})}  # type: ignore[typeddict-item]
    weights = convert_state_dict(state_dict)
    _require_shapes(weights, family)
    require_floats(weights)
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    hidden, reads = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    prefix = 0 if registers else 1 + ("dist_token" in weights)
    arguments: dict[str, Any] = {
        "img_size": _image_size(weights["pos_embed"].shape[1] - prefix, patch, facts.get("image_size")),
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": _num_heads(width, facts.get("num_heads")),
        "mlp_ratio": (hidden + 0.5) / width,  # timm truncates the product
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in weights else None,
        "reg_tokens": registers,
        "no_embed_class": bool(registers),
        "pre_norm": "norm_pre.weight" in weights,
        "norm_layer": partial(LayerNorm, eps=facts["layer_norm_eps"]),
        "act_layer": _activation(facts["hidden_act"]),
        "num_classes": 0,
        "weight_init": "skip",
    }
    if hidden == 2 * reads:
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    vit = (VisionTransformerDistilled if "dist_token" in weights else VisionTransformer)(**arguments)
    try:
        vit.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"a {family} checkpoint must fit timm's ViT, got {str(error)[:600]}.") from error
    return vit.eval()


def load_vit(path: str | PathLike[str]) -> tuple[VisionTransformer, Facts]:
    """Load a transformers checkpoint: a directory, or a safetensors file with its config.json beside it.

    Args:
        path: directory with model.safetensors (or its shards and index) and config.json; or the file.

    Returns:
        the model in float32, and the facts of its configuration with the family's defaults.

    Raises:
        FileNotFoundError: no such path, or no safetensors weights in it.
        ValueError: pickle files only, damaged files, or another architecture.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    tensors = _read_weights(path)
    facts = read_config(folder)
    if not facts:
        logger.warning("%s has no config.json; the defaults of the model's family count.", folder)
    with naming(path):
        vit, family = build_vit(tensors, facts), find_family(tensors)
    return vit, {**DEFAULTS[family], **facts, "family": family}  # type: ignore[typeddict-item]


def require_floats(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError where weights are no floating-point numbers, NaN or infinite; the message names the tensor."""
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"weights must be floating-point numbers, got {tensor.dtype} in {name[:80]}; fetch them again."
            )
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"weights must be finite, got NaN or infinite values in {name[:80]}; fetch them again.")


_DIMENSIONS = {
    "patch_embed.proj.weight": 4,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.fc2.weight": 2,
    "cls_token": (3, 1),
    "pos_embed": (3, 2),
}
"""Of the tensors that sizes are taken from; of CLIP's own forms too."""


def _require_shapes(weights: Mapping[str, Tensor], family: str) -> None:
    for name, dimensions in _DIMENSIONS.items():
        found = weights.get(name)
        allowed = dimensions if isinstance(dimensions, tuple) else (dimensions,)
        if found is None or found.ndim not in allowed or not found.numel():
            shown = "none" if found is None else list(found.shape)
            raise ValueError(f"a {family} checkpoint must hold `{name}` of {allowed[0]} dimensions, got {shown}.")
    patch = weights["patch_embed.proj.weight"]
    if patch.shape[2] != patch.shape[3]:
        raise ValueError(f"a {family} checkpoint must have square patches, got {list(patch.shape[2:])}.")


def _prefix(state_dict: Mapping[str, Tensor]) -> str | None:
    """What stands before `embeddings.` in the vision tower's keys."""
    return next((match["prefix"] for match in map(_PATCH_KEY.fullmatch, state_dict) if match), None)


def _timm_name(name: str, key: str) -> str:
    if name in _TOP:
        return _TOP[name]
    block = split_block(name)
    if block is not None:
        index, inside = block
        module, _, kind = inside.rpartition(".")
        layer = find_layer(name.rpartition(".")[0])
        if inside in _IN_BLOCK:
            return f"blocks.{index}.{_IN_BLOCK[inside]}"
        if layer is not None and module and kind in ("weight", "bias"):
            return f"blocks.{index}.{layer.name}.{kind}"
    raise ValueError(
        f"a checkpoint must be of a plain ViT, DeiT, DINOv2 or CLIP vision model, got the key {key!r}, which "
        "these do not have; choose another model."
    )


def _fuse(weights: dict[str, Tensor], fused: str) -> None:
    """Join the rows of the parts of `attn.qkv` (or of a SwiGLU `mlp.fc1`) in every block, in place."""
    parts = PARTS[fused]
    for key in [key for key in weights if f".{parts[0]}." in key]:
        names = [key.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if any(name not in weights for name in names):
            raise ValueError(f"a checkpoint must hold {names} together, got {sorted(set(names) & set(weights))}.")
        if len({(weights[name].ndim, *weights[name].shape[1:]) for name in names}) > 1 or not weights[names[0]].ndim:
            raise ValueError(f"a checkpoint must hold {names} of one width, got others; fetch it again.")
        joined = torch.cat([weights.pop(name) for name in names])
        weights[key.replace(f".{parts[0]}.", f".{fused}.")] = joined


def _image_size(patches: int, patch: int, image_size: int | tuple[int, int] | None) -> int | tuple[int, int]:
    """The input size that goes with the position embedding; the configured one where both agree."""
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if (height // patch) * (width // patch) == patches:
            return image_size
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(
            f"`image_size` must fit {patches} positions of {patch} x {patch} patches, got {image_size}; "
            "correct it in config.json."
        )
    return side * patch


def _num_heads(width: int, num_heads: int | None) -> int:
    heads = num_heads or max(width // 64, 1)
    if width % heads or (num_heads is None and width % 64):
        raise ValueError(
            f"`num_heads` must be given and divide the width {width}, got {num_heads}; put config.json "
            "beside the weights."
        )
    return heads


def _activation(name: str) -> type[nn.Module]:
    from timm.layers import GELUTanh, QuickGELU

    known: dict[str, type[nn.Module]] = {
        "gelu": nn.GELU,
        "quick_gelu": QuickGELU,
        "gelu_new": GELUTanh,
        "gelu_pytorch_tanh": GELUTanh,
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "swish": nn.SiLU,
    }
    if name not in known:
        raise ValueError(f"`hidden_act` must be one of {sorted(known)}, got {name!r}; choose another checkpoint.")
    return known[name]


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_dir():
        return load_tensors(path)[0]
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return load_tensors(path / "model.safetensors")[0]
    if not index.is_file():
        refuse_pickles(path, "pytorch_model*.bin", "transformers and call `save_pretrained`")
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"`base` must be a model, got {path}, which holds an adapter; give the model that it was tuned on (its "
                "`base_model_name_or_path`)."
            )
        raise FileNotFoundError(f"{path} must hold model.safetensors, got no such file; fetch the checkpoint again.")
    shards = (read_json(index) or {}).get("weight_map")
    if not isinstance(shards, dict) or any(Path(str(name)).name != name for name in shards.values()):
        raise ValueError(f"`weight_map` in {index} must map tensors to files beside it, got {str(shards)[:80]}.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        tensors |= load_tensors(path / name)[0]
    absent = set(shards) - set(tensors)
    if absent:
        raise ValueError(f"{index} must name tensors that are there, got {len(absent)} missing ones ({min(absent)}).")
    return tensors
