"""int8 and fp16 files: products that are exact on every CPU, and what rounding costs beside float32's own spread."""

import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from lorarecycle.export import ExportConfig, check, export_encoder, export_onnx, onnx_files, precision
from lorarecycle.export.graphs import EncoderGraph
from lorarecycle.export.runtime import Graph
from onnx import helper, numpy_helper

from lorarecycle import Backbone, load_dataset
from lorarecycle.data.dataset import LabelledImages
from lorarecycle.data.images import normalize

pytestmark = pytest.mark.medium


def embed(path, pixels):
    graph = Graph(path, providers=["CPUExecutionProvider"])
    batch = graph.inputs["pixel_values"].shape[0]
    parts = torch.split(pixels, batch if isinstance(batch, int) else len(pixels))
    return np.concatenate([graph.run({"pixel_values": part.numpy()})["embeddings"].numpy() for part in parts])


def noise(ours, expected):
    """Root mean square of the error, over that of the distance of float32's answers from their mean."""
    spread = np.sqrt(np.square(expected - expected.mean(0)).sum(1).mean())
    return np.sqrt(np.square(ours - expected).sum(1).mean()) / spread


def quantised(path):
    """The int8 weights of a file, [K, N] each."""
    tensors = onnx.load(path).graph.initializer
    return [numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]


