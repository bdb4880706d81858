"""Adapters that cannot be read, one by one: each refused before work starts, with what to do."""

import math
from pathlib import Path

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter, Head, LoRAFactors
from lorarecycle.runtime.files import load_tensors, read_json, save_tensors, write_json

D = 6
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QKV = "base_model.model.blocks.0.attn.qkv"


@pytest.fixture
def folder(tmp_path):
    """A good adapter; each test damages it."""
    pair = LoRAFactors(torch.randn(2, D), torch.randn(D, 2), 1.0)
    head = Head(torch.randn(3, D), torch.randn(3))
    Adapter({f"blocks.0.attn.{part}": pair for part in "qkv"}, head).save(tmp_path / "adapter")
    weights = tmp_path / "adapter" / WEIGHTS
    save_tensors(weights, load_tensors(weights)[0])  # without its seal, as PEFT writes it
    return tmp_path / "adapter"


def refuses(folder, message, error=ValueError, **options):
    with pytest.raises(error, match=message):
        Adapter.load(folder, **options)


def set_config(folder, **values):
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **values})


def change_weights(folder, change):
    tensors = load_tensors(folder / WEIGHTS)[0]
    change(tensors)
    save_tensors(folder / WEIGHTS, tensors)


def test_the_good_one_loads(folder):
    assert len(Adapter.load(folder).sites) == 3


# --- where it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            Path("nowhere") / "absent",
            r"`path_or_id` must be .* a PEFT adapter or a Hub id, got .*absent: no such folder",
        ),
        ("./absent", r"got \./absent: no such folder"),
        ("absent", r"got absent: no such folder"),
    ],
    ids=["path", "relative text", "one word"],
)
def test_no_such_folder(source, message):
    refuses(source, message, FileNotFoundError)


def test_a_file_instead_of_its_folder(folder):
    refuses(folder / WEIGHTS, r"`path_or_id` must be the directory of a PEFT adapter, got the file .*give .*adapter")


@pytest.mark.parametrize("name", ["README.md", "adapters.zip"])
def test_a_file_beside_adapters(folder, name):
    (folder.parent / name).write_bytes(b"PK")
    refuses(
        folder.parent / name, rf"got the file .*{name}; give the directory that holds adapter_config.json, or leave"
    )


# --- adapter_config.json ---------------------------------------------------------------------------


def test_config_missing(folder):
    (folder / CONFIG).unlink()
    refuses(folder, r"must hold adapter_config.json, got none in", FileNotFoundError)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{'r': 4}", r"adapter_config.json must be JSON"), ("[1]", r"must hold a JSON object, got list")],
    ids=["Python", "list"],
)
def test_config_not_json(folder, content, message):
    (folder / CONFIG).write_text(content)
    refuses(folder, message)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "VERA", "ADALORA", "PREFIX_TUNING", None])
def test_other_peft_types(folder, kind):
    set_config(folder, peft_type=kind)
    refuses(folder, rf"`peft_type` in .* must be 'LORA', got {kind!r}; convert")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["weight"]),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 4}),
    ],
    ids=[
        "DoRA",
        "QALoRA",
        "BD-LoRA",
        "bias of B",
        "repeated blocks",
        "aLoRA",
        "tokens",
        "bare parameters",
        "Arrow",
        "KaSA",
        "MonteCLoRA",
    ],
)
def test_variants_that_are_not_plain_lora(folder, key, value):
    set_config(folder, **{key: value})
    refuses(folder, rf"`{key}` in .* must be off, got .*: .*;")


def test_trained_biases(folder):
    set_config(folder, bias="lora_only")
    refuses(folder, r"`bias` in .* must be 'none', got 'lora_only'")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base(folder, start):
    set_config(folder, init_lora_weights=start)
    refuses(folder, rf"`init_lora_weights` in .* got '{start}'; .*path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone(folder, start):
    set_config(folder, init_lora_weights=start)
    Adapter.load(folder)


@pytest.mark.parametrize("value", [None, False, "", [], {}, "none"])
def test_unknown_keys_of_newer_versions_at_rest(folder, value):
    set_config(folder, invented_next_year=value)
    Adapter.load(folder)


def test_unknown_keys_of_newer_versions_in_use(folder):
    set_config(folder, invented_next_year={"strength": 3})
    refuses(folder, r"`invented_next_year` in .* must be off or known, got \{'strength': 3\}")


def test_fan_in_fan_out_changes_nothing(folder):
    before = Adapter.load(folder).digest()
    set_config(folder, fan_in_fan_out=True)
    assert Adapter.load(folder).digest() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_alpha": "16"}, r"`lora_alpha` in .* must be a number, got '16'"),
        ({"alpha_pattern": [1]}, r"`alpha_pattern` in .* must map module names to numbers, got \[1\]"),
        ({"alpha_pattern": {"qkv": "2"}}, r"`alpha_pattern` in .* must map module names to numbers, got '2'"),
        ({"rank_pattern": {"(": 2}}, r"`rank_pattern` in .* must have regular keys, got '\('"),
    ],
    ids=["alpha", "pattern", "value in a pattern", "key of a pattern"],
)
def test_config_values_of_the_wrong_kind(folder, values, message):
    set_config(folder, **values)
    refuses(folder, message)


