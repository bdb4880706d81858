"""Models of timm and transformers, and random adapters, for the tests of PEFT's files."""

import pytest
import torch

from lorarecycle import Backbone
from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.vit.checkpoints import build_vit

D, BLOCKS, HIDDEN = 24, 2, 48
SHAPE = {
    "hidden_size": D,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
LAYOUTS = {
    "vit": ("ViTConfig", {"intermediate_size": HIDDEN}, "ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTConfig", {"intermediate_size": HIDDEN}, "DeiTModel", "DeiTForImageClassification"),
    "dinov2": ("Dinov2Config", {"mlp_ratio": 2}, "Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2, "num_register_tokens": 3},
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    "clip_vision_model": (
        "CLIPVisionConfig",
        {"intermediate_size": HIDDEN},
        "CLIPVisionModel",
        "CLIPForImageClassification",
    ),
}
POOLS = {"dinov2": "token+mean", "dinov2_with_registers": "token+mean", "clip_vision_model": "mean"}
LAYERS = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


def transformers_model(layout, *, num_labels=0, **extra):
    transformers = pytest.importorskip("transformers")
    config_class, own, base_class, classifier_class = LAYOUTS[layout]
    config = getattr(transformers, config_class)(**SHAPE, **{**own, **extra})
    if num_labels and layout == "clip_vision_model":
        config = transformers.CLIPConfig(vision_config=config.to_dict(), text_config={"num_hidden_layers": 1})
    config.num_labels = num_labels
    name = classifier_class if num_labels else base_class
    return randomised(getattr(transformers, name)(config))


def timm_model(num_classes=0):
    from timm.models.vision_transformer import VisionTransformer

    return randomised(
        VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=D,
            depth=BLOCKS,
            num_heads=3,
            mlp_ratio=2,
            num_classes=num_classes,
        )
    )


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def backbone_of(model):
    """A Backbone with the weights of a transformers or timm model."""
    if hasattr(model, "blocks"):
        return Backbone.load(model)
    config = getattr(model.config, "vision_config", model.config)
    facts = {"layer_norm_eps": config.layer_norm_eps, "hidden_act": config.hidden_act, "num_heads": 3}
    return Backbone.load(build_vit(model.state_dict(), facts))


def feature(model, images):
    if hasattr(model, "blocks"):
        return model.forward_features(images)[:, 0]
    output = model(images)
    return output.pooler_output if "CLIP" in type(model).__name__ else output.last_hidden_state[:, 0]


def logits(model, images):
    output = model(images)
    return getattr(output, "logits", output)


def random_adapter(layers=LAYERS, *, r=3, scaling=2.0, head=None, seed=0, same=False, **facts):
    """Ranks differ between sites unless `same`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for block in range(BLOCKS):
        for i, layer in enumerate(layers):
            rank = r if same else r + (block + i) % 3
            out, width = {"mlp.fc1": (HIDDEN, D), "mlp.fc2": (D, HIDDEN)}.get(layer, (D, D))
            lora_A = 0.3 * torch.randn(rank, width, generator=generator)
            lora_B = 0.3 * torch.randn(out, rank, generator=generator)
            factors[f"blocks.{block}.{layer}"] = LoRAFactors(lora_A, lora_B, scaling if same else scaling / (1 + i))
    return Adapter(factors, head=head, **facts)


def random_head(pool="token", seed=3):
    generator = torch.Generator().manual_seed(seed)
    width = 2 * D if pool == "token+mean" else D
    weight, bias = torch.randn(3, width, generator=generator), torch.randn(3, generator=generator)
    return Head(weight, bias, ("cat", "dog", "owl"), pool)


def assert_same(one, other, tolerance=1e-6):
    assert one.sites == other.sites
    for site in one.sites:
        torch.testing.assert_close(one.delta(site), other.delta(site), rtol=tolerance, atol=tolerance)
    assert (one.head is None) == (other.head is None)
    if one.head is not None:
        assert torch.equal(one.head.weight, other.head.weight)
        assert torch.equal(one.head.bias, other.head.bias)
        assert (one.head.class_names, one.head.pool) == (other.head.class_names, other.head.pool)
    assert (one.mean, one.std, one.base_model, one.name) == (
        other.mean,
        other.std,
        other.base_model,
        other.name,
    )
