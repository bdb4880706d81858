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

ALL_LAYOUTS = ("timm", *LAYOUTS, *(f"{model_type}-classifier" for model_type in LAYOUTS), "clip")
"""What an adapter can be written for: timm's model, the headless model of a type (the classifier where the adapter has
a head), "vit-classifier" and the like (the image classifier in any case), "clip" (CLIPModel with both towers)."""

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

_MODULE = re.compile(
    r"(?P<prefix>(?:.*?\.)??)(?P<stack>blocks|encoder\.layers?|layers)\.(?P<block>\d{1,5})\.(?P<rest>.+)"
)

_WRAPPERS = {
    *("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_wrapped_module"),
    *("_flat_param", "_fpw_module", "module", "_module"),
}
"""Parts of names that torch.compile, FSDP, DDP, activation checkpointing and DeepSpeed put in."""
_STAGES = re.compile(r"(?:.*\.)?(?:stages|layers|levels|stages_\d+)\.(?:\d+\.)?")
"""Prefix of blocks in models whose stages have widths of their own (Swin, ConvNeXt, MaxViT, PVT)."""

_PLAIN_TIMM = {"vision_transformer", "deit", "vision_transformer_hybrid", "eva"}
_PLAIN_TRANSFORMERS = {
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "ijepa"), "vit"),
    "deit": "deit",
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "dinov2"),
    "clip": "clip",
    **dict.fromkeys(("auto", "timm_wrapper", "timm_backbone", "encoder_decoder", "vision_encoder_decoder"), ""),
}
"""Module of `transformers.models` whose blocks are a plain ViT's -> family; "" where that depends."""

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


def strip_wrappers(name: str) -> str:
    """A module or tensor name without what wrapping the model put into it: `base_model.model.` (PEFT's own, once or
    several times), `module.`, `_orig_mod.` and the like, wherever they stand."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


def find_layer(module: str) -> Layer | None:
    """The layer that a module name means, under any prefix; None when it is no adaptable layer of a ViT.

    Blocks in stages, as hierarchical and convolutional networks have them, are none of a ViT's.
    """
    match = _MODULE.fullmatch(module)
    if match is None or _STAGES.fullmatch(match["prefix"]):
        return None
    name = _LAYERS[match["stack"]].get(match["rest"])
    return None if name is None else Layer(match["stack"], int(match["block"]), name)


def split_block(name: str) -> tuple[int, str] | None:
    """Block index and what stands after it, for any name inside a list of blocks; None for one outside."""
    match = _MODULE.fullmatch(name)
    return None if match is None else (int(match["block"]), match["rest"])


def is_plain_vit(base_class: str) -> bool:
    """Whether a class of timm or transformers (with its module) has a plain ViT's blocks; True for classes of others,
    which are not known here, and for ""."""
    library, _, rest = base_class.partition(".models.")
    if library not in ("timm", "transformers") or not rest:
        return True
    return rest.partition(".")[0] in (_PLAIN_TIMM if library == "timm" else _PLAIN_TRANSFORMERS)


def find_family(base_class: str) -> str:
    """The family of a class of transformers: "vit", "deit", "dinov2", "clip"; "" for any other class."""
    library, _, rest = base_class.partition("transformers.models.")
    return _PLAIN_TRANSFORMERS.get(rest.partition(".")[0], "") if not library else ""


def timm_names() -> Names:
    """The names of a timm VisionTransformer."""
    modules = {layer: f"blocks.{{}}.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    return Names(modules, "head", "VisionTransformer", "timm.models.vision_transformer")


def check_layout(layout: str) -> None:
    """Make sure that a layout can be written, before there is anything to write.

    Raises:
        ValueError: there is no such layout.
        ImportError: its names need transformers, which is not installed.
    """
    require_layout(layout)
    find_names(layout, classifier=False)


def require_layout(layout: str) -> None:
    """Raises ValueError for a layout that there is none of."""
    if layout not in ALL_LAYOUTS:
        raise ValueError(f"`layout` must be one of {ALL_LAYOUTS}, got {layout!r}.")


def find_names(layout: str, *, classifier: bool) -> Names:
    """The names of a layout, see `ALL_LAYOUTS`.

    Args:
        layout: "timm", a model type, "MODEL_TYPE-classifier" or "clip".
        classifier: names inside the image classifier, where the layout leaves that open.

    Raises:
        ImportError: transformers is not installed.
    """
    if layout == "timm":
        return timm_names()
    if layout == "clip":
        return transformers_names("clip_vision_model", "CLIPModel")
    model_type = layout.removesuffix("-classifier")
    _, base_class, classifier_class = LAYOUTS[model_type]
    return transformers_names(model_type, classifier_class if classifier or layout != model_type else base_class)


def transformers_names(model_type: str, model_class: str) -> Names:
    """The names that the installed transformers uses, read off a one-block model on the meta device.

    Args:
        model_type: a key of `LAYOUTS`.
        model_class: the headless model, the image classifier, or CLIPModel.

    Raises:
        ImportError: transformers is not installed.
    """
    import torch

    config_class = LAYOUTS[model_type][0]
    try:
        import transformers

        found_class = getattr(transformers, model_class)
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
    if model_class in ("CLIPModel", "CLIPForImageClassification"):
        config = transformers.CLIPConfig(vision_config=config.to_dict(), text_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = found_class(config)
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
    return Names(modules, "classifier", found_class.__name__, found_class.__module__)
