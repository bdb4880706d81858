"""Any PEFT adapter as parameters: a language model's goes in and comes out, and peft loads it."""

import json

import pytest
import torch

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.generate import LoRAGenerator, PeftAdapter, load_adapter, load_generator
from lorarecycle.generate.parameters import make_adapter, read_parameters
from lorarecycle.generate.vectors import Layout
from lorarecycle.runtime.files import load_tensors, read_json, save_tensors, write_json

MODULES = [f"base_model.model.model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def language_adapter(seed, r=2, **config):
    """What a PEFT folder of a language model holds."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in MODULES:
        tensors[f"{module}.lora_A.weight"] = torch.randn(r, 16, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(12, r, generator=generator)
    return PeftAdapter(tensors, {**CONFIG, "r": r, **config}, f"lm-{seed}")


def updates(adapter):
    """scaling * B A of every module, by the configuration that it carries."""
    found = read_parameters(adapter)
    keys = [module.removeprefix("base_model.model.") for module in MODULES]
    return [
        found.scalings[key] * found.tensors[f"{module}.lora_B.weight"] @ found.tensors[f"{module}.lora_A.weight"]
        for key, module in zip(keys, MODULES, strict=True)
    ]


def test_a_folder_comes_back_as_it_was(tmp_path):
    adapter = language_adapter(0)
    adapter.save(tmp_path / "one")
    loaded = load_adapter(tmp_path / "one")
    assert isinstance(loaded, PeftAdapter)
    back = make_adapter(read_parameters(loaded))
    assert back.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    assert all(back.config[key] == value for key, value in CONFIG.items())


def test_a_language_model_s_adapters(quick, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    shape = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(shape)
        tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 0, 0.1)
        tuned.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    generator = LoRAGenerator.fit(folders, torch.eye(3), config={**quick, "epochs": 2}, device="cpu", quiet=True)
    generator = load_generator(generator.save(tmp_path / "g.safetensors"))
    made = generator.sample(torch.eye(3)[1])[0]
    made.save(tmp_path / "made")
    loaded = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM(shape), tmp_path / "made")
    state = peft.get_peft_model_state_dict(loaded)
    written = load_tensors(tmp_path / "made" / "adapter_model.safetensors")[0]
    assert state.keys() == written.keys() == load_tensors(folders[0] / "adapter_model.safetensors")[0].keys()
    assert all(torch.equal(state[key], written[key]) for key in written)
    assert loaded.peft_config["default"].r == 2
    assert loaded(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_ranks_pad_and_scalings_fold(quick, tmp_path):
    pool = [language_adapter(0, r=1), language_adapter(1, r=4, alpha_pattern={"layers.1.self_attn.v_proj": 2})]
    pool.append(language_adapter(2, r=2, use_rslora=True))
    layout = Layout.of(pool)
    for adapter in pool:
        back = layout.unflatten(layout.flatten(adapter), name="back")
        assert back.config["r"] == 4
        for one, two in zip(updates(back), updates(adapter), strict=True):
            torch.testing.assert_close(one, two)
    generator = LoRAGenerator.fit(pool, torch.eye(3), config=quick, device="cpu", quiet=True)
    made = generator.sample([1.0, 0, 0])[0].save(tmp_path / "made")
    assert read_json(made / "adapter_config.json")["lora_alpha"] == 32  # scaling 8, that of the first, at rank 4


def test_modules_saved_whole_are_heads(quick):
    pool = []
    for seed in range(2):
        adapter = language_adapter(seed, modules_to_save=["score"])
        score = torch.full((3, 16), float(seed), dtype=torch.float16)
        pool.append(PeftAdapter({**adapter.tensors, "base_model.model.score.weight": score}, adapter.config))
    whole = LoRAGenerator.fit(pool, torch.eye(2), config=quick, device="cpu", quiet=True).sample([1.0, 0])[0]
    assert whole.tensors["base_model.model.score.weight"].dtype == torch.float16
    assert whole.config["modules_to_save"] == ["score"]
    headless = {**quick, "heads": False}
    bare = LoRAGenerator.fit(pool, torch.eye(2), config=headless, device="cpu", quiet=True).sample([1.0, 0])[0]
    assert "base_model.model.score.weight" not in bare.tensors
    assert bare.config["modules_to_save"] is None


def test_other_kinds_of_adapters_keep_their_shapes(quick):
    def vera(seed, r=2):
        tensors = {f"{m}.vera_lambda_d": torch.randn(r, generator=torch.Generator().manual_seed(seed)) for m in MODULES}
        return PeftAdapter(tensors, {"peft_type": "VERA", "r": r}, f"vera-{seed}")

    generator = LoRAGenerator.fit([vera(0), vera(1)], torch.eye(2), config=quick, device="cpu", quiet=True)
    made = generator.sample([1.0, 0])[0]
    assert made.config["peft_type"] == "VERA"
    assert {tuple(t.shape) for t in made.tensors.values()} == {(2,)}
    with pytest.raises(ValueError, match=r"must have the same `r`, got 2 and 3"):
        LoRAGenerator.fit([vera(0), vera(1, r=3)], torch.eye(2), config=quick, device="cpu", quiet=True)


KEY = f"{MODULES[0]}.lora_B.weight"


def changed(key, tensor):
    """A language model's adapter with one tensor put in."""
    return PeftAdapter({**language_adapter(1).tensors, key: tensor}, CONFIG)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(lambda pool: pool[0], "must be of one kind", id="an adapter of a ViT"),
        pytest.param(
            lambda pool: language_adapter(1, fan_in_fan_out=True),
            "must have the same `fan_in_fan_out`, got None and True",
            id="another setting",
        ),
        pytest.param(lambda pool: changed(KEY, torch.ones(9, 2)), "must be for one architecture", id="another shape"),
        pytest.param(lambda pool: changed("more", torch.ones(1)), "must adapt the same sites", id="one tensor more"),
        pytest.param(lambda pool: changed(KEY, torch.full((12, 2), torch.nan)), "must be finite", id="NaN"),
    ],
)
def test_adapters_that_do_not_belong_together(pool, quick, other, message):
    adapters = [language_adapter(0), other(pool)]
    with pytest.raises(ValueError, match=message):
        LoRAGenerator.fit(adapters, torch.eye(2), config=quick, device="cpu", quiet=True)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_adapter(tmp_path / "nowhere")
    write_json(tmp_path / "adapter_config.json", CONFIG)
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors"):
        load_adapter(tmp_path)
    save_tensors(tmp_path / "adapter_model.safetensors", language_adapter(1).tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_adapter(tmp_path)


def test_a_damaged_adapter_of_a_vit_is_not_taken_for_bare_parameters(pool, tmp_path):
    folders = [adapter.save(tmp_path / str(i)) for i, adapter in enumerate(pool[:2])]
    weights = folders[1] / "adapter_model.safetensors"
    tensors = load_tensors(weights)[0]
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    save_tensors(weights, {**tensors, key: tensors[key] * torch.nan})
    with pytest.raises(ValueError, match="must be finite, got .* NaN"):
        LoRAGenerator.fit(folders, torch.eye(2), device="cpu", quiet=True)
    save_tensors(weights, tensors)
    (folders[1] / "lorarecycle.json").write_text("[]")
    with pytest.raises(ValueError, match="lorarecycle.json must be a JSON object"):
        load_adapter(folders[1])
    weights = folders[0] / "adapter_model.safetensors"
    save_tensors(weights, load_tensors(weights)[0])  # without its seal
    config = folders[0] / "adapter_config.json"
    write_json(config, {**read_json(config), "use_dora": True})
    assert isinstance(load_adapter(folders[0]), PeftAdapter)  # whole, and no plain LoRA


def test_an_alpha_of_zero_is_a_value():
    pool = [language_adapter(0, lora_alpha=0), language_adapter(1)]
    layout = Layout.of(pool)
    assert set(read_parameters(pool[0]).scalings.values()) == {0}
    for adapter in pool:
        back = layout.unflatten(layout.flatten(adapter), name="back")
        for one, two in zip(updates(back), updates(adapter), strict=True):
            torch.testing.assert_close(one, two)


def test_the_real_adapters_in_the_wild(real_data, quick):
    folder = real_data / "adapters" / "vit_base_r16_query_value"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    adapter = load_adapter(folder)
    assert isinstance(adapter, Adapter)
    layout = Layout.of([adapter])
    back = layout.unflatten(layout.flatten(adapter), name=adapter.name, class_names=adapter.head.class_names)
    assert back.digest() == adapter.digest()
