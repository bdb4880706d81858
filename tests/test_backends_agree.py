"""The whole pipeline gives the same meta-LoRA, within rounding, whichever backend runs its ops."""

import pytest
import torch
from lorarecycle.kernels import cpp, use_backend

from lorarecycle import recycle

pytestmark = pytest.mark.medium

SETTINGS = {
    "inversion": {"steps": 3, "images_per_class": 3, "prune": {1: 0.5}, "prune_from": 0.0, "lr": 0.05},
    "meta": {"steps": 4, "n_way": 3, "n_shot": 1, "n_query": 2, "interpolation": 0.5},
}


def small_prior() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.BatchNorm2d(4)).eval()


@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.slow)])
def test_recycle(tiny_backbone, make_adapter, backend):
    if backend == "cpp" and not cpp.available():
        pytest.skip("no C++ compiler here")
    if backend == "triton":
        pytest.importorskip("triton")
    adapters = [make_adapter(tiny_backbone, seed=seed) for seed in range(2)]
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    results = []
    for chosen in ("reference", backend):
        with use_backend(chosen):
            results.append(
                recycle(
                    adapters,
                    base=tiny_backbone,
                    prior=small_prior(),
                    device=device,
                    dtype="float32",
                    compile=False,
                    quiet=True,
                    **SETTINGS,
                )
            )
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = [tiny_backbone.merge(meta_lora)(images) for meta_lora in results]
    plain = tiny_backbone(images)
    moved = (features[0] - plain).norm()
    assert moved > 1e-4, "training must have moved the features, or there is nothing to compare"
    assert (features[0] - features[1]).norm() < 0.05 * moved
