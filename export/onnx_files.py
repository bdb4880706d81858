"""One ONNX file each for the encoder, the head and a whole episode: written, converted, checked, put in place."""

from __future__ import annotations

import logging
import math
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import Adapter
from ..runtime.folders import atomic_folder
from ..vit.backbone import Backbone
from . import check
from .check import Parity, References
from .config import ExportConfig
from .graphs import EncoderGraph, HeadGraph, PrototypeGraph, prepare_backbone
from .operators import translations
from .precision import to_fp16, to_int8
from .runtime import import_onnxruntime

MAX_INLINE_BYTES = 2_000_000_000
"""Weights up to this size stay inside the file (protobuf ends at 2 GB); above, they go into one file beside it."""


def export_encoder(
    backbone: Backbone,
    path: str | PathLike[str],
    meta_lora: Adapter | None = None,
    config: ExportConfig | None = None,
    *,
    device: str = "cpu",
    images: Any = None,
) -> Parity:
    """Write the merged encoder: `pixel_values` [batch_size, 3, H, W] -> `embeddings` float32 [batch_size, D].

    The file holds standard operations only. It is checked (ONNX checker, shape inference, equality with PyTorch on
    random and on real images, at batch sizes 1, 2, 7 and 64 where the batch is dynamic) before it is put in place.

    Args:
        backbone: the frozen ViT.
        path: the file; weights above 2 GB go into `<name>.data` beside it.
        meta_lora: adapter, merged in float32; the plain backbone when None.
        config: settings; the defaults when None.
        device: "cpu" or "cuda", where the file is compared with PyTorch.
        images: real images to compare on, of any kind that `FewShotClassifier` takes; handwritten digits when None.

    Returns:
        the largest absolute error and the smallest cosine.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing; the message names the extra.
        ValueError: bad settings, an adapter that does not fit, or a file that fails a check; then nothing is left.
    """
    config = config or ExportConfig()
    path = Path(path)
    references = References(prepare_backbone(backbone, meta_lora, config.img_size), config, device, images)
    with atomic_folder(path.parent) as folder:
        write_encoder(references.graph, folder / path.name, config)
        return references.check_encoder(folder / path.name)


def export_episode(
    backbone: Backbone,
    path: str | PathLike[str],
    meta_lora: Adapter | None = None,
    config: ExportConfig | None = None,
    *,
    device: str = "cpu",
    images: Any = None,
) -> Parity:
    """Write a whole few-shot task as one graph (Eq. 3).

    `support_images` [S, 3, H, W], `support_labels` int64 [S] from 0 to C - 1, `query_images` [Q, 3, H, W] -> `logits`
    float32 [Q, C]. Classes, shots and queries are dynamic; a class without support images gets logits of minus
    infinity. A fixed `batch_size` is no part of it: S + Q images pass the encoder at once. Arguments, result and
    errors as in `export_encoder`.
    """
    config = config or ExportConfig()
    path = Path(path)
    references = References(prepare_backbone(backbone, meta_lora, config.img_size), config, device, images)
    with atomic_folder(path.parent) as folder:
        write_dynamic_episode(references, folder / path.name, config)
        return references.check_episode(folder / path.name)


def export_head(
    path: str | PathLike[str], config: ExportConfig | None = None, *, embed_dim: int, device: str = "cpu"
) -> Parity:
    """Write the head: `embeddings` [Q, D], `prototypes` [C, D] -> `logits`, `probabilities`, float32 [Q, C] (Eq. 3b).

    Args:
        path: the file.
        config: its `distance` and `opset` are used.
        embed_dim: D.
        device: where it is compared with PyTorch.
    """
    config = config or ExportConfig()
    path = Path(path)
    with atomic_folder(path.parent) as folder:
        write_head(folder / path.name, config, embed_dim)
        return check.check_head(folder / path.name, config, embed_dim, device)


def write_encoder(
    graph: EncoderGraph, path: Path, config: ExportConfig, *, dynamic: bool | None = None, data_name: str = ""
) -> None:
    """The encoder in the precision that the settings ask for, not yet checked."""
    if config.dtype == "int8" and sum(p.nbytes for p in graph.parameters()) > MAX_INLINE_BYTES:
        raise ValueError("`dtype` must be fp32 or fp16 for weights above 2 GB, got int8, whose quantiser ends there.")
    dynamic = config.batch_size is None if dynamic is None else dynamic
    full = path if config.dtype == "fp32" else path.with_suffix(".full.onnx")
    n = 2 if dynamic else config.batch_size or 1
    axes = {"pixel_values": {0: "batch_size"}} if dynamic else None
    model = _trace(graph, (graph.example(n),), ["pixel_values"], ["embeddings"], axes, config.opset)
    data_name = data_name or f"{path.name}.data"
    full_data = data_name if full == path else f"{full.name}.data"
    _save(model.model, full, full_data)
    if config.dtype == "fp16":
        _save(to_fp16(full), path, data_name)
    elif config.dtype == "int8":
        batch = 8 if dynamic else n
        pixels = check.trial_pixels(graph, batch * math.ceil(8 / batch))
        to_int8(full, path, [part.numpy() for part in pixels.split(batch)])
    if full != path:
        full.unlink()
        full.with_name(full_data).unlink(missing_ok=True)


