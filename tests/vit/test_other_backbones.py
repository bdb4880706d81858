"""Backbones without class token, SigLIP's attention pool, EVA-02 and DINOv3: against timm's own forward pass."""

import pytest
import torch
from lorarecycle.kernels import reference
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from lorarecycle import Adapter, Backbone
from lorarecycle.vit.lora import LoRA

FREE = {"class_token": False, "global_pool": "avg"}
SIGLIP = {"class_token": False, "global_pool": "map"}
DINOV3 = {
    "qkv_bias": False,
    "use_rot_pos_emb": True,
    "use_abs_pos_emb": False,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "rope_grid_offset": 0.0,
    "use_fc_norm": False,
    "num_reg_tokens": 4,
    "init_values": 1e-1,
    "dynamic_img_size": True,
}
EVA02 = {"use_rot_pos_emb": True, "swiglu_mlp": True, "mlp_ratio": 8 / 3, "ref_feat_shape": (2, 2)}
KINDS = {
    "no class token": (VisionTransformer, FREE),
    "registers, no class token": (VisionTransformer, {**FREE, "reg_tokens": 2, "no_embed_class": True}),
    "siglip": (VisionTransformer, SIGLIP),
    "map with class token": (VisionTransformer, {"global_pool": "map"}),
    "map with prefix": (VisionTransformer, {"global_pool": "map", "pool_include_prefix": True}),
    "dinov3": (Eva, DINOV3),
    "dinov3 token": (Eva, {**DINOV3, "global_pool": "token"}),
    "dinov3 swiglu": (Eva, {**DINOV3, "swiglu_mlp": True, "swiglu_align_to": 8}),
    "eva02": (Eva, EVA02),
    "eva02 token, inner norm": (Eva, {**EVA02, "global_pool": "token", "scale_attn_inner": True, "scale_mlp": True}),
    "eva map": (Eva, {"global_pool": "map", "use_pre_transformer_norm": True}),
    "eva without class token": (Eva, {**EVA02, "class_token": False}),
}


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=KINDS)
def vit(request, build_vit):
    cls, options = KINDS[request.param]
    return build_vit(cls=cls, **options)


def forward_head(vit, images):
    return vit.forward_head(vit.forward_features(images), pre_logits=True)


@torch.no_grad()
def test_features_are_what_timm_gives(vit, images):
    backbone = Backbone.load(vit)
    found = backbone(images)
    torch.testing.assert_close(found, forward_head(vit, images), rtol=0, atol=2e-5)
    torch.testing.assert_close(backbone.clone()(images), found)
    assert backbone.own_pool == (vit.global_pool or "token")


@torch.no_grad()
def test_merged_adapters_and_factors_beside_the_weights(vit, images, make_adapter):
    backbone = Backbone.load(vit)
    adapter = make_adapter(backbone, head=False)
    merged = backbone.merge(adapter)
    torch.testing.assert_close(backbone(images, lora=LoRA.from_adapter(adapter)), merged(images), rtol=0, atol=1e-4)
    own = vit.state_dict()
    for site in adapter.sites:
        block = int(site.split(".")[1])
        third, start = vit.embed_dim, "qkv".index(site[-1]) * vit.embed_dim
        own[f"blocks.{block}.attn.qkv.weight"][start : start + third] += adapter.delta(site)
    torch.testing.assert_close(merged(images), forward_head(vit, images), rtol=0, atol=5e-5)
    assert merged.unmerge() is backbone


