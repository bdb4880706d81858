"""What all fine-tuned methods share: a learning rate chosen on validation tasks, a loop, augmented images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...vit.backbone import Backbone
from .base import Given, Method, Needs, Task, accuracy, inputs

RATES = (0.1, 0.01, 0.001)
"""Learning rates of LoRA Recycle's baselines (App. D)."""
Optimizer = Literal["sgd", "adam"]


@dataclass
class Tuned(Method):
    """A method that trains on each task's support, with the best of several learning rates (LoRA Recycle, App. D).

    Args:
        rate: learning rate; the best of `rates` on the validation tasks when None.
        rates: to choose from.
        steps: of the optimiser, on all support images together.
        optimizer: "sgd" or "adam"; LoRA Recycle's Table 1 has full fine-tuning and LoRA best with SGD.
        seed: of everything random; each task starts from the same.
    """

    rate: float | None = None
    rates: tuple[float, ...] = RATES
    steps: int = 50
    optimizer: Optimizer = "sgd"
    seed: int = 0
    needs: ClassVar[Needs] = Needs(fine_tuning=True, rate=True)
    chosen: float = field(init=False, default=0.0)
    """The learning rate in use."""
    validation_accuracy: dict[float, float] = field(init=False, default_factory=dict, repr=False)

    def _prepare(self, given: Given) -> None:
        self._setup(given)
        if self.rate is not None:
            self.chosen = self.rate
            return
        aside = given.validation_tasks
        self.validation_accuracy = {r: accuracy(self._solve_all, aside, r).mean().item() for r in self.rates}
        self.chosen = max(self.rates, key=self.validation_accuracy.__getitem__)

    @abstractmethod
    def _setup(self, given: Given) -> None: ...

    @abstractmethod
    def _solve(self, task: Task, rate: float) -> Tensor: ...

    def _with_classifier(
        self, task: Task, rate: float, model: Backbone, forward: Callable[[Tensor], Tensor], weights: Iterable[Tensor]
    ) -> Tensor:
        """Logits of the queries once `weights` and a linear classifier over `forward` have descended together."""
        head = Linear(model.embed_dim, task.n_way, model.device)
        images, labels = inputs(model, task.support_pixels()), task.labels(model.device)
        descend(
            [*weights, *head.parameters()],
            lambda step: F.cross_entropy(head(forward(images)), labels),
            steps=self.steps,
            rate=rate,
            optimizer=self.optimizer,
        )
        return head(task.run(model, forward, task.query)).detach()

    def _solve_all(self, tasks: Sequence[Task], rate: float) -> Iterator[Tensor]:
        for task in tasks:
            yield self._solve(task, rate)

    def solve(self, task: Task) -> Tensor:
        return next(iter(self._solve_all([task], self.chosen)))

    def solve_all(self, tasks: Sequence[Task]) -> Iterator[Tensor]:
        return self._solve_all(tasks, self.chosen)


class Linear(nn.Module):
    """A linear classifier that starts at zero: no class has an advantage, and no seed matters."""

    def __init__(self, width: int, n_way: int, device: torch.device) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.zeros(n_way, width, device=device))
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(n_way, device=device))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, C], float32."""
        return F.linear(features.float(), self.weight, self.bias)


def descend(
    parameters: Iterable[Tensor], loss: Callable[[int], Tensor], *, steps: int, rate: float, optimizer: Optimizer
) -> None:
    """`steps` steps down the gradient of `loss(step)`."""
    own = list(parameters)
    make = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    chosen = make(own, lr=rate)
    with torch.enable_grad():
        for step in range(steps):
            chosen.zero_grad(set_to_none=True)
            value = loss(step)
            value.backward()
            chosen.step()


def augmented(images: Tensor, generator: torch.Generator, smallest: float = 0.6) -> Tensor:
    """Random crops of at least `smallest` of the side, resized back (bilinear), half of them mirrored.

    Args:
        images: float [B, 3, H, W].
        generator: on the CPU.
        smallest: share of the side.
    """
    n = len(images)
    side = smallest + (1 - smallest) * torch.rand(n, generator=generator)
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - side)[:, None]
    mirror = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * mirror, side, shift
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False).to(
        images
    )


class Trainable:
    """A copy of a backbone whose weights train, in float32, and are brought back before each task.

    The position embeddings of the patches stay as they are: the forward pass resamples them beforehand.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.model: Backbone = backbone.clone().float()
        self.precision: torch.dtype = backbone.dtype
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        self.keep()

    def keep(self) -> None:
        """The weights as they are become those that `reset` brings back."""
        self._start = [parameter.detach().clone() for parameter in self.model.parameters()]

    @torch.no_grad()
    def reset(self) -> None:
        """Bring the weights back."""
        for parameter, start in zip(self.model.parameters(), self._start, strict=True):
            parameter.copy_(start)

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, D], float32, of images; products in the backbone's own precision."""
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.model(images).float()
