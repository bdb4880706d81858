"""Kept patches: mirrored with their image, and on a finer grid."""

import pytest
import torch

from lorarecycle.data.images import normalize
from lorarecycle.vit.positions import magnify, mirror


def test_a_flip_mirrors_the_kept_tokens(tiny_backbone, tiny_data):
    images = tiny_data.images[:4]
    kept = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(4)])
    x = normalize(images, tiny_backbone.mean, tiny_backbone.std)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    flipped = x.flip(-1).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    for i in range(4):
        assert torch.equal(patches[i, kept[i]].flip(-1), flipped[i, mirror(kept, 4)[i]])
    assert torch.equal(mirror(mirror(kept, 4), 4), kept)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_multiple_shows_the_very_same_parts(times):
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(6)])
    mask = torch.zeros(6, 12).scatter(1, kept, 1.0).view(6, 3, 4)
    expected = mask.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)
    found = magnify(kept, (3, 4), (3 * times, 4 * times))
    assert found.shape == (6, 5 * times**2)
    assert (found.diff(dim=1) > 0).all()
    assert torch.equal(torch.zeros_like(expected).scatter(1, found, 1.0), expected)


def test_where_grids_do_not_divide_the_best_covered_are_chosen():
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(256, generator=generator)[None, :64]
    mask = torch.zeros(256).scatter(0, kept[0], 1.0).view(16, 16)
    fine = mask.repeat_interleave(37, 0).repeat_interleave(37, 1)  # 592 x 592: both grids divide it
    cover = fine.view(37, 16, 37, 16).sum(dim=(1, 3)).flatten()
    found = magnify(kept, (16, 16), (37, 37))[0]
    assert len(found) == round(64 * 37 * 37 / 256)
    assert cover[found].min() >= cover.topk(len(found)).values.min()
    assert magnify(torch.tensor([[3]]), (4, 4), (1, 1)).tolist() == [[0]], "never none"


def test_other_grids_keep_the_share_and_the_place():
    found = magnify(torch.tensor([[0, 1, 4, 5], [10, 11, 14, 15]]), (4, 4), (7, 7))
    assert found.shape == (2, round(4 * 49 / 16))
    rows, columns = found // 7, found % 7
    assert rows[0].max() <= 3
    assert columns[0].max() <= 3
    assert rows[1].min() >= 3
    assert columns[1].min() >= 3
    assert torch.equal(magnify(torch.arange(16)[None], (4, 4), (7, 7))[0], torch.arange(49))
