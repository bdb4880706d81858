"""Adapters that are no PEFT folder: models in memory, files of LoRA-ViT, LoRA Recycle and CLIP-LoRA."""

import copy
import math
from functools import partial

import pytest
import torch

from lorarecycle import Adapter, Backbone, FewShotClassifier, evaluate, invert, recycle, tune
from lorarecycle.adapters.load_many import load_adapters
from lorarecycle.cli.main import main
from lorarecycle.runtime.files import save_tensors

from .peft_models import BLOCKS, HIDDEN, D, backbone_of, logits, randomised, timm_model, transformers_model
from .test_peft_read import peft_adapter

SHAPES = {
    "q": (D, D),
    "k": (D, D),
    "v": (D, D),
    "proj": (D, D),
    "fc1": (HIDDEN, D),
    "fc2": (D, HIDDEN),
    "qkv": (3 * D, D),
}


@pytest.fixture(scope="module")
def base():
    return Backbone(timm_model(), name="tiny", image_size=32)


# --- LoRA-ViT and LoRA Recycle ---------------------------------------------------------------------


def lora_vit(path, sites, *, step=1, blocks=BLOCKS, **others):
    """A file as that code writes it; numbers `step` apart, as some versions count."""
    generator = torch.Generator().manual_seed(0)
    tensors, pairs = dict(others), {}
    for n, (block, site) in enumerate((b, s) for b in range(blocks) for s in sites):
        out, width = SHAPES[site]
        lora_A, lora_B = (torch.randn(z, generator=generator) for z in ((2, width), (out, 2)))
        tensors[f"w_a_{n * step:03d}"], tensors[f"w_b_{n * step + step - 1:03d}"] = lora_A, lora_B
        pairs[block, site] = lora_B @ lora_A
    save_tensors(path, tensors)
    return pairs


@pytest.mark.parametrize(
    ("sites", "options"),
    [
        (("q", "v"), {}),
        (("q", "k", "v"), {}),
        (("q", "k", "v", "proj"), {"step": 4}),
        (("q", "k", "v", "proj", "fc1", "fc2"), {"step": 4}),
    ],
    ids=str,
)
def test_files_of_lora_vit(base, tmp_path, sites, options):
    pairs = lora_vit(tmp_path / "lora.safetensors", sites, **options)
    adapter = Adapter.from_lora_vit(tmp_path / "lora.safetensors", base)
    assert len(adapter.sites) == len(pairs)
    for (block, site), delta in pairs.items():
        room = "mlp" if site.startswith("fc") else "attn"
        torch.testing.assert_close(adapter.delta(f"blocks.{block}.{room}.{site}"), delta)
    assert (adapter.base_model, adapter.mean, adapter.notes) == (base.name, base.mean, ())
    base.check(adapter)


def test_a_fused_qkv_and_named_sites(base, tmp_path):
    file = tmp_path / "lora.safetensors"
    pairs = lora_vit(file, ("qkv",))
    adapter = Adapter.from_lora_vit(file, base)
    torch.testing.assert_close(torch.cat([adapter.delta(f"blocks.1.attn.{p}") for p in "qkv"]), pairs[1, "qkv"])
    pairs = lora_vit(file, ("k", "proj"))
    adapter = Adapter.from_lora_vit(file, base, sites=("k", "proj"), scaling=0.5)
    torch.testing.assert_close(adapter.delta("blocks.1.attn.proj"), 0.5 * pairs[1, "proj"])
    pairs = lora_vit(file, ("q", "v"), blocks=1)
    assert Adapter.from_lora_vit(file, base, layers=[1]).sites == ("blocks.1.attn.q", "blocks.1.attn.v")


def test_the_head_of_such_a_file(base, tmp_path):
    file = tmp_path / "lora.safetensors"
    weight = torch.randn(3, D)
    lora_vit(file, ("q", "v"), **{f"fc_{D}in_3out": weight})
    head = Adapter.from_lora_vit(file, base, class_names=["a", "b", "c"]).head
    assert torch.equal(head.weight, weight)
    assert head.class_names == ("a", "b", "c")
    lora_vit(file, ("q", "v"), **{"fc_8in_3out": torch.randn(3, 8), "norm": torch.ones(2)})  # reads CLIP's projection
    adapter = Adapter.from_lora_vit(file, base)
    assert adapter.head is None
    assert adapter.notes == (
        "left out: 1 other tensors (norm)",
        f"the head is left out: it reads 8 features, the model has {D}",
    )


