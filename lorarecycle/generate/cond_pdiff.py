"""COND P-DIFF: latent diffusion over autoencoded parameters, conditioned on task vectors (Jin et al., 2024)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.digests import digest_tensor
from .config import DiffusionConfig
from .cvae import CVAE
from .generator import Examples, Machine, draws
from .icm_lora import LoRAGenerator, run_record, seeded
from .normalisation import normalise
from .training import train


class CondPDiff(LoRAGenerator):
    """An autoencoder without condition, and a denoiser of its latents under the task vector.

    The autoencoder has the convolutions of `LoRAGenerator`, so that the two differ in method and not in size. The
    denoiser predicts the noise of a latent (Ho et al., 2020: linear schedule 1e-4 to 0.02) from the latent, the
    noise level and the condition; `sample` runs all levels backwards from N(0, I).

    Attributes:
        latents: float32 [2, latent], mean and deviation of the training latents, which the diffusion sees normalised.
    """

    method = "cond-p-diff"
    config_class = DiffusionConfig
    latents: Tensor
    denoiser: Denoiser

    def _build(self) -> CVAE:
        return CVAE(self.padded, 0, self.config.plan, self.config.kernel, self.config.latent)

    def _build_denoiser(self) -> Denoiser:
        return Denoiser(self.config.latent, self.conditions.shape[1], self.config.hidden)

    def _fit(self, examples: Examples, machine: Machine) -> None:
        self._fit_autoencoder(examples, machine)
        self._fit_denoiser(examples, machine)

    def _fit_autoencoder(self, examples: Examples, machine: Machine) -> None:
        vectors, self.statistics = self._normalise(examples)
        model = seeded(self._build, self.config.seed).to(machine.device)
        vectors = vectors.to(machine.device)
        config = self.config

        def reconstruction(index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            batch = vectors[index]
            with torch.autocast(machine.device.type, machine.dtype, enabled=machine.dtype != torch.float32):
                nothing = batch.new_empty(len(batch), 0)
                decoded = model.decode(model.encode(batch, nothing).mean, nothing)
            return {"reconstruction": F.mse_loss(decoded.float(), batch)}

        self.losses = train(
            model,
            reconstruction,
            len(vectors),
            epochs=config.epochs_of(len(vectors)),
            limit=config.limit,
            batch_size=config.batch_size,
            lr=config.lr,
            seed=config.seed,
            name=f"fit {self.method} autoencoder",
            settle=config.settle,
            checkpoint=machine.checkpoint,
            run=run_record(self, examples, machine),
            quiet=machine.quiet,
        )
        self.model = model.cpu().eval()

    def _fit_denoiser(self, examples: Examples, machine: Machine) -> None:
        config = self.config
        with torch.no_grad():
            codes = torch.cat([self._encode(vector) for vector in self._normalise(examples)[0].split(1)])
        self.latents = torch.stack([codes.mean(dim=0), codes.std(dim=0, correction=0).clamp(min=1e-6)])
        codes = (codes - self.latents[0]) / self.latents[1]
        known = digest_tensor(torch.cat([tensor.float().flatten() for tensor in self.model.state_dict().values()]))
        denoiser = seeded(self._build_denoiser, config.seed + 1)
        kept = schedule(config.diffusion_steps).cumprod(dim=0)  # share of the signal's variance, alpha bar

        def denoising(index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            level = torch.randint(config.diffusion_steps, (len(index),), generator=generator)
            noise = torch.randn(len(index), config.latent, generator=generator)
            share = kept[level][:, None]
            noisy = share.sqrt() * codes[index] + (1 - share).sqrt() * noise
            predicted = denoiser(noisy, level, self.conditions[examples.tasks[index]])
            return {"denoising": F.mse_loss(predicted, noise)}

        after = machine.checkpoint and machine.checkpoint.with_name(machine.checkpoint.name + ".diffusion")
        self.losses |= train(
            denoiser,
            denoising,
            len(codes),
            epochs=config.diffusion_epochs,
            batch_size=config.diffusion_batch_size,
            lr=config.lr,
            seed=config.seed,
            name=f"fit {self.method} diffusion",
            setting="diffusion_epochs",
            checkpoint=after,
            run={**run_record(self, examples, machine), "autoencoder": known},
            quiet=machine.quiet,
        )
        self.denoiser = denoiser

    def _encode(self, vectors: Tensor) -> Tensor:
        return self.model.encode(vectors, vectors.new_empty(len(vectors), 0)).mean

    def _decode(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes, codes.new_empty(len(codes), 0))

    def _sample(self, condition: Tensor, nearest: int, n: int, seed: int) -> Tensor:
        T = self.config.diffusion_steps
        alphas = schedule(T)
        kept = alphas.cumprod(dim=0)
        noise = draws((T, self.config.latent), n, seed, "sample")
        decoded = []
        for own in noise:  # one by one, so that the bits of a sample do not hang on how many are drawn
            code = own[T - 1][None]
            for t in range(T - 1, -1, -1):
                predicted = self.denoiser(code, torch.tensor([t]), condition[None])
                code = (code - (1 - alphas[t]) / (1 - kept[t]).sqrt() * predicted) / alphas[t].sqrt()
                if t:
                    code = code + (1 - alphas[t]).sqrt() * own[t - 1]
            decoded.append(self._decode(code * self.latents[1] + self.latents[0]))
        return self._denormalise(torch.cat(decoded), self.statistics[nearest])

    def _reconstruct(self, vector: Tensor, condition: Tensor, nearest: int) -> Tensor:
        normal, statistics = normalise(vector, self._sizes)
        return self._denormalise(self._decode(self._encode(self._pad(normal)[None])), statistics)[0]

    def _state(self) -> dict[str, Tensor]:
        denoiser = {f"denoiser.{name}": value for name, value in self.denoiser.state_dict().items()}
        return {**super()._state(), **denoiser, "latents": self.latents}

    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {**super()._shapes(), "latents": (2, self.config.latent)}

    def _set_state(self, tensors: dict[str, Tensor]) -> None:
        super()._set_state(tensors)
        self.latents = tensors["latents"]
        self.denoiser = self._build_denoiser()
        self.denoiser.load_state_dict({n[9:]: value for n, value in tensors.items() if n.startswith("denoiser.")})
        self.denoiser.eval()


class Denoiser(nn.Module):
    """Predicts the noise in a latent: a residual network that is told level and condition at every block."""

    def __init__(self, latent: int, width: int, hidden: int, blocks: int = 3) -> None:
        super().__init__()
        self.enter: nn.Module = nn.Linear(latent, hidden)
        self.told: nn.Module = nn.Linear(64 + width, hidden)
        self.blocks: nn.ModuleList = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(blocks)
        )
        self.leave: nn.Module = nn.Linear(hidden, latent)

    def forward(self, codes: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        """Noise [B, latent] in codes [B, latent] at levels int64 [B] under conditions [B, W]."""
        rates = torch.exp(-math.log(10_000) / 32 * torch.arange(32))
        angles = level[:, None] * rates
        told = self.told(torch.cat([angles.sin(), angles.cos(), condition], dim=1))
        hidden = self.enter(codes)
        for block in self.blocks:
            hidden = hidden + block(hidden + told)
        return self.leave(hidden)


def schedule(steps: int) -> Tensor:
    """Share of the signal's variance that each of `steps` levels keeps: 1 - beta, beta linear 1e-4 to 0.02 at 1000."""
    scale = 1000 / steps
    return 1 - torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), steps)
