"""The optimisation of a batch of images: one step over buffers that stay where they are, for adapter after adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..adapters.adapter import Head
from ..config import InversionConfig
from ..runtime.graphs import Graphs, Step, adam, held_weakly, reset, set_rate, state_of
from ..runtime.progress import Progress
from ..vit.backbone import Backbone
from .objective import inversion_loss
from .parametrization import PARAMETRIZATIONS, NormalizedPixels
from .prior import BatchNormPrior
from .start import finished_pixels
from .views import seen_as

CURVE_POINTS = 100
"""Steps at most, evenly spaced, of which `BatchOptimiser.curves` tells."""
READ_EVERY = 50
"""Steps between looks at the loss where `patience` may end the optimisation: each look waits for the GPU."""


class BatchOptimiser:
    """Adam on the images of a batch (Eq. 1), with what a step needs kept on the device.

    Args:
        teacher: with an adapter merged; its weights may be written anew between batches.
        head: the adapter's classifier, likewise.
        batch_size: images.
        config: settings; `steps` at least 1.
        prior: naturalness prior (Eq. 2); none when None.
        graphs: whether a step is one launch, see `Step`.
    """

    def __init__(
        self,
        teacher: Backbone,
        head: Head,
        batch_size: int,
        config: InversionConfig,
        prior: BatchNormPrior | None,
        graphs: Graphs = None,
    ) -> None:
        device = teacher.device
        self.teacher = teacher
        self.head = head
        self.config = config
        self.prior = prior
        self.size: int = config.image_size or teacher.image_size
        side = config.latent_size or self.size
        self.parameters: NormalizedPixels = PARAMETRIZATIONS[config.parametrization](teacher, batch_size, side)
        self.best: Tensor = torch.zeros(batch_size, 3, side, side, device=device)
        self.labels: Tensor = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.views: Tensor = torch.zeros(config.steps, 3, dtype=torch.long, device=device)
        self.rates: Tensor = torch.tensor([step_size(step, config) for step in range(config.steps)], device=device)
        self.lowest: Tensor = torch.zeros(config.steps, device=device)  # loss up to each step
        self.terms: Tensor = torch.zeros(batch_size + 1, device=device)  # of Eq. 1: each image's, the batch's
        self.history: Tensor = torch.zeros(config.steps, batch_size + 1, device=device)  # the terms at each step
        self.best_loss: Tensor = torch.zeros((), device=device)
        self.count: Tensor = torch.zeros(1, dtype=torch.long, device=device)
        self.optimizer: torch.optim.Optimizer = adam([self.parameters.variable], device, betas=config.betas)
        state = held_weakly(self._state)
        self.dense: Step = Step(held_weakly(self._step, None), state, device, graphs)
        self.pruned: Step = Step(held_weakly(self._step, config.prune), state, device, graphs)

    def run(self, start: Tensor, labels: Tensor, views: Tensor, bar: Progress[int]) -> Tensor:
        """Optimise from a start.

        Args:
            start: float32 [B, 3, s, s], normalised.
            labels: int64 [B].
            views: int64 [steps, 3], see `draw_views`.
            bar: is moved on by as many steps as there are.

        Returns:
            uint8 [B, 3, H, W] on the CPU, as they were at the step with the lowest loss.

        Raises:
            FloatingPointError: the loss was never finite.
        """
        config = self.config
        self.parameters.set(start)
        self.best.copy_(start)
        self.best_loss.fill_(torch.inf)
        self.count.zero_()
        self.history.fill_(torch.nan)
        self.labels.copy_(labels)
        self.views.copy_(views)
        reset(self.optimizer)
        prune_from = round(config.prune_from * config.steps) if config.prune else 0
        for step in range(config.steps):
            take = self.pruned if config.prune and step >= prune_from else self.dense
            take()
            bar.update(1)
            if (step + 1) % READ_EVERY == 0 and self._settled(step, prune_from):
                bar.update(config.steps - step - 1)
                break
        if not self.best_loss.isfinite():
            raise FloatingPointError(f"the loss was never finite in {config.steps} steps; lower `lr`.")
        return finished_pixels(self.best, self.teacher, config)

    def curves(self) -> Tensor:
        """What the last run went through, float32 [B, 2, T] on the CPU: cross-entropy of each image, and its batch's
        prior (0 without one), at every `ceil(steps / 100)`-th step; NaN after an early end."""
        every = math.ceil(self.config.steps / CURVE_POINTS)
        doubts, unnatural = self.history[::every].cpu().T.split([len(self.best), 1])
        return torch.stack([doubts, unnatural.expand_as(doubts)], dim=1)

    def _step(self, prune: Mapping[int, float] | None) -> None:
        images = self.parameters.images()
        seen = seen_as(images, self.views.index_select(0, self.count)[0])
        weight = self.config.prior_weight
        loss = inversion_loss(
            self.teacher, self.head, seen, self.labels, prune, self.prior, weight, self.size, self.terms
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            self.history.index_copy_(0, self.count, self.terms.view(1, -1))
            better = loss < self.best_loss
            self.best_loss.copy_(torch.where(better, loss, self.best_loss))
            self.best.copy_(torch.where(better, images, self.best))
            self.lowest.index_copy_(0, self.count, self.best_loss.view(1))
            set_rate(self.optimizer, self.rates.index_select(0, self.count)[0])
            self.optimizer.step()
            self.parameters.clip()
            self.count.add_(1)

    def _state(self) -> list[Tensor]:
        kept = [self.parameters.variable, self.best, self.best_loss, self.lowest, self.history, self.count]
        return [*kept, *state_of(self.optimizer)]

    def _settled(self, step: int, prune_from: int) -> bool:
        """Whether the lowest loss fell by less than 1 % in the last `patience` steps, pruned ones where tokens are."""
        patience = self.config.patience
        if patience is None or step - patience < prune_from:
            return False
        return not self.lowest[step] <= 0.99 * self.lowest[step - patience]


def step_size(step: int, config: InversionConfig) -> float:
    """Learning rate of a step: rises linearly over `warm_up`, then stays, or falls to zero along half a cosine."""
    rise = round(config.warm_up * config.steps)
    if step < rise:
        return config.lr * (step + 1) / rise
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * (step - rise) / (config.steps - rise))) / 2
