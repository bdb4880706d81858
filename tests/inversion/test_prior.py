"""The batch-norm prior of Eq. 2."""

import pytest
import timm
import torch
from lorarecycle.kernels import reference
from torch import nn

from lorarecycle import BatchNormPrior
from lorarecycle.runtime.files import save_tensors

HALF = (0.5, 0.5, 0.5)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return net.eval()


def test_value_is_the_sum_of_norms_over_the_layers():
    net = network()
    images = torch.randn(3, 3, 9, 9)
    x = (images * 0.5 + 0.5 - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.25
    expected = 0.0
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            flat = x.transpose(0, 1).flatten(1)
            expected += (flat.mean(1) - layer.running_mean).norm() + (
                flat.var(1, unbiased=False) - layer.running_var
            ).norm()
        x = layer(x)
    prior = BatchNormPrior(net, mean=(0.4, 0.5, 0.6), std=(0.25,) * 3)
    torch.testing.assert_close(prior(images, HALF, HALF), expected)


def test_the_network_given_stays_as_it_is_and_gradients_reach_the_images():
    net = network()
    images = torch.randn(3, 3, 9, 9, requires_grad=True)
    BatchNormPrior(net, size=7)(images, HALF, HALF).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not net[1]._forward_pre_hooks
    assert net[0].weight.requires_grad


def test_reference_gradient():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)

    def loss(x):
        v, m = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return (m - mean).norm() + (v - var).norm()

    (expected,) = torch.autograd.grad(loss(x), x)
    single = x.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(reference.batch_norm_prior(single, mean.float(), var.float()), single)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_local_weights_of_a_timm_network(tmp_path):
    net = timm.create_model("resnet18", pretrained=False)
    state = dict(net.state_dict().items())
    path = save_tensors(tmp_path / "r18.safetensors", state)
    loaded = BatchNormPrior.load("resnet18", weights=path)
    images = torch.randn(2, 3, 32, 32)
    direct = BatchNormPrior(net.eval())
    torch.testing.assert_close(loaded(images, HALF, HALF), direct(images, HALF, HALF))
    assert loaded.digest() == direct.digest()
    assert loaded.digest() != BatchNormPrior(net, size=16).digest()


def test_bad_networks(tmp_path):
    with pytest.raises(ValueError, match="`prior` must be a network with batch-norm statistics, got Linear"):
        BatchNormPrior(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`prior` must be a timm model with batch norm"):
        BatchNormPrior.load("no_such_network")
    path = save_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="must name its timm `architecture`"):
        BatchNormPrior.load(path)
    with pytest.raises(ValueError, match="`weights` must fit resnet18"):
        BatchNormPrior.load("resnet18", weights=path)


def test_no_network_says_how_to_go_on(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match="could not be fetched .*; give a local safetensors file, or None"):
        BatchNormPrior.load("resnet50")
