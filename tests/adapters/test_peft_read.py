"""PEFT directories that peft wrote, read and checked against peft and transformers themselves."""

import os
from pathlib import Path

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.runtime.files import load_tensors, save_tensors

from .peft_models import (
    BLOCKS,
    LAYOUTS,
    POOLS,
    D,
    assert_same,
    backbone_of,
    feature,
    logits,
    random_adapter,
    random_head,
    timm_model,
    transformers_model,
)


def peft_adapter(model, folder, targets, **options):
    """Save what peft makes of `model`, with factors and head that are not zero; returns the PEFT model."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2, generator=generator)
    tuned.eval().save_pretrained(folder)
    return tuned


TARGETS = r".*\.\d+\..*(q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|query|key|value|dense)"  # transformers 5, 4
PATTERNS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj|query": 2, r"\d+\.mlp\.fc.|output.dense": 3},
        "alpha_pattern": {r"mlp\.fc2|layer.\d+.output.dense": 9, r".*1.*(v_proj|value)": 2},
    },
    "patterns, rank-stabilised": {
        "r": 5,
        "lora_alpha": 3,
        "rank_pattern": {"v_proj|value": 8},
        "alpha_pattern": {"v_proj|value": 7, "q_proj|query": 1},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
@pytest.mark.medium
def test_reads_what_peft_wrote_for_transformers(layout, options, images, tmp_path):
    model = transformers_model(layout, num_labels=3)
    backbone = backbone_of(model)
    tuned = peft_adapter(model, tmp_path, TARGETS, modules_to_save=["classifier"], **options)
    adapter = Adapter.load(tmp_path)
    assert len(adapter.sites) == 6 * BLOCKS
    assert adapter.head.pool == POOLS.get(layout, "token")
    found = adapter.head(backbone.merge(adapter)(images, pool=adapter.head.pool))
    torch.testing.assert_close(found, logits(tuned, images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_reads_adapters_of_headless_models(layout, images, tmp_path):
    model = transformers_model(layout)
    backbone = backbone_of(model)
    tuned = peft_adapter(model, tmp_path, ["q_proj", "v_proj", "query", "value"], r=4, lora_alpha=8)
    adapter = Adapter.load(tmp_path)
    assert adapter.head is None
    assert adapter.sites == tuple(f"blocks.{i}.attn.{s}" for i in range(BLOCKS) for s in "qv")
    expected = feature(tuned.base_model.model, images)
    torch.testing.assert_close(backbone.merge(adapter)(images), expected, rtol=0, atol=1e-4)
    assert (expected - backbone(images)).abs().max() > 1e-2


@torch.no_grad()
def test_reads_swiglu_halves(images, tmp_path):
    model = transformers_model("dinov2", use_swiglu_ffn=True)
    backbone = backbone_of(model)
    targets = ["gate_proj", "up_proj", "down_proj", "weights_in", "weights_out"]
    tuned = peft_adapter(model, tmp_path, targets, r=2, lora_alpha=8)
    adapter = Adapter.load(tmp_path)
    assert adapter.ranks["blocks.0.mlp.fc1"] == (4 if hasattr(model.encoder.layer[0].mlp, "gate_proj") else 2)
    torch.testing.assert_close(
        backbone.merge(adapter)(images), feature(tuned.base_model.model, images), rtol=0, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"`layout` must be 'timm' for an adapter of a SwiGLU MLP"):
        adapter.save(tmp_path / "again", layout="dinov2")


@pytest.mark.parametrize("options", list(PATTERNS.values())[:2], ids=list(PATTERNS)[:2])
@torch.no_grad()
def test_reads_what_peft_wrote_for_timm(options, images, tmp_path):
    model = timm_model(num_classes=3)
    backbone = backbone_of(model)
    tuned = peft_adapter(model, tmp_path, r".*blocks.*\.(qkv|proj|fc1|fc2)", modules_to_save=["head"], **options)
    adapter = Adapter.load(tmp_path)
    assert len(adapter.sites) == 6 * BLOCKS
    assert adapter.factors["blocks.0.attn.q"].lora_A.equal(adapter.factors["blocks.0.attn.v"].lora_A)
    found = adapter.head(backbone.merge(adapter)(images))
    torch.testing.assert_close(found, logits(tuned, images), rtol=0, atol=1e-4)
    adapter.save(tmp_path / "again")  # thirds that share A go back to one pair of the same rank
    before, after = (load_tensors(p / "adapter_model.safetensors")[0] for p in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def rename(folder, rules):
    """Rewrite the keys of a saved adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = {}
    for key, tensor in load_tensors(path)[0].items():
        for old, new in rules:
            key = key.replace(old, new)
        tensors[key] = tensor
    save_tensors(path, tensors)


