"""The honest trivial baseline: the adapters of the training task whose task vector is nearest."""

from __future__ import annotations

from torch import Tensor

from .config import NearestConfig
from .generator import Examples, Generator, Machine


class NearestTask(Generator):
    """Keeps all adapters and hands out those with the nearest task vector, the last given first."""

    method = "nearest"
    config_class = NearestConfig
    vectors: Tensor
    """float32 [n, size]"""
    tasks: Tensor
    """int64 [n]"""

    def _fit(self, examples: Examples, machine: Machine) -> None:
        self.vectors, self.tasks = examples.vectors, examples.tasks

    def _sample(self, condition: Tensor, nearest: int, n: int, seed: int) -> Tensor:
        own = self.vectors[self.tasks == nearest].flip(0)
        if n > len(own):
            raise ValueError(f"`n` must be at most {len(own)}, the adapters of the nearest task, got {n}.")
        return own[:n]

    def _reconstruct(self, vector: Tensor, condition: Tensor, nearest: int) -> Tensor:
        own = self.vectors[self.tasks == nearest]
        return own[(own - vector).norm(dim=1).argmin()]

    def _state(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors, "tasks": self.tasks}

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"vectors": (len(self.tasks), self.layout.size), "tasks": (None,)}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        self.vectors, self.tasks = tensors["vectors"], tensors["tasks"]
