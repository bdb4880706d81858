"""Where inversion starts, and the schedule of its learning rate."""

import pytest
import torch

from lorarecycle import InversionConfig, invert
from lorarecycle.data.images import enlarge, normalize
from lorarecycle.inversion.optimise import step_size
from lorarecycle.inversion.start import start_images
from lorarecycle.runtime.seeds import stream

FAST = {
    "prior": None,
    "init": "noise",
    "images_per_class": 4,
    "batch_size": 12,
    "steps": 20,
    "roll": 0.0,
    "flip": False,
}
LABELS = torch.arange(3).repeat(4)


def start(backbone, adapter, **settings) -> torch.Tensor:
    config = InversionConfig(**FAST | settings)
    return start_images(backbone.merge(adapter), adapter.head, LABELS, config, stream(0, "test"))


def likelihood(backbone, adapter, canvas) -> float:
    """Mean log-probability that the teacher gives to the wanted classes."""
    pixels = (enlarge(canvas * 0.5 + 0.5, 32).clamp(0, 1) * 255).round().to(torch.uint8)
    teacher = backbone.merge(adapter)
    logits = adapter.head(teacher(normalize(pixels, teacher.mean, teacher.std)))
    return logits.log_softmax(-1)[torch.arange(12), LABELS].mean().item()


def test_noise_is_what_it_was(tiny_backbone, make_adapter):
    canvas = start(tiny_backbone, make_adapter(tiny_backbone))
    assert torch.equal(canvas, torch.randn(12, 3, 32, 32, generator=stream(0, "test")))


def test_the_teacher_chooses_among_pictures(tiny_backbone, make_adapter):
    adapter = make_adapter(tiny_backbone)
    few = start(tiny_backbone, adapter, init="painted", candidates=1, latent_size=16)
    many = start(tiny_backbone, adapter, init="painted", candidates=16, latent_size=16)
    assert few.shape == many.shape == (12, 3, 16, 16)
    assert many.min() >= -1
    assert many.max() <= 1
    assert len({tuple(x.flatten().tolist()) for x in many}) == 12  # no image twice
    assert likelihood(tiny_backbone, adapter, many) > likelihood(tiny_backbone, adapter, few) + 0.5


@pytest.mark.parametrize("init", ["noise", "painted"])
def test_smaller_images_are_optimised_and_come_back_enlarged(tiny_backbone, make_adapter, init):
    adapter = make_adapter(tiny_backbone)
    config = InversionConfig(**FAST | {"init": init, "latent_size": 16, "schedule": "cosine", "lr": 0.1})
    surrogate = invert(tiny_backbone, adapter, config=config, quiet=True)
    assert surrogate.images.shape == (12, 3, 32, 32)
    assert (surrogate.teacher_logits.argmax(1) == surrogate.labels).float().mean() > 0.9
    power = torch.fft.rfft2(surrogate.images.float() - surrogate.images.float().mean(dim=(2, 3), keepdim=True)).abs()
    assert power[..., 12:21, 12:].mean() < 0.1 * power[..., :5, :5].mean()  # nothing finer than 16 pixels can show


def test_schedules():
    cosine = InversionConfig(lr=0.2, steps=10, schedule="cosine")
    rates = [step_size(i, cosine) for i in range(10)]
    assert rates[0] == 0.2
    assert rates[5] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert rates[9] > 0
    assert {step_size(i, InversionConfig(lr=0.2, steps=10)) for i in range(10)} == {0.2}
