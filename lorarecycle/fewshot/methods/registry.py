"""Every few-shot method by name: what it is, where it comes from, what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from .average import AverageNearestMean
from .base import Method, Needs
from .cache import SupportCache
from .caml import CAML
from .full import FullFineTuning
from .laplacian import LaplacianShot
from .linear_probe import LinearProbe
from .lora_linear import AverageLinear, LoRALinear
from .lorahub import LoRAHub, LoRAHubNearestMean
from .merges import COMBINATIONS, PeftNearestMean
from .mole import Mole
from .nearest import NearestMean
from .pmf import PMF
from .recycled import FromWeights, LoRARecycle, WarmStart
from .shrunk import ShrunkMean
from .text import ZeroShot
from .zero_shot import ZeroShotHub, ZeroShotMole, ZeroShotRecycle

RECYCLE = "LoRA Recycle (CVPR 2025)"


class Entry(NamedTuple):
    """A method in the registry."""

    make: Callable[..., Method]
    """Its settings as keyword arguments, all with defaults."""
    title: str
    source: str

    @property
    def kind(self) -> type[Method]:
        """Its class."""
        return self.make.func if isinstance(self.make, partial) else self.make  # type: ignore[return-value]

    @property
    def needs(self) -> Needs:
        """What it asks for."""
        return self.kind.needs


METHODS: dict[str, Entry] = {
    "nn": Entry(NearestMean, "NN: nearest class mean", f"{RECYCLE}, Sec. 5, baseline d"),
    "average": Entry(AverageNearestMean, "LoRAs Avg + NN", f"{RECYCLE}, Sec. 5, baseline a"),
    **{
        f"peft-{kind}": Entry(
            partial(PeftNearestMean, combination=kind), f"PEFT's {kind} + NN", "PEFT, add_weighted_adapter"
        )
        for kind in COMBINATIONS
    },
    "warm-start": Entry(WarmStart, "warm start + NN", "lorarecycle.warm_start"),
    "recycle-weights": Entry(FromWeights, "meta-LoRA of the default preset", "lorarecycle.recycle"),
    "lora-recycle": Entry(LoRARecycle, "LoRA Recycle", f"{RECYCLE}, Sec. 4"),
    **{
        f"lora-recycle-{share}": Entry(
            partial(LoRARecycle, sparsity=share / 100), f"LoRA Recycle_{share}", f"{RECYCLE}, Sec. 4.3"
        )
        for share in (25, 50, 75)
    },
    "caml": Entry(CAML, "CAML", "Fifty et al., ICLR 2024"),
    "zero-shot": Entry(ZeroShot, "CLIP zero-shot", "Radford et al., ICML 2021"),
    "zero-shot-recycle": Entry(ZeroShotRecycle, "zero-shot LoRA Recycle", f"{RECYCLE}, Tab. 14"),
    "zero-shot-lorahub": Entry(ZeroShotHub, "zero-shot LoRAHub", f"{RECYCLE}, Tab. 14"),
    "zero-shot-mole": Entry(ZeroShotMole, "zero-shot MOLE", f"{RECYCLE}, Tab. 14"),
    "tip-adapter": Entry(SupportCache, "Tip-Adapter's cache", "Zhang et al., ECCV 2022"),
    "laplacian-shot": Entry(LaplacianShot, "LaplacianShot (transductive)", "Ziko et al., ICML 2020"),
    "shrunk": Entry(ShrunkMean, "class means shrunk towards known ones", "ours"),
    "full": Entry(FullFineTuning, "full fine-tuning", f"{RECYCLE}, Sec. 5, baseline g"),
    "linear-probe": Entry(LinearProbe, "linear probe", f"{RECYCLE}, Sec. 5, baseline h"),
    "lora-linear": Entry(LoRALinear, "LoRA + Linear", f"{RECYCLE}, Sec. 5, baseline i"),
    "average-linear": Entry(AverageLinear, "LoRAs Avg + Linear", f"{RECYCLE}, Sec. 5, baseline a"),
    "lorahub": Entry(LoRAHub, "LoRAHub", "Huang et al., COLM 2024"),
    "lorahub-nn": Entry(LoRAHubNearestMean, "LoRAHub + NN", f"{RECYCLE}, Tab. 16"),
    "mole": Entry(Mole, "MOLE", f"{RECYCLE}, Sec. 5, baseline c"),
    "pmf": Entry(PMF, "P > M > F", "Hu et al., CVPR 2022"),
}
"""In the order of the papers' tables."""


def find_method(name: str) -> Entry:
    """The entry of a method.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if name not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {name!r}.")
    return METHODS[name]


def settings_of(name: str) -> set[str]:
    """What a method can be given."""
    return {f.name for f in fields(find_method(name).kind) if f.init}  # type: ignore[arg-type]


def make_method(name: str, *, like: Mapping[str, Any] | None = None, **settings: Any) -> Method:
    """A method with its settings; those that it does not have are left out where they are None.

    Args:
        name: in `METHODS`.
        like: settings that it takes as far as it has them, such as `distance` and `seed`.
        settings: of the method's class.

    Raises:
        ValueError: an unknown name, or a setting that the method does not have.
    """
    entry = find_method(name)
    known = settings_of(name)
    settings = {**{key: value for key, value in (like or {}).items() if key in known}, **settings}
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"`{unknown[0]}` must be left out for method {name!r}, whose settings are {sorted(known)}.")
    return entry.make(**given)


def describe_methods() -> str:
    """A Markdown table of all methods."""
    rows = [f"| `{name}` | {e.title} | {e.needs.words()} | {e.source} |" for name, e in METHODS.items()]
    return "\n".join(["| name | method | needs | source |", "| --- | --- | --- | --- |", *rows])
