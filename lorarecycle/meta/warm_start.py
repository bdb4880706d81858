"""Warm start of the meta-LoRA: what the adapters have in common, found in their weights alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING

from torch import Tensor

from ..adapters.adapter import Adapter, LoRAFactors
from ..adapters.copies import note_copies
from ..adapters.dead import leave_out_dead
from ..adapters.load_many import AdapterLike, HubOptions, load_all
from ..config import MetaConfig
from ..runtime.strict import left_out_error
from ..vit.backbone import Backbone
from ..vit.base import BaseLike, doubts, find_base
from ..vit.fit import check_fit, leave_out_unfit
from ..vit.lora import LoRA
from .factors import random_factors
from .sums import Sums, in_parts, sum_updates

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger: logging.Logger = logging.getLogger(__name__)

GAIN, SHARED, LENGTH, LEAST = 4.5, 0.5, 0.04, 0.25
"""Of `common_gain`; chosen on validation classes (benchmarks/results/warm_start_gain.md; the last: surrogates_tried.md
there)."""


def warm_start(
    adapters: AdapterLike | Iterable[AdapterLike],
    *,
    base: BaseLike | None = None,
    r: int = 16,
    lora_alpha: float = 16.0,
    sites: Sequence[str] = ("q", "v"),
    layers: Sequence[int] | None = None,
    gain: float | None = None,
    name: str = "warm-start",
    strict: bool | None = None,
    **hub: Unpack[HubOptions],
) -> Adapter:
    """One adapter with what many have in common, found in their weights alone: no images, no training, seconds.

    It is `gain` times the mean of their updates `scaling * B A`, cut to rank `r` at each site (see `start_factors`):
    where `recycle` starts from by default. What it is worth depends on how the adapters were tuned: with ViT-Tiny and
    adapters tuned at 112 pixels it gained 15 points of 1-shot accuracy over the plain ViT (Euclidean distance). Briefly
    tuned adapters have nothing in common that shows, and their mean neither gains nor loses a point. Compare it with
    the plain ViT on tasks of your own (`evaluate`).

    Args:
        adapters: `Adapter` objects, PEFT folders or Hub ids, or one folder that holds many; heads are not used.
        base: the model that they were tuned on (see `Backbone.load`); the one that the adapters name when None.
        r: rank of the result.
        lora_alpha: its scaling is `lora_alpha / r`; the update is the same for any.
        sites: linear layers of the result: any of q, k, v, proj, fc1, fc2; updates elsewhere are left out.
        layers: blocks of the result; all when None.
        gain: factor on the mean of the updates; `common_gain` when None.
        name: of the result.
        strict: what becomes of adapters that are left out, or do not fit, as in `recycle`.
        hub: `revision`, `token`, `subfolder`, `cache_dir`, `local_files_only` for Hub ids among `adapters`, as in
            `Adapter.from_pretrained`.

    Returns:
        an `Adapter` without a head.

    Raises:
        ValueError, FileNotFoundError: `r`, `lora_alpha`, `sites`, `layers` or `gain` that cannot be, no adapters,
            adapters that do not fit, no base that can be found.
    """
    shape = MetaConfig(r=r, lora_alpha=lora_alpha, sites=tuple(sites), layers=None if layers is None else tuple(layers))
    _check_gain(gain)
    loaded = load_all(adapters, strict=strict, stored=True, **hub)
    found, dead = leave_out_dead(loaded.adapters)
    if strict and dead:
        raise left_out_error(dead[0])
    backbone, unfit = find_base(base, found), list[str]()
    like = random_factors(backbone, shape, 0)  # what is random in them is in ranks that stay empty
    if strict is False:
        found, unfit = leave_out_unfit(backbone, found)
    for adapter in found:
        check_fit(backbone, adapter)
    for line in (*dead, *unfit, *note_copies(found), *doubts(backbone, found)):
        logger.warning(line)
    return start_factors(found, like, backbone, gain=gain).to_adapter(name=name, like=backbone)


def start_factors(adapters: Iterable[Adapter], like: LoRA, backbone: Backbone, *, gain: float | None = None) -> LoRA:
    """Factors that start where many adapters point: `gain` times the mean of their updates `scaling * B A`.

    What adapters of different tasks share is small in each one, as each update is confined to a random subspace of
    its rank, and it is spread over all of them; averaging uncovers it, and the gain brings it to size. At each site the
    mean is cut to the rank of `like` by a singular value decomposition. Adapters are read one after the other, and
    what is held of them is never more than the weights of the sites (see `UpdateSum`), so memory does not grow with
    their number and time does linearly.

    Args:
        adapters: for one base model; ranks, scalings and sites may differ, heads are not used. An adapter without a
            site counts as zero there. An iterable that can be gone through again, such as a list.
        like: gives sites, ranks and scalings; what the adapters leave open stays as it is there: sites that none of
            them has, ranks beyond the sum of theirs. It is not changed.
        backbone: that the adapters are for.
        gain: factor on the mean; `common_gain` when None; as many as there are adapters make their sum.

    Returns:
        new factors, on the device of `like`; singular values are shared evenly between `lora_A` and `lora_B`.

    Raises:
        ValueError: no adapters, `gain` not positive, shapes that differ at a site.
    """
    _check_gain(gain)
    factors = like.factors()
    lengths, tops = _Lengths(), {}
    for part in in_parts(_shapes(factors)):
        found = sum_updates(adapters, part)
        lengths.add(found)
        for site, one in found.sites.items():
            tops[site] = one.top(factors[site].r)
        del found
    n = _count(adapters)
    gain = lengths.gain(n, backbone) if gain is None else gain
    for site, (U, S, Vh) in tops.items():
        factors[site] = _refactored(U, S, Vh, factors[site], gain / n)
    return LoRA(factors).to(next(like.parameters()).device)


def common_gain(adapters: Iterable[Adapter], like: LoRA, backbone: Backbone) -> float:
    """How far to amplify the mean of n updates D_i, from their lengths and likeness.

    With `L = mean over pairs <D_i, D_j> / mean |D_i|^2` (their likeness), W the weights and |.| the length over all
    sites::

        gain = clip(max(4.5, 0.5 / sqrt(L)), 1, min(n, 0.04 |W| / |mean of D_i|))  where L > 0.25 S
        gain = 1                                                                   otherwise

    so 4.5, or more where the updates have little in common: 0.5 / sqrt(L) makes the shared part half as long as one
    update; at most n, which gives their sum, and at most what changes the weights by 4 % of their length, which holds
    back adapters that were tuned far. S is the mean of `rank / min(out, in)`, weighted by |D_i|^2, with effective
    ranks `(sum of s^2)^2 / sum of s^4` of singular values s: the likeness of updates that want the same, each in a
    random subspace of its rank. Far below that what they share is not told from chance, and amplifying their mean would
    amplify noise.

    Args:
        adapters, like: as in `start_factors`; only the sites of `like` count.
        backbone: that the adapters are for.

    Raises:
        ValueError: no adapters, or shapes that differ at a site.
    """
    lengths = _Lengths()
    for part in in_parts(_shapes(like.factors())):
        lengths.add(sum_updates(adapters, part))
    return lengths.gain(_count(adapters), backbone)


class _Lengths:
    """Squared lengths over the sites that any adapter has: of the sum, and of the adapters' own updates together."""

    def __init__(self) -> None:
        self.together = self.apart = self.spanned = 0.0
        self.sites: list[str] = []

    def add(self, sums: Sums) -> None:
        self.together += sum(one.squared_length() for one in sums.sites.values())
        self.apart += sums.apart
        self.spanned += sums.spanned
        self.sites += sums.sites

    def gain(self, n: int, backbone: Backbone) -> float:
        """See `common_gain`."""
        if n == 1 or self.together == 0:
            return 1.0
        weights = sum(backbone.site_weight(site).float().square().sum().item() for site in self.sites)
        likeness = (self.together - self.apart) / ((n - 1) * self.apart)
        if likeness <= LEAST * self.spanned / self.apart:
            logger.info("The adapters have hardly more in common than chance gives; their mean is not amplified.")
            return 1.0
        wanted = max(GAIN, SHARED / math.sqrt(likeness))
        return max(1.0, min(wanted, LENGTH * n * math.sqrt(weights / self.together), n))


