"""PEFT adapters with more than LoRA on a ViT's blocks, with wrapped names, or of other models: read, or named."""

import copy

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.runtime.files import load_tensors, read_json, save_tensors, write_json

from .peft_models import backbone_of, logits, timm_model, transformers_model
from .test_peft_read import peft_adapter

D = 6
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QKV = "base_model.model.blocks.0.attn.qkv"


@pytest.fixture
def folder(tmp_path):
    pair = LoRAFactors(torch.randn(2, D), torch.randn(D, 2), 1.0)
    Adapter({f"blocks.0.attn.{part}": pair for part in "qkv"}).save(tmp_path / "adapter")
    weights = tmp_path / "adapter" / WEIGHTS
    save_tensors(weights, load_tensors(weights)[0])  # without its seal, as PEFT writes it
    return tmp_path / "adapter"


def change(folder, **tensors):
    save_tensors(folder / WEIGHTS, {**load_tensors(folder / WEIGHTS)[0], **tensors})


def configure(folder, **values):
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **values})


# --- LoRA outside the blocks -----------------------------------------------------------------------


def pair(name, *shapes):
    return {f"base_model.model.{name}.lora_{s}.weight": torch.ones(z) for s, z in zip("AB", shapes, strict=True)}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("vit.pooler.dense", ((2, D), (D, 2))),
        ("visual_projection", ((2, D), (4, 2))),
        ("patch_embed.proj", ((2, 3, 4, 4), (D, 2, 1, 1))),
        ("fc_norm_projection", ((2, D), (9, 2))),
    ],
)
def test_other_layers_are_left_out_and_named(folder, caplog, name, shapes):
    before = Adapter.load(folder)
    change(folder, **pair(name, *shapes))
    after = Adapter.load(folder)
    assert after.digest() == before.digest()
    assert after.notes == (f"LoRA outside the blocks is left out, 1 of 1: {name}",)
    assert len(caplog.records) == 1
    assert after.notes[0] in caplog.text


def test_only_layers_outside(folder):
    save_tensors(folder / WEIGHTS, pair("vit.pooler.dense", (2, D), (D, 2)))
    with pytest.raises(ValueError, match=r"LoRA factors .* of a ViT's blocks, got only LoRA on vit.pooler.dense"):
        Adapter.load(folder)


@pytest.mark.medium
@torch.no_grad()
def test_all_linear_layers_of_a_classifier(images, tmp_path):
    """The head's own weight is not in the file, but in the model."""
    pytest.importorskip("transformers")
    model = transformers_model("vit", num_labels=3)
    backbone = backbone_of(copy.deepcopy(model))
    tuned = peft_adapter(model, tmp_path / "file", "all-linear", r=4, lora_alpha=6)
    from_file = Adapter.load(tmp_path / "file")
    assert from_file.head is None
    assert "the head is left out: 'classifier' is under LoRA" in from_file.notes[0]
    assert "Adapter.from_peft" in from_file.notes[0]
    from_model = Adapter.from_peft(tuned)  # the advice
    assert not from_model.notes
    assert len(from_model.sites) == 12
    found = from_model.head(backbone.merge(from_model)(images, pool=from_model.head.pool))
    torch.testing.assert_close(found, logits(tuned, images), rtol=0, atol=1e-4)
    given = Adapter.load(tmp_path / "file", head=from_model.head)  # the other advice
    assert torch.equal(given.head.weight, from_model.head.weight)


