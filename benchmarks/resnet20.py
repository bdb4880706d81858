"""ResNet-20 for 32 x 32 images with parameter-free shortcuts (He et al. 2016, Sec. 4.2, option A).

Its batch-norm statistics stand in for an ImageNet ResNet-50's where those weights cannot be had.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from lorarecycle.inversion.prior import BatchNormPrior
from lorarecycle.runtime.files import load_tensors


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.stride = channels // in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            pad = (y.shape[1] - x.shape[1]) // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
        return F.relu(x + y)


class ResNet20(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32), BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64), BasicBlock(64, 64), BasicBlock(64, 64))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20_prior(weights: Path) -> BatchNormPrior:
    """The prior of a CIFAR-10 ResNet-20, which sees images at 32 x 32."""
    network = ResNet20()
    state = load_tensors(weights)[0]
    network.load_state_dict(state, strict=False)  # `num_batches_tracked` is not in the file
    missing = {k for k in network.state_dict() if not k.endswith("num_batches_tracked")} - set(state)
    if missing:
        raise ValueError(f"{weights} must hold a ResNet-20, got one without {sorted(missing)}.")
    return BatchNormPrior(network, size=32)
