"""PEFT directories that we write: peft loads them, they come back whole, and writing that fails harms nothing."""

import errno
import json
from pathlib import Path

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter, Head
from lorarecycle.runtime.files import load_tensors, read_json, save_tensors

from .peft_models import (
    LAYERS,
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


@pytest.mark.parametrize("layers", [LAYERS, ("attn.q", "attn.v"), ("attn.k", "mlp.fc2")], ids="+".join)
@pytest.mark.parametrize("layout", ["timm", *LAYOUTS])
@torch.no_grad()
@pytest.mark.medium
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


def test_later_training_of_the_qkv_pair_is_not_cut_off(tmp_path):
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


def test_saving_draws_no_random_numbers(tmp_path):
    pytest.importorskip("transformers")
    state = torch.get_rng_state()
    random_adapter().save(tmp_path, layout="dinov2")
    assert torch.equal(torch.get_rng_state(), state)


def test_model_card_and_metadata(tmp_path):
    sources = [random_adapter(seed=i, name=f"source {i}", base_model="some/base") for i in range(2)]
    adapter = random_adapter(name="meta", base_model="some/base", head=random_head())
    adapter.save(tmp_path, config={"n_way": 5, "path": Path("x")}, sources=sources)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nbase_model: some/base\nlibrary_name: peft\ntags:\n- lora\n")
    for text in ("# meta", "source 0", sources[1].digest(), '"n_way": 5', torch.__version__, "cat, dog, owl"):
        assert text in card
    metadata = read_json(tmp_path / "lorarecycle.json")
    assert [one["digest"] for one in metadata["sources"]] == [one.digest() for one in sources]


@pytest.mark.parametrize(
    ("base_model", "expected"),
    [("some/base", "some/base"), ("vit_base_patch16_224", None), ("/a/folder/of/mine", None), ("", None)],
    ids=["Hub id", "timm", "folder", "unknown"],
)
def test_metadata_of_the_card_parses(base_model, expected, tmp_path):
    """The Hub refuses a `base_model` that is no id of its own."""
    hub = pytest.importorskip("huggingface_hub")
    random_adapter(name='with: "quotes"', base_model=base_model).save(tmp_path)
    data = hub.ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (data["library_name"], data.get("base_model")) == ("peft", expected)
    assert {"lora", "peft", "lorarecycle"} <= set(data["tags"])


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

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"lorarecycle.adapters.peft.write.{failing}", full)
    with pytest.raises(OSError, match=r"cannot write .*adapter: No space left on device; earlier files"):
        random_adapter(seed=2).save(tmp_path / "adapter")
    with pytest.raises(OSError, match=r"No space left"):
        random_adapter(seed=2).save(tmp_path / "fresh")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == files
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert_same(Adapter.load(tmp_path / "adapter"), before)


def test_only_the_files_of_the_adapter_are_in_the_folder(tmp_path):
    for _ in range(2):
        random_adapter().save(tmp_path / "adapter")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        names = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorarecycle.json"}


def test_a_readme_of_others_stays(tmp_path, caplog):
    card = random_adapter(name="first").save(tmp_path) / "README.md"
    random_adapter(name="second").save(tmp_path)
    assert "# second" in card.read_text(), "a model card of ours is of the adapter that it lies beside"
    card.write_text("# My thesis, written with lorarecycle")
    random_adapter(name="third").save(tmp_path)
    assert card.read_text() == "# My thesis, written with lorarecycle"
    assert "README.md is left as it is: it is no model card of lorarecycle" in caplog.text


def test_damaged_metadata_is_replaced(tmp_path):
    (tmp_path / "lorarecycle.json").write_text("{")
    adapter = random_adapter()
    adapter.save(tmp_path)
    assert_same(Adapter.load(tmp_path), adapter)


def test_unknown_layout(tmp_path):
    with pytest.raises(ValueError, match=r"`layout` must be one of .*'timm'.* got 'resnet'"):
        random_adapter().save(tmp_path / "a", layout="resnet")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way(tmp_path):
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