def test_a_head_under_lora_whose_weight_is_in_the_file(folder):
    weight, bias = torch.randn(3, D), torch.randn(3)
    change(
        folder,
        **pair("classifier", (2, D), (3, 2)),
        **{
            "base_model.model.classifier.base_layer.weight": weight,
            "base_model.model.classifier.base_layer.bias": bias,
        },
    )
    head = Adapter.load(folder).head
    scaling = read_json(folder / CONFIG)["lora_alpha"] / 2
    torch.testing.assert_close(head.weight, weight + scaling * torch.ones(3, 2) @ torch.ones(2, D))
    assert torch.equal(head.bias, bias)


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("blocks.0.", "blocks.0._orig_mod."),
        ("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "_orig_mod.base_model.model.module."),
        ("base_model.model.", "base_model.model.base_model.model."),
        ("base_model.model.", "base_model.model.model.vit."),
        ("base_model.model.", ""),
        ("attn.qkv", "attn._orig_mod.qkv"),
        ("base_model.model.blocks", "base_model.model.1.blocks"),  # torch.nn.Sequential(normalise, vit)
    ],
)
def test_wrapper_names_inside_keys(folder, old, new):
    before = Adapter.load(folder)
    tensors = load_tensors(folder / WEIGHTS)[0]
    save_tensors(folder / WEIGHTS, {key.replace(old, new): tensor for key, tensor in tensors.items()})
    after = Adapter.load(folder)
    assert after.digest() == before.digest()
    assert not after.notes


# --- what the files say of themselves --------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("transformers.models.detr.modeling_detr", "DetrForObjectDetection"),
        ("transformers.models.swin.modeling_swin", "SwinForImageClassification"),
        ("transformers.models.bert.modeling_bert", "BertModel"),
        ("transformers.models.whisper.modeling_whisper", "WhisperModel"),
        ("timm.models.convnext", "ConvNeXt"),
        ("timm.models.beit", "Beit"),
        ("timm.models.resnet", "ResNet"),
    ],
)
def test_other_architectures_whose_names_match(folder, library, name):
    configure(folder, auto_mapping={"parent_library": library, "base_model_class": name})
    with pytest.raises(ValueError, match=rf"`auto_mapping` in .* must name a plain ViT .*got {library}.{name}"):
        Adapter.load(folder)


@pytest.mark.parametrize(
    "library",
    [
        "transformers.models.vit.modeling_vit",
        "transformers.models.timm_wrapper.modeling_timm_wrapper",
        "timm.models.vision_transformer",
        "dinov3.models.vision_transformer",
        "__main__",
    ],
)
def test_plain_and_unknown_architectures(folder, library):
    configure(folder, auto_mapping={"parent_library": library, "base_model_class": "AnyViT"})
    adapter = Adapter.load(folder)
    (folder / "lorarecycle.json").unlink()
    adapter = Adapter.load(folder)
    assert adapter.base_class == f"{library}.AnyViT"
    adapter.save(folder.parent / "again")
    assert Adapter.load(folder.parent / "again").base_class == adapter.base_class


def test_an_unknown_key_is_not_called_newer(folder):
    configure(folder, my_note={"strength": 3})
    with pytest.raises(ValueError, match=r"no PEFT known here has it, .*; remove the key if you know") as caught:
        Adapter.load(folder)
    assert "newer" not in str(caught.value)
    content = read_json(folder / CONFIG)
    del content["my_note"]  # the advice
    write_json(folder / CONFIG, content)
    Adapter.load(folder)


