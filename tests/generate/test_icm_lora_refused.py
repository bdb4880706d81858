"""What ICM-LoRA's generator cannot learn from, cannot answer, and does not read; each named in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorarecycle import Adapter
from lorarecycle.generate import DiffusionConfig, LoRAGenerator, load_generator
from lorarecycle.runtime.files import load_tensors, save_tensors
from lorarecycle.vit.backbone import Backbone


def fit(adapters, vectors, config, **options):
    return LoRAGenerator.fit(adapters, vectors, config=config, device="cpu", quiet=True, **options)


NAN = float("nan")


@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        pytest.param(
            lambda pool, v: (pool[:1], v[:1]), ValueError, "at least two adapters or checkpoints, got 1", id="one"
        ),
        pytest.param(lambda pool, v: (pool[0], v[:1]), TypeError, "must be a list of adapters", id="no list"),
        pytest.param(
            lambda pool, v: ([1, 2], v[:2]),
            TypeError,
            "must be Adapter or PeftAdapter objects or folders|got int",
            id="numbers for adapters",
        ),
        pytest.param(
            lambda pool, v: (pool, v[:5]), ValueError, "one for each of the 6 adapters, got 5", id="too few vectors"
        ),
        pytest.param(
            lambda pool, v: (pool[:2], [v[0], v[1][:4]]),
            ValueError,
            r"must have one width, got \[4, 5\]",
            id="vectors of two widths",
        ),
        pytest.param(
            lambda pool, v: (pool[:2], [v[0], [0, 0, 0, 0, NAN]]),
            ValueError,
            r"`task_vectors\[1\]` must be finite, got 1 NaN",
            id="a NaN in a vector",
        ),
        pytest.param(
            lambda pool, v: (pool[:2], [v[0][None], v[1]]),
            ValueError,
            r"`task_vectors\[0\]` must be an array \[D\], got shape \[1, 5\]",
            id="a matrix for a vector",
        ),
        pytest.param(
            lambda pool, v: (pool[:2], [v[0], "cats"]),
            TypeError,
            r"`task_vectors\[1\]` must be an array of numbers \[D\], got str",
            id="text for a vector",
        ),
        pytest.param(
            lambda pool, v: (pool[:2], torch.eye(2, dtype=torch.complex64)),
            TypeError,
            "must hold real numbers, got torch.complex64",
            id="complex vectors",
        ),
        pytest.param(
            lambda pool, v: (pool, [v[0]] * 6),
            ValueError,
            "`task_vectors` must differ between tasks, got one for .* of classes",
            id="one vector for all tasks",
        ),
    ],
)
def test_bad_input(pool, vectors, quick, choose, error, message):
    with pytest.raises(error, match=message):
        fit(*choose(pool, vectors), quick)


def with_nan(adapter):
    adapter.factors["blocks.1.attn.v"].lora_B[0, 0] = NAN  # after the adapter's own check
    return adapter


@pytest.mark.parametrize(
    ("other", "message"),
    [
        pytest.param(
            lambda backbone, make, build, pool: make(backbone, sites=("attn.q", "attn.proj")),
            "must adapt the same sites, got blocks.0.attn.proj",
            id="other sites",
        ),
        pytest.param(
            lambda backbone, make, build, pool: make(Backbone(build(embed_dim=48), name="tiny")),
            r"must be for one architecture, got blocks.0.attn.q.lora_A \[2, 32\] and \[2, 48\]",
            id="another width",
        ),
        pytest.param(
            lambda backbone, make, build, pool: make(backbone, n_classes=4),
            r"head.weight \[3, 32\] and \[4, 32\]; leave heads out",
            id="another number of classes",
        ),
        pytest.param(
            lambda backbone, make, build, pool: Adapter(pool[1].factors, pool[1].head, base_model="other", name="o"),
            "must have the same `base_model`, got 'tiny' and 'other'",
            id="another base",
        ),
        pytest.param(
            lambda backbone, make, build, pool: with_nan(make(backbone, seed=7)),
            "blocks.1.attn.v.lora_B of adapter 'adapter-7' must be finite",
            id="a NaN in a factor",
        ),
    ],
)
def test_adapters_that_do_not_belong_together(
    pool, vectors, quick, make_adapter, tiny_backbone, build_vit, other, message
):
    with pytest.raises(ValueError, match=message):
        fit([pool[0], other(tiny_backbone, make_adapter, build_vit, pool)], vectors[:2], quick)


@pytest.mark.parametrize(
    ("config", "options", "error", "message"),
    [
        pytest.param(
            {"layers": 3}, {}, TypeError, "`config` must name settings of GenerateConfig .*, got layers", id="unknown"
        ),
        pytest.param("fast", {}, TypeError, "must be a GenerateConfig or a mapping, got str", id="text"),
        pytest.param(
            DiffusionConfig(), {}, TypeError, "must be a GenerateConfig .*, got DiffusionConfig", id="another method's"
        ),
        pytest.param({"lr": 1e30}, {}, FloatingPointError, "lower `lr`", id="it diverges"),
        pytest.param(
            {},
            {"dtype": "float16"},
            ValueError,
            "`dtype` must be float32 or bfloat16 for a fit, got float16",
            id="float16",
        ),
    ],
)
def test_settings_that_no_fit_takes(pool, vectors, quick, config, options, error, message):
    with pytest.raises(error, match=message):
        fit(pool, vectors, {**quick, **config} if isinstance(config, dict) else config, **options)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        pytest.param(
            lambda generator, make, v: generator.sample(v[:4]),
            r"the width of those that the generator learnt from \(5\), got 4",
            id="a shorter vector",
        ),
        *(
            pytest.param(
                lambda generator, make, v, n=n: generator.sample(v, n),
                f"`n` must be a whole number of at least 1, got {n}",
                id=f"n={n}",
            )
            for n in (0, 2.5, None)
        ),
        pytest.param(
            lambda generator, make, v: generator.reconstruct(make(r=3), v),
            "at most .* of the same architecture fits",
            id="another rank",
        ),
        pytest.param(
            lambda generator, make, v: generator.reconstruct(make(sites=("attn.q",)), v),
            r"must have blocks.0.attn.v.lora_A, .* got none",
            id="too few sites",
        ),
        pytest.param(
            lambda generator, make, v: generator.reconstruct(make(sites=("attn.q", "attn.v", "mlp.fc1")), v),
            "must adapt the generator's sites only, got blocks.0.mlp.fc1.lora_A too",
            id="too many sites",
        ),
    ],
)
@pytest.mark.medium
def test_bad_requests(pool, vectors, quick, make_adapter, tiny_backbone, ask, message):
    generator = fit(pool, vectors, quick)
    with pytest.raises(ValueError, match=message):
        ask(generator, lambda **options: make_adapter(tiny_backbone, **options), vectors[0])


@pytest.fixture
def saved(pool, vectors, quick, tmp_path):
    """A generator's file, and what it holds."""
    path = fit(pool, vectors, quick).save(tmp_path / "g.safetensors")
    tensors, strings = load_tensors(path)
    metadata = {key: json.loads(value) for key, value in strings.items() if key != "format"}
    return path, tensors, metadata


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        pytest.param({"format_version": 2}, "`format_version` of .* must be 1, got 2", id="a later format"),
        pytest.param({"method": "magic"}, "got method 'magic'", id="another method"),
        pytest.param({"method": None}, "got method None", id="no method"),
        pytest.param(None, "must be a generator's file, got another", id="no metadata"),
    ],
)
def test_files_of_another_kind(saved, metadata, message):
    path, tensors, own = saved
    changed = {key: value for key, value in {**own, **(metadata or {})}.items() if value is not None}
    save_tensors(path, tensors, *([] if metadata is None else [changed]))
    with pytest.raises(ValueError, match=message):
        load_generator(path)


