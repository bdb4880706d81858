"""Backbone against timm's own forward pass; merging; pruning against a loop; sparse tokens."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lorarecycle.adapters.adapter import Adapter, Head
from lorarecycle.vit.backbone import Backbone
from lorarecycle.vit.lora import LoRA

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dinov2 with registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3},
    "registers with positions": {"reg_tokens": 2},
    "clip": {"pre_norm": True, "norm_layer": "layernorm"},
    "distilled deit": {"cls": VisionTransformerDistilled},
    "qk norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "average pooling": {"global_pool": "avg"},
    "dynamic size": {"dynamic_img_size": True},
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_timms(build_vit: Callable[..., Any], images: Tensor, variant: str) -> None:
    vit = build_vit(**VARIANTS[variant])
    backbone = Backbone(vit)
    expected = vit.forward_features(images)
    tokens = backbone.encode(images).tokens
    torch.testing.assert_close(backbone.vit.norm(tokens), expected, rtol=1e-4, atol=1e-5)
    if variant != "average pooling":
        torch.testing.assert_close(backbone(images), expected[:, 0], rtol=1e-4, atol=1e-5)
        P = backbone.num_prefix_tokens
        both = torch.cat([expected[:, 0], expected[:, P:].mean(dim=1)], dim=-1)
        torch.testing.assert_close(backbone(images, pool="token+mean"), both, rtol=1e-4, atol=1e-5)
        mean = tokens[:, P:].mean(dim=1)
        torch.testing.assert_close(backbone(images, pool="mean"), mean)


def test_features_of_timms_registered_models(images: Tensor) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", pretrained=False).eval()
    image = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(Backbone(vit)(image), vit.forward_features(image)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (24, 40), (8, 8), (64, 16)])
@pytest.mark.parametrize("variant", ["plain", "dinov2 with registers", "clip", "distilled deit"])
def test_other_image_sizes_are_timms(build_vit: Callable[..., Any], variant: str, size: tuple[int, int]) -> None:
    vit = build_vit(**VARIANTS[variant], dynamic_img_size=True)
    backbone = Backbone(vit)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = vit.forward_features(images)[:, 0]
    torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)
    if size == (48, 48):
        torch.testing.assert_close(Backbone(vit, image_size=48)(images), expected, rtol=1e-4, atol=1e-5)


def test_given_module_is_left_as_it_is(tiny_vit: Any) -> None:
    tiny_vit.train()
    backbone = Backbone(tiny_vit)
    assert tiny_vit.training
    assert all(p.requires_grad for p in tiny_vit.parameters() if p.is_floating_point())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert backbone.vit.blocks[0].attn.qkv.weight.data_ptr() == tiny_vit.blocks[0].attn.qkv.weight.data_ptr()
    assert not backbone.train().training
    assert (backbone.embed_dim, backbone.num_blocks, backbone.num_heads, backbone.patch_size) == (32, 3, 2, 8)
    assert (backbone.num_prefix_tokens, backbone.image_size) == (1, 32)


def test_dtypes(tiny_vit: Any, images: Tensor) -> None:
    expected = Backbone(tiny_vit)(images)
    double = Backbone(tiny_vit).double()
    assert double.dtype == torch.float64
    torch.testing.assert_close(double(images).float(), expected, rtol=1e-4, atol=1e-5)
    brief = Backbone(tiny_vit).to(torch.bfloat16)
    assert brief(images).dtype == torch.bfloat16
    torch.testing.assert_close(brief(images).float(), expected, rtol=0.2, atol=0.2)
    assert next(tiny_vit.parameters()).dtype == torch.float32


def test_input_gradient(tiny_backbone: Backbone, images: Tensor) -> None:
    images.requires_grad_(True)
    tiny_backbone(images, prune={1: 0.5}).square().sum().backward()
    assert torch.isfinite(images.grad).all()
    assert images.grad.abs().max() > 0


# --- adapters ---


def test_merge_is_exact_reversible_and_shares(
    tiny_backbone: Backbone, make_adapter: Callable[..., Adapter], images: Tensor
) -> None:
    before = {name: value.clone() for name, value in tiny_backbone.state_dict().items()}
    features = tiny_backbone(images)
    adapter = make_adapter(tiny_backbone, sites=("attn.q", "attn.v", "mlp.fc2"))
    merged = tiny_backbone.merge(adapter)
    for i, block in enumerate(merged.vit.blocks):
        weight = before[f"vit.blocks.{i}.attn.qkv.weight"].clone()
        weight[:32] += adapter.delta(f"blocks.{i}.attn.q")
        weight[64:] += adapter.delta(f"blocks.{i}.attn.v")
        assert torch.equal(block.attn.qkv.weight, weight)
        own, shared = block.mlp, tiny_backbone.vit.blocks[i].mlp
        assert own.fc1.weight.data_ptr() == shared.fc1.weight.data_ptr()
        assert own.fc2.weight.data_ptr() != shared.fc2.weight.data_ptr()
        assert own.fc2.bias.data_ptr() == shared.fc2.bias.data_ptr()
    assert merged.vit.cls_token.data_ptr() == tiny_backbone.vit.cls_token.data_ptr()
    for name, value in tiny_backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert merged.unmerge() is tiny_backbone
    assert torch.equal(merged.unmerge()(images), features)
    twice = merged.merge(make_adapter(tiny_backbone, seed=1))
    assert twice.unmerge() is merged
    with pytest.raises(ValueError, match="must hold a merged adapter, got none"):
        tiny_backbone.unmerge()


def test_adapters_that_do_not_fit(
    tiny_backbone: Backbone, build_vit: Callable[..., Any], make_adapter: Callable[..., Adapter]
) -> None:
    deep, wide = Backbone(build_vit(depth=4)), Backbone(build_vit(embed_dim=48))
    with pytest.raises(ValueError, match=r"'adapter-0'.*'tiny'.*blocks\.3\.attn\.q.*3 blocks"):
        tiny_backbone.merge(make_adapter(deep))
    with pytest.raises(ValueError, match=r"'adapter-0'.*'tiny'.*\[48, 48\].*\[32, 32\]"):
        tiny_backbone.check(make_adapter(wide))
    adapter = make_adapter(tiny_backbone)
    with pytest.raises(ValueError, match=r"head of adapter 'adapter-0' must read 32 features.*\[3, 64\]"):
        tiny_backbone.check(adapter.with_head(Head(torch.zeros(3, 64))))
    tiny_backbone.check(adapter.with_head(Head(torch.zeros(3, 64), pool="token+mean")))


def test_gated_mlps(build_vit: Callable[..., Any], make_adapter: Callable[..., Adapter], images: Tensor) -> None:
    from timm.layers import SwiGLUPacked

    vit = build_vit(mlp_layer=SwiGLUPacked)  # as in the giant DINOv2
    backbone = Backbone(vit)
    torch.testing.assert_close(backbone(images), vit.forward_features(images)[:, 0], rtol=1e-4, atol=1e-5)
    adapter = make_adapter(backbone)
    worn = backbone(images, lora=LoRA.from_adapter(adapter))
    torch.testing.assert_close(worn, backbone.merge(adapter)(images), rtol=1e-4, atol=1e-4)
    gated = make_adapter(backbone, sites=("mlp.fc1", "mlp.fc2"))
    assert not torch.equal(backbone.merge(gated)(images), backbone(images))
    with pytest.raises(ValueError, match="must leave the MLPs of .* alone, which are gated; `merge` it instead"):
        backbone(images, lora=LoRA.from_adapter(gated))


# --- pruning ---


def pruned_by_loop(vit: VisionTransformer, image: Tensor, prune: dict[int, float]) -> tuple[Tensor, list[int]]:
    """Sec. 4.3 for one image, token by token, on timm's own modules."""
    P = vit.num_prefix_tokens
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))
    kept = list(range(x.shape[1] - P))
    for i, block in enumerate(vit.blocks):
        x_in = block.norm1(x)
        q, k, _ = (
            block.attn.qkv(x_in).reshape(1, -1, 3, block.attn.num_heads, block.attn.head_dim).permute(2, 0, 3, 1, 4)
        )
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        attention = (q[0, :, 0:1] @ k[0].transpose(-1, -2) * block.attn.head_dim**-0.5).softmax(dim=-1)
        scores = attention.mean(dim=0)[0, P:].tolist()
        x = x + block.ls1(block.attn(x_in))
        if i in prune:
            n = len(scores)
            drop = sorted(range(n), key=lambda t: scores[t])[: int(n * prune[i])]
            stay = [t for t in range(n) if t not in drop]
            kept = [kept[t] for t in stay]
            x = torch.stack([*x[0, :P], *(x[0, P + t] for t in stay)])[None]
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return vit.norm(x)[0], kept


