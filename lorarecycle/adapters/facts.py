"""What a run asks of an adapter again and again, small enough to be kept of ten thousand: shapes, classes, hashes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.seeds import stream
from .value import AdapterValue


class SiteShape(NamedTuple):
    """Sizes of the factors at a site."""

    out: int
    """rows of the weight"""
    r: int
    """rank"""
    width: int
    """columns of the weight, its input"""


class HeadFacts(NamedTuple):
    """A head without its tensors."""

    features: int
    """columns of its weight"""
    pool: str
    """see `Head.pool`"""
    class_names: tuple[str, ...]


class Facts(NamedTuple):
    """An adapter without its tensors."""

    shapes: dict[str, SiteShape]
    """site -> sizes, in model order; adapters of the same sizes share one dictionary"""
    head: HeadFacts | None
    dead: bool
    """every update is zero: all of a B, all of an A, or a scaling of 0"""
    signature: float
    """a number that updates and head give, see `signature`"""
    digest: str
    weights_digest: str


def facts_of(adapter: AdapterValue) -> Facts:
    """The facts of an adapter whose tensors are at hand."""
    return Facts(
        _shared(tuple(shapes(adapter).items())),
        head_facts(adapter),
        is_dead(adapter),
        signature(adapter),
        adapter.digest(),
        adapter.weights_digest(),
    )


def shapes(adapter: AdapterValue) -> dict[str, SiteShape]:
    """Site -> sizes, in model order."""
    return {site: SiteShape(len(B), len(A), A.shape[1]) for site, (A, B, _) in adapter.factors.items()}


def head_facts(adapter: AdapterValue) -> HeadFacts | None:
    """The head without its tensors."""
    head = adapter.head
    return None if head is None else HeadFacts(head.weight.shape[1], head.pool, head.class_names)


def is_dead(adapter: AdapterValue) -> bool:
    """Whether every update is zero."""
    return not any(f.scaling and f.lora_A.any() and f.lora_B.any() for f in adapter.factors.values())


def signature(adapter: AdapterValue) -> float:
    """`u^T (scaling B A) v` for fixed random u, v, summed over sites, and the like of the head.

    Adapters are brought to an order by it that neither names nor places change, nor the rounding of a file format.
    """
    total = 0.0
    for site, (lora_A, lora_B, scaling) in adapter.factors.items():
        u, v = _directions(site, lora_B.shape[0], lora_A.shape[1])
        total += scaling * float((u @ lora_B.cpu().double()) @ (lora_A.cpu().double() @ v))
    if adapter.head is not None:
        weight = adapter.head.weight.cpu().double()
        total += float((_head_direction(tuple(weight.shape)) * weight).sum())
    return total


@lru_cache(maxsize=512)
def _directions(site: str, out: int, width: int) -> tuple[Tensor, Tensor]:
    generator = stream(0, "signature", site)
    u = torch.randn(out, generator=generator, dtype=torch.float64)
    return u, torch.randn(width, generator=generator, dtype=torch.float64)


@lru_cache(maxsize=4)
def _head_direction(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=stream(0, "head"), dtype=torch.float64)


@lru_cache(maxsize=256)
def _shared(items: tuple[tuple[str, SiteShape], ...]) -> dict[str, SiteShape]:
    return dict(items)
