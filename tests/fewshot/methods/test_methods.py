"""Every method of the registry through `evaluate`: it answers, learns what can be learnt, and says what it lacks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lorarecycle.config import EvaluateConfig
from lorarecycle.fewshot.evaluate import evaluate, task_accuracies
from lorarecycle.fewshot.images import TaskImages
from lorarecycle.fewshot.methods.base import Needs, make_tasks
from lorarecycle.fewshot.methods.registry import METHODS, describe_methods, find_method, make_method
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.inversion.surrogate import Surrogate
from lorarecycle.vit.features import extract_features

CONFIG = EvaluateConfig(n_way=3, n_shot=2, n_query=4, n_tasks=4, n_validation_tasks=2, seed=1)
QUICK = {
    **{name: {"steps": 2} for name in METHODS if "recycle" in name},
    "caml": {"steps": 150, "batch": 8, "hidden": 64, "layers": 2, "max_way": 3, "max_shot": 2, "learning_rate": 2e-3},
    "lorahub": {"budget": 4},
    "lorahub-nn": {"budget": 4},
    **{name: {"steps": 2} for name in ("zero-shot-recycle", "zero-shot-mole")},
    "zero-shot-lorahub": {"budget": 4},
    "pmf": {"meta_steps": 2, "steps": 3, "rates": (0.01, 0.001)},
    "full": {"steps": 10, "rates": (0.01, 0.001)},
    "lora-linear": {"steps": 10, "rates": (0.1, 0.01)},
    "average-linear": {"steps": 10, "rates": (0.1, 0.01)},
    "mole": {"steps": 10, "rates": (0.1, 0.01)},
}


class Words:
    """A text encoder in whose space class 'kind c' is the mean feature of its images, and every other name one word."""

    scale = 10.0

    def __init__(self, backbone, data):
        features = extract_features(backbone, data.images)
        self.centre = features.mean(dim=0)
        self.unknown = F.normalize(torch.ones(features.shape[1]), dim=0)
        self.known = {
            name: F.normalize(features[data.labels == c].mean(dim=0) - self.centre, dim=0)
            for c, name in enumerate(data.class_names)
        }

    def encode(self, class_names):
        return torch.stack([self.known.get(name, self.unknown) for name in class_names])

    def project(self, features):
        return features - self.centre


@pytest.fixture
def world(tiny_backbone, make_adapter, make_data):
    """What methods ask for: adapters with heads, surrogates with labels, validation images, words."""
    adapters = [make_adapter(tiny_backbone, n_classes=5, seed=i, size=0.05) for i in range(3)]
    surrogates = []
    for i, adapter in enumerate(adapters):
        images = make_data(n_classes=5, per_class=16, seed=10 + i)
        surrogates.append(
            Surrogate(
                images.images,
                images.labels,
                torch.randn(80, 5, generator=torch.Generator().manual_seed(i)),
                adapter.head.class_names,
                patch_size=8,
                scores=torch.rand(80, 16, generator=torch.Generator().manual_seed(i)),
                adapter=adapter.name,
            )
        )
    data = make_data(n_classes=4, per_class=12)
    return SimpleNamespace(
        data=data,
        shared={
            "adapters": adapters,
            "surrogates": surrogates,
            "validation": make_data(n_classes=4, per_class=8, seed=5),
            "text_encoder": Words(tiny_backbone, data),
            "config": CONFIG,
            "quiet": True,
        },
    )


@pytest.mark.medium
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("caml", "recycle-weights") else n for n in METHODS]
)
def test_every_method_solves_easy_tasks(name, tiny_backbone, world):
    for package in METHODS[name].needs.packages:
        pytest.importorskip(package)
    before = {key: value.clone() for key, value in tiny_backbone.state_dict().items()}
    results = [
        evaluate(tiny_backbone, world.data, method=make_method(name, **QUICK.get(name, {})), **world.shared)
        for _ in range(2)
    ]
    assert results[0].accuracy > 60, "chance is 33"
    assert torch.equal(results[0].accuracies, results[1].accuracies), "equal arguments, equal answers"
    assert results[0].seconds_per_task > 0
    for key, value in tiny_backbone.state_dict().items():
        assert torch.equal(value, before[key]), "the backbone is left as it is"
        assert not tiny_backbone.vit.get_parameter(key.removeprefix("vit.")).requires_grad


def test_nearest_mean_is_what_it_was(tiny_backbone, world):
    result = evaluate(tiny_backbone, world.data, config=CONFIG, quiet=True)
    expected = task_accuracies(extract_features(tiny_backbone, world.data.images), result.tasks)
    assert torch.equal(result.accuracies, expected)


def test_tasks_are_the_same_for_every_method_and_blind(tiny_backbone, world):
    tasks = sample_tasks(world.data.labels, n_way=3, n_shot=1, n_query=2, n_tasks=3, seed=0)
    made = make_tasks(TaskImages(world.data.images, 32), tasks, world.data.class_names)
    for task, classes in zip(made, tasks.classes.tolist(), strict=True):
        assert task.class_names == tuple(f"kind {c}" for c in classes)
        assert task.support_labels.tolist() == [0, 1, 2]
        assert task.blind().query_labels is None
        assert torch.equal(task.support_pixels(), world.data.images[task.support])


def test_features_are_computed_once(tiny_backbone, world, monkeypatch):
    calls = []
    original = type(tiny_backbone).forward
    monkeypatch.setattr(
        type(tiny_backbone),
        "forward",
        lambda self, images, **k: calls.append(len(images)) or original(self, images, **k),
    )
    tasks = sample_tasks(world.data.labels, n_way=3, n_shot=1, n_query=2, n_tasks=30, seed=0)
    result = evaluate(tiny_backbone, world.data, method="laplacian-shot", tasks=tasks, quiet=True)
    wanted = len(torch.cat([tasks.support.flatten(), tasks.query.flatten()]).unique())
    assert len(result.accuracies) == 30
    assert sum(calls) == wanted


@pytest.mark.medium
def test_images_of_an_earlier_call_keep_their_features(tiny_backbone, world, monkeypatch):
    """One and two shots of one set: the images go through the model once."""
    plain = [
        evaluate(tiny_backbone, world.data, config={"n_way": 3, "n_shot": k, "n_query": 4}).accuracy for k in (1, 2)
    ]
    calls = []
    original = type(tiny_backbone).forward
    monkeypatch.setattr(
        type(tiny_backbone),
        "forward",
        lambda self, images, **k: calls.append(len(images)) or original(self, images, **k),
    )
    images = TaskImages(world.data.images, tiny_backbone.fit)
    for n_shot, expected in zip((1, 2), plain, strict=True):
        config = {"n_way": 3, "n_shot": n_shot, "n_query": 4}
        assert evaluate(tiny_backbone, world.data, config=config, images=images).accuracy == expected
    assert sum(calls) == len(world.data)


def test_a_meta_lora_is_worn_by_methods_without_adapters(tiny_backbone, world, make_adapter):
    adapter = make_adapter(tiny_backbone, size=0.3, seed=7)
    worn = evaluate(tiny_backbone, world.data, adapter, method="tip-adapter", config=CONFIG, quiet=True)
    merged = evaluate(tiny_backbone.merge(adapter), world.data, method="tip-adapter", config=CONFIG, quiet=True)
    assert torch.equal(worn.accuracies, merged.accuracies)
    with pytest.raises(ValueError, match="`meta_lora` must be left out for method WarmStart"):
        evaluate(tiny_backbone, world.data, adapter, method="warm-start", **world.shared)


@pytest.mark.parametrize(
    ("name", "without", "message"),
    [
        ("average", "adapters", "`adapters` must hold at least 1 for method AverageNearestMean, got 0"),
        ("lora-recycle", "surrogates", "`surrogates` must hold labelled images for method LoRARecycle, got none"),
        ("caml", "surrogates", "`surrogates` must hold labelled images for method CAML"),
        ("zero-shot", "text_encoder", "`text_encoder` must be given for method ZeroShot, got none"),
        ("mole", "validation", "`validation_tasks` must be given for method Mole, got none: its learning rate"),
        ("linear-probe", "validation", "`validation_tasks` must be given for method LinearProbe"),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(name, without, message, tiny_backbone, world, monkeypatch):
    monkeypatch.setattr(type(tiny_backbone), "forward", lambda *a, **k: pytest.fail("it ran"))
    given = {**world.shared, without: () if without == "adapters" else None}
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_backbone, world.data, method=name, **given)


def test_heads_labels_and_packages_are_asked_for(tiny_backbone, world, monkeypatch, make_adapter, build_vit):
    bare = [adapter.with_head(None) for adapter in world.shared["adapters"]]
    for name in ("shrunk", "lora-recycle"):
        with pytest.raises(ValueError, match="`adapters` must have classification heads for method"):
            evaluate(tiny_backbone, world.data, method=name, **{**world.shared, "adapters": bare})
    images = world.data.images
    painted = [Surrogate(images, None, None, (), patch_size=8)]
    with pytest.raises(ValueError, match="`surrogates` must be labelled for method PMF, got 1 without labels"):
        evaluate(tiny_backbone, world.data, method="pmf", **{**world.shared, "surrogates": painted})
    monkeypatch.setattr("lorarecycle.fewshot.methods.base.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="LoRAHub needs nevergrad; `pip install nevergrad`"):
        evaluate(tiny_backbone, world.data, method="lorahub", **world.shared)
    wide = make_adapter(type(tiny_backbone)(build_vit(embed_dim=48)))
    with pytest.raises(ValueError, match="must fit backbone 'tiny'"):
        evaluate(tiny_backbone, world.data, method="average", adapters=[wide], config=CONFIG, quiet=True)


def test_unknown_names_and_settings(tiny_backbone, world):
    with pytest.raises(ValueError, match=r"`method` must be one of nn, average, peft-linear.*, got 'best'"):
        evaluate(tiny_backbone, world.data, method="best", config=CONFIG, quiet=True)
    with pytest.raises(ValueError, match=r"`rate` must be left out for method 'nn', whose settings are \['distance'\]"):
        make_method("nn", rate=0.1)
    assert make_method("lora-recycle-25").sparsity == 0.25
    assert find_method("lorahub").needs.packages == ("nevergrad",)


def test_the_registry_describes_itself():
    table = describe_methods()
    for name in METHODS:
        assert f"| `{name}` |" in table
    assert Needs(adapters=2, heads=True).words() == "2 adapters, heads"
    for entry in METHODS.values():
        assert entry.title
        assert entry.source


def test_seen_classes_are_named(tiny_backbone, world, caplog):
    adapter = world.shared["adapters"][0]
    head = type(adapter.head)(adapter.head.weight, adapter.head.bias, ("kind 0", "a", "b", "c", "d"))
    evaluate(tiny_backbone, world.data, method="average", adapters=[adapter.with_head(head)], config=CONFIG, quiet=True)
    assert "1 of 4 classes have the name of one that an adapter was tuned on (kind 0)" in caplog.text
