"""fp16 and int8 forms of an exported encoder."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .runtime import Graph

logger: logging.Logger = logging.getLogger(__name__)
FLOAT32_OPS = ["LayerNormalization", "Softmax", "TopK", "Range", "Min", "Max"]
"""What stays in float32 in an fp16 graph."""
INT8_OPS = ["MatMul", "Gemm"]
"""What int8 quantises: the products with weights; the patch convolution stays in float32."""
MAX_WEIGHT = 64
"""Largest int8 weight. CPUs with AVX2 or AVX-512 but no VNNI add two products of an activation (0 to 255) and a weight
in 16 bits, and what exceeds 32767 is cut off there: 2 * 255 * 64 = 32640 fits, 2 * 255 * 127 does not."""
MAX_ROUNDING = 0.1
"""A product stays in float32 if int8 would add more noise to its input than this share of a typical channel's size."""


def to_fp16(source: Path) -> Any:
    """Weights and products in float16, layer norm and softmax in float32, inputs and outputs as they were."""
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # values below float16's smallest become that one
        model = convert_float_to_float16(str(source), keep_io_types=True, op_block_list=FLOAT32_OPS)
    del model.graph.value_info[:]  # of float32 times
    ordered = onnx_ir.from_proto(model)
    ordered.graph.sort()  # the converter appends casts at the end
    return ordered


def to_int8(source: Path, target: Path, samples: Sequence[np.ndarray]) -> None:
    """Per-channel int8 weights; activations quantised while the graph runs, with the range of each call.

    Weights reach from -64 to 64, one bit less than int8 holds, so that no CPU saturates (see `MAX_WEIGHT`): the sums of
    products are the same whole numbers wherever the file is served.

    One step serves a whole activation. Trained ViTs have single neurons of the MLP that exceed all others whatever
    the image (ViT-Tiny, block 7: 210 where the others reach 3); the step that holds them rounds the rest to zero. Such
    products stay in float32 (see `rounding`).

    Args:
        source: the float32 graph.
        target: the file to write.
        samples: batches of the graph's only input, on which the products are judged.

    Raises:
        ValueError: the installed onnxruntime wrote weights that may saturate.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=target.parent) as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        coarse = [name for name, noise in rounding(prepared, samples).items() if noise > MAX_ROUNDING]
        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=INT8_OPS,
            nodes_to_exclude=coarse,
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # -64 to 64
            extra_options={"MatMulConstBOnly": True},
        )
    check_weights(target)
    logger.info("int8: %d products stay in float32 for their outliers: %s", len(coarse), ", ".join(coarse) or "none")


def check_weights(path: Path) -> None:
    """Raise where a CPU without VNNI could saturate.

    Raises:
        ValueError: a quantised product has weights beyond `MAX_WEIGHT`.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for product in (node for node in graph.node if node.op_type == "MatMulInteger"):
        tensor = weights.get(product.input[1])
        largest = None if tensor is None else int(np.abs(numpy_helper.to_array(tensor).astype(np.int16)).max())
        if largest is None or largest > MAX_WEIGHT:
            raise ValueError(
                f"the int8 weights of {product.name} must lie within {MAX_WEIGHT} (wider ones saturate on CPUs without "
                f"VNNI), got {'another kind' if largest is None else largest} from onnxruntime's quantiser; install "
                "another version of onnxruntime."
            )


def rounding(source: Path, samples: Sequence[np.ndarray]) -> dict[str, float]:
    """What int8 would do to the input of each product with weights, by the product's name.

    The noise of rounding, step / sqrt(12) with 255 steps from the smallest value to the largest, over the root mean
    square of a channel; median over channels, largest over batches.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in INT8_OPS and node.input[1] in weights]
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "rows"))
    del graph.output[:]
    for product in products:
        x, flat, square = product.input[0], f"{product.name} flat", f"{product.name} square"
        graph.node.append(helper.make_node("Flatten", [x], [flat], axis=-1))
        graph.node.append(helper.make_node("Mul", [flat, flat], [square]))
        for op, inputs in (("ReduceMin", [x]), ("ReduceMax", [x]), ("ReduceMean", [square, "rows"])):
            name = f"{product.name} {op}"
            graph.node.append(helper.make_node(op, inputs, [name], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    measured = source.with_name("measured.onnx")
    onnx.save(model, measured)
    session = Graph(measured, providers=["CPUExecutionProvider"])
    (pixels,) = session.inputs
    found = {product.name: 0.0 for product in products}
    for batch in samples:
        values = {name: value.numpy() for name, value in session.run({pixels: batch}).items()}
        for name in found:
            low, high, squares = (values[f"{name} {op}"] for op in ("ReduceMin", "ReduceMax", "ReduceMean"))
            noise = (max(high, 0) - min(low, 0)) / 255 / 12**0.5
            found[name] = max(found[name], float(noise / max(np.sqrt(np.median(squares)), 1e-12)))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
