"""LV-ViT-M: its size, the published checkpoint's names, and a forward pass written from the paper's description."""

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lorarecycle.vit.backbone import Backbone
from lorarecycle.vit.lvvit import lvvit_m

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.fixture
def small():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = lvvit_m(**SMALL).eval()
        with torch.no_grad():
            for tensor in (*vit.parameters(), *(b for n, b in vit.named_buffers() if "running" in n)):
                tensor.add_(0.1 * torch.rand_like(tensor))
    return vit


def by_hand(state, images):
    """The published forward pass, from weights by their names: residuals are halved."""
    x = images
    for i, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
        x = F.conv2d(x, state[f"patch_embed.conv{i}.weight"], stride=stride, padding=padding)
        norm = [state[f"patch_embed.bn{i}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *norm).relu()
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4).flatten(2).mT
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    for i in range(2):
        block = f"blocks.{i}"
        q, k, v = F.linear(norm(x, f"{block}.norm1"), state[f"{block}.attn.qkv.weight"]).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (q, k, v))
        heads = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(heads, state[f"{block}.attn.proj.weight"], state[f"{block}.attn.proj.bias"]) / 2
        hidden = F.gelu(
            F.linear(norm(x, f"{block}.norm2"), *(state[f"{block}.mlp.fc1.{s}"] for s in ("weight", "bias")))
        )
        x = x + F.linear(hidden, *(state[f"{block}.mlp.fc2.{s}"] for s in ("weight", "bias"))) / 2
    return norm(x, "norm")[:, 0]


def test_it_has_the_paper_s_size_and_the_checkpoint_s_names():
    with torch.device("meta"):
        vit = timm.create_model("lvvit_m")
    count = sum(p.numel() for p in vit.parameters()) + 512 * 1000 + 1000  # the checkpoint's aux_head
    assert round(count / 1e6) == 56
    names = set(vit.state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.conv1.weight", "patch_embed.bn3.running_var"} <= names
    assert {"patch_embed.proj.bias", "blocks.19.attn.qkv.weight", "blocks.0.mlp.fc2.bias", "norm.weight"} <= names
    assert "blocks.0.attn.qkv.bias" not in names
    assert not [name for name in names if ".ls" in name]


def test_the_forward_pass_is_the_published_one(small):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = by_hand(small.state_dict(), images)
    backbone = Backbone(small, name="lv")
    torch.testing.assert_close(backbone(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small(images), expected, atol=1e-4, rtol=1e-4)


def test_sparse_images_adapters_and_gradients(small, make_adapter):
    backbone = Backbone(small, name="lv")
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(backbone(images, kept=everything), backbone(images), atol=1e-5, rtol=1e-5)
    assert backbone.encode(images, prune={0: 0.5}).kept.shape == (2, 8)
    backbone(images, kept=everything[:, :4]).sum().backward()
    assert images.grad.abs().sum() > 0
    adapter = make_adapter(backbone, sites=("attn.q", "attn.v", "mlp.fc1"))
    assert not torch.allclose(backbone.merge(adapter)(images), backbone(images), atol=1e-3)


def test_the_published_file_loads(tmp_path, monkeypatch, small):
    """Heads in it are left out; trained weights are not fetched."""
    state = {name: tensor.contiguous() for name, tensor in small.state_dict().items()}
    state |= {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10), "aux_head.weight": torch.zeros(10, 32)}
    save_file({**state, "aux_head.bias": torch.zeros(10)}, tmp_path / "lv.safetensors")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **k: create(name, **{**k, **SMALL}))
    backbone = Backbone.load("lvvit_m", weights=tmp_path / "lv.safetensors")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(images), Backbone(small)(images))
    assert backbone.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="released weights of lvvit_m are a pickle file"):
        Backbone.load("lvvit_m")
