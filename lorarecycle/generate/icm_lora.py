"""ICM-LoRA: a conditional variational autoencoder that makes an adapter for a task vector (Shao et al., IJCAI 2025)."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import as_plain
from ..runtime.seeds import stream
from .config import GenerateConfig
from .cvae import CVAE, Posterior
from .generator import Examples, Generator, Machine, draws
from .normalisation import denormalise, normalise, segments
from .training import train


class LoRAGenerator(Generator):
    """Adapters from task vectors by a conditional variational autoencoder.

    `fit` minimises mean squared error + `kl_weight` * KL over normalised flat adapters (Eq. 8); `sample` draws
    z ~ N(0, I), decodes it under the task vector (Eq. 9) and undoes the normalisation. A generated vector has no
    statistics of its own: it takes the mean statistics of the training adapters with the nearest task vector.

    Attributes:
        losses: "reconstruction" and "kl" (unweighted), float32 [steps] each, of the fit.
        statistics: float32 [T, parts, 2], mean and deviation for each training condition.
    """

    method = "icm-lora"
    config_class = GenerateConfig
    losses: dict[str, Tensor]
    statistics: Tensor
    model: CVAE

    def _build(self) -> CVAE:
        return CVAE(self.padded, self.conditions.shape[1], self.config.plan, self.config.kernel, self.config.latent)

    @property
    def padded(self) -> int:
        """Length of the network's vectors: the adapter's, up to the next multiple of 2 ** conv_layers (4096)."""
        step = 2**self.config.conv_layers
        return -(-self.layout.size // step) * step

    @property
    def _sizes(self) -> list[int]:
        return segments(list(self.layout.slices().values()), self.config.normalisation)

    def _fit(self, examples: Examples, machine: Machine) -> None:
        vectors, self.statistics = self._normalise(examples)
        model = seeded(self._build, self.config.seed).to(machine.device)
        vectors, conditions = vectors.to(machine.device), self.conditions.to(machine.device)

        def terms(index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            batch, condition = vectors[index], conditions[examples.tasks[index]]
            noise = torch.randn(len(index), self.config.latent, generator=generator).to(machine.device)
            with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
                posterior = model.encode(batch, condition)
                mean, log_variance = posterior.mean.float(), posterior.log_variance.float()
                decoded = model.decode(mean + noise * (log_variance / 2).exp(), condition)  # Eq. 4
            reconstruction = F.mse_loss(decoded.float(), batch)
            return {"reconstruction": reconstruction, "kl": self.config.kl_weight * divergence(mean, log_variance)}

        self.losses = train(
            model,
            terms,
            len(vectors),
            epochs=self.config.epochs_of(len(vectors)),
            limit=self.config.limit,
            batch_size=self.config.batch_size,
            lr=self.config.lr,
            seed=self.config.seed,
            name=f"fit {self.method}",
            settle=self.config.settle,
            checkpoint=machine.checkpoint,
            run=run_record(self, examples, machine),
            quiet=machine.quiet,
        )
        if self.config.kl_weight:
            self.losses["kl"] = self.losses["kl"] / self.config.kl_weight
        self.model = model.cpu().eval()

    def _normalise(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Normalised, padded vectors [n, padded], and the mean statistics [T, parts, 2] of each condition."""
        normal = examples.vectors.new_zeros(len(examples.vectors), self.padded)
        statistics = []
        for row, vector in zip(normal, examples.vectors, strict=True):
            row[: len(vector)], found = normalise(vector, self._sizes)
            statistics.append(found)
        every = torch.stack(statistics)
        return normal, torch.stack([every[examples.tasks == t].mean(dim=0) for t in range(len(self.conditions))])

    def _pad(self, vectors: Tensor) -> Tensor:
        return F.pad(vectors, (0, self.padded - vectors.shape[-1]))

    def _denormalise(self, vectors: Tensor, statistics: Tensor) -> Tensor:
        return denormalise(vectors[:, : self.layout.size], statistics, self._sizes)

    def _sample(self, condition: Tensor, nearest: int, n: int, seed: int) -> Tensor:
        z = draws((self.config.latent,), n, seed, "sample")
        # one by one, so that the bits of a sample do not hang on how many are drawn
        decoded = torch.cat([self.model.decode(row[None], condition[None]) for row in z])
        return self._denormalise(decoded, self.statistics[nearest])

    def _reconstruct(self, vector: Tensor, condition: Tensor, nearest: int) -> Tensor:
        normal, statistics = normalise(vector, self._sizes)
        posterior: Posterior = self.model.encode(self._pad(normal)[None], condition[None])
        return self._denormalise(self.model.decode(posterior.mean, condition[None]), statistics)[0]

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        losses = {f"losses.{name}": value for name, value in self.losses.items()}
        return {"statistics": self.statistics, **state, **losses}

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"statistics": (len(self.conditions), len(self._sizes), 2)}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        self.statistics = tensors["statistics"]
        self.losses = {name[7:]: value for name, value in tensors.items() if name.startswith("losses.")}
        self.model = self._build()
        self.model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
        self.model.eval()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(q || N(0, I)), summed over z, averaged over the batch (Eq. 8)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()


def seeded(build: Any, seed: int) -> Any:
    """A module whose first weights come from `seed`; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream(seed, "weights").initial_seed())  # torch's would reseed GPUs too
        return build()


def run_record(generator: Generator, examples: Examples, machine: Machine) -> dict[str, Any]:
    """What a checkpoint must agree with: settings, precision and everything learnt from."""
    sha = hashlib.sha256()
    for tensor in (examples.vectors, examples.tasks, generator.conditions):
        sha.update(tensor.contiguous().numpy().tobytes())
    return {
        "method": generator.method,
        "config": as_plain(generator.config),
        "dtype": str(machine.dtype),
        "examples": sha.hexdigest(),
    }
