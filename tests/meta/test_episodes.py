"""Episodes: what they are made of, and that a step decides them."""

from dataclasses import replace

import pytest
import torch

from lorarecycle import MetaConfig, Surrogate
from lorarecycle.meta.episodes import EpisodeSampler, ImageSampler


def pool(name: str, n_classes: int, per_class: int = 6) -> Surrogate:
    n = n_classes * per_class
    return Surrogate(
        images=torch.zeros(n, 3, 8, 8, dtype=torch.uint8),
        labels=torch.arange(n) % n_classes,
        teacher_logits=torch.zeros(n, n_classes),
        class_names=tuple(f"{name}{c}" for c in range(n_classes)),
        patch_size=8,
        adapter=name,
    )


POOLS = [pool("a", 4), pool("b", 5), pool("c", 3)]
CONFIG = MetaConfig(n_way=3, n_shot=2, n_query=4, interpolation=0.5)


def origin(row: int) -> tuple[int, int]:
    for i, p in enumerate(POOLS):
        if row < len(p.labels):
            return i, int(p.labels[row])
        row -= len(p.labels)
    raise AssertionError


def test_episodes_are_made_right():
    sampler = EpisodeSampler(POOLS, CONFIG, seed=1)
    kinds = set()
    for step in range(60):
        episode = sampler(step)
        assert episode.labels.tolist() == [0, 0, 1, 1, 2, 2] + [0] * 4 + [1] * 4 + [2] * 4
        assert len(set(episode.images.tolist())) == 18, "no image twice"
        origins = [origin(int(row)) for row in episode.images]
        by_label = [
            {o for o, label in zip(origins, episode.labels.tolist(), strict=True) if label == c} for c in range(3)
        ]
        assert all(len(o) == 1 for o in by_label), "one class for each label"
        classes = [next(iter(o)) for o in by_label]
        assert len(set(classes)) == 3
        kinds.add(episode.cross_task)
        if episode.cross_task:
            assert len({p for p, _ in classes}) > 1
        else:
            assert len({p for p, _ in classes}) == 1
            assert [c for _, c in classes] == episode.teacher_classes.tolist()
    assert kinds == {True, False}


def test_the_share_of_cross_task_episodes():
    for share in (0.0, 0.25, 1.0):
        sampler = EpisodeSampler(POOLS, MetaConfig(n_way=3, n_shot=1, n_query=2, interpolation=share))
        got = sum(sampler(step).cross_task for step in range(400)) / 400
        assert abs(got - share) < 0.07


def test_seed_and_step_decide():
    first, again, other = (EpisodeSampler(POOLS, CONFIG, seed=s) for s in (3, 3, 4))
    assert torch.equal(first(7).images, again(7).images)
    assert not torch.equal(first(7).images, first(8).images)
    assert any(not torch.equal(first(s).images, other(s).images) for s in range(3))


@pytest.mark.parametrize(
    ("pools", "config", "message"),
    [
        ([], CONFIG, "`adapters` must hold at least one adapter"),
        (
            POOLS,
            MetaConfig(n_way=4, n_query=2),
            "`n_way` must be at most the classes of every adapter, got n_way=4 and 3",
        ),
        (POOLS[:1], CONFIG, "`interpolation` must be 0 with a single adapter, got 0.5"),
        (
            POOLS[1:],
            MetaConfig(n_way=9, interpolation=1.0),
            r"all adapters together \(8, those of one name counted once\), got 9",
        ),
        (
            POOLS,
            MetaConfig(n_way=3, n_shot=3, n_query=4),
            r"at least n_shot \+ n_query = 7, got 6 images of class 'a0'",
        ),
    ],
)
def test_bad_input(pools, config, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(pools, config)


def test_images_without_labels():
    pictures = Surrogate(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), None, None, (), 8)
    draw = ImageSampler([pictures, pictures], CONFIG, seed=1)
    rows = [draw(step).images for step in range(20)]
    assert all(len(r) == len(set(r.tolist())) == 18 and r.max() < 60 for r in rows)
    assert torch.equal(rows[3], ImageSampler([pictures, pictures], CONFIG, seed=1)(3).images)
    assert not torch.equal(rows[3], rows[4])
    assert len(ImageSampler([pictures], MetaConfig(), seed=1)(0).images) == 30, "80 where there are so many"


def test_episodes_within_an_adapter_ask_for_its_answers():
    silent = replace(POOLS[0], teacher_logits=None)
    with pytest.raises(ValueError, match=r"surrogate of 'a' must hold teacher logits .* or set interpolation=1.0"):
        EpisodeSampler([silent, *POOLS[1:]], CONFIG)
    EpisodeSampler([silent, *POOLS[1:]], replace(CONFIG, interpolation=1.0))


def named(adapter: str, *names: str) -> Surrogate:
    return replace(pool(adapter, len(names)), class_names=names)


def test_cross_task_episodes_never_oppose_two_classes_of_one_name():
    """Two adapters that were tuned on cats both have a class "cat": an episode that asked which is which would teach
    noise. Mere numbers are no names."""
    pools = [named("a", "cat", "dog", "fox"), named("b", "cat", "dog", "owl"), named("c", "cat", "elk", "fox")]
    sampler = EpisodeSampler(pools, replace(CONFIG, interpolation=1.0), seed=2)
    seen = set()
    for step in range(200):
        episode = sampler(step)
        assert episode.cross_task
        chosen = []
        for row in episode.images[:: CONFIG.n_shot][: CONFIG.n_way].tolist():
            i, row = divmod(row, 18)
            chosen.append((i, pools[i].class_names[int(pools[i].labels[row])]))
        assert len({name for _, name in chosen}) == 3
        assert len({i for i, _ in chosen}) > 1
        seen |= set(chosen)
    assert seen == {(i, name) for i, p in enumerate(pools) for name in p.class_names}, "none is left out for good"
    twins = [named("a", "cat", "dog", "fox"), named("b", "cat", "dog", "fox")]
    with pytest.raises(ValueError, match=r"all adapters together \(3, those of one name counted once\), got 4"):
        EpisodeSampler(twins, MetaConfig(n_way=4, n_shot=1, n_query=2, interpolation=1.0))
    numbered = [named("a", "0", "1", "2"), named("b", "0", "1", "2")]
    EpisodeSampler(numbered, MetaConfig(n_way=4, n_shot=1, n_query=2, interpolation=1.0))
