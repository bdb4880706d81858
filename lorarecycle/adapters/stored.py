"""An adapter whose tensors stay in their files: of ten thousand, what is used at the moment is in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

from . import facts
from .adapter import Adapter
from .facts import Facts, HeadFacts, SiteShape, facts_of, head_facts, shapes, signature
from .value import AdapterValue, Head, LoRAFactors

KEPT = 2
"""Stored adapters whose tensors stay in memory after they were used, those that were used last."""


class StoredAdapter(Adapter):
    """What `Adapter` is; factors and head are read when they are asked for, and forgotten after other adapters' were.

    Facts without tensors (`facts`, `sites`, `ranks`, `digest()`) stay in memory.

    Args:
        adapter: with its tensors, as they were read; it is not kept.
        read: reads it again.
    """

    def __init__(self, adapter: Adapter, read: Callable[[], Adapter]) -> None:
        for name in ("base_model", "mean", "std", "name", "base_class", "resize", "notes"):
            object.__setattr__(self, name, getattr(adapter, name))
        object.__setattr__(self, "_facts", facts_of(adapter))
        object.__setattr__(self, "_read", read)

    @property
    def facts(self) -> Facts:
        """What is known without reading anything."""
        return self.__dict__["_facts"]

    @property
    def factors(self) -> Mapping[str, LoRAFactors]:  # type: ignore[override]
        """Site -> factors, read from the files unless they were used just now."""
        return self.whole().factors

    @property
    def head(self) -> Head | None:  # type: ignore[override]
        """The head, likewise."""
        return None if self.facts.head is None else self.whole().head

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that carry factors, in model order."""
        return tuple(self.facts.shapes)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank at each site."""
        return {site: shape.r for site, shape in self.facts.shapes.items()}

    def digest(self) -> str:
        """As when it was first read."""
        return self.facts.digest

    def weights_digest(self) -> str:
        """As when it was first read."""
        return self.facts.weights_digest

    def with_head(self, head: Head | None) -> Adapter:  # type: ignore[override]
        """The same factors, in memory, under another head or none."""
        return self.whole().with_head(head)

    def whole(self) -> Adapter:
        """The adapter with its tensors.

        Raises:
            ValueError: its files hold another one by now.
            FileNotFoundError: they are gone.
        """
        with _lock:
            found = _last.pop(id(self), None)
        if found is None:
            found = self.__dict__["_read"]()
            if found.weights_digest() != self.facts.weights_digest:
                raise ValueError(
                    f"the files of adapter {self.name!r} must stay as they are while they are used, got other weights "
                    "than before; start again."
                )
        with _lock:
            _last[id(self)] = found
            while len(_last) > KEPT:
                _last.popitem(last=False)
        return found

    def __del__(self) -> None:
        _last.pop(id(self), None)

    def __repr__(self) -> str:
        return f"StoredAdapter({self.name!r}, {len(self.sites)} sites, base={self.base_model!r})"


def shapes_of(adapter: AdapterValue) -> dict[str, SiteShape]:
    """Site -> sizes, of any adapter; one that is stored is not read for it. So with what follows."""
    return adapter.facts.shapes if isinstance(adapter, StoredAdapter) else shapes(adapter)


def head_of(adapter: AdapterValue) -> HeadFacts | None:
    """The head without its tensors; None where there is none."""
    return adapter.facts.head if isinstance(adapter, StoredAdapter) else head_facts(adapter)


def is_dead(adapter: AdapterValue) -> bool:
    """Whether every update is zero: all of a B, all of an A, or a scaling of 0."""
    return adapter.facts.dead if isinstance(adapter, StoredAdapter) else facts.is_dead(adapter)


def signature_of(adapter: AdapterValue) -> float:
    """The number that adapters are ordered by, see `facts.signature`."""
    return adapter.facts.signature if isinstance(adapter, StoredAdapter) else signature(adapter)


_last: OrderedDict[int, Adapter] = OrderedDict()
_lock = threading.Lock()
