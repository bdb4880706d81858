"""What Adam changes: each parametrization gives back the images it starts from, and stays where images are."""

import pytest
import torch

from lorarecycle import InversionConfig, invert
from lorarecycle.data.images import normalize
from lorarecycle.inversion.optimise import step_size
from lorarecycle.inversion.parametrization import PARAMETRIZATIONS, Fourier
from lorarecycle.inversion.start import start_images


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("size", [16, 15])
def test_images_come_back(tiny_backbone, name, size):
    pixels = torch.randint(10, 246, (2, 3, size, size), dtype=torch.uint8)
    images = normalize(pixels, tiny_backbone.mean, tiny_backbone.std)
    parameters = PARAMETRIZATIONS[name](tiny_backbone, 2, size)
    parameters.set(images)
    torch.testing.assert_close(parameters.images().detach(), images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_large_step_stays_in_range(tiny_backbone, name):
    parameters = PARAMETRIZATIONS[name](tiny_backbone, 1, 16)
    with torch.no_grad():
        parameters.variable.add_(100)
    parameters.clip()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tiny_backbone.mean, tiny_backbone.std))
    pixels = parameters.images().detach() * std + mean
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5


def test_equal_steps_of_coefficients_move_coarse_parts_further(tiny_backbone):
    parameters = Fourier(tiny_backbone, 1, 32)
    with torch.no_grad():
        parameters.variable.copy_(torch.randn(parameters.variable.shape, generator=torch.Generator().manual_seed(0)))
    power = torch.fft.rfft2(parameters.images().detach()[0]).abs()
    assert power[:, 1:4, 1:4].mean() > 4 * power[:, 12:20, 12:].mean()


def test_the_sigmoid_moves_by_about_the_learning_rate(tiny_backbone):
    parameters = Fourier(tiny_backbone, 1, 32)
    signs = torch.randint(0, 2, parameters.variable.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    with torch.no_grad():
        parameters.variable.add_(0.1 * signs)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tiny_backbone.mean, tiny_backbone.std))
    moved = (parameters.images().detach() * std + mean).logit()
    assert 0.05 < moved.square().mean().sqrt() < 0.3


def test_noise_of_coefficients_is_smooth_and_grey(tiny_backbone, make_adapter):
    config = InversionConfig(init="noise", parametrization="fourier", steps=1)
    head, labels = make_adapter(tiny_backbone).head, torch.zeros(4, dtype=torch.long)
    images = start_images(tiny_backbone, head, labels, config, torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tiny_backbone.mean, tiny_backbone.std))
    pixels = images * std + mean
    assert (pixels - 0.5).abs().mean() < 0.15
    steps = (pixels[..., 1:] - pixels[..., :-1]).abs().mean()
    assert steps < (pixels - 0.5).abs().mean()  # 1.4 times as large for white noise


@pytest.mark.parametrize(("name", "lr"), [("pixels", 0.1), ("fourier", 0.2)])
def test_the_teacher_recognises_images_of_every_parametrization(tiny_backbone, make_adapter, name, lr):
    config = {"prior": None, "init": "noise", "images_per_class": 2, "steps": 40, "roll": 0.0, "flip": False}
    config |= {"parametrization": name, "lr": lr, "warm_up": 0.1, "schedule": "cosine"}
    surrogate = invert(tiny_backbone, make_adapter(tiny_backbone), config=config, quiet=True)
    assert (surrogate.teacher_logits.argmax(1) == surrogate.labels).all()


def test_warm_up():
    config = InversionConfig(lr=0.2, steps=20, warm_up=0.25, schedule="cosine")
    rates = [step_size(i, config) for i in range(20)]
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert rates[5] == 0.2
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert step_size(19, InversionConfig(lr=0.2, steps=20, warm_up=0.5)) == 0.2
