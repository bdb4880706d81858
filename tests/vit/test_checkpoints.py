"""transformers checkpoints as timm ViTs: the same tokens, under every name that transformers has used."""

import json

import pytest
import torch

from lorarecycle import Backbone
from lorarecycle.runtime.files import save_tensors
from lorarecycle.vit.checkpoint_facts import read_config
from lorarecycle.vit.checkpoints import build_vit, convert_state_dict, find_family, load_vit
from lorarecycle.vit.sources import _fill

transformers = pytest.importorskip("transformers", reason="compares with transformers' own models")

SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
KINDS = {
    "vit": ("ViTConfig", "ViTModel", {"intermediate_size": 48}),
    "vit without qkv bias": ("ViTConfig", "ViTModel", {"intermediate_size": 48, "qkv_bias": False}),
    "deit": ("DeiTConfig", "DeiTModel", {"intermediate_size": 48}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2}),
    "dinov2 with SwiGLU": ("Dinov2Config", "Dinov2Model", {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2 with registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {"intermediate_size": 48}),
}
NAMES_4 = {  # inside a block: transformers 5 -> transformers 4
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def make(kind):
    config_class, model_class, extra = KINDS[kind]
    config = getattr(transformers, config_class)(**SHAPE, **extra)
    return randomised(getattr(transformers, model_class)(config))


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def class_feature(model, images):
    output = model(images)
    clip = type(model).__name__.startswith("CLIP")
    return output.pooler_output if clip else output.last_hidden_state[:, 0]


def timm_feature(vit, images):
    return vit.forward_features(images)[:, 0]


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_same_feature_from_the_model_and_from_its_directory(kind, images, tmp_path):
    model = make(kind)
    expected = class_feature(model, images)
    model.save_pretrained(tmp_path)  # transformers 5 writes most of its files under the names of transformers 4
    facts = read_config(tmp_path)
    torch.testing.assert_close(timm_feature(build_vit(model.state_dict(), facts), images), expected)
    vit, facts = load_vit(tmp_path)
    torch.testing.assert_close(timm_feature(vit, images), expected)
    assert (facts["width"], facts["depth"], facts["num_heads"], facts["patch_size"]) == (24, 2, 3, 8)


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov2 with registers"])
@torch.no_grad()
def test_every_token_is_the_same(kind, images):
    model = make(kind)
    vit = build_vit(model.state_dict(), facts_of(model))
    torch.testing.assert_close(vit.forward_features(images), model(images).last_hidden_state)


@torch.no_grad()
def test_clip_patch_tokens_before_the_last_norm(images):
    model = make("clip")
    vit = build_vit(model.state_dict(), facts_of(model))
    vit.norm = torch.nn.Identity()
    torch.testing.assert_close(vit.forward_features(images), model(images).last_hidden_state)


def test_what_is_left_out_of_a_file_may_be_of_any_kind(images):
    model = make("clip")
    state = {**model.state_dict(), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    vit = build_vit(model.state_dict(), facts_of(model))
    _fill(vit, state, "a file of transformers 4")
    torch.testing.assert_close(timm_feature(vit, images), class_feature(model, images))


def facts_of(model):
    config = model.config
    return {
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": config.hidden_act,
        "num_heads": config.num_attention_heads,
    }


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov2 with registers"])
@pytest.mark.parametrize("prefix", ["", "vit.", "some.wrapper."])
def test_names_of_transformers_4_convert_the_same(kind, prefix):
    new = make(kind).state_dict()
    old = {}
    for key, tensor in new.items():
        for five, four in NAMES_4.items():
            key = key.replace(five, four)
        if kind in ("vit", "deit"):
            key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
            key = key.replace("layers.", "encoder.layer.") if key.startswith("layers.") else key
        old[prefix + key] = tensor
    expected, found = convert_state_dict(new), convert_state_dict(old)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("vit", "vit"),
        ("deit", "deit"),
        ("dinov2", "dinov2"),
        ("dinov2 with registers", "dinov2"),
        ("clip", "clip"),
    ],
)
def test_family(kind, family):
    assert find_family(make(kind).state_dict()) == family


