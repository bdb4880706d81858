"""PEFT directories in both directions, checked against peft and transformers themselves."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from lorarecycle import Backbone
from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.adapters.algebra import split_factors, stack_factors
from lorarecycle.runtime.files import load_tensors, read_json, save_tensors, write_json
from lorarecycle.vit.checkpoints import build_vit

D, BLOCKS, HIDDEN = 24, 2, 48
SHAPE = {
    "hidden_size": D,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
LAYOUTS = {
    "vit": ("ViTConfig", {"intermediate_size": HIDDEN}, "ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTConfig", {"intermediate_size": HIDDEN}, "DeiTModel", "DeiTForImageClassification"),
    "dinov2": ("Dinov2Config", {"mlp_ratio": 2}, "Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 2, "num_register_tokens": 3},
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    "clip_vision_model": (
        "CLIPVisionConfig",
        {"intermediate_size": HIDDEN},
        "CLIPVisionModel",
        "CLIPForImageClassification",
    ),
}
POOLS = {"dinov2": "token+mean", "dinov2_with_registers": "token+mean", "clip_vision_model": "mean"}
LAYERS = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")


def transformers_model(layout, *, num_labels=0, **extra):
    transformers = pytest.importorskip("transformers")
    config_class, own, base_class, classifier_class = LAYOUTS[layout]
    config = getattr(transformers, config_class)(**SHAPE, **{**own, **extra})
    if num_labels and layout == "clip_vision_model":
        config = transformers.CLIPConfig(vision_config=config.to_dict(), text_config={"num_hidden_layers": 1})
    config.num_labels = num_labels
    name = classifier_class if num_labels else base_class
    return randomised(getattr(transformers, name)(config))


def timm_model(num_classes=0):
    from timm.models.vision_transformer import VisionTransformer

    return randomised(
        VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=D,
            depth=BLOCKS,
            num_heads=3,
            mlp_ratio=2,
            num_classes=num_classes,
        )
    )


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def backbone_of(model):
    """A Backbone with the weights of a transformers or timm model."""
    if hasattr(model, "blocks"):
        return Backbone.load(model)
    config = getattr(model.config, "vision_config", model.config)
    facts = {"layer_norm_eps": config.layer_norm_eps, "hidden_act": config.hidden_act, "num_heads": 3}
    return Backbone.load(build_vit(model.state_dict(), facts))


def feature(model, images):
    if hasattr(model, "blocks"):
        return model.forward_features(images)[:, 0]
    output = model(images)
    return output.pooler_output if "CLIP" in type(model).__name__ else output.last_hidden_state[:, 0]


def logits(model, images):
    output = model(images)
    return getattr(output, "logits", output)


def random_adapter(layers=LAYERS, *, r=3, scaling=2.0, head=None, seed=0, same=False, **facts):
    """Ranks differ between sites unless `same`."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for block in range(BLOCKS):
        for i, layer in enumerate(layers):
            rank = r if same else r + (block + i) % 3
            out, width = {"mlp.fc1": (HIDDEN, D), "mlp.fc2": (D, HIDDEN)}.get(layer, (D, D))
            lora_A = 0.3 * torch.randn(rank, width, generator=generator)
            lora_B = 0.3 * torch.randn(out, rank, generator=generator)
            factors[f"blocks.{block}.{layer}"] = LoRAFactors(lora_A, lora_B, scaling if same else scaling / (1 + i))
    return Adapter(factors, head=head, **facts)


def random_head(pool="token", seed=3):
    generator = torch.Generator().manual_seed(seed)
    width = 2 * D if pool == "token+mean" else D
    weight, bias = torch.randn(3, width, generator=generator), torch.randn(3, generator=generator)
    return Head(weight, bias, ("cat", "dog", "owl"), pool)


def assert_same(one, other, tolerance=1e-6):
    assert one.sites == other.sites
    for site in one.sites:
        torch.testing.assert_close(one.delta(site), other.delta(site), rtol=tolerance, atol=tolerance)
    assert (one.head is None) == (other.head is None)
    if one.head is not None:
        assert torch.equal(one.head.weight, other.head.weight)
        assert torch.equal(one.head.bias, other.head.bias)
        assert (one.head.class_names, one.head.pool) == (other.head.class_names, other.head.pool)
    assert (one.mean, one.std, one.base_model, one.name) == (
        other.mean,
        other.std,
        other.base_model,
        other.name,
    )


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- adapters that peft wrote ----------------------------------------------------------------------


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


