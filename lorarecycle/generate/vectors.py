"""How adapters become vectors of one length, and vectors adapters: derived from the adapters, kept in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .parameters import AnyAdapter, Parameters, make_adapter, pair_of, read_parameters


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors that make up the vector, in order.

    Attributes:
        shapes: name -> shape; factors at the largest rank that any adapter has there.
        scalings: module -> scaling that the factors in a vector stand under, never 0.
        facts: what else an adapter is made from (see `Parameters.facts`), of the first adapter.
    """

    shapes: dict[str, tuple[int, ...]]
    scalings: dict[str, float]
    facts: dict[str, Any]

    @classmethod
    def of(cls, adapters: Sequence[AnyAdapter], *, heads: bool = True) -> Layout:
        """The layout that holds all of these adapters.

        Args:
            adapters: at least one; for one architecture, at the same sites.
            heads: whether heads (and modules saved whole) are part of the vectors.

        Raises:
            ValueError: adapters of different kinds, sites or shapes; heads of some only.
        """
        read = [_without_heads(read_parameters(adapter), heads) for adapter in adapters]
        first = read[0]
        shapes = {name: tuple(tensor.shape) for name, tensor in first.tensors.items()}
        for other in read[1:]:
            _check_alike(first, other)
            for name, tensor in other.tensors.items():
                shapes[name] = _widest(name, shapes[name], tuple(tensor.shape), first, other)
        return cls(shapes, {module: scaling or 1.0 for module, scaling in first.scalings.items()}, first.facts)

    @property
    def size(self) -> int:
        """Parameters of an adapter."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def has_heads(self) -> bool:
        """Whether a ViT's head is part of the vectors."""
        return "head.weight" in self.shapes

    def flatten(self, adapter: AnyAdapter) -> Tensor:
        """The vector [size] of an adapter, float32: smaller ranks padded with zeros, its scaling folded into B.

        Raises:
            ValueError: an adapter that does not fit.
        """
        found = read_parameters(adapter)
        parts = []
        for name, shape in self.shapes.items():
            tensor = found.tensors.get(name)
            if tensor is None:
                raise ValueError(f"adapter {found.name!r} must have {name}, as the generator's adapters do, got none.")
            tensor = tensor.float().cpu()
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} of adapter {found.name!r} must be finite, got NaN or infinite values.")
            pair = pair_of(name)
            if pair is not None and pair[1] == "B" and pair[0] in self.scalings:
                ratio = found.scalings[pair[0]] / self.scalings[pair[0]]
                tensor = tensor if ratio == 1 else tensor * ratio
            parts.append(self._pad(tensor, name, shape, found.name).flatten())
        unknown = sorted(set(found.tensors) - set(self.shapes) - found.heads)
        if unknown:
            raise ValueError(f"adapter {found.name!r} must adapt the generator's sites only, got {unknown[0]} too.")
        return torch.cat(parts)

    def unflatten(self, vector: Tensor, *, name: str, class_names: tuple[str, ...] = ()) -> AnyAdapter:
        """The adapter of a vector [size]."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = vector.detach().cpu().split(sizes)
        tensors = {n: p.clone().view(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}
        return make_adapter(Parameters(tensors, self.scalings, frozenset(), self.facts, name), class_names)

    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the vector."""
        ends, places = 0, {}
        for name, shape in self.shapes.items():
            places[name] = slice(ends, ends + math.prod(shape))
            ends += math.prod(shape)
        return places

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Layout:
        """The layout that `to_json` gave."""
        shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
        return cls(shapes, content["scalings"], content["facts"])

    def _pad(self, tensor: Tensor, name: str, shape: tuple[int, ...], adapter: str) -> Tensor:
        padding = [total - own for own, total in zip(tensor.shape, shape, strict=False)]
        rank_only = tensor.ndim == len(shape) and all(not p for i, p in enumerate(padding) if i != _rank_axis(name))
        if not rank_only or min(padding, default=0) < 0 or (any(padding) and not self.scalings):
            raise ValueError(
                f"adapter {adapter!r} must fit the generator: {name} is {list(tensor.shape)}, at most "
                f"{list(shape)} of the same architecture fits; fit a generator on such adapters."
            )
        padded = tensor.new_zeros(shape)
        padded[tuple(map(slice, tensor.shape))] = tensor
        return padded


def _without_heads(parameters: Parameters, heads: bool) -> Parameters:
    if heads:
        return parameters
    return parameters._replace(tensors={k: t for k, t in parameters.tensors.items() if k not in parameters.heads})


def _check_alike(first: Parameters, other: Parameters) -> None:
    both = f"adapters {first.name!r} and {other.name!r}"
    if first.facts["kind"] != other.facts["kind"]:
        raise ValueError(
            f"{both} must be of one kind, got a ViT's adapter and bare PEFT parameters; the latter is for another "
            "model, or no plain LoRA."
        )
    unlike = sorted(set(first.tensors) ^ set(other.tensors))
    if unlike and unlike[0] in first.heads | other.heads:
        raise ValueError(
            f"{both} must both have a head or none, got {unlike[0]} in one; leave heads out (heads=False)."
        )
    if unlike:
        raise ValueError(f"{both} must adapt the same sites, got {unlike[0]} in one only; fit one generator for each.")
    for key, one, two in _meanings(first, other):
        if one != two:
            raise ValueError(f"{both} must have the same `{key}`, got {one!r} and {two!r}; fit one generator for each.")


def _meanings(first: Parameters, other: Parameters) -> Iterator[tuple[str, Any, Any]]:
    """(name, value, value) of all that decides what parameters mean."""
    one, two = first.facts, other.facts
    if one["kind"] == "peft":
        for key in sorted(one["meaning"].keys() | two["meaning"].keys()):
            yield key, one["meaning"].get(key), two["meaning"].get(key)
        return
    if one["base_model"] and two["base_model"]:  # "" is unknown
        yield "base_model", one["base_model"], two["base_model"]
    if "head.weight" in first.tensors:
        yield "pool", one["pool"], two["pool"]


def _widest(
    name: str, shape: tuple[int, ...], other: tuple[int, ...], one: Parameters, two: Parameters
) -> tuple[int, ...]:
    """The shape that holds both; only the rank may differ."""
    axis = _rank_axis(name) if one.scalings and two.scalings else None
    differing = [i for i, sizes in enumerate(zip(shape, other, strict=False)) if sizes[0] != sizes[1]]
    if len(shape) != len(other) or any(i != axis for i in differing):
        advice = "leave heads out (heads=False)" if name in one.heads else "fit one generator for each architecture"
        raise ValueError(
            f"adapters {one.name!r} and {two.name!r} must be for one architecture, got {name} {list(shape)} and "
            f"{list(other)}; {advice}."
        )
    return tuple(map(max, shape, other))


def _rank_axis(name: str) -> int | None:
    """The axis of a factor that its rank is: 0 of A, 1 of B."""
    pair = pair_of(name)
    return None if pair is None else "AB".index(pair[1])
