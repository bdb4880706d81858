"""Model soup: adapters averaged parameter by parameter, all of them or a greedy choice (Wortsman et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .config import SoupConfig
from .generator import Examples, Generator, Machine, _machine
from .parameters import AnyAdapter

Score = Callable[[AnyAdapter, Tensor], float]
"""(adapter, task vector) -> how good it is on validation data of that task; higher is better."""


class ModelSoup(Generator):
    """One averaged adapter for each condition; every sample of a condition is the same.

    The factors A and B are averaged apart, as flat parameters: that means something for runs that started from the
    same factors, and little for others (`lorarecycle.fewshot.methods.average` averages the updates themselves).
    """

    method = "soup"
    config_class = SoupConfig
    soups: Tensor
    """float32 [T, size]"""

    @classmethod
    def fit(
        cls,
        adapters: Iterable[AnyAdapter | str | PathLike[str]],
        task_vectors: Iterable[Any],
        *,
        config: Any = None,
        seed: int | None = None,
        score: Score | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        checkpoint: str | PathLike[str] | None = None,
        quiet: bool = False,
    ) -> ModelSoup:
        """As `Generator.fit`.

        Args:
            score: judges an adapter on validation data of a task; the greedy recipe needs it.

        Raises:
            ValueError: also a greedy recipe without `score`, or a score without the recipe.
        """
        generator, examples = cls._prepare(adapters, task_vectors, config, seed)
        if (generator.config.recipe == "greedy") != (score is not None):
            raise ValueError(
                f"`score` must be given with recipe='greedy' and only then, got recipe={generator.config.recipe!r} "
                f"and score={score!r}."
            )
        generator._score = score
        generator._fit(examples, _machine(device, dtype, checkpoint, quiet))
        return generator

    def _fit(self, examples: Examples, machine: Machine) -> None:
        soups = []
        for t in range(len(self.conditions)):
            vectors = examples.vectors[examples.tasks == t] if self.config.scope == "task" else examples.vectors
            soups.append(self._greedy(vectors, t) if self.config.recipe == "greedy" else vectors.mean(dim=0))
        self.soups = torch.stack(soups)

    def _greedy(self, vectors: Tensor, task: int) -> Tensor:
        """Best first; each is kept if the average with it scores no lower than before."""

        def judge(vector: Tensor) -> float:
            condition = self.conditions[task]
            return float(self._score(self._adapter(vector, condition, task, "candidate"), condition))

        scores = [judge(vector) for vector in vectors]
        order = sorted(range(len(vectors)), key=lambda i: -scores[i])
        chosen, best = [order[0]], scores[order[0]]
        for i in order[1:]:
            score = judge(vectors[[*chosen, i]].mean(dim=0))
            if score >= best:
                chosen, best = [*chosen, i], score
        return vectors[chosen].mean(dim=0)

    def _sample(self, condition: Tensor, nearest: int, n: int, seed: int) -> Tensor:
        return self.soups[nearest].expand(n, -1)

    def _reconstruct(self, vector: Tensor, condition: Tensor, nearest: int) -> Tensor:
        return self.soups[nearest]

    def _state(self) -> dict[str, Tensor]:
        return {"soups": self.soups}

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"soups": (len(self.conditions), self.layout.size)}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        self.soups = tensors["soups"]

    _score: Any = None