def _check_gain(gain: float | None) -> None:
    if gain is not None and not 0 < gain < math.inf:
        raise ValueError(f"`gain` must be positive and finite, got {gain}.")


def _count(adapters: Iterable[Adapter]) -> int:
    n = len(adapters) if isinstance(adapters, Sized) else sum(1 for _ in adapters)
    if not n:
        raise ValueError("`adapters` must hold at least one adapter, got none; use init='random'.")
    return n


def _shapes(factors: Mapping[str, LoRAFactors]) -> dict[str, tuple[int, int]]:
    """Site -> (out, in)."""
    return {site: (f.lora_B.shape[0], f.lora_A.shape[1]) for site, f in factors.items()}


def _refactored(U: Tensor, S: Tensor, Vh: Tensor, start: LoRAFactors, factor: float) -> LoRAFactors:
    """`factor` times `U S Vh`, in the rank and scaling of `start`."""
    r = min(start.r, len(S))
    root = (S[:r] * (factor / start.scaling)).sqrt()
    new_A, new_B = start.lora_A.clone(), start.lora_B.clone()
    new_A[:r] = (root[:, None] * Vh[:r]).to(new_A)
    new_B[:, :r] = (U[:, :r] * root).to(new_B)
    return LoRAFactors(new_A, new_B, start.scaling)