# --- adapters that we write ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [LAYERS, ("attn.q", "attn.v"), ("attn.k", "mlp.fc2")], ids="+".join)
@pytest.mark.parametrize("layout", ["timm", *LAYOUTS])
@torch.no_grad()
def test_peft_loads_what_we_write(layout, layers, images, tmp_path):
    peft = pytest.importorskip("peft")
    head = random_head(POOLS.get(layout, "token"))
    adapter = random_adapter(layers, head=head)
    model = timm_model(3) if layout == "timm" else transformers_model(layout, num_labels=3)
    backbone = backbone_of(model)
    adapter.save(tmp_path, layout=layout)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    expected = head(backbone.merge(adapter)(images, pool=head.pool))
    torch.testing.assert_close(logits(tuned, images), expected, rtol=0, atol=1e-4)
    assert_no_site_unfilled(tuned, tmp_path)


@pytest.mark.parametrize("layout", ["timm", *LAYOUTS])
@torch.no_grad()
def test_peft_loads_headless_adapters(layout, images, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = random_adapter()
    model = timm_model() if layout == "timm" else transformers_model(layout)
    backbone = backbone_of(model)
    adapter.save(tmp_path, layout=layout)
    tuned = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    found = feature(tuned.base_model.model, images)
    torch.testing.assert_close(found, backbone.merge(adapter)(images), rtol=0, atol=1e-4)
    assert_no_site_unfilled(tuned, tmp_path)


def assert_no_site_unfilled(tuned, folder):
    """peft put LoRA where our file has factors, and nowhere else."""
    import peft

    saved = load_tensors(folder / "adapter_model.safetensors")[0]
    assert peft.get_peft_model_state_dict(tuned).keys() == saved.keys()


@torch.no_grad()
def test_class_token_head_fits_dinov2_with_zeros(images, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = random_adapter(head=random_head("token"))
    model = transformers_model("dinov2", num_labels=3)
    backbone = backbone_of(model)
    adapter.save(tmp_path, layout="dinov2")
    tuned = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    expected = adapter.head(backbone.merge(adapter)(images))
    torch.testing.assert_close(logits(tuned, images), expected, rtol=0, atol=1e-4)
    assert_same(Adapter.load(tmp_path), adapter)


@pytest.mark.parametrize("pool", ["token", "token+mean", "mean"])
@pytest.mark.parametrize("layout", ["timm", *LAYOUTS])
def test_round_trip_keeps_everything(layout, pool, tmp_path):
    if layout != "timm":
        pytest.importorskip("transformers")
    adapter = random_adapter(
        head=random_head(pool),
        base_model="some/base",
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 0.5, 0.25),
        name="an adapter",
    )
    assert adapter.save(tmp_path / "a", layout=layout) == tmp_path / "a"
    assert_same(Adapter.load(tmp_path / "a"), adapter)


@pytest.mark.parametrize("layers", [LAYERS, ("attn.q", "attn.v"), ("attn.k",)], ids="+".join)
def test_round_trip_of_equal_scalings_is_exact_to_the_bit(layers, tmp_path):
    adapter = random_adapter(layers, same=True, scaling=16 / 3, head=random_head())
    adapter.save(tmp_path)
    again = Adapter.load(tmp_path)
    assert again.digest() == adapter.digest()
    assert again.ranks == adapter.ranks


def test_later_training_of_the_fused_pair_is_not_cut_off(tmp_path):
    """Where peft trained our saved pair further, the block structure is gone: all of it counts."""
    adapter = random_adapter(("attn.q", "attn.v"), same=True)
    adapter.save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: torch.randn_like(value) for key, value in load_tensors(path)[0].items()}
    save_tensors(path, tensors)
    again = Adapter.load(tmp_path)
    key = "base_model.model.blocks.0.attn.qkv"
    expected = 2.0 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
    found = torch.cat([again.delta(f"blocks.0.attn.{part}") for part in "qkv"])
    torch.testing.assert_close(found, expected)


def test_fused_pair_round_trip_with_every_kind_of_part():
    shared = torch.randn(2, 6)
    parts = [
        LoRAFactors(shared, torch.randn(4, 2), 1.0),
        LoRAFactors(torch.randn(3, 6), torch.randn(4, 3), -2.0),
        None,
        LoRAFactors(shared, torch.randn(4, 2), 1.0),
    ]
    fused, columns = stack_factors(parts)
    assert columns == [(0, 2), (2, 5), None, (0, 2)]
    assert fused.lora_A.shape == (5, 6)
    expected = [torch.zeros(4, 6) if p is None else p.scaling * p.lora_B @ p.lora_A for p in parts]
    torch.testing.assert_close(fused.scaling * fused.lora_B @ fused.lora_A, torch.cat(expected))
    again = split_factors(fused, 4, columns)
    assert again[2] is None
    assert [p and p.r for p in again] == [2, 3, None, 2]
    for part, other in zip(expected, split_factors(fused, 4), strict=True):
        torch.testing.assert_close(part, other.scaling * other.lora_B @ other.lora_A)
    with pytest.raises(ValueError, match=r"must have rows divisible by 3, got \[16, 5\]"):
        split_factors(fused, 3)
    with pytest.raises(ValueError, match=r"must all be \[4, 6\], got \[5, 6\]"):
        stack_factors([parts[0], LoRAFactors(shared, torch.randn(5, 2), 1.0)])


