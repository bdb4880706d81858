"""CAML: a sequence model that reads labelled support features and one query, trained on surrogates beforehand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.seeds import stream
from ...vit.backbone import Backbone
from ...vit.features import extract_features
from .base import Given, Method, Needs, Task
from .episodes import EpisodeDraw, pool_classes


class SequenceModel(nn.Module):
    """A transformer over [query; support], each token a feature beside the code of its class (Fifty et al., ICLR 2024).

    Codes are those of an equiangular simplex (ELMES): any two classes are as far apart as any other two, so which class
    has which code does not matter. The query's is a learnt one. There are no position embeddings.

    Args:
        width: of a feature.
        max_way: most classes.
        layers, heads, hidden: of the transformer; `hidden` is its width.
    """

    codes: Tensor

    def __init__(self, width: int, max_way: int, *, layers: int = 4, heads: int = 4, hidden: int = 256) -> None:
        super().__init__()
        codes = (torch.eye(max_way) - 1 / max_way) * (max_way / max(1, max_way - 1)) ** 0.5
        self.register_buffer("codes", codes)
        self.unknown: nn.Parameter = nn.Parameter(torch.zeros(max_way))
        self.embed: nn.Module = nn.Linear(width, hidden)
        self.embed_code: nn.Module = nn.Linear(max_way, hidden, bias=False)
        layer = nn.TransformerEncoderLayer(
            hidden, heads, 4 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers: nn.TransformerEncoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm: nn.Module = nn.LayerNorm(hidden)
        self.out: nn.Module = nn.Linear(hidden, max_way)

    def forward(self, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        """Logits of the codes.

        Args:
            support: float32 [..., S, D].
            labels: int64 [..., S].
            query: float32 [..., Q, D]; each is answered as if it were alone.

        Returns:
            float32 [..., Q, max_way].
        """
        centre = support.mean(dim=-2, keepdim=True)
        scale = (support - centre).norm(dim=-1).mean(dim=-1)[..., None, None].clamp_min(1e-6) / support.shape[-1] ** 0.5
        known = self.embed((support - centre) / scale) + self.embed_code(self.codes[labels])
        asked = self.embed((query - centre) / scale) + self.embed_code(self.unknown)
        rows = known.unsqueeze(-3).expand(*asked.shape[:-1], *known.shape[-2:])
        sequence = torch.cat([asked.unsqueeze(-2), rows], dim=-2)
        answers = self.layers(sequence.flatten(0, -3))[:, 0]
        return self.out(self.norm(answers)).unflatten(0, asked.shape[:-1])


@dataclass
class CAML(Method):
    """In-context classification by a sequence model over frozen features.

    It trains on episodes of the surrogates' features, with 1 to `max_shot` support images of a class and codes dealt
    anew each time.

    Args:
        steps: of training.
        batch: episodes of a step.
        max_way, max_shot, n_query: of the episodes, as far as there are classes; a task has at most `max_way` classes.
        learning_rate: the highest of Adam, which warms up over a tenth of the steps and falls to zero.
        layers, heads, hidden: of the sequence model.
        seed: of everything random.
    """

    steps: int = 1000
    batch: int = 16
    max_way: int = 5
    max_shot: int = 5
    n_query: int = 5
    learning_rate: float = 5e-4
    layers: int = 4
    heads: int = 4
    hidden: int = 256
    seed: int = 0
    needs: ClassVar[Needs] = Needs(surrogates=True)
    encoder: Backbone = field(init=False, repr=False)
    model: SequenceModel = field(init=False, repr=False)

    def _prepare(self, given: Given) -> None:
        pool, self.encoder = pool_classes(given.surrogates), given.backbone
        self.model = self.train(extract_features(self.encoder, pool.images).to(self.encoder.device), pool.labels)

    def train(self, features: Tensor, labels: Tensor) -> SequenceModel:
        """A sequence model from features [n, D] and their classes [n]."""
        shots = range(1, min(self.max_shot, int(torch.bincount(labels).min()) - 1) + 1)
        n_way = min(self.max_way, len(labels.unique()))
        draws = [EpisodeDraw(labels, n_way, n_shot, self.n_query) for n_shot in shots]
        if not draws:
            raise ValueError("`surrogates` must hold at least two images of each class, got one.")
        device = features.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=stream(self.seed, "CAML"))))
            model = SequenceModel(
                features.shape[1], self.max_way, layers=self.layers, heads=self.heads, hidden=self.hidden
            ).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.steps, pct_start=0.1, cycle_momentum=False
        )
        with torch.enable_grad():
            for step in range(self.steps):
                generator = stream(self.seed, "episodes", step)
                draw = draws[int(torch.randint(len(draws), (), generator=generator))]
                parts = [
                    torch.stack(part).to(device)
                    for part in zip(*(draw(generator) for _ in range(self.batch)), strict=True)
                ]
                support, known, query, truth = parts
                logits = model(features[support], known, features[query])
                loss = F.cross_entropy(logits.flatten(0, -2), truth.flatten())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                rate.step()
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def solve(self, task: Task) -> Tensor:
        if task.n_way > self.max_way:
            raise ValueError(f"`max_way` must be at least the classes of a task, got {self.max_way} and {task.n_way}.")
        support, query = task.features(self.encoder)
        return self.model(support, task.labels(support.device), query)[:, : task.n_way]