@torch.no_grad()
def test_dropping_patches_by_hand(vit, images):
    """Positions travel with their patches, whatever their order; patches are ranked without a class token."""
    backbone = Backbone.load(vit)
    pruned = backbone.encode(images, prune={0: 0.5, 2: 0.25})
    assert pruned.kept.shape == (2, 6)
    assert (pruned.kept.diff() > 0).all()
    kept = torch.tensor([[0, 3, 5, 6, 12, 15], [1, 2, 4, 7, 8, 9]])
    whole = backbone.encode(images, kept=kept)
    assert whole.tokens.shape == (2, backbone.num_prefix_tokens + 6, 32)
    shuffled = backbone.encode(images, kept=kept.flip(1)).tokens
    back = torch.cat([shuffled[:, : backbone.num_prefix_tokens], shuffled[:, backbone.num_prefix_tokens :].flip(1)], 1)
    torch.testing.assert_close(back, whole.tokens, rtol=0, atol=1e-5)
    assert (shuffled - whole.tokens).abs().max() > 1e-3
    scores = backbone.encode(images, scores=True, class_token_only=True).scores
    assert scores.shape == (2, 16)
    assert (scores > 0).all()


@torch.no_grad()
def test_all_patches_in_order_are_the_whole_image(vit, images):
    backbone = Backbone.load(vit)
    everything = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(backbone(images, kept=everything), backbone(images), rtol=0, atol=2e-5)
    other = everything.flip(1)
    torch.testing.assert_close(backbone(images, kept=other), backbone(images), rtol=0, atol=2e-5)


def test_mean_attention_is_softmax_attention():
    q, k = torch.randn(2, 2, 3, 7, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1).mean(dim=(1, 2))[:, 2:]
    torch.testing.assert_close(reference.mean_attention(q, k, 2), expected)
    q.requires_grad_()
    assert not reference.mean_attention(q, k).requires_grad


@torch.no_grad()
def test_other_sizes_than_the_own(build_vit):
    larger = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(2))
    vit = build_vit(cls=Eva, **DINOV3)
    backbone = Backbone.load(vit)
    torch.testing.assert_close(backbone(larger), forward_head(vit, larger), rtol=0, atol=2e-5)
    fixed = build_vit(cls=Eva, **EVA02, dynamic_img_size=False)
    free = build_vit(cls=Eva, **EVA02, dynamic_img_size=True)
    torch.testing.assert_close(Backbone.load(fixed)(larger), forward_head(free, larger), rtol=0, atol=2e-5)


@torch.no_grad()
def test_rotations_stay_exact_in_bfloat16(build_vit, images):
    backbone = Backbone.load(build_vit(cls=Eva, **DINOV3))
    low = backbone.clone().to(dtype=torch.bfloat16)
    assert low.vit.rotation.table((4, 4), low.device).dtype == torch.float32
    assert low(images).dtype == torch.bfloat16
    torch.testing.assert_close(low(images).float(), backbone(images), rtol=0.1, atol=0.3)


def test_the_rotation_is_part_of_the_digest(build_vit):
    one = Backbone.load(build_vit(cls=Eva, **DINOV3))
    other = Backbone.load(build_vit(cls=Eva, **{**DINOV3, "rope_temperature": 50.0}))
    assert one.digest() != other.digest()