@pytest.mark.parametrize("variant", ["plain", "dinov2 with registers", "clip", "distilled deit", "qk norm"])
@pytest.mark.parametrize("prune", [{0: 0.5}, {0: 0.3, 1: 0.3}, {1: 0.25, 2: 0.5}, {2: 0.7}, {0: 0.9, 1: 0.5}, {1: 0.0}])
def test_pruning_against_a_loop(
    build_vit: Callable[..., Any], images: Tensor, variant: str, prune: dict[int, float]
) -> None:
    vit = build_vit(**VARIANTS[variant])
    backbone = Backbone(vit)
    encoding = backbone.encode(images, prune=prune)
    features = backbone(images, prune=prune)
    narrow = backbone.encode(images, prune=prune, class_token_only=True)
    assert torch.equal(narrow.kept, encoding.kept)
    for i, image in enumerate(images):
        tokens, kept = pruned_by_loop(vit, image, prune)
        assert encoding.kept[i].tolist() == kept
        torch.testing.assert_close(backbone.vit.norm(encoding.tokens[i]), tokens, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[i], tokens[0], rtol=1e-4, atol=1e-5)


def test_pruning_counts(tiny_backbone: Backbone) -> None:
    assert tiny_backbone.kept_per_layer({0: 0.3, 2: 0.5}, 16) == {0: 12, 2: 6}
    assert tiny_backbone.kept_per_layer({0: 0.99, 1: 0.99, 2: 0.99}, 16) == {0: 1, 1: 1, 2: 1}
    assert tiny_backbone.kept_per_layer({2: 0.0}, 16) == {2: 16}