def write_head(path: Path, config: ExportConfig, embed_dim: int) -> None:
    """The head, not yet checked."""
    if embed_dim < 1:
        raise ValueError(f"`embed_dim` must be at least 1, got {embed_dim}; pass the backbone's.")
    example = (torch.zeros(3, embed_dim), torch.ones(2, embed_dim))
    axes = {"embeddings": {0: "queries"}, "prototypes": {0: "classes"}}
    names = ["embeddings", "prototypes"], ["logits", "probabilities"]
    _save(_trace(HeadGraph(config.distance), example, *names, axes, config.opset).model, path)


def write_dynamic_episode(references: References, path: Path, config: ExportConfig) -> None:
    """An episode around an encoder of its own, which takes any number of images."""
    encoder = path.with_name(f"{path.stem}.encoder.onnx")
    write_encoder(references.graph, encoder, config, dynamic=True, data_name=f"{path.name}.data")
    if config.dtype != "fp32":  # the limit on an episode's logits is wide then
        references.check_encoder(encoder)
    write_episode(encoder, path, config)
    encoder.unlink()


def write_episode(encoder: Path, path: Path, config: ExportConfig) -> None:
    """Put the encoder's graph between a concatenation and the prototypes; weights beside it stay where they are."""
    import onnx
    from onnx import compose, helper

    middle = onnx.load(encoder, load_external_data=False)
    pixels, embeddings = middle.graph.input[0], middle.graph.output[0]
    embed_dim = embeddings.type.tensor_type.shape.dim[-1].dim_value
    example = (torch.zeros(5, embed_dim), torch.tensor([0, 1, 2]))
    axes = {"embeddings": {0: "images"}, "support_labels": {0: "support"}}
    tail = _trace(
        PrototypeGraph(config.distance), example, ["embeddings", "support_labels"], ["logits"], axes, config.opset
    )
    tail = compose.add_prefix(tail.model_proto, "task.", rename_inputs=False, rename_outputs=False)

    shape = [d.dim_value for d in pixels.type.tensor_type.shape.dim][1:]
    kind = pixels.type.tensor_type.elem_type
    inputs = [
        helper.make_tensor_value_info("support_images", kind, ["support", *shape]),
        tail.graph.input[1],
        helper.make_tensor_value_info("query_images", kind, ["queries", *shape]),
    ]
    joined = helper.make_node("Concat", ["support_images", "query_images"], [pixels.name], name="all_images", axis=0)
    tail.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["queries", "classes"])
    )
    graph = helper.make_graph(
        [joined, *middle.graph.node, *tail.graph.node],
        "episode",
        inputs,
        [tail.graph.output[0]],
        initializer=[*middle.graph.initializer, *tail.graph.initializer],
    )
    model = helper.make_model(graph, opset_imports=list(middle.opset_import), ir_version=middle.ir_version)
    onnx.save(model, path)


def _trace(
    module: nn.Module, example: tuple[Any, ...], inputs: list[str], outputs: list[str], axes: Any, opset: int
) -> Any:
    """The module as an ONNX program."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the export needs {error.name}; install `lorarecycle[onnx]`.") from None
    import_onnxruntime()  # for the conversion and the checks, later
    shapes = None  # the names of dynamic axes are given at the end: named ones may not begin at 1 or 0
    if axes is not None:
        shapes = tuple(dict.fromkeys(axes[key], torch.export.Dim.AUTO) for key in inputs)
    quiet = logging.getLogger("torch.onnx"), logging.getLogger("onnxscript")
    levels = [logger.level for logger in quiet]
    try:
        for logger in quiet:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            traced = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                optimize=True,
                verbose=False,
                custom_translation_table=translations(opset),
            )
        assert traced is not None
        written = traced.model.opset_imports[""]
        if written != opset:
            raise ValueError(
                f"`opset` must be one that the exporter writes, got {opset}, which came out as {written}; ask for less."
            )
        _name_axes(traced.model.graph, axes or {})
        return traced
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


def _name_axes(graph: Any, axes: dict[str, dict[int, str]]) -> None:
    """Give the dynamic axes of the inputs their names, wherever they appear."""
    import onnx_ir

    names = {}
    for value in graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            found = value.shape[axis]
            if not isinstance(found, onnx_ir.SymbolicDim):
                raise ValueError(f"axis {axis} of `{value.name}` must be dynamic, got {found} fixed by the model.")
            names[found.value] = name
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        for axis, found in enumerate(value.shape or ()):
            if isinstance(found, onnx_ir.SymbolicDim) and found.value in names:
                value.shape[axis] = names[found.value]


def _save(model: Any, path: Path, data_name: str = "") -> None:
    """Weights inside the file, or in `data_name` beside it where they are too large."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    for node in model.graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    onnx_ir.save(model, path, external_data=data_name if size > MAX_INLINE_BYTES else None)