@torch.no_grad()
def test_heads_text_tower_and_projections_are_left_out(images):
    vision = {**SHAPE, "intermediate_size": 48}
    text = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    clip = randomised(transformers.CLIPModel(config))
    vit = build_vit(clip.state_dict(), facts_of(clip.vision_model))
    expected = clip.vision_model(images).pooler_output
    torch.testing.assert_close(timm_feature(vit, images), expected)
    classifier = randomised(transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE, num_labels=5)))
    assert not any("classifier" in key or "head" in key for key in convert_state_dict(classifier.state_dict()))


def test_timm_weights_are_left_alone():
    from timm.models.vision_transformer import VisionTransformer

    state = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3).state_dict()
    assert find_family(state) == "timm"
    assert convert_state_dict(state).keys() == state.keys()
    with pytest.raises(ValueError, match=r"timm's key names; give the timm architecture"):
        build_vit(state)


@torch.no_grad()
def test_sharded_checkpoint(images, tmp_path):
    model = make("vit")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(timm_feature(load_vit(tmp_path)[0], images), class_feature(model, images))


@torch.no_grad()
def test_bare_file_takes_the_configuration_beside_it(images, tmp_path):
    model = make("clip")
    model.save_pretrained(tmp_path)
    vit, _ = load_vit(tmp_path / "model.safetensors")
    torch.testing.assert_close(timm_feature(vit, images), class_feature(model, images))


def test_half_precision_weights_load_as_float32(tmp_path):
    make("vit").half().save_pretrained(tmp_path)
    assert load_vit(tmp_path)[0].cls_token.dtype == torch.float32


def test_normalisation_and_clip_configuration(tmp_path):
    vision = {"hidden_size": 24, "num_attention_heads": 3, "layer_norm_eps": 1e-3}
    config = {"model_type": "clip", "vision_config": vision, "text_config": {"hidden_size": 7}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    facts = read_config(tmp_path)
    assert facts["mean"] == (0.1, 0.2, 0.3)
    assert facts["std"] == (1.0, 1.0, 1.0)
    assert (facts["width"], facts["num_heads"], facts["layer_norm_eps"]) == (24, 3, 1e-3)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert read_config(tmp_path)["mean"] == (0.0, 0.0, 0.0)


def test_without_configuration_the_family_decides(caplog, tmp_path):
    state = make("clip").state_dict()
    save_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(ValueError, match=r"`num_heads` must be given and divide the width 24"):
        load_vit(tmp_path)
    assert "has no config.json" in caplog.text
    vit = build_vit(state, {"num_heads": 3})
    assert vit.norm.eps == 1e-5
    assert type(vit.blocks[0].mlp.act).__name__ == "QuickGELU"


def without_a_key(state):
    lost = next(key for key in state if "1" in key and key.endswith(("k_proj.weight", "key.weight")))
    return {key: value for key, value in state.items() if key != lost}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda state: {"layer1.0.conv1.weight": torch.zeros(1)},
            r"must be of a timm ViT or of transformers' ViT",
            id="a ResNet",
        ),
        pytest.param(
            lambda state: {**state, "layers.0.attention.relative_position_bias.table": torch.zeros(1)},
            r"relative_position_bias",
            id="relative positions",
        ),
        pytest.param(without_a_key, r"must hold .*attn.k.* together", id="no keys in one block"),
    ],
)
def test_other_architectures_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(change(make("vit").state_dict()))


@pytest.mark.parametrize(
    ("tensors", "facts", "message"),
    [
        ({}, {"num_heads": 5}, r"`num_heads` must be given and divide"),
        ({}, {"num_heads": 3, "hidden_act": "mystery"}, r"`hidden_act` must be one of"),
        (
            {"embeddings.position_embeddings": torch.zeros(1, 16, 24)},
            {"num_heads": 3, "image_size": 32},
            r"`image_size` must fit 15 positions",
        ),
    ],
    ids=["heads", "activation", "positions"],
)
def test_facts_that_do_not_fit_are_refused(tensors, facts, message):
    with pytest.raises(ValueError, match=message):
        build_vit({**make("vit").state_dict(), **tensors}, facts)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors"):
        load_vit(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"must be safetensors, got only the pickle file pytorch_model.bin"):
        load_vit(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match=r"must map tensors to files beside it"):
        load_vit(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"must be a whole safetensors file"):
        load_vit(tmp_path)


@pytest.mark.parametrize("base", ["demo", "folder", "vit.safetensors"])
def test_weights_beside_a_model_that_has_its_own_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=rf"`weights` must come with a `base` that names .*, got '{base}', which has"):
        Backbone.load(base, weights="mine.safetensors")