@pytest.mark.parametrize(
    ("prune", "message"),
    [({3: 0.5}, "layers 0 to 2, got 3"), ({0: 1.0}, "no token"), ({0: -0.1}, r"\[0, 1\)")],
)
def test_pruning_that_cannot_be(tiny_backbone: Backbone, prune: dict[int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_backbone.kept_per_layer(prune, 16)


def test_scores_belong_to_the_kept_tokens(tiny_backbone: Backbone, images: Tensor) -> None:
    full = tiny_backbone.encode(images, scores=True)
    assert full.kept is None
    assert full.scores.shape == (3, 16)
    assert not full.scores.requires_grad
    assert (full.scores.sum(dim=1) < 1).all()
    last = tiny_backbone.encode(images, scores=True, prune={2: 0.5})
    torch.testing.assert_close(last.scores, full.scores.gather(1, last.kept))
    assert last.scores.min(dim=1).values.tolist() == full.scores.topk(8).values[:, -1].tolist()
    early = tiny_backbone.encode(images, scores=True, prune={0: 0.5})
    assert early.scores.shape == early.kept.shape == (3, 8)


# --- sparse tokens ---


@pytest.mark.parametrize("variant", ["plain", "dinov2 with registers", "clip", "distilled deit"])
def test_sparse_tokens(build_vit: Callable[..., Any], images: Tensor, variant: str) -> None:
    vit = build_vit(**VARIANTS[variant])
    backbone = Backbone(vit)
    every = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(backbone(images, kept=every), backbone(images), rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(2)
    kept = torch.stack([torch.randperm(16, generator=generator)[:5].sort().values for _ in range(3)])
    P = backbone.num_prefix_tokens
    x = vit.patch_embed(images)
    x = vit._pos_embed(x)
    x = torch.stack([torch.cat([x[i, :P], x[i, P:][kept[i]]]) for i in range(3)])
    expected = vit.norm(vit.blocks(vit.norm_pre(x)))
    torch.testing.assert_close(backbone(images, kept=kept), expected[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        backbone.vit.norm(backbone.encode(images, kept=kept).tokens), expected, rtol=1e-4, atol=1e-5
    )


def test_left_out_patches_do_not_matter(tiny_backbone: Backbone, images: Tensor) -> None:
    kept = torch.tensor([[0, 3, 9]] * 3)
    changed = images.clone()
    changed[:, :, 8:16] += 5  # patches 4 to 7
    assert torch.equal(tiny_backbone(images, kept=kept), tiny_backbone(changed, kept=kept))


def test_pruning_of_sparse_tokens_composes(tiny_backbone: Backbone, images: Tensor) -> None:
    kept = torch.tensor([[1, 4, 6, 9, 15]] * 3)
    for narrow in (False, True):
        encoding = tiny_backbone.encode(images, kept=kept, prune={0: 0.4, 2: 0.4}, class_token_only=narrow)
        assert encoding.kept.shape == (3, 2)
        assert all(set(row) <= {1, 4, 6, 9, 15} for row in encoding.kept.tolist())
        assert (encoding.kept.diff(dim=1) > 0).all()


# --- errors ---


def test_sizes_that_the_patches_do_not_divide(tiny_backbone: Backbone, tiny_vit: Any) -> None:
    with pytest.raises(ValueError, match=r"multiple of the patch size 8, got 30 x 32"):
        tiny_backbone(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="patch size 8"):
        Backbone(tiny_vit, image_size=20)


def test_unknown_pool(tiny_backbone: Backbone, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"`pool` must be .*got 'max'"):
        tiny_backbone(images, pool="max")


def test_modules_of_another_kind(build_vit: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="VisionTransformer, got a Linear"):
        Backbone(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="class token"):
        Backbone(build_vit(class_token=False, global_pool=""))
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(ValueError, match="ParallelScalingBlock"):
        Backbone(build_vit(block_fn=ParallelScalingBlock))


def test_patch_embeddings_of_another_kind_are_refused() -> None:
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, img_size=64)
    with pytest.raises(ValueError, match="HybridEmbed"):
        Backbone(hybrid)


def test_attention_of_another_kind_is_refused(build_vit: Callable[..., Any]) -> None:
    if "attn_layer" not in inspect.signature(VisionTransformer).parameters:
        pytest.skip("this timm has one kind of attention only")
    with pytest.raises(ValueError, match="DiffAttention"):
        Backbone(build_vit(attn_layer="diff"))


def test_a_classifier_is_no_part_of_the_digest() -> None:
    """A module that is given with one, and the same model loaded without."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    vits = [VisionTransformer(**shape, num_classes=n) for n in (0, 7)]
    vits[0].load_state_dict(vits[1].state_dict(), strict=False)
    digests = [Backbone(vit, name="tiny").digest() for vit in vits]
    assert digests[0] == digests[1]
    vits[1].blocks[0].mlp.fc1.weight.data[0, 0] += 1
    assert Backbone(vits[1], name="tiny").digest() != digests[0]
