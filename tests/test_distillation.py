"""Features to follow: of which model, at which size, of which length; and that training follows them."""

import torch
import torch.nn.functional as F

from lorarecycle.backbone import Backbone
from lorarecycle.distillation import feature_targets, native_size
from lorarecycle.images import normalize
from lorarecycle.shapes import enlarge


def test_targets_are_the_guides_features_at_its_size(tiny_vit, make_adapter, tiny_data):
    small = Backbone(tiny_vit, image_size=16)
    guide = make_adapter(small, head=False)
    images = tiny_data.resize(16).images[:10]
    assert native_size(small) == 32
    targets = feature_targets(small, guide, images, batch_size=4)
    pixels = enlarge(images.float(), 32).round().clamp(0, 255).to(torch.uint8)
    views = [small.merge(guide)(normalize(v, small.mean, small.std)) for v in (pixels, pixels.flip(-1))]
    expected = (views[0] + views[1]) / 2
    torch.testing.assert_close(F.normalize(targets, dim=-1), F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    lengths = targets.norm(dim=-1)
    torch.testing.assert_close(lengths, expected.norm(dim=-1).mean().expand(10), rtol=1e-4, atol=1e-5)


def test_size_and_guide_can_be_chosen(tiny_vit, make_adapter, tiny_data):
    small = Backbone(tiny_vit, image_size=16)
    images = tiny_data.resize(16).images[:4]
    plain = feature_targets(small, None, images)
    assert not torch.allclose(plain, feature_targets(small, None, images, image_size=16), atol=1e-2)
    assert not torch.allclose(plain, feature_targets(small, make_adapter(small), images), atol=1e-2)
    larger = tiny_data.resize(48).images[:4]  # images above the native size are taken as they are
    torch.testing.assert_close(
        feature_targets(small, None, larger), feature_targets(small, None, larger, image_size=48)
    )
