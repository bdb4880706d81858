"""The batch-norm prior of Eq. 2."""

import pytest
import timm
import torch
from lorarecycle.kernels import reference
from torch import fx, nn

from lorarecycle import BatchNormPrior
from lorarecycle.inversion import prior as prior_module
from lorarecycle.inversion.prior_graph import LayerWithLoss
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


def timm_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            nn.init.normal_(layer.bias, 0, 0.3)
    return net


def plain(net: nn.Module, monkeypatch, **options) -> BatchNormPrior:
    with monkeypatch.context() as patch:
        patch.setattr(prior_module, "losses_graph", lambda *_: None)
        return BatchNormPrior(net, **options)


def run(prior: BatchNormPrior, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images = images.clone().requires_grad_()
    loss = prior(images, HALF, HALF)
    return loss.detach(), torch.autograd.grad(loss, images)[0]


def fused(prior: BatchNormPrior) -> dict[str, int]:
    """How many layers took in which activation, and how many a residual."""
    (graph,) = prior._graph
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        layer = graph.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, LayerWithLoss):
            found[layer.activation] = found.get(layer.activation, 0) + 1
            found["residual"] = found.get("residual", 0) + isinstance(node.args[1], fx.Node)
    return found


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", {"relu": 17, "none": 3, "residual": 8}),
        ("resnet50", {"relu": 49, "none": 4, "residual": 16}),
        ("tf_efficientnet_lite0", {"relu6": 33, "none": 16, "residual": 9}),
        ("mobilenetv2_100", {"relu6": 35, "none": 17, "residual": 10}),
        ("densenet121", {"relu": 121, "residual": 0}),
        ("efficientnet_b0", {"none": 49, "residual": 9}),  # SiLU stays beside the operation
    ],
)
def test_activations_and_residuals_in_the_same_pass_change_nothing(name, expected, monkeypatch):
    net = timm_network(name)
    images = torch.randn(2, 3, 64, 64)
    prior = BatchNormPrior(net)
    assert fused(prior) == expected
    for got, wanted in zip(run(prior, images), run(plain(net, monkeypatch), images), strict=True):
        assert (got - wanted).norm() <= 1e-4 * wanted.norm()


class _Decides(nn.Module):
    """Values decide what it does: nothing can follow it without them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x if x.mean() < 1e9 else -x)


class _OwnBatchNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 1.0)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(self.norm(x)))


def test_networks_that_no_graph_describes_run_as_they_are():
    own = network()
    own[1].__class__ = _OwnBatchNorm
    twice = _Twice().eval()
    images = torch.randn(3, 3, 9, 9)
    reference_prior = BatchNormPrior(network())
    assert reference_prior._graph is not None
    for net in (_Decides().eval(), own):
        prior = BatchNormPrior(net)
        assert prior._graph is None
        for got, wanted in zip(run(prior, images), run(reference_prior, images), strict=True):
            torch.testing.assert_close(got, wanted)
    prior = BatchNormPrior(twice)
    assert prior._graph is None
    assert run(prior, images)[0] > 0


class _ChangedInPlace(nn.Module):
    """The map that the layer reads is changed before its output meets the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = self.norm(x)
        return self.last(torch.relu(y + x.mul_(0.5)))


def test_maps_changed_in_place(monkeypatch):
    torch.manual_seed(0)
    net = _ChangedInPlace().eval()
    images = torch.randn(3, 3, 9, 9)
    prior = BatchNormPrior(net)
    assert fused(prior) == {"none": 2, "residual": 0}
    with torch.no_grad():
        torch.testing.assert_close(prior(images, HALF, HALF), plain(net, monkeypatch)(images, HALF, HALF))


@pytest.mark.medium
def test_the_graph_follows_the_network_to_another_dtype_and_is_compiled_whole():
    images = torch.randn(3, 3, 9, 9)
    prior = BatchNormPrior(network())
    loss, grad = run(prior, images)
    compiled = torch.compile(prior, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(run(compiled, images), (loss, grad), strict=True):
        torch.testing.assert_close(got, wanted)
    wide = run(prior.double(), images.double())
    assert wide[0].dtype == torch.float64
    torch.testing.assert_close(wide[1].float(), grad, rtol=1e-4, atol=1e-6)


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


@pytest.mark.medium
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


def test_a_relative_prior_weighs_layers_by_their_own_statistics():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)
    ).eval()
    network[1].running_var.fill_(9.0)
    images, shown = torch.rand(2, 3, 8, 8), ((0.0,) * 3, (1.0,) * 3)
    priors = {relative: BatchNormPrior(network, mean=shown[0], std=shown[1], relative=relative) for relative in (0, 1)}
    x, parts = images, []
    for convolution, norm in ((network[0], network[1]), (network[2], network[3])):
        x = convolution(x)
        var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        lengths = norm.running_mean.norm() + norm.running_var.norm()
        parts.append((((mean - norm.running_mean).norm() + (var - norm.running_var).norm()), lengths))
        x = norm(x)
    torch.testing.assert_close(priors[1](images, *shown), sum(part / length for part, length in parts))
    torch.testing.assert_close(priors[0](images, *shown), sum(part for part, _ in parts))
    assert priors[0].digest() != priors[1].digest()
