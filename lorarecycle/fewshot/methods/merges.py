"""PEFT's own ways of combining adapters into one (`add_weighted_adapter`), then the nearest class mean."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from ...adapters.adapter import Adapter
from ...vit.backbone import Backbone
from .base import Given, Needs
from .nearest import NearestMean

COMBINATIONS = (
    *("linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)
"""PEFT's names. Those without "svd" combine the factors, not the products, and want adapters of equal ranks."""


def combine_with_peft(
    backbone: Backbone, adapters: Sequence[Adapter], combination: str, *, density: float = 0.5, seed: int = 0
) -> Adapter:
    """One adapter from many, each with weight 1/n, as PEFT combines them.

    Args:
        backbone: that they are for.
        adapters: two or more.
        combination: one of `COMBINATIONS`.
        density: share of the entries that ties, dare and magnitude_prune keep.
        seed: of what dare drops.

    Raises:
        ValueError: an unknown combination; PEFT's own, such as of ranks that differ.
        ImportError: PEFT is missing.
    """
    from peft import PeftModel

    if combination not in COMBINATIONS:
        raise ValueError(f"`combination` must be one of {COMBINATIONS}, got {combination!r}.")
    vit = copy.deepcopy(backbone.vit).float().cpu()
    with tempfile.TemporaryDirectory() as parent, torch.random.fork_rng(devices=[]):
        folders = [each.with_head(None).save(Path(parent) / f"a{i}") for i, each in enumerate(adapters)]
        model = PeftModel.from_pretrained(vit, str(folders[0]), adapter_name="a0")
        for i, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=f"a{i}")
        names = [f"a{i}" for i in range(len(adapters))]
        options = {} if combination in ("linear", "svd") else {"density": density}
        torch.manual_seed(seed)
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "all", combination_type=combination, **options)
        return Adapter.from_peft(model, adapter_name="all", name=f"peft-{combination}")


@dataclass
class PeftNearestMean(NearestMean):
    """The nearest class mean under what PEFT makes of the adapters.

    Args:
        distance: see `distance_logits`.
        combination: one of `COMBINATIONS`.
        density: share of the entries that ties, dare and magnitude_prune keep.
        seed: of what dare drops.
    """

    combination: str = "svd"
    density: float = 0.5
    seed: int = 0
    needs: ClassVar[Needs] = Needs(adapters=2, packages=("peft",))

    def _encode(self, given: Given) -> Backbone:
        combined = combine_with_peft(
            given.backbone, given.adapters, self.combination, density=self.density, seed=self.seed
        )
        return given.backbone.merge(combined)
