"""A meta-LoRA, which has no head, written for the class that people load, and loaded there with PEFT."""

import copy
import re
import warnings

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.adapters.peft.names import ALL_LAYOUTS

from .peft_models import SHAPE, assert_same, backbone_of, random_adapter, randomised, timm_model, transformers_model

CLASSIFIERS = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model")


def load(model, folder):
    """The PEFT model; a warning of absent keys is an error."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def check_effect(model, tower, folder, adapter, images):
    """The tower inside the tuned model gives the features of the merged backbone."""
    backbone = backbone_of(model if tower is None else tower(model))
    tuned = load(model, folder)
    inner = tuned.base_model.model
    inner = inner if tower is None else tower(inner)
    if hasattr(inner, "forward_features"):
        found = inner.forward_features(images)[:, 0]
    else:
        output = inner(images)
        found = output.pooler_output if "CLIP" in type(inner).__name__ else output.last_hidden_state[:, 0]
    expected = backbone.merge(adapter)(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - backbone(images)).abs().max() > 1e-2


@pytest.mark.parametrize("layout", CLASSIFIERS)
@torch.no_grad()
def test_for_the_image_classifier(layout, images, tmp_path):
    model = transformers_model(layout, num_labels=3)
    adapter = random_adapter(same=True)
    adapter.save(tmp_path, layout=f"{layout}-classifier")
    towers = {"vit": "vit", "deit": "deit", "clip_vision_model": "vision_model"}
    name = towers.get(layout, "dinov2" if hasattr(model, "dinov2") else layout)
    check_effect(model, lambda m: getattr(m, name), tmp_path, adapter, images)
    assert_same(Adapter.load(tmp_path), adapter)


@torch.no_grad()
def test_for_clip_with_both_towers(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(**SHAPE, intermediate_size=48)
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    model = randomised(
        transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text))
    )
    adapter = random_adapter(same=True)
    adapter.save(tmp_path, layout="clip")
    check_effect(model, lambda m: m.vision_model, tmp_path, adapter, images)


@torch.no_grad()
def test_for_auto_model_and_timm(images, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers_model("vit")
    assert type(transformers.AutoModel.from_config(model.config)) is type(model)
    adapter = random_adapter(same=True)
    adapter.save(tmp_path / "auto", layout="vit")
    check_effect(model, None, tmp_path / "auto", adapter, images)
    adapter.save(tmp_path / "timm", layout="timm")
    check_effect(timm_model(num_classes=3), None, tmp_path / "timm", adapter, images)


@pytest.mark.parametrize("layout", ["vit", "vit-classifier", "clip", "timm"])
def test_the_card_shows_code_for_that_class(layout, tmp_path):
    pytest.importorskip("transformers")
    random_adapter(base_model="owner/model").save(tmp_path, layout=layout)
    card = (tmp_path / "README.md").read_text()
    code = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "PeftModel" in block]
    assert len(code) == 1
    compile(code[0], "card", "exec")
    wanted = {
        "vit": "base = ViTModel.from_pretrained('owner/model')",
        "vit-classifier": "base = ViTForImageClassification.from_pretrained('owner/model')",
        "clip": "base = CLIPModel.from_pretrained('owner/model')",
        "timm": "base = timm.create_model('hf_hub:owner/model', pretrained=True, num_classes=0)",
    }
    assert wanted[layout] in code[0]


def test_unknown_layouts_are_named(tmp_path):
    for layout in ("vit-head", "", "ViTModel"):
        with pytest.raises(ValueError, match=r"`layout` must be one of \('timm', 'vit'"):
            random_adapter().save(tmp_path, layout=layout)
    assert len(ALL_LAYOUTS) == 12