def test_lora_on_the_classifier_is_left_out(base, tmp_path):
    file, extra = tmp_path / "lora.safetensors", BLOCKS * 2
    lora_vit(file, ("q", "v"), **{f"w_a_{extra:03d}": torch.ones(2, D), f"w_b_{extra:03d}": torch.ones(5, 2)})
    assert "LoRA on the classifier is left out" in Adapter.from_lora_vit(file, base).notes[0]


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (("q",) * 5, {}, r"must hold 1, 2, 3, 4 or 6 pairs for each of 2 blocks of 'tiny'"),
        (("q", "v"), {"blocks": 3}, r"pairs for each of 2 blocks .*got 6|must fit 'tiny'"),
        (
            ("fc1", "fc2"),
            {},
            r"must fit 'tiny', whose blocks.0.attn.q is \[24, 24\], got factors \[2, 24\] and \[48, 2\]",
        ),
        (("q", "v"), {"w_a_099": torch.ones(2, D)}, r"must hold as many `w_a_...` .* got 5 and 4"),
    ],
    ids=["five pairs", "another depth", "other layers", "half a pair"],
)
def test_files_that_do_not_fit(base, tmp_path, sites, options, message):
    file = tmp_path / "lora.safetensors"
    lora_vit(file, sites, **options)
    if message.startswith("pairs"):
        loaded = pytest.raises((ValueError,), match=message) if len(sites) * 3 % BLOCKS else None
        if loaded is None:  # three pairs a block fit as q, k, v: the shapes are the same
            assert len(Adapter.from_lora_vit(file, base).sites) == 6
            return
    with pytest.raises(ValueError, match=message):
        Adapter.from_lora_vit(file, base)


def test_the_hints_lead_there(base, tmp_path):
    file = tmp_path / "own" / "lora.safetensors"
    lora_vit(file, ("q", "v"))
    for source in (file, file.parent):
        with pytest.raises(ValueError, match=r"use `Adapter.from_lora_vit\(file, Backbone.load\(base\)\)`"):
            Adapter.load(source)
    with pytest.raises(TypeError, match=r"`base` must be a Backbone, got str; load one with `Backbone.load`"):
        Adapter.from_lora_vit(file, "demo")
    with pytest.raises(FileNotFoundError):
        Adapter.from_lora_vit(tmp_path / "none.safetensors", base)
    Adapter.from_lora_vit(file, Backbone.load(timm_model()))


# --- CLIP-LoRA -------------------------------------------------------------------------------------


def clip_lora(path, *, encoder="vision", position="all", layers=BLOCKS, text=0, parts=("q_proj", "v_proj"), **facts):
    generator = torch.Generator().manual_seed(0)

    def factors(width):
        return {
            part: {
                "w_lora_A": torch.randn(4, width, generator=generator),
                "w_lora_B": torch.randn(width, 4, generator=generator),
            }
            for part in parts
        }

    weights = {f"layer_{i}": factors(D if i >= text else 16) for i in range(layers + text)}
    metadata = {"r": 4, "alpha": 1, "encoder": encoder, "params": ["q", "v"], "position": position, **facts}
    torch.save({"weights": weights, "metadata": metadata}, path)
    return weights


