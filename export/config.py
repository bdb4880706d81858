"""ExportConfig: what the exported graphs are like; the command line's flags come from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..config import DISTANCES, Distance

MIN_OPSET = 18
"""The oldest operator set that the exporter writes."""
DTYPES = ("fp32", "fp16", "int8")
ATOL = {"fp32": 1e-4}
"""Largest absolute error allowed by default, where absolute errors are the measure."""
MIN_COSINE = {"fp16": 0.999, "int8": 0.9}
"""Smallest cosine of an embedding with PyTorch's that is allowed by default in reduced precision."""
MIN_COSINE_PRUNED = {**MIN_COSINE, "fp16": 0.99}
"""The same with pruning, where rounding may keep another one of two tokens at the limit: half of ViT-Tiny's dropped at
112 x 112, the worst of 64 images is at 0.996 in fp16."""
MAX_LOGIT_ERROR = {"fp16": 0.05, "int8": 0.4}
"""Largest error of an episode's logits allowed by default in reduced precision, relative to the largest logit."""


@dataclass(frozen=True)
class ExportConfig:
    """Settings of an export.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    opset: int = 18
    """ONNX operator set, 18 or later."""
    dtype: Literal["fp32", "fp16", "int8"] = "fp32"
    """fp16 keeps layer norm and softmax in float32. int8 has per-channel weights and activations measured per run, and
    keeps products whose input has outliers in float32. Its weights use 7 of the 8 bits, so that no sum of products
    saturates: accuracy is the same with and without VNNI. Speed is not: CPUs with VNNI gain most, old ones may gain
    nothing but the smaller file."""
    img_size: int | None = None
    """Side in pixels, a multiple of the patch; the model's own when left out."""
    batch_size: int | None = None
    """Images per call, fixed; dynamic when left out."""
    uint8_input: bool = False
    """Pixels 0 to 255 go in; scaling and normalisation are part of the graph."""
    atol: float | None = None
    """Largest absolute error against PyTorch (in float32, or float64 where its float32 is further off). Left out:
    1e-4 for fp32; fp16 and int8 must reach a cosine of 0.999 (0.99 with `prune`) and 0.9 on every image instead, and
    an episode's logits may be off by 5 % and 40 % of the largest."""
    prune: Mapping[int, float] = field(default_factory=dict)
    """Patch tokens dropped on the way, `{layer: ratio}` (LoRA Recycle, Sec. 4.3)."""
    distance: Distance = "centred_cosine"
    """What the head measures between a feature and the class centres, see `distance_logits`."""

    def __post_init__(self) -> None:
        if self.opset < MIN_OPSET:
            raise ValueError(f"`opset` must be at least {MIN_OPSET}, got {self.opset}; leave it out for that.")
        for name, known in (("dtype", DTYPES), ("distance", DISTANCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}.")
        for name in ("img_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}; leave it out for the default.")
        if self.atol is not None and not (math.isfinite(self.atol) and self.atol > 0):
            raise ValueError(f"`atol` must be a number above 0, got {self.atol}.")


def parse_batch_size(text: str) -> int | None:
    """ "dynamic" or a number.

    Raises:
        ValueError: neither.
    """
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"`batch_size` must be 'dynamic' or a number of images, got {text!r}.")
    return int(text)


def parse_prune(texts: tuple[str, ...]) -> dict[int, float]:
    """Pairs "layer:ratio", such as "6:0.5".

    Raises:
        ValueError: not such a pair, or a layer named twice.
    """
    prune: dict[int, float] = {}
    for text in texts:
        layer, _, ratio = text.partition(":")
        try:
            pair = int(layer), float(ratio)
        except ValueError:
            raise ValueError(f"`prune` must be pairs such as 6:0.5 (layer:ratio), got {text!r}.") from None
        if pair[0] in prune:
            raise ValueError(f"`prune` must name a layer once, got {pair[0]} twice.")
        prune[pair[0]] = pair[1]
    return prune
