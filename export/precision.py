"""fp16 and int8 forms of an exported encoder: files in, files out."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FLOAT32_OPS = ["LayerNormalization", "Softmax", "TopK", "Range", "Min", "Max"]
"""What stays in float32 in an fp16 graph."""
INT8_OPS = ["MatMul", "Gemm"]
"""What int8 quantises: the products with weights; the patch convolution stays in float32."""


def to_fp16(source: Path, target: Path) -> None:
    """Weights and products in float16, layer norm and softmax in float32, inputs and outputs as they were."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # values below float16's smallest become that one
        model = convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=FLOAT32_OPS)
    onnx.save(model, target)


def to_int8(source: Path, target: Path) -> None:
    """Per-channel int8 weights; activations quantised while the graph runs, with the range of each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=target.parent) as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=INT8_OPS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


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