def test_files_of_clip_lora(base, tmp_path):
    file = tmp_path / "lora_weights.pt"
    weights = clip_lora(file)
    adapter = Adapter.from_clip_lora(file, base)
    assert adapter.sites == tuple(f"blocks.{i}.attn.{s}" for i in range(BLOCKS) for s in "qv")
    pair = weights["layer_1"]["v_proj"]
    torch.testing.assert_close(adapter.delta("blocks.1.attn.v"), pair["w_lora_B"] @ pair["w_lora_A"] / math.sqrt(4))
    weights = clip_lora(file, encoder="both", text=3, parts=("k_proj", "proj"))
    adapter = Adapter.from_clip_lora(file, base)
    assert adapter.notes == ("3 layers of the text tower are left out; only the vision model counts",)
    pair = weights["layer_3"]["proj"]
    torch.testing.assert_close(adapter.delta("blocks.0.attn.proj"), pair["w_lora_B"] @ pair["w_lora_A"] / 2)
    clip_lora(file, position="half-up", layers=1)
    assert Adapter.from_clip_lora(file, base).sites == ("blocks.1.attn.q", "blocks.1.attn.v")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "text"}, r"must adapt CLIP's vision tower, got encoder='text'"),
        ({"layers": 5}, r"must fit 'tiny' with 2 blocks, got 5 layers at position 'all'"),
        ({"position": "somewhere"}, r"got 2 layers at position 'somewhere'"),
        ({"r": 10**400}, r"`r` in the metadata of .* must be a number above 0"),
        ({"alpha": [1]}, r"`alpha` in the metadata"),
        ({"parts": ("x_proj",)}, r"`layer_0.x_proj` in .* must be q_proj"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_bad_files_of_clip_lora(base, tmp_path, options, message):
    clip_lora(tmp_path / "w.pt", **options)
    with pytest.raises(ValueError, match=message):
        Adapter.from_clip_lora(tmp_path / "w.pt", base)


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", {"weights": {}}, [1], {"weights": {"x": 1}, "metadata": {}}], ids=str
)
def test_other_pickles(base, tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "w.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt must (be a file of CLIP-LoRA|hold `weights`)|`weights` in"):
        Adapter.from_clip_lora(tmp_path / "w.pt", base)
    with pytest.raises(ValueError, match=r"for a file of CLIP-LoRA use `Adapter.from_clip_lora"):
        Adapter.load(tmp_path / "w.pt")


def test_code_in_a_pickle_is_not_run(base, tmp_path):
    torch.save({"weights": {"layer_0": print}, "metadata": {}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"with tensors and plain values only"):
        Adapter.from_clip_lora(tmp_path / "w.pt", base)


def test_the_command_converts(tmp_path, capsys):
    demo = Backbone.load("demo")
    width = demo.embed_dim
    tensors = {}
    for n in range(2 * demo.num_blocks):
        tensors[f"w_a_{n:03d}"], tensors[f"w_b_{n:03d}"] = torch.ones(1, width), torch.ones(width, 1)
    save_tensors(tmp_path / "a.safetensors", tensors)
    (tmp_path / "b.safetensors").write_bytes(b"")
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    command = ["convert", *files, "--base", "demo", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 2
    assert "b.safetensors must be a whole safetensors file" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    assert Adapter.load(tmp_path / "out" / "a").sites == Adapter.from_lora_vit(files[0], demo).sites
    assert main([*command, "--skip-bad", "--strict"]) == 2
    assert "`--strict` must come without `--skip-bad`" in capsys.readouterr().err


# --- PEFT models in memory -------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path):
    pytest.importorskip("transformers")
    model = transformers_model("vit", num_labels=3)
    backbone = backbone_of(copy.deepcopy(model))
    return peft_adapter(model, tmp_path / "file", ["q_proj", "query"], r=2, modules_to_save=["classifier"]), backbone


@pytest.mark.medium
@torch.no_grad()
def test_a_model_reads_as_its_files_do(tuned, images, tmp_path):
    model, backbone = tuned
    expected = Adapter.load(tmp_path / "file")
    for one in (model, torch.nn.DataParallel(model), torch.compile(model)):
        assert Adapter.from_peft(one).weights_digest() == expected.weights_digest()
    assert Adapter.load(model).weights_digest() == expected.weights_digest()
    adapter = load_adapters(model)[0]
    found = adapter.head(backbone.merge(adapter)(images))
    torch.testing.assert_close(found, logits(model, images), rtol=0, atol=1e-4)


def test_several_adapters_of_one_model(tuned):
    model, _ = tuned
    model.add_adapter("second", model.peft_config["default"])
    assert [one.name for one in load_adapters(model)] == ["adapter", "second"]
    assert len(load_adapters([model, model])) == 4
    assert Adapter.from_peft(model, "second").name == "second"
    with pytest.raises(ValueError, match=r"`adapter_name` must be one of \['default', 'second'\], .*got 'third'"):
        Adapter.from_peft(model, "third")


def test_a_model_of_transformers_that_wears_an_adapter(tuned, tmp_path):
    import peft

    expected = Adapter.load(tmp_path / "file")
    model = transformers_model("vit", num_labels=3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "query"])
    peft.inject_adapter_in_model(config, model, "mine")  # what `add_adapter` does, which asks for a newer PEFT
    model.peft_config = {"mine": config}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=generator)
    adapter = Adapter.from_peft(model)
    assert adapter.sites == expected.sites
    assert adapter.name == "mine"


