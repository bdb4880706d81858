"""A cell's key: whatever moves its result is in it, by content; how that is written or where it lies is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lorarecycle.config import RecycleConfig
from lorarecycle.inversion.prior import BatchNormPrior
from lorarecycle.reproduce.kinds import cell_facts
from lorarecycle.reproduce.quick import Letters, tiny_backbone
from lorarecycle.reproduce.sets import Sets
from lorarecycle.reproduce.settings import common, key_of, merge

CPU = torch.device("cpu")
SMALL = {
    "base": "tiny",
    "set": "shapes",
    "adapters": {"of": ["shapes"], "count": 2, "n_way": 3},
    "tasks": {"n_way": 3, "n_query": 3, "n_tasks": 4},
}


@pytest.fixture
def world(rehearse):
    """A rehearsal's world, which knows what it has drawn."""
    return rehearse("table7").world


def fresh(world, **changes):
    """The same world, which has read nothing yet."""
    return replace(world, _backbones={}, _priors={}, _own={}, **changes)


def key(world, *layers):
    settings = merge(common(), SMALL, *layers)
    return key_of(cell_facts(world, settings))


def write(path, *, shade=0):
    """A set of two parts, in one pixel as dark as one says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part in ("train", "test"):
        images = np.zeros((24, 8, 8, 3), np.uint8)
        images[3, 2, 1] = shade if part == "test" else 0
        labels = np.arange(24, dtype=np.int16) % 4
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
        arrays[f"{part}_classes"] = np.array([f"{part} {c}" for c in range(4)])
    np.savez(path, **arrays)


def test_content_of_sets(world, tmp_path):
    """One pixel of a test image moves the key; another place of the same images does not."""

    def at(place, **facts):
        return key(replace(world, open=Sets(tmp_path, {"shapes": {"path": place, **facts}}).open), {"method": "nn"})

    write(tmp_path / "a.npz")
    write(tmp_path / "moved" / "b.npz")
    first = at("a.npz")
    assert at("moved/b.npz") == first
    assert at("a.npz", train="train", test="train") != first, "another part under the same name"
    write(tmp_path / "a.npz", shade=1)
    assert at("a.npz") != first


def test_the_recipe_of_the_default_preset(world, monkeypatch):
    """Cells of an earlier version's default are not taken for today's."""
    recycled, plain = {"method": "recycle-weights"}, {"method": "nn"}
    before = [key(world, recycled), key(world, plain)]
    default = RecycleConfig.weights()
    other = replace(default, inversion=replace(default.inversion, pictures=7))
    monkeypatch.setattr(RecycleConfig, "weights", classmethod(lambda cls: other))
    after = [key(world, recycled), key(world, plain)]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_content_of_networks_and_encoders(world):
    def other_model(base, weights=None):
        model = tiny_backbone(base, device=CPU)
        model.vit.blocks[0].mlp.fc1.weight.data[0, 0] += 1
        return model

    def other_prior(config):
        return BatchNormPrior(nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)))

    class Other(Letters):
        def digest(self):
            return "other letters"

    recycled, plain, words = {"method": "lora-recycle"}, {"method": "nn"}, {"method": "zero-shot"}
    for change, moved, unmoved in (
        ({"load": other_model}, (recycled, plain, words), ()),
        ({"load_prior": other_prior}, (recycled,), (plain, words)),
        ({"text_encoder": Other()}, (words,), (plain, recycled)),
    ):
        changed = fresh(world, **change)
        assert all(key(changed, layer) != key(world, layer) for layer in moved)
        assert all(key(changed, layer) == key(world, layer) for layer in unmoved)


def test_models_of_equal_weights_and_other_names(world):
    """CLIP with GELU and with QuickGELU: one set of weights, two models."""
    models = fresh(world, load=lambda base, weights: tiny_backbone("tiny", device=CPU), _models={})
    one, other = ({"base": base, "method": "nn"} for base in ("clip", "clip_quickgelu"))
    assert key(models, one) != key(models, other)
    settings = [merge(common(), SMALL, layer) for layer in (one, other)]
    assert models.model(settings[0]) is models.model(settings[0])
    assert models.model(settings[0]) is not models.model(settings[1])


def test_a_text_encoder_is_read_once(world):
    """Its weights are hundreds of megabytes, and every cell asks for their digest."""

    class Counted(Letters):
        read = 0

        def digest(self):
            self.read += 1
            return f"letters {id(self)}"

    first, second = Counted(), Counted()
    words, other = fresh(world, text_encoder=first), {"method": "zero-shot", "seed": 1}
    keys = {key(words, {"method": "zero-shot"}), key(words, other)}
    keys |= {key(replace(words, text_encoder=second), other)}
    assert len(keys) == 3
    assert (first.read, second.read) == (1, 1)


@pytest.mark.parametrize(
    ("method", "layer", "moves"),
    [
        ("data", {"tune": {"epochs": 3}}, False),
        ("plain", {"r": 4}, False),
        ("plain", {"per_class": 7}, True),
        ("original", {"r": 4}, True),
        ("original", {"tune": {"epochs": 10}}, False),  # the default, written out
        ("original", {"samples": 3}, False),
        ("soup", {"tune": {"epochs": 3}}, True),
        ("soup", {"samples": 3}, True),
    ],
)
def test_generated_adapters_hang_on_what_they_read(method, layer, moves, world):
    below = {"kind": "generation", "generator": {"method": method, "per_class": 6}}
    assert (key(world, below) != key(world, below, {"generator": layer})) is moves


def test_the_order_of_texts_moves_the_key(world):
    """Steps of training draw a text by its number."""
    one, other = (
        {"kind": "language", "language": {"method": "plain", "texts": texts}} for texts in (["a", "b"], ["b", "a"])
    )
    assert key(world, one) != key(world, other)


def test_content_of_adapters_in_a_folder(world, tmp_path, make_adapter):
    backbone = tiny_backbone("tiny", device=CPU)
    own = {"adapters": {"folder": str(tmp_path / "own")}, "method": "average"}
    make_adapter(backbone, seed=0).save(tmp_path / "own" / "a")
    first = key(fresh(world), own)
    assert key(fresh(world), own) == first
    make_adapter(backbone, seed=1).save(tmp_path / "own" / "b")
    more = key(fresh(world), own)
    make_adapter(backbone, seed=2).save(tmp_path / "other" / "b")
    (tmp_path / "own" / "b").rename(tmp_path / "gone")
    (tmp_path / "other" / "b").rename(tmp_path / "own" / "b")
    assert len({first, more, key(fresh(world), own)}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"method": "lora-recycle-75"}, {"surrogates": {"inversion": {"prior_weight": 0.01}}}),
        ({"meta": {"n_shot": 1}}, {}),
        ({"tasks": {"n_query": 3}}, {}),
        ({"surrogates": {"head": "own"}}, {}),
        ({"adapters": {"tune": {"epochs": 10}}}, {}),
        ({"method": "linear-probe", "options": {"rate": 0.1}}, {"method": "linear-probe", "options": {"rate": 1e-1}}),
        ({"method": "nn"}, {"meta": {"steps": 7}, "surrogates": {"images": "real"}, "adapters": {"count": 9}}),
        ({"method": "lora-recycle", "meta": {"sparsity": 0.5}}, {"method": "lora-recycle-50"}),
    ],
)
def test_settings_that_are_equal_have_one_key(one, other, world):
    method = {"method": one.get("method", "lora-recycle")}
    assert key(world, method, one) == key(world, method, other)


@pytest.mark.parametrize(
    ("layer", "method"),
    [
        ({"seed": 1}, "caml"),
        ({"options": {"steps": 9}}, "caml"),
        ({"tasks": {"n_tasks": 5}}, "nn"),
        ({"tasks": {"n_tuned": 2}}, "full"),
        ({"tasks": {"n_validation_tasks": 3}}, "full"),
        ({"adapters": {"count": 3}}, "average"),
        ({"adapters": {"ranks": [8]}}, "average"),
        ({"surrogates": {"inversion": {"steps": 9}}}, "caml"),
        ({"surrogates": {"images": "real"}}, "caml"),
        ({"surrogates": {"mask": "first-layer"}}, "lora-recycle"),
        ({"learn": "joint"}, "lora-recycle"),
        ({"meta": {"steps": 9}}, "lora-recycle"),
    ],
)
def test_settings_that_are_read_move_the_key(layer, method, world):
    assert key(world, {"method": method}) != key(world, {"method": method}, layer)


def test_weights_belong_to_their_base():
    below = {"base": "a", "weights": "a.safetensors"}
    assert merge(below, {"base": "b"}) == {"base": "b"}
    assert merge(below, {"base": "b"}, {"weights": "b.safetensors"}) == {"base": "b", "weights": "b.safetensors"}
    assert merge(below, {"base": "a"}) == below


def test_first_adapters_of_many_are_those_of_few(world):
    """So that a figure of two adapters shares them with a table of a hundred, and makes no others."""
    many = merge(common(), SMALL, {"adapters": {"count": 9}, "kind": "pictures"})
    few = merge(many, {"adapters": {"count": 2}})
    assert world.class_lists(many, 2) == world.class_lists(few, 2) == world.class_lists(many, 9)[:2]
    assert world.adapter_facts(many) == world.adapter_facts(few)
    assert world.surrogate_facts(many) == world.surrogate_facts(few)
    assert key(world, many) == key(world, few)