OLD_NAMES = [
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
]
OLD_VIT = [
    *OLD_NAMES,
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("it.layers.", "it.encoder.layer."),
]


@pytest.mark.parametrize(
    ("layout", "rules"),
    [
        ("vit", OLD_VIT),
        ("deit", OLD_VIT),
        ("dinov2", OLD_NAMES),
        ("dinov2_with_registers", OLD_NAMES),
        ("clip_vision_model", [("base_model.model.", "base_model.model.clip.")]),
        ("vit", [("base_model.model.vit.", "")]),
        ("vit", [("base_model.model.vit.", "base_model.model.my.wrapper.")]),
        ("vit", [(".lora_A.", ".lora_A.default."), (".lora_B.", ".lora_B.default.")]),
        ("vit", [("classifier.", "classifier.modules_to_save.default.")]),
        ("vit", [("classifier.", "score.")]),
    ],
)
def test_other_names_read_the_same(layout, rules, tmp_path):
    pytest.importorskip("transformers")
    adapter = random_adapter(same=True, head=random_head(POOLS.get(layout, "token")))
    adapter.save(tmp_path, layout=layout)
    rename(tmp_path, rules)
    assert Adapter.load(tmp_path).digest() == adapter.digest()


def test_original_copy_of_a_head_is_ignored(tmp_path):
    adapter = random_adapter(head=random_head())
    adapter.save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    extra = {"base_model.model.head.original_module.weight": torch.zeros(9, D)}
    save_tensors(path, {**load_tensors(path)[0], **extra})
    assert_same(Adapter.load(tmp_path), adapter)


def test_timm_models_inside_transformers_read_the_same(tmp_path):
    adapter = random_adapter(head=random_head())
    adapter.save(tmp_path)
    rename(tmp_path, [("base_model.model.", "base_model.model.timm_model.")])
    assert_same(Adapter.load(tmp_path), adapter)


def test_text_tower_is_left_out_with_one_warning(caplog, tmp_path):
    pytest.importorskip("transformers")
    adapter = random_adapter(("attn.q",))
    adapter.save(tmp_path, layout="clip_vision_model")
    rename(tmp_path, [("model.encoder.", "model.vision_model.encoder.")])
    path = tmp_path / "adapter_model.safetensors"
    text = {
        f"base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.zeros(2, 2)
        for side in "AB"
    }
    save_tensors(path, {**load_tensors(path)[0], **text})
    assert_same(Adapter.load(tmp_path), adapter)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 tensors of the text tower are left out" in caplog.text


def data_folder():
    here = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("LORARECYCLE_DATA") or here.parent / "shared" / "data") / "adapters"


@pytest.mark.parametrize(
    ("name", "sites", "r", "scaling", "classes"),
    [
        ("vit_base_r16_query_value", ("attn.q", "attn.v"), 16, 2.0, 2),
        (
            "vit_base_r8_query_key_value_dense",
            ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc2"),
            8,
            2.0,
            0,
        ),
    ],
)
def test_adapters_found_in_the_wild(name, sites, r, scaling, classes, tmp_path):
    folder = data_folder() / name
    if not folder.is_dir():
        pytest.skip(f"needs the adapter {name}; set LORARECYCLE_DATA to the folder that has adapters/{name}")
    adapter = Adapter.load(folder)
    assert adapter.sites == tuple(f"blocks.{i}.{layer}" for i in range(12) for layer in sites)
    assert set(adapter.ranks.values()) == {r}
    assert {pair.scaling for pair in adapter.factors.values()} == {scaling}
    assert adapter.base_model == "google/vit-base-patch16-224"
    assert (0 if adapter.head is None else len(adapter.head.class_names)) == classes
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    adapter.save(tmp_path, layout="vit")
    model_class = transformers.ViTForImageClassification if classes else transformers.ViTModel
    with torch.device("meta"):  # names and shapes are what counts here
        model = model_class(transformers.ViTConfig())
        tuned = peft.PeftModel.from_pretrained(model, tmp_path, low_cpu_mem_usage=True)
    loaded = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    saved = load_tensors(tmp_path / "adapter_model.safetensors")[0]
    assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in saved.items()}
    assert len(saved) == 2 * len(adapter.sites) + (2 if classes else 0)
    assert Adapter.load(tmp_path).digest() == adapter.digest()