def test_rank_is_what_the_tensors_say(folder, caplog):
    set_config(folder, r=64, lora_alpha=4)
    adapter = Adapter.load(folder)
    assert set(adapter.ranks.values()) == {2}
    assert adapter.factors["blocks.0.attn.q"].scaling == 2.0
    assert "rank 64, its tensors have rank 2; the tensors count" in caplog.text


# --- adapter_model.safetensors ---------------------------------------------------------------------


def test_weights_missing(folder):
    (folder / WEIGHTS).unlink()
    refuses(folder, r"must hold adapter_model.safetensors, got none in", FileNotFoundError)


def test_pickle_only(folder):
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refuses(folder, r"must be safetensors, got only the pickle file adapter_model.bin .*safe_serialization=True")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_truncated_weights(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refuses(folder, r"adapter_model.safetensors must be a whole safetensors file")


def test_corrupt_header(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[8:20] = b"x" * 12
    (folder / WEIGHTS).write_bytes(content)
    refuses(folder, r"adapter_model.safetensors must be a whole safetensors file")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(folder, value):
    change_weights(folder, lambda tensors: tensors[f"{QKV}.lora_A.weight"][0].fill_(value))
    refuses(folder, r"lora_A at blocks.0.attn.q of 'adapter' must be finite")


def test_head_that_is_not_finite(folder):
    change_weights(folder, lambda tensors: tensors["base_model.model.head.weight"].fill_(math.nan))
    refuses(folder, r"the head in .*: the head's `weight` must be finite")


@pytest.mark.parametrize(("gone", "left"), [("A", "B"), ("B", "A")])
def test_half_a_pair(folder, gone, left):
    change_weights(folder, lambda tensors: tensors.pop(f"{QKV}.lora_{gone}.weight"))
    refuses(folder, rf"must hold lora_A and lora_B of each module, got 'blocks.0.attn.qkv' without lora_{gone}")


def test_pair_of_two_ranks(folder):
    change_weights(folder, lambda tensors: tensors.update({f"{QKV}.lora_A.weight": torch.ones(3, D)}))
    refuses(folder, r"of one rank, got \[3, 6\] and \[18, 2\] at 'blocks.0.attn.qkv'")


def test_qkv_pair_that_does_not_divide_by_three(folder):
    change_weights(folder, lambda tensors: tensors.update({f"{QKV}.lora_B.weight": torch.ones(20, 2)}))
    refuses(folder, r"qkv of block 0: `lora_B` of a layer of 3 parts must have rows divisible by 3, got \[20, 2\]")


@pytest.mark.parametrize(
    "module",
    [
        "model.layers.0.self_attn.q_proj",
        "encoder.layer.0.attention.self.query",
        "blocks.0.attn.q",
        "stages.0.blocks.0.mlp.fc1",
        "layers.1.blocks.0.attn.qkv",
    ],
    ids=["language model", "text encoder", "part of a qkv", "ConvNeXt", "Swin"],
)
def test_unknown_sites(folder, module):
    pair = {f"base_model.model.{module}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    change_weights(folder, lambda tensors: tensors.update(pair))
    refuses(folder, rf"must adapt q, k, v, attention output, fc1 or fc2 .* got LoRA on '{module}'")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("vit.embeddings.lora_embedding_A", r"got LoRA on an embedding: 'vit.embeddings.lora_embedding_A'"),
        ("blocks.0.attn.qkv.lora_magnitude_vector", r"got a magnitude vector of DoRA"),
        ("blocks.0.attn.qkv.lora_B.bias", r"got a bias of lora_B"),
        ("vit.layernorm.weight", r"neither a LoRA factor nor a linear head: 'vit.layernorm.weight'"),
        ("cls_classifier.weight", r"got two heads of a distilled model"),
        ("blocks.0.attn.qkv.hada_w1_a", r"neither a LoRA factor nor a linear head"),
    ],
    ids=["embedding", "DoRA", "bias", "norm", "two heads", "LoHa"],
)
def test_tensors_that_are_no_factors(folder, key, message):
    change_weights(folder, lambda tensors: tensors.update({f"base_model.model.{key}": torch.ones(2)}))
    refuses(folder, message)


def test_no_factors_at_all(folder):
    save_tensors(folder / WEIGHTS, {"base_model.model.head.weight": torch.ones(2, D)})
    refuses(folder, r"must hold LoRA factors \(lora_A, lora_B\) of a ViT's blocks, got none among its 1")


def test_two_adapters_in_one_file(folder):
    def add(tensors):
        for side in "AB":
            tensors[f"{QKV}.lora_{side}.second.weight"] = tensors[f"{QKV}.lora_{side}.weight"].clone()

    change_weights(folder, add)
    refuses(folder, r"must hold one adapter, got \['None', 'second'\]")


def test_two_models_in_one_file(folder):
    def add(tensors):
        for side in "AB":
            key = f"base_model.model.other.blocks.0.attn.qkv.lora_{side}.weight"
            tensors[key] = tensors[f"{QKV}.lora_{side}.weight"].clone()

    change_weights(folder, add)
    refuses(folder, r"each site in .* must come once, got attn.qkv of block 0 twice")


def test_adapter_of_a_text_model(folder):
    set_config(folder, auto_mapping={"base_model_class": "CLIPTextModel"})
    refuses(folder, r"must adapt a vision model, got one of CLIPTextModel")


# --- head and lorarecycle.json ---------------------------------------------------------------------


def test_head_of_another_width(folder):
    change_weights(folder, lambda tensors: tensors.update({"base_model.model.head.weight": torch.ones(3, D + 1)}))
    refuses(folder, r"the head in .* must read 6 features .* got a weight of \[3, 7\]")


def test_given_head_of_another_width(folder):
    refuses(folder, r"`head` must read 6 features .* got a weight of \[2, 5\]", head=Head(torch.ones(2, 5)))


def test_head_whose_bias_does_not_fit(folder):
    change_weights(folder, lambda tensors: tensors.update({"base_model.model.head.bias": torch.ones(2)}))
    refuses(folder, r"the head in .*: `bias` of a head must have one value per class \(3\), got \[2\]")


def test_head_without_weight(folder):
    change_weights(folder, lambda tensors: tensors.pop("base_model.model.head.weight"))
    refuses(folder, r"must hold the weight of its head, got its bias only; give `head=`")


def test_two_heads(folder):
    key = "base_model.model.classifier.weight"
    change_weights(folder, lambda tensors: tensors.update({key: torch.ones(3, D)}))
    refuses(folder, r"must hold one head, got \['classifier', 'head'\]; choose one and give it as `head=`")
    assert Adapter.load(folder, head=Head(torch.ones(2, D))).head is not None


def test_head_file_that_is_not_there(folder, tmp_path):
    refuses(folder, r"`head` must be a safetensors file .* no such file", FileNotFoundError, head=tmp_path / "x")


def test_head_file_of_another_kind(folder, tmp_path):
    (tmp_path / "head.bin").write_bytes(b"pickle")
    refuses(folder, r"`head` must be a safetensors file .* got .*head.bin; save it as one", head=tmp_path / "head.bin")


def test_head_file_with_other_keys(folder, tmp_path):
    save_tensors(tmp_path / "h.safetensors", {"kernel": torch.ones(3, D)})
    refuses(folder, r"must hold `weight` .* got \['kernel'\]", head=tmp_path / "h.safetensors")


def test_class_names_that_do_not_fit(folder):
    refuses(folder, r"`class_names` must name the head's 3 classes, got 2 names", class_names=["a", "b"])


def test_class_names_without_a_head(folder):
    change_weights(folder, lambda tensors: [tensors.pop(f"base_model.model.head.{k}") for k in ("weight", "bias")])
    refuses(folder, r"`class_names` must come with a head, and 'adapter' has none", class_names=["a", "b"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], r"lorarecycle.json must be a JSON object with `format_version`"),
        ({"format_version": 99}, r"`format_version` in .* must be at most 1, got 99; upgrade lorarecycle"),
        ({"format_version": 1, "head": [1]}, r"`head` in .* must be a JSON object"),
        (
            {"format_version": 1, "mean": [1, 2], "std": [1, 2, 3]},
            r"`mean` in .*lorarecycle.json must be one number or three",
        ),
    ],
    ids=["list", "newer", "head", "normalisation"],
)
def test_damaged_metadata(folder, content, message):
    write_json(folder / "lorarecycle.json", content)
    refuses(folder, message)


@pytest.mark.parametrize("columns", [[0, 9], [1, 1], [0, 1], "all", [0.0, 2.0]])
def test_block_structure_that_is_not_there_is_ignored(folder, columns):
    before = Adapter.load(folder)
    metadata = read_json(folder / "lorarecycle.json")
    metadata["fused"]["blocks.0.attn.qkv"]["attn.k"] = columns
    write_json(folder / "lorarecycle.json", metadata)
    after = Adapter.load(folder)
    assert all(torch.equal(before.delta(site), after.delta(site)) for site in before.sites)
