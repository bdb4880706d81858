"""What commands share: the model and machine, manners, and how they find backbone and meta-LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from ..adapters.adapter import Adapter
    from ..vit.backbone import Backbone

Flat = tyro.conf.arg(name="")  # the settings' own names as flags, without a prefix


@dataclass(frozen=True)
class Manners:
    """What a command shows, the same for all."""

    quiet: bool = False
    """Show no plan and no progress bars."""
    debug: bool = False
    """Show the traceback of an error that is one line otherwise."""


@dataclass(frozen=True)
class Care:
    """What becomes of input that is left out: files that cannot be read, adapters that change nothing."""

    strict: bool = False
    """Stop where anything is left out; otherwise it is counted and named."""
    skip_bad: bool = False
    """Go on without adapters and files that cannot be read, and name them."""

    @property
    def level(self) -> bool | None:
        """`strict` as the library's functions take it.

        Raises:
            ValueError: both flags.
        """
        if self.strict and self.skip_bad:
            raise ValueError("`--strict` must come without `--skip-bad`, got both; leave one out.")
        return True if self.strict else False if self.skip_bad else None


@dataclass(frozen=True)
class Machine:
    """Model, device and precision, the same for every command that runs a model."""

    base: str | None = None
    """Model: a timm name, a Hub id, a folder, a safetensors file, or "demo"; what the adapters name when left out."""
    weights: Path | None = None
    """Local safetensors weights for the architecture that --base names."""
    image_size: int | None = None
    """Side in pixels that images are resized to; the model's own when left out."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; bfloat16 where the hardware has it."""

    def backbone(self, adapter: Adapter | None = None, dtype: torch.dtype | None = None) -> Backbone:
        """The model that the flags name, else the one that the adapter names.

        Raises:
            ValueError: neither names one.
        """
        from ..runtime.device import resolve
        from ..vit.backbone import Backbone

        base = self.base or (adapter.base_model if adapter is not None else None)
        if not base:
            raise ValueError("`--base` must name the model, got none; see `lorarecycle recycle --help`.")
        device, default = resolve(self.device, self.dtype)
        size = self.image_size
        return Backbone.load(base, weights=self.weights, image_size=size, device=device, dtype=dtype or default)


def find_backbone(machine: Machine, adapters: Sequence[Adapter]) -> Backbone:
    """The float32 model that the flags name, else the one that all adapters name.

    Raises:
        ValueError: neither names one, or adapters name several.
    """
    import torch

    from ..vit.base import common_base

    named = None if machine.base else common_base(adapters)
    return machine.backbone(named, torch.float32)


def refuse_sources(output: Path, folders: Sequence[Path]) -> None:
    """Raises ValueError where the output is to take the place of an adapter that it is made of."""
    real = output.expanduser().resolve()
    if any(folder.resolve() == real for folder in folders):
        raise ValueError(f"`--output` must not be one of the adapters that go in, got {output}; choose another folder.")


def load_meta_lora(source: str | None) -> Adapter | None:
    """The adapter of a folder or Hub id; None for None."""
    from ..adapters.adapter import Adapter

    return None if source is None else Adapter.load(source)