def test_int8_uint8_pruned_fixed(exported_int8, model, pictures):
    graph = onnx.load(exported_int8 / "encoder.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert {"MatMulInteger", "DynamicQuantizeLinear", "TopK", "GatherElements"} <= kinds
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [4, 3, 32, 32]
    scales = [t for t in graph.initializer if t.name.endswith("_scale")]
    assert len(quantised(exported_int8 / "encoder.onnx")) == 8, "four products with weights in each of two blocks"
    assert all(len(t.dims) == 1 and t.dims[0] > 1 for t in scales), "one scale per channel"
    ours = embed(exported_int8 / "encoder.onnx", pictures.images)
    merged = model.backbone.merge(model.meta_lora)
    expected = merged(normalize(pictures.images, merged.mean, merged.std), prune={0: 0.5}).numpy()
    assert 1e-4 < noise(ours, expected) < 0.1, "0.042 where it was measured; 0.36 where products saturate"
    config = json.loads((exported_int8 / "config.json").read_text())
    assert (config["batch_size"], config["input_dtype"], config["prune"]) == (4, "uint8", {"0": 0.5})
    assert config["accuracy"]["tasks"] == "600 5-way 1-shot tasks of handwritten digits"
    assert set(config["accuracy"]) == {"tasks", "float32", "int8"}
    assert all(config["accuracy"][name] > 20 for name in ("float32", "int8")), "chance"


def test_products_are_exact_in_the_worst_case(exported_int8):
    """The largest activation, 255, wherever a channel's weights have one sign, and 0 elsewhere.

    With weights up to 127 a CPU without VNNI is off here.
    """
    for weights in quantised(exported_int8 / "encoder.onnx"):
        assert 0 < np.abs(weights.astype(int)).max() <= precision.MAX_WEIGHT
        worst = np.concatenate([(weights.T > 0), (weights.T < 0)]).astype(np.uint8) * np.uint8(255)
        (ours,) = multiply(worst, weights)
        np.testing.assert_array_equal(ours, worst.astype(np.int32) @ weights.astype(np.int32))
    assert 2 * 255 * precision.MAX_WEIGHT <= 2**15 - 1


def multiply(x, weights):
    """MatMulInteger of uint8 [M, K] and int8 [K, N], as ONNX Runtime computes it on this CPU."""
    product = helper.make_node("MatMulInteger", ["x", "weights"], ["y"])
    graph = helper.make_graph(
        [product],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [len(x), weights.shape[1]])],
        [numpy_helper.from_array(weights, "weights")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def test_weights_that_could_saturate_are_refused(exported_int8, model, tmp_path, monkeypatch):
    from onnxruntime import quantization

    quantise = quantization.quantize_dynamic
    monkeypatch.setattr(
        quantization, "quantize_dynamic", lambda *args, **options: quantise(*args, **{**options, "reduce_range": False})
    )
    with pytest.raises(ValueError, match="must lie within 64 .* got 127 from onnxruntime's quantiser; install another"):
        export_encoder(model.backbone, tmp_path / "encoder.onnx", config=ExportConfig(dtype="int8"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_int8_leaves_a_product_with_an_outlier_in_float32(model, pictures, tmp_path, monkeypatch):
    """One neuron of the MLP far above the others, as in trained ViTs: in int8 it would swallow them."""
    backbone = deepcopy(model.backbone)
    with torch.no_grad():
        backbone.vit.blocks[1].mlp.fc1.bias[5] += 500
        backbone.vit.blocks[1].mlp.fc2.weight[:, 5] *= 0.01
    pixels = normalize(pictures.images, backbone.mean, backbone.std)
    expected = backbone(pixels).numpy()

    def export(name):
        export_encoder(backbone, tmp_path / name, config=ExportConfig(dtype="int8", atol=1e3))
        return noise(embed(tmp_path / name, pixels), expected)

    kept = export("kept.onnx")
    monkeypatch.setattr(precision, "MAX_ROUNDING", float("inf"))
    plain = export("plain.onnx")
    assert kept < 0.1, "0.034 where it was measured"
    assert plain > 0.4, "0.85 where it was measured"
    kinds = [[node.op_type for node in onnx.load(tmp_path / name).graph.node] for name in ("kept.onnx", "plain.onnx")]
    assert [k.count("MatMulInteger") for k in kinds] == [7, 8]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rounding_at_a_fixed_batch_size_with_uint8_input(model, tmp_path, batch_size):
    """The measure by hand: the first product reads the first layer norm."""
    config = ExportConfig(batch_size=batch_size, uint8_input=True)
    graph = EncoderGraph(model.backbone, uint8_input=True)
    onnx_files.write_encoder(graph, tmp_path / "encoder.onnx", config)
    pixels = check.trial_pixels(graph, batch_size)
    found = precision.rounding(tmp_path / "encoder.onnx", [pixels.numpy()])
    assert len(found) == 8
    inputs = []
    hook = model.backbone.vit.blocks[0].norm1.register_forward_hook(lambda module, _, y: inputs.append(y))
    graph(pixels)
    hook.remove()
    step = (inputs[0].max() - inputs[0].min()) / 255
    size = np.sqrt(np.median(inputs[0].square().mean((0, 1))))
    assert next(iter(found.values())) == pytest.approx(float(step / 12**0.5 / size), rel=1e-4)


def test_fp16_keeps_layer_norm_and_softmax_in_float32(model, tmp_path):
    parity = export_encoder(model.backbone, tmp_path / "half.onnx", model.meta_lora, ExportConfig(dtype="fp16"))
    assert 1e-5 < parity.max_error < 0.05
    inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half.onnx")).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for node in inferred.node:
        wanted = {"LayerNormalization": full, "Softmax": full, "MatMul": half}.get(node.op_type)
        assert wanted is None or {kinds.get(name, wanted) for name in node.output} == {wanted}, node.op_type
    weights = {t.data_type for t in inferred.initializer if len(t.dims) == 2 and min(t.dims) > 16}
    assert weights == {half}
    assert {v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.output)} == {full}


@pytest.mark.slow
def test_int8_of_vit_tiny_with_real_weights(real_data, tmp_path, monkeypatch):
    """By accuracy: photos of CIFAR-FS's validation classes, 112 x 112."""
    weights = real_data / "vit_tiny_patch16_224.safetensors"
    backbone = Backbone.load("vit_tiny_patch16_224", weights=weights)
    monkeypatch.setattr(check, "BATCH_SIZES", (1, 8))
    monkeypatch.setattr(check, "TASKS", check.TASKS[:1])
    photos = load_dataset(real_data / "cifar_fs.npz", "val")
    few = torch.cat([torch.nonzero(photos.labels == label)[:16, 0] for label in range(16)])
    data = LabelledImages(photos.images[few], photos.labels[few], photos.class_names)
    config = ExportConfig(dtype="int8", img_size=112)
    report = export_onnx(backbone, tmp_path / "out", config=config, data=data)
    assert report.parities[0].cosine > 0.9
    assert report.accuracy["int8"] > report.accuracy["float32"] - 3


@pytest.mark.slow
def test_fp16_of_vit_tiny_pruned(real_data, tmp_path):
    """Rounding keeps another token at the limit in some of the 64 images."""
    backbone = Backbone.load("vit_tiny_patch16_224", weights=real_data / "vit_tiny_patch16_224.safetensors")
    config = ExportConfig(dtype="fp16", img_size=112, prune={6: 0.5})
    assert export_onnx(backbone, tmp_path / "out", config=config).parities[0].cosine > 0.99
    with pytest.raises(ValueError, match=r"must be at least 0\.9999; nothing was kept\. Use dtype fp32, or set `atol`"):
        check.judge(Path("e.onnx"), [(np.array([[1, 0.1]]), np.array([[1, 0]]))], None, 0.9999)


def test_too_few_images_are_said_before_anything_is_exported(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("lorarecycle.export.folder.write_head", lambda *a: pytest.fail("it was exported"))
    few = pictures.sample(2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"`n_shot \+ n_query` must be at most the images of every class, got 16"):
        export_onnx(model.backbone, tmp_path / "served", config=ExportConfig(dtype="int8"), data=few)
    assert not list(tmp_path.iterdir())