def test_gradients_reach_images_and_factors(vit, images, make_adapter):
    backbone = Backbone.load(vit)
    lora = LoRA.from_adapter(make_adapter(backbone, head=False))
    images.requires_grad_()
    backbone(images, lora=lora, prune={1: 0.5}).square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in lora.parameters())


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (VisionTransformer, {"class_token": False, "global_pool": ""}, r"must pool where it has no class token.*'avg'"),
        (Eva, {**EVA02, "qkv_fused": False}, r"one layer for queries, keys and values, got separate .*q_proj.*choose"),
        (Eva, {"use_rot_pos_emb": True, "rope_type": "mixed"}, r"alike in all blocks, got RotaryEmbeddingMixed"),
        (Eva, {"use_post_norm": True}, r"plain timm blocks, got EvaBlockPostNorm"),
        (Eva, {"attn_type": "rope"}, r"plain timm blocks, got EvaBlock with AttentionRope"),
        (Eva, {"global_pool": "max"}, r"got global_pool='max'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_stays_refused(build_vit, cls, options, message):
    with pytest.raises(ValueError, match=message):
        Backbone.load(build_vit(cls=cls, **options))


def test_heads_that_read_what_is_not_there(build_vit, make_adapter):
    backbone = Backbone.load(build_vit(**FREE))
    with pytest.raises(ValueError, match=r"head of adapter 'adapter-0' .*no class token"):
        backbone.check(make_adapter(backbone))
    with pytest.raises(ValueError, match=r"`pool` must be 'avg', 'mean' or 'pooled'"):
        backbone(torch.zeros(1, 3, 32, 32), pool="token")
    with pytest.raises(ValueError, match=r"another than 'map' for .*no attention pool"):
        backbone(torch.zeros(1, 3, 32, 32), pool="map")


@pytest.mark.parametrize("kind", ["no class token", "siglip", "dinov3", "eva02"])
@pytest.mark.medium
def test_a_whole_job(kind, build_vit, tiny_data, tmp_path):
    """Tune, recycle with pruning, classify, save and load: no step presumes a class token."""
    from lorarecycle import FewShotClassifier, recycle, tune

    cls, options = KINDS[kind]
    backbone = Backbone.load(build_vit(cls=cls, **options))
    tuned = [tune(backbone, tiny_data, seed=i, config={"epochs": 1, "batch_size": 16}, quiet=True) for i in range(2)]
    assert tuned[0].head.pool == backbone.own_pool
    tuned[0].save(tmp_path / "tuned")
    assert Adapter.load(tmp_path / "tuned").digest() == tuned[0].digest()
    meta = recycle(
        tuned,
        base=backbone,
        inversion={"pictures": 8, "prune": {1: 0.5}},
        meta={"steps": 2, "n_way": 2},
        quiet=True,
    )
    classifier = FewShotClassifier(backbone, meta).fit(tiny_data.images, tiny_data.labels)
    assert classifier.score(tiny_data.images, tiny_data.labels) > 0.5


@pytest.mark.medium
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_siglip_gap_224",
        "vit_base_patch16_siglip_224",
        "vit_small_patch16_dinov3",
        "eva02_tiny_patch14_224",
    ],
)
@pytest.mark.slow
@torch.no_grad()
def test_the_released_architectures(name, tmp_path):
    """Random weights, through `weights=`, whose forward pass must be timm's at the released size."""
    import timm
    from safetensors.torch import save_file

    vit = timm.create_model(name, pretrained=False, num_classes=0).eval()
    save_file({key: value.contiguous() for key, value in vit.state_dict().items()}, tmp_path / "w.safetensors")
    backbone = Backbone.load(name, weights=tmp_path / "w.safetensors")
    images = torch.randn(1, 3, backbone.image_size, backbone.image_size)
    torch.testing.assert_close(backbone(images), forward_head(vit, images), rtol=0, atol=5e-5)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["Siglip", "DINOv3ViT"])
def test_the_same_from_transformers_is_refused(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = ("SiglipVisionConfig", "SiglipVisionModel") if kind == "Siglip" else ("DINOv3ViTConfig", "DINOv3ViTModel")
    if not hasattr(transformers, names[0]):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config, model = (getattr(transformers, name) for name in names)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model(config(**sizes, image_size=16, patch_size=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a checkpoint must be of a .*choose another"):
        Backbone.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["registers, no class token", "siglip", "dinov3", "eva02"])
def test_exported_they_answer_the_same(kind, build_vit, images, make_adapter, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    from lorarecycle.export import ExportConfig, export_encoder

    cls, options = KINDS[kind]
    backbone = Backbone.load(build_vit(cls=cls, **options))
    adapter = make_adapter(backbone, head=False)
    merged = backbone.merge(adapter)
    prune = {1: 0.5}
    export_encoder(backbone, tmp_path / "encoder.onnx", meta_lora=adapter, config=ExportConfig(prune=prune))
    session = ort.InferenceSession(str(tmp_path / "encoder.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": images.numpy()})
    with torch.no_grad():
        expected = merged(images, prune=prune)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
