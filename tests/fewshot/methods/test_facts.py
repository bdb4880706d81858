"""Facts that each method must reproduce: an adapter with weight 1, a saturated gate, classifiers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from lorarecycle.adapters.adapter import Head
from lorarecycle.data.images import normalize
from lorarecycle.fewshot.images import TaskImages
from lorarecycle.fewshot.methods import zero_shot
from lorarecycle.fewshot.methods.average import average, average_factors
from lorarecycle.fewshot.methods.base import Given, Task, accuracy
from lorarecycle.fewshot.methods.caml import CAML
from lorarecycle.fewshot.methods.episodes import EpisodeDraw, pool_classes
from lorarecycle.fewshot.methods.lorahub import LoRAHub, LoRAHubNearestMean, WeightedSum
from lorarecycle.fewshot.methods.mole import Gated
from lorarecycle.fewshot.methods.nearest import NearestMean
from lorarecycle.fewshot.methods.registry import make_method
from lorarecycle.fewshot.methods.shrunk import ShrunkMean
from lorarecycle.fewshot.methods.text import Names, words
from lorarecycle.fewshot.methods.tuned import Trainable, augmented
from lorarecycle.fewshot.methods.zero_shot import Episodes, ZeroShotRecycle, text_head
from lorarecycle.inversion.surrogate import Surrogate
from lorarecycle.meta.prototypes import class_centres, distance_logits
from lorarecycle.meta.train import learning_rate

SITES = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture
def images(tiny_data):
    return normalize(tiny_data.images[:4], (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    return [make_adapter(tiny_backbone, seed=0, sites=SITES), make_adapter(tiny_backbone, seed=1, r=3)]


@pytest.fixture
def task(tiny_data):
    support = torch.tensor([0, 12, 24])
    query = torch.tensor([5, 6, 17, 18, 29, 30])
    return Task(TaskImages(tiny_data.images, 32), support, torch.arange(3), query, ("a", "b", "c"))


def test_lorahub_with_one_weight_of_1_is_that_adapter(tiny_backbone, adapters, images):
    worn = WeightedSum(tiny_backbone, adapters)
    for i, adapter in enumerate(adapters):
        worn.set(F.one_hot(torch.tensor(i), 2).float())
        torch.testing.assert_close(worn.forward(images), tiny_backbone.merge(adapter)(images), rtol=1e-4, atol=1e-4)
    worn.set(torch.zeros(2))
    torch.testing.assert_close(worn.forward(images), tiny_backbone(images), rtol=0, atol=0)
    worn.set(torch.full((2,), 0.5))
    both = tiny_backbone.merge(average(adapters))(images)
    torch.testing.assert_close(worn.forward(images), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("distance", ["euclidean", "centred_cosine"])
def test_lorahub_nn_answers_by_its_distance(tiny_backbone, adapters, task, monkeypatch, distance):
    method = LoRAHubNearestMean(distance=distance).prepare(tiny_backbone, adapters)
    monkeypatch.setattr(method, "find_weights", lambda task: torch.zeros(2))
    nearest = NearestMean(distance=distance).prepare(tiny_backbone)
    torch.testing.assert_close(method.solve(task), nearest.solve(task))


@pytest.mark.medium
def test_lorahub_finds_weights_that_are_better_than_none(tiny_backbone, adapters, task):
    pytest.importorskip("nevergrad")
    method = LoRAHub(budget=12).prepare(tiny_backbone, adapters)
    weights = method.find_weights(task)
    assert weights.shape == (2,)
    assert weights.abs().max() <= 1.5
    assert torch.equal(weights, method.find_weights(task))
    assert torch.equal(
        LoRAHub(budget=12, penalty=1e6).prepare(tiny_backbone, adapters).find_weights(task), torch.zeros(2)
    )


def test_a_saturated_gate_is_the_chosen_adapter(tiny_backbone, adapters, images):
    gated = Gated(tiny_backbone, adapters)
    even = gated.model(images)
    torch.testing.assert_close(even, tiny_backbone.merge(average(adapters))(images), rtol=1e-4, atol=1e-4)
    for i, adapter in enumerate(adapters):
        for bias in gated.biases.values():
            bias.data.copy_(100 * F.one_hot(torch.tensor(i), 2).float())
        torch.testing.assert_close(gated.model(images), tiny_backbone.merge(adapter)(images), rtol=1e-4, atol=1e-4)
    gated.reset()
    assert torch.equal(gated.model(images), even)
    gated.model(images).square().sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in gated.weights.values())


def test_the_average_re_factored_is_the_average_where_the_rank_suffices(tiny_backbone, adapters):
    whole, cut = average(adapters), average_factors(adapters, tiny_backbone, 5).to_adapter(name="a", like=tiny_backbone)
    assert set(cut.sites) == set(whole.sites)
    for site in whole.sites:
        torch.testing.assert_close(cut.delta(site), whole.delta(site), rtol=1e-4, atol=1e-4)


def test_every_rank_of_the_average_can_learn(tiny_backbone, make_adapter):
    """Also those that one adapter of a lower rank leaves open."""
    lora = average_factors([make_adapter(tiny_backbone, r=2)], tiny_backbone, 5)
    features = tiny_backbone(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), lora=lora)
    features.square().sum().backward()
    for weight in lora.lora_B.values():
        assert (weight.grad.abs().amax(dim=0) > 0).all()


@pytest.mark.parametrize(("steps", "peak"), [(20, 5), (40, 10)])
def test_a_short_zero_shot_training_has_one_whole_cycle(tiny_backbone, make_adapter, monkeypatch, steps, peak):
    method, rates = ZeroShotRecycle(steps=steps), []

    def rate(step, meta, lr):
        rates.append(learning_rate(step, meta, lr))
        return 0.0

    monkeypatch.setattr(zero_shot, "learning_rate", rate)
    given = Given(tiny_backbone, [make_adapter(tiny_backbone)], (), (), None)
    method._learn(given, lambda step, encode: encode(torch.zeros(1, 3, 32, 32)).sum())
    assert len(rates) == steps
    assert rates.index(max(rates)) == peak
    assert rates[-1] < max(rates) / 10


@pytest.mark.slow
def test_caml_comes_within_2_points_of_a_nearest_mean_that_solves_the_task():
    generator = torch.Generator().manual_seed(0)

    def clusters(classes: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(classes).repeat_interleave(each)
        return 3 * torch.randn(classes, 16, generator=generator)[labels] + torch.randn(
            len(labels), 16, generator=generator
        ), labels

    model = CAML(steps=300, batch=8, hidden=64, layers=2, learning_rate=2e-3).train(*clusters(64, 12))
    features, labels = clusters(40, 12)
    draw = EpisodeDraw(labels, 5, 5, 5)
    right = {"caml": 0, "nearest": 0}
    for step in range(60):
        support, known, query, truth = draw(torch.Generator().manual_seed(step))
        nearest = distance_logits(features[query], class_centres(features[support], known, 5))
        logits = model(features[support], known, features[query])
        right["caml"] += int((logits.argmax(-1) == truth).sum())
        right["nearest"] += int((nearest.argmax(-1) == truth).sum())
        if step == 0:  # the order of the support and of the classes' codes is no matter to what is asked alone
            order = torch.randperm(25, generator=generator)
            again = model(features[support][order], known[order], features[query][:3])
            torch.testing.assert_close(again, logits[:3], rtol=1e-3, atol=1e-3)
    assert right["nearest"] > 0.97 * 60 * 25
    assert right["caml"] >= right["nearest"] - 0.02 * 60 * 25


def test_the_cache_with_one_shot_is_the_nearest_cosine(tiny_backbone, task):
    logits = make_method("tip-adapter").prepare(tiny_backbone).solve(task)
    support, query = task.features(tiny_backbone)
    centre = support.mean(dim=0)
    cosine = F.cosine_similarity((query - centre)[:, None], (support - centre)[None], dim=-1)
    torch.testing.assert_close(logits, -5.5 * (1 - cosine), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tip-adapter", "laplacian-shot"])
def test_methods_with_a_distance_of_their_own_take_none(name):
    with pytest.raises(ValueError, match="distance"):
        make_method(name, distance="euclidean")


def test_neighbours_outvote_a_query_that_stands_between(monkeypatch, tiny_backbone):
    support = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    query = torch.tensor([[0.5, 0.52], [0.62, 0.5], [0.63, 0.5], [0.64, 0.5]])
    monkeypatch.setattr(Task, "features", lambda self, backbone, pool="pooled": (support, query))
    task = Task(
        TaskImages(torch.zeros(6, 3, 32, 32, dtype=torch.uint8), 32),
        torch.arange(2),
        torch.arange(2),
        torch.arange(2, 6),
        ("a", "b"),
    )
    alone = make_method("laplacian-shot", weight=0.0).prepare(tiny_backbone).solve(task)
    together = make_method("laplacian-shot", weight=5.0).prepare(tiny_backbone).solve(task)
    assert alone.argmax(dim=-1).tolist() == [1, 0, 0, 0]
    assert together.argmax(dim=-1).tolist() == [0, 0, 0, 0]


def test_shrinking_follows_its_formula(tiny_backbone, make_adapter, task):
    adapter = make_adapter(tiny_backbone, n_classes=5)
    none = ShrunkMean(strength=0.0).prepare(tiny_backbone, [adapter])
    warm = make_method("warm-start").prepare(tiny_backbone, [adapter])
    torch.testing.assert_close(none.solve(task), warm.solve(task), rtol=1e-4, atol=1e-4)
    method = ShrunkMean(strength=1.0, neighbours=1).prepare(tiny_backbone, [adapter])
    support, query = task.features(method.encoder)
    centre = support.mean(dim=0)
    rows = F.normalize(adapter.head.weight - adapter.head.weight.mean(dim=0), dim=-1)
    expected = []
    for p in support - centre:
        best = rows[int(F.cosine_similarity(p, rows, dim=-1).argmax())]
        expected.append(centre + 0.5 * p + 0.5 * p.norm() * best)
    torch.testing.assert_close(method.solve(task), -torch.cdist(query, torch.stack(expected)), rtol=1e-3, atol=1e-3)
    narrow = adapter.with_head(Head(torch.randn(3, 64), pool="token+mean"))
    with pytest.raises(ValueError, match="must have heads that read the 32 features"):
        ShrunkMean().prepare(tiny_backbone, [narrow])


def test_the_probe_of_many_tasks_is_that_of_each(tiny_backbone, task):
    other = Task(task.images, task.support.flip(0), task.support_labels, task.query, task.class_names)
    method = make_method("linear-probe", rate=0.01).prepare(tiny_backbone)
    together = list(method.solve_all([task, other]))
    for one, logits in zip((task, other), together, strict=True):
        torch.testing.assert_close(method.solve(one), logits, rtol=1e-4, atol=1e-4)
    assert together[0].argmax(dim=-1).tolist() == [0, 0, 1, 1, 2, 2]


def test_the_learning_rate_is_the_best_on_validation_tasks(tiny_backbone, task):
    truth = Task(
        *(getattr(task, key) for key in ("images", "support", "support_labels", "query", "class_names")),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    method = make_method("linear-probe", rates=(1e-9, 0.01)).prepare(tiny_backbone, validation_tasks=[truth])
    assert set(method.validation_accuracy) == {1e-9, 0.01}
    assert method.validation_accuracy[method.chosen] == max(method.validation_accuracy.values())
    assert accuracy(method.solve_all, [truth]).item() == method.validation_accuracy[method.chosen]
    with pytest.raises(ValueError, match="`validation_tasks` must know their `query_labels`"):
        make_method("linear-probe").prepare(tiny_backbone, validation_tasks=[task])


def test_trainable_weights_come_back(tiny_backbone, images):
    trainable = Trainable(tiny_backbone)
    before = trainable(images).detach()
    for parameter in trainable.model.parameters():
        parameter.data.add_(0.1)
    assert (trainable(images) - before).abs().max() > 0.01
    trainable.reset()
    assert torch.equal(trainable(images), before)
    assert not any(parameter.requires_grad for parameter in tiny_backbone.parameters())


def test_augmented_views(images):
    views = augmented(images, torch.Generator().manual_seed(0))
    assert views.shape == images.shape
    assert torch.equal(views, augmented(images, torch.Generator().manual_seed(0)))
    whole = augmented(images, torch.Generator().manual_seed(0), smallest=1.0)
    for image, view in zip(images, whole, strict=True):
        same = [torch.allclose(view, each, atol=1e-4) for each in (image, image.flip(-1))]
        assert any(same), "without crops a view is the image or its mirror image"


def test_classes_of_one_name_are_one(tiny_data):
    def surrogate(names):
        return Surrogate(tiny_data.images, tiny_data.labels, None, names, patch_size=8)

    for number in ("0", "LABEL_0"):
        pool = pool_classes([surrogate(("a", "b", "c", number)), surrogate(("b", "d", "e", number))])
        assert len(pool) == 96
        assert pool.labels[[0, 12, 24, 36, 48, 60, 72, 84]].tolist() == [0, 1, 2, 3, 1, 4, 5, 6]
        assert pool.class_names[1:4] == ("b", "c", f"{number} of adapter 0")
    with pytest.raises(ValueError, match="`surrogates` must hold 8 classes of at least 2 images, got 7"):
        EpisodeDraw(pool.labels, 8, 1, 5)


def test_clip_text_gives_what_clip_gives(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    from lorarecycle.fewshot.methods.text import ClipText, ZeroShot
    from lorarecycle.vit.backbone import Backbone

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**vision, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49, "bos_token_id": 48}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
    model.vision_model.save_pretrained(tmp_path / "vision")

    class Letters(dict):
        def to(self, device):
            return self

    def tokenizer(texts, padding, return_tensors):
        rows = [[48, *(ord(c) % 40 for c in text[:10]), 49] for text in texts]
        ids = torch.tensor([row + [49] * (12 - len(row)) for row in rows])
        return Letters(input_ids=ids, attention_mask=torch.ones_like(ids))

    clip, names = ClipText(model, tokenizer, template="{}"), ("owl", "red fox", "ant")
    many = [f"{i:03d}.bird_{i}" for i in range(70)]
    sizes = []
    monkeypatch.setattr(clip, "tokenizer", lambda texts, **k: sizes.append(len(texts)) or tokenizer(texts, **k))
    torch.testing.assert_close(clip.encode(many)[-1:], clip.encode(["bird 69"]))
    assert sizes == [64, 6, 1]
    assert clip.digest() == ClipText(model, tokenizer, template="{}").digest() != ClipText(model, tokenizer).digest()
    backbone = Backbone.load(model.vision_model)
    pixels = torch.randint(0, 256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    task = Task(TaskImages(pixels, 32), torch.arange(3), torch.arange(3), torch.arange(5), names)
    logits = ZeroShot().prepare(backbone, text_encoder=clip).solve(task)
    tokens = tokenizer(names, True, "pt")
    with torch.no_grad():
        expected = model(pixel_values=normalize(pixels, backbone.mean, backbone.std), **tokens).logits_per_image
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert math.isclose(clip.scale, float(model.logit_scale.exp()), rel_tol=1e-6)


class Space:
    """A text encoder whose names are directions of a space of 8, into which features are projected linearly."""

    scale = 5.0

    def __init__(self, names, width):
        generator = torch.Generator().manual_seed(0)
        self.known = {name: F.normalize(torch.randn(8, generator=generator), dim=0) for name in names}
        self.matrix, self.offset = (
            torch.randn(width, 8, generator=generator),
            torch.randn(8, generator=generator),
        )

    def encode(self, class_names):
        return torch.stack([self.known[name] for name in class_names])

    def project(self, features):
        return features @ self.matrix + self.offset


def test_a_text_head_is_the_projection_before_normalisation():
    space = Space(["cat", "dog", "fox"], 16)
    features = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    head = text_head(space, ("dog", "cat"), 16)
    expected = space.scale * space.project(features) @ space.encode(["dog", "cat"]).T / 4
    torch.testing.assert_close(head(features), expected, atol=1e-4, rtol=1e-4)
    assert head.class_names == ("dog", "cat")
    logits = Names(space).logits(features, ["dog", "cat"])
    assert logits.abs().max() <= space.scale
    assert torch.equal(logits.argmax(1), head(features).argmax(1)), "normalising moves no winner"
    space.project = lambda features: features.square()[:, :8]
    with pytest.raises(ValueError, match="must project image features by a matrix"):
        text_head(space, ("dog",), 16)


def test_zero_shot_recycle_learns_what_names_mean(tiny_backbone, make_data, make_adapter):
    """Names that mean nothing to the model beforehand: episodes of surrogates teach the meta-LoRA their directions."""
    data = make_data(n_classes=4, per_class=12)
    space = Space(data.class_names, tiny_backbone.embed_dim)
    surrogate = Surrogate(data.images, data.labels, None, data.class_names, patch_size=8)
    task = Task(
        TaskImages(data.images, 32),
        torch.tensor([0, 12, 24, 36]),
        torch.arange(4),
        torch.arange(48),
        data.class_names,
        data.labels,
    )
    adapters, found = [make_adapter(tiny_backbone)], {}
    for name, settings in (("zero-shot", {}), ("zero-shot-recycle", {"steps": 60, "n_way": 4, "n_query": 6})):
        method = make_method(name, **settings).prepare(tiny_backbone, adapters, [surrogate], None, space)
        found[name] = (method.solve(task).argmax(1) == data.labels).float().mean().item()
    assert found["zero-shot-recycle"] > max(0.6, found["zero-shot"] + 0.1)


def test_class_names_are_read_as_words():
    assert words("001.Black_footed_Albatross") == "Black footed Albatross"
    assert words("Tomato___Leaf_Mold") == "Tomato Leaf Mold"
    assert words("7") == "7"
    assert words("St. Bernard") == "St. Bernard"


def test_names_are_encoded_once(tiny_backbone, make_data, make_adapter):
    """And LoRAHub's weights are judged on several episodes, not on the classes of one."""
    pytest.importorskip("nevergrad")
    data = make_data(n_classes=6, per_class=4)
    space = Space(data.class_names, tiny_backbone.embed_dim)
    asked, encode = [], space.encode
    space.encode = lambda names: asked.extend(names) or encode(names)
    surrogate = Surrogate(data.images, data.labels, None, data.class_names, patch_size=8)
    method = make_method("zero-shot-lorahub", budget=2, episodes=3, n_way=2, n_query=2)
    steps, solved = [], Episodes.__call__

    def watched(self, step, encode):
        steps.append(step)
        return solved(self, step, encode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Episodes, "__call__", watched)
        method.prepare(tiny_backbone, [make_adapter(tiny_backbone)], [surrogate], None, space)
    assert steps == [0, 1, 2, 0, 1, 2]
    task = Task(TaskImages(data.images, 32), torch.arange(2), torch.arange(2), torch.arange(4), data.class_names[:2])
    method.solve(task)
    assert sorted(asked) == sorted(data.class_names)
