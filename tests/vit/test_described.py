"""Bases as people have them: pooling, channels, shapes, timm folders and processors are what the files say."""

import json

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from lorarecycle import Adapter, Backbone, FewShotClassifier
from lorarecycle.adapters.adapter import Head
from lorarecycle.data.images import Fit
from lorarecycle.data.processor import read_processor
from lorarecycle.runtime.files import load_tensors, save_tensors


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def forward_head(vit, images):
    return vit.forward_head(vit.forward_features(images), pre_logits=True)


# --- pooling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True},
        {"global_pool": "token"},
        {"global_pool": "token", "fc_norm": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_features_are_what_timm_pools(build_vit, images, options):
    vit = build_vit(**options)
    backbone = Backbone.load(vit)
    assert backbone.own_pool == options["global_pool"]
    torch.testing.assert_close(backbone(images), forward_head(vit, images), rtol=0, atol=1e-5)
    other = "token" if options["global_pool"] == "avg" else "avg"
    assert (backbone(images, pool=other) - backbone(images)).abs().max() > 1e-2


def test_average_pooling_end_to_end(build_vit, images, make_adapter, tiny_data, tmp_path):
    from lorarecycle import recycle, tune

    backbone = Backbone.load(build_vit(global_pool="avg"))
    tuned = tune(backbone, tiny_data, config={"epochs": 1, "batch_size": 16}, quiet=True)
    assert tuned.head.pool == "avg"
    tuned.save(tmp_path / "tuned")
    assert Adapter.load(tmp_path / "tuned").digest() == tuned.digest()
    adapters = [make_adapter(backbone, seed=i, size=0.1) for i in range(3)]
    meta = recycle(adapters, base=backbone, inversion={"pictures": 6}, meta={"steps": 2, "n_way": 2}, quiet=True)
    fitted = FewShotClassifier(backbone, meta).fit(tiny_data.images, tiny_data.labels)
    pixels = (images.clamp(0, 1) * 255).byte()
    prepared = (pixels.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = forward_head(backbone.merge(meta).vit, prepared)
    torch.testing.assert_close(torch.from_numpy(fitted.transform(pixels)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "max"}, r"pool by class token, by the mean .*got global_pool='max'; choose"),
        ({"global_pool": "avg", "pool_include_prefix": True}, r"global_pool='avg' with pool_include_prefix"),
        ({"in_chans": 4}, r"colour or grey images, 3 channels or 1, got in_chans=4; .*in_chans=3"),
        ({"in_chans": 2}, r"got in_chans=2"),
        ({"img_size": (32, 64)}, r"images that are not square, got 32 x 64: .*image_size=32"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_at_load(build_vit, options, message):
    with pytest.raises(ValueError, match=message):
        Backbone.load(build_vit(**options))


def test_the_advice_on_channels_and_shapes(build_vit):
    Backbone.load(build_vit(in_chans=3))
    backbone = Backbone.load(build_vit(img_size=(32, 64)), image_size=32)
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 32)
    assert Backbone.load(build_vit(img_size=(64, 64))).image_size == 64


@pytest.mark.medium
def test_wide_checkpoints_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=[32, 64], patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not square, got 32 x 64"):
        Backbone.load(tmp_path)
    assert Backbone.load(tmp_path, image_size=64).image_size == 64


# --- channels --------------------------------------------------------------------------------------


@torch.no_grad()
def test_models_that_read_grey(build_vit):
    vit = build_vit(in_chans=1)
    backbone = Backbone.load(vit, mean=0.4, std=(0.25,))
    assert (backbone.mean, backbone.std) == ((0.4,) * 3, (0.25,) * 3)
    assert vit.patch_embed.proj.in_channels == 1, "the module is left as it is"
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(backbone(grey.expand(-1, 3, -1, -1)), forward_head(vit, grey), rtol=0, atol=1e-5)
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1
    expected = forward_head(vit, 0.299 * torch.ones(1, 1, 32, 32))  # Pillow's "L"
    torch.testing.assert_close(backbone(red), expected, rtol=0, atol=1e-5)
    classifier = FewShotClassifier(backbone).fit([Image.new("L", (32, 32), c) for c in (10, 200)], ["dark", "light"])
    assert list(classifier.predict([Image.new("RGB", (40, 32), (210, 210, 210))])) == ["light"]


def test_grey_checkpoints_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8, num_channels=1
    )
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = model(grey).last_hidden_state[:, 0]
        found = Backbone.load(tmp_path)(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- folders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    import timm

    folder = tmp_path_factory.mktemp("timm")
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, global_pool="avg", num_classes=3)
    args = {"img_size": 32, "global_pool": "avg", "num_classes": 3}
    timm.models.save_for_hf(vit, folder, model_args=args, safe_serialization=True)
    return folder, vit.eval()


@torch.no_grad()
def test_a_timm_snapshot_as_a_local_folder(timm_folder, images):
    folder, vit = timm_folder
    backbone = Backbone.load(folder)
    torch.testing.assert_close(backbone(images), forward_head(vit, images), rtol=0, atol=1e-5)
    assert backbone.fit == Fit(32, "crop", 0.9)
    assert (backbone.own_pool, backbone.mean) == ("avg", (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": [1]}, r"`model_args` in .*config.json must be a JSON object, got list"),
        ({"pretrained_cfg": "x"}, r"`pretrained_cfg` in .* must be a JSON object, got str"),
        ({"pretrained_cfg": {"mean": [1, 2]}}, r"`mean` in .* must be one number or three"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, r"`std` in .* must be above 0"),
        ({"architecture": "no_such_vit"}, r"must be a timm model name"),
        ({"architecture": "resnet18", "model_args": {}}, r"must be a timm VisionTransformer, got a ResNet"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_damaged_timm_folders(timm_folder, tmp_path, changes, message):
    folder, _ = timm_folder
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    if "global_pool" in content and "model_args" in changes:
        del content["global_pool"]
    (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises((ValueError, TypeError), match=message):
        Backbone.load(tmp_path)


def test_a_timm_folder_without_weights(timm_folder, tmp_path):
    (tmp_path / "config.json").write_text((timm_folder[0] / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors, got none; .*save_for_hf"):
        Backbone.load(tmp_path)


def test_an_adapter_in_the_place_of_a_base(tiny_backbone, make_adapter, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`base` must be a model, got .*a, which holds an adapter; give the model"
    ):
        Backbone.load(make_adapter(tiny_backbone).save(tmp_path / "a"))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_other_models_are_named(name, timm_folder):
    with pytest.raises(TypeError, match=r"`base` must be a timm VisionTransformer, got a \w+; choose a plain ViT"):
        Backbone.load(name, weights=timm_folder[0] / "model.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", [3]), ("layer_norm_eps", "1e-6"), ("hidden_act", ["gelu"]), ("image_size", "32")],
)
def test_config_values_of_the_wrong_kind(tmp_path, key, value):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, key: value}))
    with pytest.raises(ValueError, match=rf"`{key}` in .*config.json must be a n"):
        Backbone.load(tmp_path)


@pytest.mark.medium
def test_metadata_of_a_file(timm_folder, tmp_path):
    tensors, _ = load_tensors(timm_folder[0] / "model.safetensors")
    tensors = {key.replace("fc_norm", "norm"): tensor for key, tensor in tensors.items()}  # as without pooling
    file = tmp_path / "w.safetensors"
    for mean, message in (("0.5,x,0.5", "must be numbers"), ("0.5,0.5", "one number or three")):
        save_tensors(file, tensors)
        from safetensors.torch import save_file

        save_file(tensors, str(file), metadata={"architecture": "vit_tiny_patch16_224", "mean": mean})
        with pytest.raises(ValueError, match=rf"`mean` in .*{message}"):
            Backbone.load(file)


# --- processors: one reader for bases and adapters -------------------------------------------------

HALF = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.2]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (HALF, ((0.5, 0.4, 0.3), (0.5, 0.5, 0.2), None, None)),
        ({**HALF, "do_normalize": False}, ((0.0,) * 3, (1.0,) * 3, None, None)),
        ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3, None, None)),
        ({"image_mean": [0.5], "image_std": 0.25}, ((0.5,) * 3, (0.25,) * 3, None, None)),
        ({**HALF, "do_rescale": False, "image_mean": 127.5, "image_std": 51}, ((0.5,) * 3, (0.2,) * 3, None, None)),
        ({**HALF, "rescale_factor": 1 / 255}, ((0.5, 0.4, 0.3), (0.5, 0.5, 0.2), None, None)),
        ({**HALF, "size": {"height": 224, "width": 224}}, (*HALF.values(), "squash", 1.0)),
        (
            {**HALF, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            (*HALF.values(), "crop", 0.875),
        ),
        ({**HALF, "image_processor_type": "ViTImageProcessor", "size": 224}, (*HALF.values(), "squash", 1.0)),
        (
            {
                **HALF,
                "feature_extractor_type": "DeiTFeatureExtractor",
                "size": 256,
                "crop_size": 224,
                "do_center_crop": True,
            },
            (*HALF.values(), "squash", 0.875),
        ),
        (
            {**HALF, "image_processor_type": "CLIPImageProcessor", "size": 224, "crop_size": 224},
            (*HALF.values(), "crop", 1.0),
        ),
        ({**HALF, "do_resize": False, "size": 224}, (*HALF.values(), None, None)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_processors(tmp_path, make_adapter, tiny_backbone, content, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    found = read_processor(tmp_path)
    for one, other in zip(found, expected, strict=True):
        assert one == (pytest.approx(tuple(other)) if isinstance(other, (list, tuple)) else other)
    make_adapter(tiny_backbone).save(tmp_path)
    (tmp_path / "lorarecycle.json").unlink()
    adapter = Adapter.load(tmp_path)
    assert (adapter.mean, adapter.std, adapter.resize) == found[:3]
    save_checkpoint(tmp_path)
    backbone = Backbone.load(tmp_path)
    if found.mean is not None:
        assert (backbone.mean, backbone.std) == (found.mean, found.std)
    if found.resize is not None:
        assert backbone.fit[1:] == (found.resize, found.crop_pct)


def save_checkpoint(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"image_mean": [1, 2], "image_std": 1},
            r"`image_mean` in .*preprocessor_config.json must be one number or three",
        ),
        ({"image_mean": "0.5", "image_std": 1}, r"`image_mean` in .* must be one number or three"),
        ({"image_mean": 0.5, "image_std": 0}, r"`image_std` in .* must be above 0, got 0"),
        ({"image_mean": [True] * 3, "image_std": 1}, r"`image_mean` in .* must be one number or three"),
        ({"image_mean": 10**400, "image_std": 1}, r"`image_mean` in .* must be one number or three"),
        ({"rescale_factor": 0, "image_mean": 0.5, "image_std": 1}, r"`rescale_factor` in .* above 0"),
        ({"size": [224, 224]}, r"`size` in .* must be a number, or hold"),
        ({"size": {"shortest_edge": 224}, "crop_size": "224"}, r"`size` and `crop_size` in .* must be numbers"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_processors_that_cannot_be(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_processor(tmp_path)


def test_the_families_own_preparation(tmp_path):
    save_checkpoint(tmp_path)
    assert Backbone.load(tmp_path).fit == Fit(32, "squash", 1.0)  # transformers' ViTImageProcessor
    assert Backbone.load(tmp_path, resize="crop", crop_pct=0.5).fit == Fit(32, "crop", 0.5)
    with pytest.raises(ValueError, match=r"`resize` must be 'crop' or 'squash', got 'pad'"):
        Backbone.load(tmp_path, resize="pad")
    with pytest.raises(ValueError, match=r"`crop_pct` must be from 0.1 to 1, got 2"):
        Backbone.load(tmp_path, crop_pct=2)
    with pytest.raises(ValueError, match=r"`std` must be one finite number or three, above 0"):
        Backbone.load(tmp_path, std=(1.0, 0.0, 1.0))
    assert Backbone.load("demo").fit.crop_pct == 1.0


def test_the_preparation_is_part_of_the_digest(build_vit):
    vit = build_vit()
    plain, squashed = Backbone(vit), Backbone(vit, resize="squash")
    assert plain.digest() != squashed.digest()
    assert plain.digest() != Backbone(vit, crop_pct=0.9).digest()


def test_heads_know_the_pool():
    assert Head(torch.ones(2, 3), pool="avg").pool == "avg"
    with pytest.raises(ValueError, match=r"`pool` must be one of .*'avg', 'map', 'pooled'"):
        Head(torch.ones(2, 3), pool="max")


def test_timm_modules_say_how_they_crop():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    assert isinstance(vit, VisionTransformer)
    assert Backbone.load(vit).fit == Fit(224, "crop", 0.9)


# --- released weights ------------------------------------------------------------------------------


def test_released_weights_are_fetched_as_safetensors_only(monkeypatch, tmp_path):
    import timm
    from safetensors.torch import save_file

    from lorarecycle.vit import sources

    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(sources, "find_folder", lambda *call, **_: asked.append(call) or tmp_path)
    backbone = Backbone.load("vit_tiny_patch16_224")
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", ("model.safetensors",))]
    assert torch.equal(backbone.vit.blocks[3].attn.qkv.weight, vit.blocks[3].attn.qkv.weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"could not be fetched \(timm/vit_tiny.* has no model.safetensors\); pass"):
        Backbone.load("vit_tiny_patch16_224")


@pytest.mark.medium
def test_without_a_network_one_try_is_enough():
    import os
    import subprocess
    import sys
    import time

    code = "from lorarecycle import Backbone\nprint('ready', flush=True)\nBackbone.load('vit_tiny_patch16_224')"
    offline = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": os.devnull}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=offline, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    start = time.monotonic()
    error = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 12, "seconds, on a busy machine; timm's own tries take a minute"
    assert "could not be fetched" in error
    assert "Retry" not in error
