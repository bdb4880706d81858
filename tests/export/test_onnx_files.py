"""The ONNX files: what they hold, that they equal PyTorch, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from lorarecycle.export import (
    ExportConfig,
    check,
    export_encoder,
    export_episode,
    export_head,
    export_onnx,
    folder,
    onnx_files,
)

from lorarecycle import Adapter, Backbone
from lorarecycle.adapters.adapter import LoRAFactors
from lorarecycle.data.images import normalize
from lorarecycle.runtime.files import LEFTOVER

pytestmark = pytest.mark.medium

CPU = ["CPUExecutionProvider"]


def run(path, **feeds):
    return ort.InferenceSession(str(path), providers=CPU).run(None, {k: np.asarray(v) for k, v in feeds.items()})


def shapes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def op_types(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def test_folder(exported):
    assert {file.name for file in exported.iterdir()} == {"encoder.onnx", "head.onnx", "episode.onnx", "config.json"}
    graphs = {name: onnx.load(exported / f"{name}.onnx").graph for name in ("encoder", "head", "episode")}
    assert shapes(graphs["encoder"].input) == {"pixel_values": ["batch_size", 3, 32, 32]}
    assert shapes(graphs["encoder"].output) == {"embeddings": ["batch_size", 32]}
    assert shapes(graphs["head"].input) == {"embeddings": ["queries", 32], "prototypes": ["classes", 32]}
    assert list(shapes(graphs["head"].output)) == ["logits", "probabilities"]
    assert list(shapes(graphs["episode"].input)) == ["support_images", "support_labels", "query_images"]
    assert shapes(graphs["episode"].output) == {"logits": ["queries", "classes"]}
    for graph in graphs.values():
        assert {node.domain for node in graph.node} <= {""}
    assert not any("lora" in tensor.name.lower() for tensor in graphs["encoder"].initializer)
    config = json.loads((exported / "config.json").read_text())
    assert config["mean"] == [0.4, 0.5, 0.6]
    assert config["meta_lora"]["name"] == "meta"
    assert config["embed_dim"] == 32
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert len(config["parity"]) == 3
    assert all(0 < part["max_error"] < 1e-4 for part in config["parity"])


def test_a_class_without_support_images_is_never_chosen(exported):
    pixels = np.random.default_rng(0).normal(size=(5, 3, 32, 32)).astype(np.float32)
    labels = np.array([0, 2])
    (logits,) = run(
        exported / "episode.onnx", support_images=pixels[:2], support_labels=labels, query_images=pixels[2:]
    )
    assert np.isneginf(logits[:, 1]).all()
    assert np.isfinite(logits[:, [0, 2]]).all()


def test_gelu_in_the_form_that_onnx_runtime_fuses(exported, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    ort.InferenceSession(str(exported / "encoder.onnx"), options, providers=CPU)
    assert {"BiasGelu", "Gelu"} & op_types(tmp_path / "fused.onnx")
    assert "Erf" not in op_types(tmp_path / "fused.onnx")


@pytest.mark.parametrize(("approximate", "opset"), [("none", 18), ("tanh", 18), ("tanh", 20)])
def test_gelu_equals_torch(tmp_path, approximate, opset):
    x = torch.linspace(-8, 8, 1001)[None]
    gelu = torch.nn.GELU(approximate)
    onnx_files._save(onnx_files._trace(gelu, (x,), ["x"], ["y"], None, opset).model, tmp_path / "gelu.onnx")
    np.testing.assert_allclose(run(tmp_path / "gelu.onnx", x=x)[0], gelu(x), atol=1e-6)


def test_pruned_encoder_equals_the_pruned_backbone(model, tmp_path):
    config = ExportConfig(prune={0: 0.5, 1: 0.25}, img_size=48, uint8_input=True, opset=20)
    export_encoder(model.backbone, tmp_path / "pruned.onnx", config=config)
    assert {"TopK", "GatherElements"} <= op_types(tmp_path / "pruned.onnx")
    assert onnx.load(tmp_path / "pruned.onnx").opset_import[0].version == 20
    images = torch.randint(0, 256, (5, 3, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    backbone = Backbone(model.backbone.vit, image_size=48, mean=model.backbone.mean, std=model.backbone.std)
    expected = backbone(normalize(images, backbone.mean, backbone.std), prune=config.prune).numpy()
    np.testing.assert_allclose(run(tmp_path / "pruned.onnx", pixel_values=images)[0], expected, atol=1e-4)


def test_head_and_episode_by_themselves(model, tmp_path):
    config = ExportConfig(distance="sqeuclidean")
    assert export_head(tmp_path / "head.onnx", config, embed_dim=32).max_error < 1e-4
    assert export_episode(model.backbone, tmp_path / "episode.onnx", config=config).max_error < 1e-4
    assert {file.name for file in tmp_path.iterdir()} == {"head.onnx", "episode.onnx"}


@pytest.mark.slow
def test_large_weights_lie_in_one_file_beside_the_graph(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "MAX_INLINE_BYTES", 1000)
    report = export_onnx(model.backbone, tmp_path / "big")
    names = {file.name for file in (tmp_path / "big").iterdir()}
    assert {"encoder.onnx", "encoder.onnx.data", "episode.onnx"} <= names
    graph = (tmp_path / "big" / "encoder.onnx").read_bytes()
    assert len(graph) < 120_000
    assert b"stack_trace" not in graph, "paths of the machine that exported it"
    assert report.parities[0].max_error < 1e-4
    images = np.zeros((2, 3, 32, 32), np.float32)
    expected = model.backbone(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(tmp_path / "big" / "encoder.onnx", pixel_values=images)[0], expected, atol=1e-4)
    feeds = {"support_images": images, "support_labels": np.array([0, 1]), "query_images": images[:1]}
    assert run(tmp_path / "big" / "episode.onnx", **feeds)[0].shape == (1, 2)


def test_int8_of_large_weights_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "MAX_INLINE_BYTES", 1000)
    with pytest.raises(ValueError, match="`dtype` must be fp32 or fp16"):
        export_encoder(model.backbone, tmp_path / "encoder.onnx", config=ExportConfig(dtype="int8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_whose_float32_is_noisy_is_judged_in_float64(model, tmp_path, monkeypatch):
    config = ExportConfig(atol=1e-4)
    monkeypatch.setattr(check.References, "embeddings", torch.full((64, 32), 1e3))
    parity = export_encoder(model.backbone, tmp_path / "encoder.onnx", config=config)
    assert parity.max_error < 1e-4
    assert parity.reference == "float64"
    assert str(parity).endswith("against PyTorch in float64")
    monkeypatch.setattr(check.References, "exact", torch.full((64, 32), 1e3))
    with pytest.raises(ValueError, match="at most `atol`"):
        export_encoder(model.backbone, tmp_path / "other.onnx", config=config)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.onnx"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"opset": 17}, "`opset` must be at least 18, got 17"),
        ({"opset": 99}, "`opset` must be one that the exporter writes, got 99, which came out as 18"),
        ({"dtype": "bf16"}, "`dtype` must be one of"),
        ({"distance": "manhattan"}, "`distance` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"atol": 0.0}, "`atol` must be a number above 0"),
        ({"img_size": 35}, "`img_size` must be a multiple of the patch size 8, got 35; take 32"),
        ({"img_size": 3}, "`img_size` must be a multiple of the patch size 8, got 3; take 8"),
        ({"prune": {2: 0.5}}, "`prune` must name layers 0 to 1, got 2"),
        ({"prune": {0: 1.0}}, r"`prune\[0\]` must be a ratio in"),
    ],
)
def test_bad_settings(model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(model.backbone, tmp_path / "out", config=ExportConfig(**settings))
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_width_is_refused(model, tmp_path):
    foreign = Adapter({"blocks.0.attn.q": LoRAFactors(torch.ones(2, 64), torch.ones(64, 2), 1.0)}, name="wide")
    with pytest.raises(ValueError, match=r"adapter 'wide' must fit backbone 'tiny'"):
        export_onnx(model.backbone, tmp_path / "out", foreign)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("export", "error", "message"),
    [
        pytest.param(
            lambda backbone, out: export_onnx("demo", out),
            TypeError,
            r"`backbone` must be a Backbone, got str; use `Backbone\.load`",
            id="a name for a backbone",
        ),
        pytest.param(
            lambda backbone, out: export_encoder(backbone, out / "encoder.onnx", "meta-lora"),
            TypeError,
            r"`meta_lora` must be an Adapter, got str; use `Adapter\.load`",
            id="a name for an adapter",
        ),
        pytest.param(
            lambda backbone, out: export_head(out / "head.onnx", embed_dim=0),
            ValueError,
            "`embed_dim` must be at least 1, got 0",
            id="no width",
        ),
    ],
)
def test_other_kinds_of_objects_are_refused(model, tmp_path, export, error, message):
    with pytest.raises(error, match=message):
        export(model.backbone, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["file", "file/inner"])
def test_a_folder_that_cannot_be_made(tmp_path, output):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=rf"cannot write into the folder .*{output}: .*; choose another"):
        export_head(tmp_path / output / "head.onnx", embed_dim=8)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_no_folder_is_left_that_cannot_be_written(tmp_path, monkeypatch):
    original = Path.mkdir

    def full(self, *args, **keywords):
        if self.name.startswith(LEFTOVER):
            original(self.parent, exist_ok=True, parents=True)
            raise OSError(28, "No space left on device")
        original(self, *args, **keywords)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left on device; choose another"):
        export_head(tmp_path / "deep" / "out" / "head.onnx", embed_dim=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (check.MAX_LOGIT_ERROR, r"^episode\.onnx: .* the error must be at most"),
        (check.MIN_COSINE, r"^episode\.encoder\.onnx: .* the cosine must be at least"),
    ],
)
def test_an_int8_episode_that_is_too_far_off_is_removed(model, tmp_path, monkeypatch, limits, message):
    monkeypatch.setitem(limits, "int8", 1e-9 if limits is check.MAX_LOGIT_ERROR else 1.1)
    with pytest.raises(ValueError, match=message):
        export_episode(model.backbone, tmp_path / "episode.onnx", config=ExportConfig(dtype="int8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_fail_whatever_the_limits(bad):
    rows = np.ones((2, 3), np.float32)
    broken = rows.copy()
    broken[1, 1] = bad
    with pytest.raises(ValueError, match=r"episode\.onnx must give finite values, got 1 NaN or infinite"):
        check.judge(Path("episode.onnx"), [(broken, rows)], None, None)


def test_the_reference_on_a_gpu_is_computed_without_tf32():
    def precisions():
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before = precisions()
    with check.full_float32("cuda"):
        assert precisions() == ("ieee", "ieee")
    assert precisions() == before
    with check.full_float32("cpu"):
        assert precisions() == before


def test_a_file_that_is_too_far_off_is_removed(model, tmp_path):
    with pytest.raises(ValueError, match=r"head\.onnx: max error .* at most `atol` 1e-12; nothing was kept"):
        export_onnx(model.backbone, tmp_path / "deep" / "out", config=ExportConfig(atol=1e-12))
    assert not list(tmp_path.iterdir())


def test_a_full_folder_needs_force(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "encoder.pt2").write_text("of an earlier export")
    (out / f"{LEFTOVER}x").mkdir()
    with pytest.raises(FileExistsError, match="`directory` must be empty"):
        export_onnx(model.backbone, out)
    with pytest.raises(FileExistsError, match="must be a folder, got the file"):
        export_onnx(model.backbone, out / "notes.txt")
    assert len(list(out.iterdir())) == 3
    export_onnx(model.backbone, out, force=True)
    names = {file.name for file in out.iterdir() if file.name != f"{LEFTOVER}x"}
    assert names == {"notes.txt", "encoder.onnx", "head.onnx", "episode.onnx", "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_what_a_killed_export_left_is_free(tmp_path):
    (tmp_path / f"{LEFTOVER}x").mkdir()
    folder.require_free(tmp_path, force=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(model, tmp_path):
    with pytest.raises(ValueError, match="`device` must be one that this machine has"):
        export_onnx(model.backbone, tmp_path / "out", device="cuda")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.export, "export", None)  # no work before
    with pytest.raises(ImportError, match=r"install `lorarecycle\[onnx\]`"):
        export_head(Path(tmp_path) / "head.onnx", embed_dim=8)
    assert not list(tmp_path.iterdir())
