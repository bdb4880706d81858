"""One step of meta-training over buffers that stay where they are: draw, loss, backward, Adam."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import MetaConfig
from ..runtime.graphs import Graphs, Step, set_rate, state_of
from ..vit.backbone import Backbone
from ..vit.lora import LoRA
from .bank import Bank
from .draws import Draws
from .loss import episode_loss
from .stream import ImageStream


class EpisodeStep:
    """Takes the steps of a training one after another, see `Step`.

    Args:
        backbone: frozen.
        lora: what is trained.
        bank: all images and what goes with them.
        draws: of all steps.
        rates: float32 [steps], learning rates.
        config: settings.
        optimizer: over the factors, made by `runtime.graphs.adam`.
        losses: float32 [steps], into which the steps write.
        done: steps that were taken before.
        graphs: whether a step is one launch.
    """

    def __init__(
        self,
        backbone: Backbone,
        lora: LoRA,
        bank: Bank,
        draws: Draws,
        rates: Tensor,
        config: MetaConfig,
        *,
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
        done: int = 0,
        graphs: Graphs = None,
    ) -> None:
        self._stream = None
        if bank.stored is not None:
            self._stream = ImageStream(bank.stored, draws.rows.cpu(), done, backbone.device)
            bank = bank._replace(window=self._stream.window)
        self.backbone, self.lora, self.bank, self.draws = backbone, lora, bank, draws
        self.rates, self.config, self.optimizer, self.losses = rates, config, optimizer, losses
        self.count = torch.full((1,), done, dtype=torch.int64, device=backbone.device)
        self._step = Step(self._take, self._state, backbone.device, graphs)

    def __call__(self) -> None:
        """Take the next step."""
        if self._stream is not None:
            self._stream.advance()
        self._step()

    def close(self) -> None:
        """Stop reading images ahead."""
        if self._stream is not None:
            self._stream.close()

    def _take(self) -> None:
        loss = episode_loss(self.backbone, self.lora, self.bank, self.draws.at(self.count), self.config)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        set_rate(self.optimizer, self.rates.index_select(0, self.count)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.count, loss.detach().view(1))
        self.count.add_(1)

    def _state(self) -> list[Tensor]:
        return [*self.lora.parameters(), *state_of(self.optimizer), self.losses, self.count]
