"""Many adapters in one batch: every image gets what its own adapter, merged, would have given it."""

import pytest
import torch

from lorarecycle import LoRAStack

ALL = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_against_one_by_one_merged_runs(tiny_backbone, make_adapter, images):
    adapters = [
        make_adapter(tiny_backbone, r=2, seed=0),
        make_adapter(tiny_backbone, r=(1, 5, 3), seed=1, sites=ALL),
        make_adapter(tiny_backbone, r=4, seed=2, sites=("attn.k", "mlp.fc2")),
    ]
    stack = LoRAStack(adapters)
    assert len(stack) == 3
    ids = torch.tensor([1, -1, 0, 2, 1, 0])
    models = [*(tiny_backbone.merge(adapter) for adapter in adapters), tiny_backbone]
    for options in ({}, {"prune": {0: 0.25, 2: 0.5}}, {"kept": torch.tensor([[0, 3, 9, 15]] * 6)}, {"pool": "mean"}):
        worn = tiny_backbone(images, lora=stack, adapter_ids=ids, **options)
        for i, adapter_id in enumerate(ids):
            own = {k: v[i : i + 1] if k == "kept" else v for k, v in options.items()}
            alone = models[adapter_id](images[i : i + 1], **own)
            torch.testing.assert_close(worn[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_images_and_nothing_else(tiny_backbone, make_adapter, images):
    stack = LoRAStack([make_adapter(tiny_backbone), make_adapter(tiny_backbone, seed=1)])
    images.requires_grad_()
    tiny_backbone(images, lora=stack, adapter_ids=torch.arange(6) % 2).square().sum().backward()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()
    assert not list(stack.parameters())


def test_ranks_above_the_kernels_limit_in_bfloat16(tiny_backbone, make_adapter, images):
    adapters = [make_adapter(tiny_backbone, seed=i, r=80) for i in range(2)]
    student = tiny_backbone.clone().to(torch.bfloat16)
    worn = student(images, lora=LoRAStack(adapters), adapter_ids=torch.tensor([0, 1, 0, 1, -1, -1])).float()
    for rows, model in ((slice(0, 4, 2), tiny_backbone.merge(adapters[0])), (slice(4, 6), tiny_backbone)):
        torch.testing.assert_close(worn[rows], model(images[rows]), rtol=0.05, atol=0.05)


def test_bad_input(tiny_backbone, make_adapter, images, build_vit):
    from lorarecycle import Backbone
    from lorarecycle.lora import LoRA

    adapter = make_adapter(tiny_backbone)
    stack = LoRAStack([adapter])
    with pytest.raises(ValueError, match="`adapter_ids` must be from -1 .* to 0, got 1"):
        tiny_backbone(images, lora=stack, adapter_ids=torch.ones(6, dtype=torch.int64))
    high = LoRAStack([make_adapter(tiny_backbone, r=80)])  # above the kernel's limit, whose checks do not run
    for worn, n in ((stack, 5), (stack, 1), (high, 1)):
        with pytest.raises(ValueError, match=f"`adapter_ids` must hold one id per image, 6, got {n}"):
            tiny_backbone(images, lora=worn, adapter_ids=torch.zeros(n, dtype=torch.int64))
    for ids in (torch.zeros(6), torch.zeros(6, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"`adapter_ids` must be int32 or int64 \[B\]"):
            stack.worn_by(ids)
    with pytest.raises(ValueError, match="`adapter_ids` must say which adapter .* got None"):
        tiny_backbone(images, lora=stack)
    with pytest.raises(ValueError, match="`adapter_ids` must come with a `LoRAStack` in `lora`, got LoRA"):
        tiny_backbone(images, lora=LoRA.from_adapter(adapter), adapter_ids=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="`adapters` must hold at least one adapter, got none"):
        LoRAStack([])
    wide = make_adapter(Backbone(build_vit(embed_dim=48)), name="wide")
    with pytest.raises(ValueError, match=r"`adapters` must fit one backbone, .* at blocks.0.attn.q \(adapter 'wide'\)"):
        LoRAStack([adapter, wide])
