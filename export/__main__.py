"""The command line of the export: `python -m lorarecycle.export --onnx | --aoti`."""

from __future__ import annotations

import logging
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..config import Distance
from .config import ExportConfig, parse_batch_size, parse_prune


@dataclass(frozen=True)
class Export:
    """Turn a backbone and a meta-LoRA into files that answer few-shot queries without PyTorch or without Python."""

    output: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder to write to; MODEL-export when left out."""
    onnx: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write encoder.onnx, head.onnx, episode.onnx and config.json, for ONNX Runtime."""
    aoti: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write encoder.pt2, compiled ahead of time for this kind of machine, for lorarecycle-predict."""
    model: str | None = None
    """Model: a timm name, a Hub id, a folder, a safetensors file; what the meta-LoRA names, or the demo's model."""
    weights: Path | None = None
    """Local safetensors weights for the architecture that --model names."""
    meta_lora: str | None = None
    """PEFT folder or Hub id; the plain model when left out."""
    opset: int = 18
    """ONNX operator set, 18 or later."""
    dtype: Literal["fp32", "fp16", "int8"] = "fp32"
    """Precision of the encoder. int8 files are about a third of fp32's size and as accurate on every CPU; how much
    faster they are depends on the CPU, most with VNNI."""
    img_size: int | None = None
    """Side in pixels, a multiple of the patch; the model's own when left out."""
    batch_size: str = "dynamic"
    """"dynamic", or a number of images per call."""
    uint8_input: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Put scaling and normalisation into the graph: pixels 0 to 255 go in."""
    atol: float | None = None
    """Largest absolute error against PyTorch. Left out: 1e-4 for fp32, a cosine of 0.999 for fp16 (0.99 with --prune)
    and 0.9 for int8."""
    prune: tuple[str, ...] = ()
    """Patch tokens to drop, layer:ratio, such as 6:0.5; several may be given."""
    distance: Distance = "centred_cosine"
    """Between a feature and the class centres; the papers' is euclidean."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the files are compared with PyTorch."""
    images: tuple[Path, ...] = ()
    """Image files to compare on; handwritten digits when left out."""
    data: str | None = None
    """Labelled images on which fp16 and int8 are compared with float32 by few-shot accuracy, as for `lorarecycle
    evaluate`; handwritten digits when left out."""
    split: str | None = None
    """Part of the data: train, val, test."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace an earlier export in the folder."""

    def run(self) -> None:
        from ..adapters.adapter import Adapter
        from ..data.load import load_dataset
        from ..vit.backbone import Backbone
        from .folder import export_onnx, require_free
        from .package import export_aoti, require_fp32

        if not (self.onnx or self.aoti):
            raise ValueError("the format must be named, got none; pass `--onnx`, `--aoti` or both.")
        self._refuse_idle_flags()
        config = ExportConfig(
            opset=self.opset,
            dtype=self.dtype,
            img_size=self.img_size,
            batch_size=parse_batch_size(self.batch_size),
            uint8_input=self.uint8_input,
            atol=self.atol,
            prune=parse_prune(self.prune),
            distance=self.distance,
        )
        if self.aoti:
            require_fp32(config)
        if self.output is not None:
            require_free(self.output, self.force)
        meta_lora = None if self.meta_lora is None else Adapter.load(self.meta_lora)
        base = self.model or (meta_lora.base_model if meta_lora else "demo")
        if not base:
            raise ValueError(f"`--model` must name the model, got none and {self.meta_lora} does not name it either.")
        backbone = Backbone.load(base, weights=self.weights)
        output = self.output or Path(f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', backbone.name)}-export")
        require_free(output, self.force)
        images = list(self.images) or None
        if self.onnx:
            data = None if self.data is None else load_dataset(self.data, self.split)
            keywords: dict[str, Any] = {"device": self.device, "images": images, "data": data, "force": self.force}
            print(export_onnx(backbone, output, meta_lora, config, **keywords))
        if self.aoti:
            print(export_aoti(backbone, output / "encoder.pt2", meta_lora, config, images=images))
            print(output / "encoder.pt2")

    def _refuse_idle_flags(self) -> None:
        """Raise for a flag that would change nothing."""
        if self.device != "cpu" and not self.onnx:
            raise ValueError(f"`--device` must be cpu without `--onnx`, got {self.device}: a package is for the CPU.")
        if self.data is not None and (self.dtype == "fp32" or not self.onnx):
            raise ValueError(
                f"`--data` must come with `--onnx` and `--dtype` fp16 or int8, got --dtype {self.dtype}: accuracy is "
                "measured for those only; leave `--data` out."
            )
        if self.split is not None and self.data is None:
            raise ValueError(f"`--split` must come with `--data`, got {self.split!r} alone; name the data.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; the exit status. What cannot be done ends with one line on standard error and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        tyro.cli(Export, prog="python -m lorarecycle.export", args=args).run()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"lorarecycle.export: error: {textwrap.shorten(str(error), 2000)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