# --- numbers and JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_floats_of_any_size(folder, dtype):
    change(folder, **{f"{QKV}.lora_A.weight": torch.ones(2, D).to(dtype)})
    assert Adapter.load(folder).factors["blocks.0.attn.q"].lora_A.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.full((2, D), 1e30),
            r"lora_A at blocks.0.attn.q of 'adapter' must hold numbers of at most 1e\+06, got 1e",
        ),
        (torch.ones(2, D, dtype=torch.int64), r"must hold floating-point numbers, got int64"),
        (torch.ones(2, D, dtype=torch.bool), r"must hold floating-point numbers, got bool"),
        (torch.ones(2, D, dtype=torch.complex64), r"must hold floating-point numbers, got complex64"),
        (torch.full((2, D), float("nan")), r"must be finite, got 12 NaN or infinite"),
        (torch.ones(2, 1, D), r"must hold lora_A \[r, in\]"),
    ],
    ids=["1e30", "int64", "bool", "complex", "NaN", "three axes"],
)
def test_factors_that_cannot_be(folder, tensor, message):
    change(folder, **{f"{QKV}.lora_A.weight": tensor})
    with pytest.raises(ValueError, match=message):
        Adapter.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_alpha", 10**400, r"`lora_alpha` in .* must be a number"),
        ("r", float("inf"), r"`r` in .* must be a number"),
        ("r", [4], r"`r` in .* must be a number, got '\[4\]'"),
        ("auto_mapping", [1], r"`auto_mapping` in .* must be a JSON object, got \[1\]"),
        ("alpha_pattern", {"(a+)+b": 2}, r"`alpha_pattern` in .* must have keys that are matched quickly"),
        ("alpha_pattern", {"(a|aa)*b": 2}, r"must have keys that are matched quickly"),
        ("rank_pattern", {".*.*.*.*.*x": 2}, r"must have keys that are matched quickly"),
        ("rank_pattern", {"x" * 2000: 2}, r"must have keys that are matched quickly"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_cannot_be(folder, key, value, message):
    configure(folder, **{key: value})
    with pytest.raises(ValueError, match=message):
        Adapter.load(folder)


@pytest.mark.parametrize(
    "pattern", [r".*1.*(v_proj|qkv)", r"blocks\.(\d+)\.attn\.qkv", "blocks.0.attn.qkv", r"\d+.attn.qkv"]
)
def test_patterns_as_people_write_them(folder, pattern):
    configure(folder, alpha_pattern={pattern: 7})
    Adapter.load(folder)


def make(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", [CONFIG, "lorarecycle.json", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep|must be JSON"),
        ("[1]", "JSON object"),
        ('"text"', "JSON object"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer; .*`git lfs pull`"),
        ("{", "must be JSON"),
        ('{"r": ' + "9" * 5000 + "}", "JSON"),
    ],
    ids=["deep", "list", "text", "LFS", "cut", "digits"],
)
def test_json_files_that_hold_something_else(folder, name, text, message):
    if name == "config.json":  # read for the names of a head's classes
        change(
            folder, **{"base_model.model.head.weight": torch.ones(3, D), "base_model.model.head.bias": torch.ones(3)}
        )
        (folder / "lorarecycle.json").unlink()
    if name == "preprocessor_config.json":
        (folder / "lorarecycle.json").unlink()
    make(folder, name, text)
    with pytest.raises(ValueError, match=message) as caught:
        Adapter.load(folder)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)[:-1]


def test_a_git_lfs_pointer_in_place_of_weights(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 9\n")
    with pytest.raises(
        ValueError, match=r"must be the file itself, got a Git LFS pointer; fetch it with `git lfs pull`"
    ):
        Adapter.load(folder)


@torch.no_grad()
def test_a_head_of_a_model_that_averages(images, tmp_path):
    """The file of a timm adapter does not say what its head reads: the base does."""
    from timm.models.vision_transformer import VisionTransformer

    from lorarecycle import Backbone

    torch.manual_seed(0)
    plain = timm_model(num_classes=3)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    mean = VisionTransformer(**sizes, num_classes=3, global_pool="avg").eval()
    for model, own in ((plain, "token"), (mean, "avg")):
        backbone = Backbone.load(copy.deepcopy(model))
        tuned = peft_adapter(model, tmp_path / own, ["qkv"], r=2, modules_to_save=["head"])
        adapter = Adapter.load(tmp_path / own)
        assert (adapter.head.pool, backbone.own_pool) == ("pooled", own)
        found = adapter.head(backbone.merge(adapter)(images, pool=adapter.head.pool))
        torch.testing.assert_close(found, tuned(images), rtol=0, atol=1e-4)


def test_heads_that_cannot_be():
    for weight, message in (
        (torch.ones(2, 3, dtype=torch.int32), "floating-point numbers, got int32"),
        (torch.full((2, 3), 1e30), "at most 1e"),
    ):
        with pytest.raises(ValueError, match=message):
            Head(weight)
