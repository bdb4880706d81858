"""Features to follow: of which model, at which size, of which length; and that training follows them."""

import torch
import torch.nn.functional as F

from lorarecycle.data.images import normalize, to_uint8
from lorarecycle.meta.guide import feature_targets, guide_side
from lorarecycle.vit.backbone import Backbone


def test_targets_are_the_guides_features_at_its_size(tiny_vit, make_adapter, tiny_data):
    small = Backbone(tiny_vit, image_size=16)
    guide = make_adapter(small, head=False)
    images = tiny_data.resize(16).images[:10]
    assert guide_side(small, 16) == 32
    assert guide_side(small, 48) == 48
    targets = feature_targets(small, guide, images, batch_size=4)
    pixels = to_uint8(images, 32)
    shifted = pixels.roll((4, 4), (-2, -1))
    views = [pixels, pixels.flip(-1), shifted, shifted.flip(-1)]
    expected = sum(small.merge(guide)(normalize(v, small.mean, small.std)) for v in views) / 4
    torch.testing.assert_close(F.normalize(targets, dim=-1), F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    lengths = targets.norm(dim=-1)
    torch.testing.assert_close(lengths, expected.norm(dim=-1).mean().expand(10), rtol=1e-4, atol=1e-5)


def test_size_and_guide_can_be_chosen(tiny_vit, make_adapter, tiny_data):
    small = Backbone(tiny_vit, image_size=16)
    images = tiny_data.resize(16).images[:4]
    plain = feature_targets(small, None, images)
    assert not torch.allclose(plain, feature_targets(small, None, images, flip=False), atol=1e-2)
    assert not torch.allclose(plain, feature_targets(small, None, images, shift=False), atol=1e-2)
    assert not torch.allclose(plain, feature_targets(small, None, images, image_size=16), atol=1e-2)
    assert not torch.allclose(plain, feature_targets(small, make_adapter(small), images), atol=1e-2)
    larger = tiny_data.resize(48).images[:4]  # images above the native size are taken as they are
    torch.testing.assert_close(
        feature_targets(small, None, larger), feature_targets(small, None, larger, image_size=48)
    )


def test_the_guide_sees_what_a_sparse_student_sees(tiny_vit, make_adapter, tiny_data):
    """At twice the size four patches for one; whatever lies under the others does not matter."""
    small = Backbone(tiny_vit, image_size=16)
    guide = make_adapter(small, head=False)
    images = tiny_data.resize(16).images[:6].clone()
    kept = torch.tensor([[1, 2]] * 6)
    targets = feature_targets(small, guide, images, kept=kept, flip=False, batch_size=4)  # as they lie, not shifted
    model = small.merge(guide)
    pixels = to_uint8(images, 32)
    finer = torch.tensor([[2, 3, 6, 7, 8, 9, 12, 13]] * 6)
    expected = model(normalize(pixels, small.mean, small.std), kept=finer)
    torch.testing.assert_close(F.normalize(targets, dim=-1), F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    whole = feature_targets(small, guide, images, kept=torch.arange(4).expand(6, -1))
    assert torch.equal(whole, feature_targets(small, guide, images)), "a mask of everything masks nothing"
    mirrored = feature_targets(small, guide, images.flip(-1), kept=torch.tensor([[0, 3]] * 6))
    torch.testing.assert_close(mirrored, feature_targets(small, guide, images, kept=kept), rtol=1e-4, atol=1e-5)


def test_a_warm_start_is_left_alone_by_sparse_training_at_its_own_size(tiny_backbone, make_adapter, tiny_data):
    """Its features already point where the targets do; only lengths differ, which `F.normalize` takes out."""
    kept = torch.arange(0, 16, 2).expand(len(tiny_data), -1)
    guide = make_adapter(tiny_backbone, head=False)
    model = tiny_backbone.merge(guide)
    x = normalize(tiny_data.images, tiny_backbone.mean, tiny_backbone.std)
    targets = feature_targets(tiny_backbone, guide, tiny_data.images, kept=kept, flip=False)
    student = model(x, kept=kept)
    torch.testing.assert_close(F.normalize(targets, dim=-1), F.normalize(student, dim=-1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(F.normalize(targets, dim=-1), F.normalize(model(x), dim=-1), atol=1e-2)
