"""The naturalness prior: batch-norm statistics of a network trained on real images (Eq. 2)."""

from __future__ import annotations

import copy
import hashlib
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import batch_norm_prior
from ..runtime.files import load_tensors
from .prior_graph import losses_graph

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BatchNormPrior(nn.Module):
    """Sum over batch-norm layers of `||mean - running_mean||_2 + ||var - running_var||_2`.

    Args:
        network: a network with `BatchNorm2d` layers; copied, frozen.
        mean, std: its input normalisation per RGB channel for pixels in [0, 1].
        size: side in pixels at which it sees the images; their own when None.
        dtype: precision of its convolutions; batch norm and statistics stay in the network's own.
        relative: divide each layer's term by `||running_mean||_2 + ||running_var||_2` of that layer.

    Raises:
        ValueError: the network has no batch-norm layer with running statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        size: int | None = None,
        dtype: torch.dtype | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.network: nn.Module = (
            copy.deepcopy(network).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        )
        self.mean = mean
        self.std = std
        self.size = size
        self.relative = relative
        layers = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        if not layers:
            raise ValueError(
                f"`prior` must be a network with batch-norm statistics, got {type(network).__name__} without any; "
                "use a ResNet, or None for no prior."
            )
        for module in self.network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(dtype)
        weights = 1 / torch.tensor([_length(layer) for layer in layers]) if relative else torch.ones(len(layers))
        self.weights: Tensor
        self.register_buffer("weights", weights, persistent=False)
        graph = losses_graph(self.network, layers)
        self._graph = None if graph is None else (graph,)  # no child: its modules are the network's
        self._layers: list[Any] = layers
        if graph is None:
            for layer in layers:
                layer.register_forward_pre_hook(_measure)

    @classmethod
    def load(
        cls,
        source: str | PathLike[str] | nn.Module,
        *,
        weights: str | PathLike[str] | None = None,
        size: int | None = None,
        dtype: torch.dtype | None = None,
        relative: bool = False,
    ) -> BatchNormPrior:
        """Build the prior from a timm model name, a safetensors file that names its `architecture`, or a module.

        Args:
            source: e.g. "resnet50"; its weights come from the Hub unless `weights` is given.
            weights: local safetensors file with the weights of the timm model `source`.
            size, dtype, relative: see the class.

        Raises:
            ValueError: unknown model, or its weights cannot be had; the message says how to give them.
        """
        if isinstance(source, nn.Module):
            return cls(source, size=size, dtype=dtype, relative=relative)
        import timm

        path = Path(source).expanduser()
        state = None
        if path.suffix == ".safetensors":
            state, meta = load_tensors(path)
            if "architecture" not in meta:
                raise ValueError(
                    f"`prior` file {path} must name its timm `architecture` in its metadata, got none; pass "
                    "`BatchNormPrior.load(name, weights=file)` instead."
                )
            source = meta["architecture"]
        elif weights is not None:
            state, _ = load_tensors(weights)
        name = str(source)
        if not timm.is_model(name):
            raise ValueError(f"`prior` must be a timm model with batch norm, such as 'resnet50', got {name!r}.")
        try:
            network = timm.create_model(name, pretrained=state is None)
        except Exception as error:
            raise ValueError(
                f"`prior` {name!r} needs its pre-trained weights, which could not be fetched ({error}); give a local "
                "safetensors file, or None for no prior."
            ) from error
        if state is not None:
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(f"`weights` must fit {name}: {error}") from error
        cfg: Any = network.pretrained_cfg
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        return cls(network, mean=mean, std=std, size=size, dtype=dtype, relative=relative)

    def digest(self) -> str:
        """SHA-256 (hex) over the network's weights, normalisation, size and measure."""
        measure = " relative" if self.relative else ""
        sha = hashlib.sha256(f"{self.mean} {self.std} {self.size}{measure}".encode())
        for name, tensor in self.network.state_dict().items():
            sha.update(name.encode())
            sha.update(tensor.cpu().float().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def forward(self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """The prior of a batch.

        Args:
            images: [B, 3, H, W], normalised with `mean` and `std`.
            mean, std: normalisation that the images are in.

        Returns:
            float32 scalar.
        """
        channels = zip(images.unbind(1), mean, std, self.mean, self.std, strict=True)  # no tensor to copy to a GPU
        x = torch.stack([(c * s + (m - own_m)) / own_s for c, m, s, own_m, own_s in channels], dim=1)
        if self.size is not None and tuple(x.shape[-2:]) != (self.size, self.size):
            x = nn.functional.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        x = x.to(next(self.network.parameters()).dtype, memory_format=torch.channels_last)
        if self._graph is not None:
            return (torch.stack(self._graph[0](x)) * self.weights).sum()
        self.network(x)
        loss = (torch.stack([layer.prior_loss for layer in self._layers]) * self.weights).sum()
        for layer in self._layers:
            layer.prior_loss = None
        return loss


def _length(layer: Any) -> float:
    """`||running_mean||_2 + ||running_var||_2` of a layer."""
    return float(layer.running_mean.float().norm() + layer.running_var.float().norm())


def _measure(layer: Any, args: tuple[Tensor, ...]) -> None:
    """Leaves the prior of a batch in `layer.prior_loss`, a scalar, before the layer runs."""
    layer.prior_loss = batch_norm_prior(args[0], layer.running_mean, layer.running_var)