def test_models_are_taken_wherever_adapters_are(tuned, tiny_data):
    model, backbone = tuned
    data = tiny_data.images, tiny_data.labels
    by_model = FewShotClassifier(backbone, model).fit(*data)
    by_value = FewShotClassifier(backbone, Adapter.from_peft(model)).fit(*data)
    assert (by_model.prototypes_ == by_value.prototypes_).all()
    made = recycle([model, Adapter.from_peft(model, name="again")], base=backbone, meta={"steps": 0}, quiet=True)
    assert made.head is None
    tasks = {"n_way": 2, "n_query": 2, "n_tasks": 3}
    by_model = evaluate(backbone, tiny_data, model, config=tasks, quiet=True)
    by_value = evaluate(backbone, tiny_data, Adapter.from_peft(model), config=tasks, quiet=True)
    assert torch.equal(by_model.accuracies, by_value.accuracies)
    for adapters in (model, [model]):
        worn = evaluate(backbone, tiny_data, method="average", adapters=adapters, config=tasks, quiet=True)
        assert torch.equal(worn.accuracies, by_value.accuracies)
    for call in (backbone.merge, backbone.check, partial(invert, backbone)):
        with pytest.raises(TypeError, match="`adapter` must be an Adapter, got PeftModel; `Adapter.load` reads"):
            call(model)


def test_folders_are_taken_by_evaluate(base, tiny_data, make_adapter, tmp_path):
    adapter = make_adapter(base)
    folder, tasks = adapter.save(tmp_path / "a"), {"n_way": 2, "n_query": 2, "n_tasks": 3}
    found = evaluate(base, tiny_data, folder, config=tasks, quiet=True)
    assert torch.equal(found.accuracies, evaluate(base, tiny_data, adapter, config=tasks, quiet=True).accuracies)
    with pytest.raises(TypeError, match="`data` must be LabelledImages or a Dataset, got str; `load_dataset`"):
        evaluate(base, "digits")
    with pytest.raises(TypeError, match="`data` must be LabelledImages or a Dataset, got str; `load_dataset`"):
        tune(base, "digits")


@pytest.mark.parametrize(
    "thing", [torch.nn.Linear(2, 2), object(), {"peft_config": {}}], ids=["module", "object", "dict"]
)
def test_what_is_no_peft_model(thing):
    with pytest.raises(TypeError, match=r"`model` must be a PEFT model, got \w+; make one with `peft.get_peft_model`"):
        Adapter.from_peft(thing)


@torch.no_grad()
def test_a_base_in_memory(images):
    pytest.importorskip("transformers")
    for kind in ("vit", "clip_vision_model"):
        model = randomised(transformers_model(kind))
        backbone = Backbone.load(model)
        torch.testing.assert_close(backbone(images), backbone_of(model)(images))
        assert backbone.family == kind.partition("_")[0]


def test_a_base_with_adapters(tuned):
    model, _ = tuned
    with pytest.raises(TypeError, match=r"without adapters, got one with PEFT's; give what `model.unload\(\)` returns"):
        Backbone.load(model)
    Backbone.load(model.unload())  # the advice