def test_a_generator_of_another_method(saved):
    path, tensors, metadata = saved
    save_tensors(path, tensors, {**metadata, "method": "magic"})
    with pytest.raises(ValueError, match="method 'icm-lora', got 'magic'"):
        LoRAGenerator.load(path)


def test_someone_elses_file(saved):
    path, tensors, _ = saved
    save_file(tensors, path, {"kind": "someone else's, no JSON"})
    with pytest.raises(ValueError, match="must be a generator's file, got another"):
        load_generator(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_generator(tmp_path / "absent.safetensors")


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


BIAS = "model.to_mean.bias"


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        pytest.param(lambda t: without(t, "statistics"), {}, "statistics", id="no statistics"),
        pytest.param(lambda t: without(t, "conditions"), {}, "conditions", id="no conditions"),
        pytest.param(lambda t: without(t, BIAS), {}, "to_mean.bias", id="no bias"),
        pytest.param(lambda t: {**t, BIAS: torch.zeros(3)}, {}, "to_mean.bias", id="a short bias"),
        pytest.param(lambda t: {**t, BIAS: t[BIAS] * NAN}, {}, "to_mean.bias is NaN", id="NaN in the bias"),
        pytest.param(
            lambda t: {**t, "conditions": t["conditions"] * torch.inf},
            {},
            "conditions is NaN",
            id="infinite conditions",
        ),
        pytest.param(
            lambda t: {**t, "statistics": t["statistics"][:1]},
            {},
            r"statistics is \[1, 1, 2\], not \[2, 1, 2\]",
            id="half the statistics",
        ),
        pytest.param(
            lambda t: {**t, "conditions": t["conditions"][:1]},
            {},
            "2 class lists for 1 conditions",
            id="half the conditions",
        ),
        pytest.param(dict, {"config": {"layers": 3}}, "unexpected keyword argument 'layers'", id="an unknown setting"),
        pytest.param(dict, {"config": {"epochs": 0}}, "`epochs` must be at least 1", id="a bad setting"),
        pytest.param(dict, {"layout": {}}, "shapes", id="no layout"),
        pytest.param(dict, {"class_names": None}, "NoneType", id="no class names"),
    ],
)
@pytest.mark.medium
def test_damaged_files(saved, damage, changes, message):
    path, tensors, metadata = saved
    if "config" in changes:
        changes = {"config": {**metadata["config"], **changes["config"]}}
    save_tensors(path, damage(tensors), {**metadata, **changes})
    with pytest.raises(ValueError, match=rf"g.safetensors must hold all .*{message}.*; fit it again") as caught:
        load_generator(path)
    assert "\n" not in str(caught.value)


def test_a_layout_that_is_no_json(saved):
    path, tensors, metadata = saved
    strings = {key: json.dumps(value) for key, value in metadata.items()}
    save_file(tensors, path, {**strings, "format": "pt", "layout": "{"})
    with pytest.raises(ValueError, match="must hold all .*JSONDecodeError"):
        load_generator(path)