def test_saving_draws_no_random_numbers(tmp_path):
    pytest.importorskip("transformers")
    state = torch.get_rng_state()
    random_adapter().save(tmp_path, layout="dinov2")
    assert torch.equal(torch.get_rng_state(), state)


def test_model_card_and_side_file(tmp_path):
    sources = [random_adapter(seed=i, name=f"source {i}", base_model="some/base") for i in range(2)]
    adapter = random_adapter(name="meta", base_model="some/base", head=random_head())
    adapter.save(tmp_path, config={"n_way": 5, "path": Path("x")}, sources=sources)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "peft"\nbase_model: "some/base"\ntags: [')
    for text in ("# meta", "source 0", sources[1].digest(), '"n_way": 5', torch.__version__, "cat, dog, owl"):
        assert text in card
    side = read_json(tmp_path / "lorarecycle.json")
    assert [one["digest"] for one in side["sources"]] == [one.digest() for one in sources]


def test_hub_yaml_of_the_card_parses(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    random_adapter(name="meta", base_model="some/base").save(tmp_path)
    data = hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("peft", "some/base")
    assert "lora" in data["tags"]


# --- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["head.safetensors", "classifier.safetensors"])
def test_head_beside_the_adapter(file, tmp_path):
    random_adapter().save(tmp_path)
    head = random_head()
    save_tensors(tmp_path / file, {"weight": head.weight, "bias": head.bias})
    found = Adapter.load(tmp_path, class_names=["a", "b", "c"]).head
    assert torch.equal(found.weight, head.weight)
    assert found.class_names == ("a", "b", "c")
    assert found.pool == "token"


def test_given_head_replaces_a_saved_one(tmp_path):
    random_adapter(head=random_head()).save(tmp_path / "adapter")
    other = random_head(seed=8)
    assert Adapter.load(tmp_path / "adapter", head=other).head is other
    wide = random_head("token+mean")
    save_tensors(tmp_path / "given.safetensors", {"classifier.weight": wide.weight})
    found = Adapter.load(tmp_path / "adapter", head=tmp_path / "given.safetensors").head
    assert torch.equal(found.weight, wide.weight)
    assert found.pool == "token+mean"
    assert not found.bias.any()


def test_class_names_and_normalisation_from_the_files_of_transformers(tmp_path):
    random_adapter(head=random_head()).save(tmp_path)
    (tmp_path / "lorarecycle.json").unlink()
    write_json(tmp_path / "config.json", {"id2label": {"1": "dog", "0": "cat", "2": "owl"}})
    write_json(tmp_path / "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    adapter = Adapter.load(tmp_path)
    assert adapter.head.class_names == ("cat", "dog", "owl")
    assert (adapter.mean, adapter.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert adapter.name == tmp_path.name


def test_head_of_the_adapter_before_does_not_stay(tmp_path):
    random_adapter(head=random_head("mean")).save(tmp_path)
    assert (tmp_path / "head.safetensors").exists()
    random_adapter().save(tmp_path)
    assert Adapter.load(tmp_path).head is None


# --- writing that fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["save_tensors", "write_json", "write_text"])
def test_earlier_files_stay_whole_when_the_disk_is_full(failing, tmp_path, monkeypatch):
    before = random_adapter(seed=1, head=random_head("mean"))
    before.save(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"lorarecycle.adapters.peft.read.{failing}", full)
    with pytest.raises(OSError, match=r"cannot write .*adapter: No space left on device; earlier files"):
        random_adapter(seed=2).save(tmp_path / "adapter")
    with pytest.raises(OSError, match=r"No space left"):
        random_adapter(seed=2).save(tmp_path / "fresh")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_same(Adapter.load(tmp_path / "adapter"), before)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".adapter.saving-abc").mkdir()
    (tmp_path / ".adapter.saving-abc" / "adapter_model.safetensors").write_bytes(b"half")
    random_adapter().save(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_damaged_side_file_is_replaced(tmp_path):
    (tmp_path / "lorarecycle.json").write_text("{")
    adapter = random_adapter()
    adapter.save(tmp_path)
    assert_same(Adapter.load(tmp_path), adapter)


def test_unknown_layout_and_a_file_in_the_way(tmp_path):
    with pytest.raises(ValueError, match=r"`layout` must be one of .*'timm'.* got 'resnet'"):
        random_adapter().save(tmp_path / "a", layout="resnet")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"`directory` must be a directory or new, got the file"):
        random_adapter().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_head_of_another_width_is_refused_before_writing(tmp_path):
    adapter = random_adapter(head=Head(torch.ones(2, D + 1)))
    with pytest.raises(ValueError, match=rf"must read {D} features .* got a weight of \[2, {D + 1}\]"):
        adapter.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_config_is_what_peft_writes(tmp_path):
    random_adapter(("attn.q",), same=True).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["target_modules"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
