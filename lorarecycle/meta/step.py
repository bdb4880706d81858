"""One step of meta-training over buffers that stay where they are: draw, loss, backward, Adam."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..config import MetaConfig
from ..runtime.distributed import ALONE, Group
from ..runtime.graphs import Graphs, Step, held_weakly, set_rate, state_of
from ..vit.backbone import Backbone
from ..vit.lora import LoRA
from .bank import Bank
from .loss import episode_loss
from .shares import Share
from .stream import ImageStream


class EpisodeStep:
    """Takes the steps of a training one after another, see `Step`.

    With several processes each computes its own passes, the gradients are added up, and each takes the same step of
    Adam. What comes before the sum and what comes after are one launch each then.

    Args:
        backbone: frozen.
        lora: what is trained.
        bank: all images and what goes with them.
        shares: the passes of this process.
        rates: float32 [steps], learning rates.
        config: settings.
        optimizer: over the factors, made by `runtime.graphs.adam`.
        losses: float32 [steps], into which the steps write.
        done: steps that were taken before.
        graphs: whether a step is one launch.
        group: the processes that train together.
    """

    def __init__(
        self,
        backbone: Backbone,
        lora: LoRA,
        bank: Bank,
        shares: Sequence[Share],
        rates: Tensor,
        config: MetaConfig,
        *,
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
        done: int = 0,
        graphs: Graphs = None,
        group: Group = ALONE,
    ) -> None:
        device = backbone.device
        self._stream, banks = None, [bank] * len(shares)
        if bank.stored is not None and shares:
            rows = torch.cat([share.draws.rows for share in shares], dim=1).cpu()
            self._stream = ImageStream(bank.stored, rows, done, device)
            windows = self._stream.window.split([share.draws.rows.shape[1] for share in shares])
            banks = [bank._replace(window=window) for window in windows]
        self._passes = list(zip(shares, banks, strict=True))
        self.backbone = backbone
        self.lora = lora
        self.config = config
        self.rates = rates
        self.optimizer = optimizer
        self.losses = losses
        self._group = group
        self.count: Tensor = torch.full((1,), done, dtype=torch.int64, device=device)
        if group.size == 1:
            self._step = Step(held_weakly(self._take), held_weakly(self._state), device, graphs)
            return
        sizes = [parameter.numel() for parameter in lora.parameters()]
        self._sum = torch.zeros(sum(sizes) + 1, device=device)  # the gradients and the loss
        self._parts = [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]
        summed = [self._sum]
        self._before = Step(held_weakly(self._own_part), lambda: summed, device, graphs)
        self._after = Step(held_weakly(self._follow_sum), held_weakly(self._state), device, graphs)

    def __call__(self) -> None:
        """Take the next step."""
        if self._stream is not None:
            self._stream.advance()
        if self._group.size == 1:
            self._step()
            return
        self._before()
        self._group.add(self._sum)
        self._after()

    def close(self) -> None:
        """Stop reading images ahead."""
        if self._stream is not None:
            self._stream.close()

    def _take(self) -> None:
        self._update(self._backward())

    def _backward(self) -> Tensor:
        """The loss of this process's passes; its gradients are the parameters' afterwards."""
        self.optimizer.zero_grad(set_to_none=True)
        found = []
        for share, bank in self._passes:
            loss = episode_loss(self.backbone, self.lora, bank, share.draws.at(self.count), self.config)
            loss = loss if share.weight == 1 else loss * share.weight
            loss.backward()
            found.append(loss.detach())
        return reduce(torch.add, found) if found else torch.zeros((), device=self.losses.device)

    def _update(self, loss: Tensor) -> None:
        set_rate(self.optimizer, self.rates.index_select(0, self.count)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.count, loss.view(1))
        self.count.add_(1)

    def _own_part(self) -> None:
        self._sum[-1] = self._backward()
        for parameter, own in zip(self.lora.parameters(), self._parts, strict=True):
            if parameter.grad is None:  # this process has no pass in the step
                self._sum[own].zero_()
            else:
                self._sum[own].copy_(parameter.grad.flatten())

    def _follow_sum(self) -> None:
        for parameter, own in zip(self.lora.parameters(), self._parts, strict=True):
            parameter.grad = self._sum[own].view_as(parameter)
        self._update(self._sum[-1])

    def _state(self) -> list[Tensor]:
        return [*self.lora.parameters(), *state_of(self.optimizer), self.losses, self.count]
