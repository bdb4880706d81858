"""Few-shot tasks and their accuracy: seeded, counted by a naive loop, saved and loaded."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.config import EvaluateConfig
from lorarecycle.data.dataset import LabelledImages
from lorarecycle.data.images import normalize
from lorarecycle.fewshot.evaluate import Evaluation, evaluate, task_accuracies
from lorarecycle.fewshot.methods import registry
from lorarecycle.fewshot.tasks import Tasks, sample_tasks
from lorarecycle.vit.backbone import Backbone
from lorarecycle.vit.features import extract_features
from lorarecycle.vit.lora import LoRA

SIZES = {"n_way": 3, "n_shot": 2, "n_query": 4, "n_tasks": 20}


def test_tasks_hold_what_they_say(tiny_data: LabelledImages) -> None:
    tasks = sample_tasks(tiny_data.labels, **SIZES, seed=0)
    assert (len(tasks), tasks.n_way, tasks.n_shot, tasks.n_query) == (20, 3, 2, 4)
    for classes, support, query in zip(tasks.classes, tasks.support, tasks.query, strict=True):
        assert len(set(classes.tolist())) == 3
        assert len({*support.tolist(), *query.tolist()}) == 18
        assert torch.equal(tiny_data.labels[support], classes.repeat_interleave(2))
        assert torch.equal(tiny_data.labels[query], classes.repeat_interleave(4))
    assert set(tasks.classes.flatten().tolist()) == {0, 1, 2, 3}


def test_tasks_follow_the_seed_alone(tiny_data: LabelledImages) -> None:
    first = sample_tasks(tiny_data.labels, **SIZES, seed=5)
    torch.manual_seed(99)
    again = sample_tasks(tiny_data.labels.tolist(), **SIZES, seed=5)
    other = sample_tasks(tiny_data.labels, **SIZES, seed=6)
    assert torch.equal(first.support, again.support)
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.support, other.support)


def test_labels_need_not_be_contiguous() -> None:
    labels = torch.tensor([3, 9, 3, 9, 3, 9])
    tasks = sample_tasks(labels, n_way=2, n_shot=1, n_query=2, n_tasks=4, seed=0)
    assert set(tasks.classes.flatten().tolist()) == {3, 9}


def test_task_lists_are_files(tiny_data: LabelledImages, tmp_path: Path) -> None:
    tasks = sample_tasks(tiny_data.labels, **SIZES, seed=0)
    tasks.save(tmp_path / "tasks.npz")
    loaded = Tasks.load(tmp_path / "tasks.npz")
    for name in ("classes", "support", "query"):
        assert torch.equal(getattr(loaded, name), getattr(tasks, name))
    whole = (tmp_path / "tasks.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no tasks")
    for name in ("short.npz", "text.npz"):
        with pytest.raises(ValueError, match=f"{name} must be a whole npz file"):
            Tasks.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.npz"):
        Tasks.load(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"must be \[T, n_way\]"):
        Tasks(tasks.classes, tasks.support[:, :5], tasks.query)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "centred_cosine"])
def test_accuracies_against_a_loop(tiny_data: LabelledImages, distance: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(tiny_data), 6, generator=generator) + tiny_data.labels[:, None] * 0.5
    tasks = sample_tasks(tiny_data.labels, **{**SIZES, "n_tasks": 130}, seed=1)
    expected = []
    for support, query in zip(tasks.support, tasks.query, strict=True):
        centres = features[support].view(3, 2, 6).mean(dim=1)
        hits = 0
        for i, image in enumerate(query):
            if "cosine" in distance:
                middle = 0.8 * centres.mean(dim=0) if distance == "centred_cosine" else 0
                nearest = torch.cosine_similarity(features[image] - middle, centres - middle).argmax()
            else:
                nearest = (features[image] - centres).norm(dim=1).argmin()
            hits += int(nearest == i // 4)
        expected.append(100 * hits / 12)
    torch.testing.assert_close(task_accuracies(features, tasks, distance), torch.tensor(expected))


def test_features(tiny_backbone: Backbone, tiny_data: LabelledImages, make_adapter: Callable[..., Adapter]) -> None:
    images = tiny_data.images[:7]
    with torch.no_grad():
        expected = tiny_backbone(normalize(images, tiny_backbone.mean, tiny_backbone.std))
    features = extract_features(tiny_backbone, images, batch_size=3)
    torch.testing.assert_close(features, expected)
    assert not features.requires_grad
    assert features.dtype == torch.float32
    adapter = make_adapter(tiny_backbone)
    worn = extract_features(tiny_backbone, images, lora=LoRA.from_adapter(adapter))
    merged = extract_features(tiny_backbone.merge(adapter), images)
    torch.testing.assert_close(worn, merged, rtol=1e-4, atol=1e-4)
    assert extract_features(tiny_backbone, images[:0]).shape == (0, 32)
    larger = tiny_data.resize(48).images[:2]
    assert extract_features(tiny_backbone, larger).shape == (2, 32)


def test_evaluate(tiny_backbone: Backbone, tiny_data: LabelledImages, make_adapter: Callable[..., Adapter]) -> None:
    config = EvaluateConfig(**SIZES, seed=3)
    result = evaluate(tiny_backbone, tiny_data, config=config, quiet=True)
    assert result.accuracies.shape == (20,)
    assert 80 < result.accuracy <= 100
    adapter = make_adapter(tiny_backbone)
    with_lora = evaluate(tiny_backbone, tiny_data, adapter, config=config, quiet=True)
    assert torch.equal(with_lora.tasks.support, result.tasks.support)
    merged = evaluate(tiny_backbone.merge(adapter), tiny_data, tasks=result.tasks, quiet=True)
    assert torch.equal(merged.accuracies, with_lora.accuracies)
    other = sample_tasks(tiny_data.labels.flip(0), **SIZES, seed=0)
    with pytest.raises(ValueError, match="`tasks` must be a task list of `data`"):
        evaluate(tiny_backbone, tiny_data, tasks=other, quiet=True)


def test_mean_and_interval(tiny_data: LabelledImages) -> None:
    tasks = sample_tasks(tiny_data.labels, **{**SIZES, "n_tasks": 4}, seed=0)
    result = Evaluation(torch.tensor([50.0, 60.0, 70.0, 80.0]), tasks)
    assert result.accuracy == 65
    assert result.interval == pytest.approx(1.96 * math.sqrt(500 / 3) / 2)
    assert str(result) == "65.00 +- 12.65 (4 3-way 2-shot tasks)"
    assert result.summary()["n_query"] == 4
    assert math.isnan(
        Evaluation(torch.tensor([50.0]), sample_tasks(tiny_data.labels, **{**SIZES, "n_tasks": 1}, seed=0)).interval
    )


def test_too_few(tiny_backbone: Backbone, tiny_data: LabelledImages) -> None:
    with pytest.raises(ValueError, match="`n_way` must be at most the number of classes, 4, got 5"):
        evaluate(tiny_backbone, tiny_data, quiet=True)
    with pytest.raises(ValueError, match=r"`n_shot \+ n_query` must be at most.*got 16; class 0 has 12"):
        evaluate(tiny_backbone, tiny_data, config=EvaluateConfig(n_way=2), quiet=True)
    with pytest.raises(ValueError, match="`n_tasks` must be at least 1"):
        sample_tasks(tiny_data.labels, **{**SIZES, "n_tasks": 0}, seed=0)


def test_the_seed_reaches_tasks_and_method(tiny_backbone, tiny_data, monkeypatch):
    made = []

    def make(name, **settings):
        made.append(settings)
        return registry.make_method(name, rate=0.01, steps=1, **settings)

    monkeypatch.setattr(sys.modules["lorarecycle.fewshot.evaluate"], "make_method", make)
    sizes = {**SIZES, "n_tasks": 1}
    result = evaluate(tiny_backbone, tiny_data, method="linear-probe", config=sizes, seed=7, quiet=True)
    assert [settings["like"]["seed"] for settings in made] == [7]
    assert torch.equal(result.tasks.query, sample_tasks(tiny_data.labels, **sizes, seed=7).query)
