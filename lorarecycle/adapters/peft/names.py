"""What models call the sites: transformers 4, transformers 5 and timm; reading and writing."""

from __future__ import annotations

import re
from typing import NamedTuple

LAYOUTS = {
    "vit": ("ViTConfig", "ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTConfig", "DeiTModel", "DeiTForImageClassification"),
    "dinov2": ("Dinov2Config", "Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel", "CLIPForImageClassification"),
}
"""transformers model type -> config class, headless model, image classifier."""

_ATTENTION_4 = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
}
_ATTENTION_5 = {
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
}
_ATTENTION_CLIP = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.proj",
}
_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_SWIGLU = {  # DINOv2 giant; timm packs gate and up into one fc1
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.fc2",
}
_LAYERS = {
    "blocks": {"attn.qkv": "attn.qkv", "attn.proj": "attn.proj", **_MLP},
    "encoder.layer": {
        **_ATTENTION_4,
        **_ATTENTION_5,
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        **_MLP,
        **_SWIGLU,
    },
    "encoder.layers": {**_ATTENTION_CLIP, **_MLP},
    "layers": {**_ATTENTION_5, **_MLP},
}
"""Name of the list of blocks -> name inside a block -> our layer name."""

_MODULE = re.compile(r"(?P<prefix>(?:.*?\.)??)(?P<stack>blocks|encoder\.layers?|layers)\.(?P<block>\d+)\.(?P<rest>.+)")

PARTS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}
"""Layer of timm -> the layers of transformers that it holds, in row order."""


class Layer(NamedTuple):
    """A linear layer of a transformer block, found by its module name."""

    stack: str
    """"blocks" (timm), "encoder.layer" (ViT and DeiT of transformers 4, DINOv2), "layers" (ViT and DeiT of
    transformers 5) or "encoder.layers" (CLIP)."""
    block: int
    name: str
    """a site's layer ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"), or one that stands
    for several or for part of one: "attn.qkv", "mlp.gate", "mlp.up"."""


class Names(NamedTuple):
    """What one model class calls its layers."""

    modules: dict[str, str]
    """layer name -> module name with `{}` for the block's index"""
    head: str
    """module name of the classifier"""
    model_class: str
    library: str
    """Python module of `model_class`"""


def find_layer(module: str) -> Layer | None:
    """The layer that a module name means, under any prefix; None when it is no adaptable layer of a ViT."""
    match = _MODULE.fullmatch(module)
    if match is None:
        return None
    name = _LAYERS[match["stack"]].get(match["rest"])
    return None if name is None else Layer(match["stack"], int(match["block"]), name)


def split_block(name: str) -> tuple[int, str] | None:
    """Block index and what stands after it, for any name inside a list of blocks; None for one outside."""
    match = _MODULE.fullmatch(name)
    return None if match is None else (int(match["block"]), match["rest"])


def timm_names() -> Names:
    """The names of a timm VisionTransformer."""
    modules = {layer: f"blocks.{{}}.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    return Names(modules, "head", "VisionTransformer", "timm.models.vision_transformer")


def transformers_names(model_type: str, *, classifier: bool) -> Names:
    """The names that the installed transformers uses, read off a one-block model on the meta device.

    Args:
        model_type: a key of `LAYOUTS`.
        classifier: names inside the image classifier instead of the headless model.

    Raises:
        ImportError: transformers is not installed.
    """
    import torch

    config_class, base_class, classifier_class = LAYOUTS[model_type]
    try:
        import transformers

        model_class = getattr(transformers, classifier_class if classifier else base_class)
    except ImportError as error:
        raise ImportError(
            f"`layout` {model_type!r} must have transformers for its names, which did not import ({error}); "
            "`pip install 'lorarecycle[transformers]'`, or use layout='timm'."
        ) from error
    tiny = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 8,
    }
    config = getattr(transformers, config_class)(**tiny)
    if classifier and model_type == "clip_vision_model":
        config = transformers.CLIPConfig(vision_config=config.to_dict(), text_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = model_class(config)
    modules = {}
    for name, module in model.named_modules():
        layer = find_layer(name)
        if layer is not None and isinstance(module, torch.nn.Linear) and "text_model" not in name:
            modules[layer.name] = name.replace(".0.", ".{}.", 1)
    missing = {"attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"} - set(modules)
    if missing:
        raise ValueError(
            f"`layout` must be a model type whose layers are known, got {model_type!r}: transformers "
            f"{transformers.__version__} has no {sorted(missing)} under a known name; use layout='timm'."
        )
    return Names(modules, "classifier", model_class.__name__, model_class.__module__)
