"""Whole stages on a pretended GPU: nothing mixes devices, no captured step waits or copies, results are the CPU's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from lorarecycle.kernels import use_backend

from lorarecycle import FewShotClassifier, InversionConfig, evaluate, recycle, tune, warm_start
from lorarecycle.config import EvaluateConfig
from lorarecycle.fewshot.methods.registry import METHODS, make_method
from lorarecycle.generate import LoRAGenerator
from lorarecycle.inversion.invert import invert
from lorarecycle.reproduce.prepare import prepare_run
from lorarecycle.reproduce.quick import tiny_prior
from lorarecycle.runtime.graphs import Step

from .pretended_gpu import GPU, pretended_gpu

INVERSION = {"images_per_class": 4, "batch_size": 12, "steps": 4, "init": "noise"}
META = {"steps": 3, "n_way": 3, "n_query": 3}
EPISODES = {**META, "guide_weight": 0.0, "init": "random"}
QUICK = {
    "caml": {"steps": 2, "batch": 2, "hidden": 16, "layers": 1, "max_way": 3, "max_shot": 2},
    "lorahub": {"budget": 6},
    "pmf": {"meta_steps": 1, "steps": 1, "rates": (0.01,)},
    "full": {"steps": 1, "rates": (0.01,)},
    "lora-linear": {"steps": 1, "rates": (0.01,)},
    "mole": {"steps": 1, "rates": (0.01,)},
}


@pytest.fixture
def gpu():
    with use_backend("reference"), pretended_gpu() as gpu:
        yield gpu


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    return [make_adapter(tiny_backbone, seed=i, r=1 + i, size=0.05) for i in range(3)]


def same(here, there, start=None):
    """Two trainings lead to the same, but for the order of sums, and pixels and signs of Adam's steps that hang on it:
    they differ by less than a third of what was learnt."""
    for site in here.sites:
        learnt = here.delta(site) - (0 if start is None else start.delta(site))
        assert (there.delta(site) - here.delta(site)).norm() < learnt.norm() / 3, site


@pytest.mark.parametrize(
    ("inversion", "meta", "steps", "more"),
    [
        pytest.param({"pictures": 12}, META, 1, {}, marks=pytest.mark.medium),
        pytest.param({"pictures": 12}, {**META, "sparsity": 0.5}, 1, {}, marks=pytest.mark.medium),
        ({**INVERSION, "prune": {1: 0.5}, "latent_size": 16}, {**EPISODES, "distance": "cosine"}, 3, {}),
        pytest.param(
            {**INVERSION, "prune": {1: 0.5}, "parametrization": "fourier", "prior_relative": True},
            {**EPISODES, "resolutions": (8, 16)},
            3,
            {},
            marks=pytest.mark.medium,
        ),
        pytest.param(INVERSION, {**META, "guide_weight": 0.5}, 2, {"memory_budget": 0}, marks=pytest.mark.medium),
    ],
    ids=["default", "sparse", "pruned", "fourier", "from disk"],
)
def test_recycle(gpu, tiny_backbone, adapters, tmp_path, inversion, meta, steps, more):
    """The job from adapters to meta-LoRA; one captured step for each phase."""
    found = {}
    for device in ("cpu", "cuda"):
        options = {"config": {"inversion": inversion, "meta": meta}, "work_dir": tmp_path / device, **more}
        options["prior"] = tiny_prior(InversionConfig(**inversion), dtype=torch.float32, device=torch.device("cpu"))
        found[device] = recycle(adapters, base=tiny_backbone, device=device, dtype="float32", quiet=True, **options)
    same(found["cpu"], found["cuda"], None if meta.get("init") else warm_start(adapters, base=tiny_backbone))
    assert gpu.steps == steps
    assert gpu.elements > 1e6


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_than_warm_ups(gpu, tiny_backbone, adapters, steps):
    """Runs before a capture stay within the tables, also those of the pruned step, which begins later."""
    inversion = {**INVERSION, "steps": steps, "prune": {1: 0.5}, "prune_from": 0.5, "prior": None}
    config = {"inversion": inversion, "meta": {**EPISODES, "steps": steps}}
    recycle(adapters, base=tiny_backbone, config=config, device="cuda", dtype="float32", quiet=True)
    assert gpu.steps == 3 - (steps == 1)  # of one step none is before half of them


def test_tune(gpu, tiny_backbone, tiny_data):
    config = {"epochs": 2, "batch_size": 24}
    here = tune(tiny_backbone, tiny_data, config=config, quiet=True)
    there = tune(tiny_backbone.clone().to(GPU), tiny_data, config=config, quiet=True)
    same(here, there)
    assert gpu.steps == 1


@pytest.mark.medium
@pytest.mark.parametrize("name", ["nn", "average", "warm-start", "tip-adapter", "laplacian-shot", "shrunk", *QUICK])
def test_methods(gpu, tiny_backbone, adapters, make_data, name):
    """Each method answers tasks with what it needs, and as it does on the CPU."""
    for package in METHODS[name].needs.packages:
        pytest.importorskip(package)
    data, config = make_data(n_classes=3), EvaluateConfig(n_way=3, n_shot=2, n_query=4, n_tasks=2, n_validation_tasks=1)
    needs, found = METHODS[name].needs, {}
    for device in ("cpu", "cuda"):
        backbone = tiny_backbone.clone().to(torch.device(device))
        surrogates = None
        if needs.surrogates:
            inversion = {**INVERSION, "prior": None, "steps": 1}
            surrogates = [invert(backbone, one, config=inversion, quiet=True) for one in adapters]
        found[device] = evaluate(
            backbone,
            data,
            method=make_method(name, **QUICK.get(name, {})),
            adapters=adapters if needs.adapters else (),
            surrogates=surrogates,
            validation=data if needs.rate else None,
            config=config,
            quiet=True,
        )
    if name in QUICK:  # trained from noise, or in a few steps
        assert abs(found["cuda"].accuracy - found["cpu"].accuracy) < 10
    else:
        assert torch.equal(found["cuda"].accuracies, found["cpu"].accuracies)
    assert gpu.elements > 1e5


def test_classifier(gpu, tiny_backbone, adapters, tiny_data):
    support, labels = tiny_data.images[::12], list("abcd")
    here = FewShotClassifier(tiny_backbone, adapters[0]).fit(support, labels)
    there = FewShotClassifier(tiny_backbone.clone().to(GPU), adapters[0]).fit(support, labels)
    for _ in range(3):  # a shape that comes again is captured
        torch.testing.assert_close(
            torch.as_tensor(there.predict_proba(tiny_data.images)),
            torch.as_tensor(here.predict_proba(tiny_data.images)),
        )


def test_generator(gpu, tiny_backbone, adapters):
    vectors = list(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    config = {"epochs": 2, "batch_size": 2, "conv_layers": 6, "latent": 8}
    generator = LoRAGenerator.fit(adapters, vectors, config=config, device="cuda", dtype="float32", quiet=True)
    assert generator.sample(vectors[0])[0].sites == adapters[0].sites
    assert gpu.elements > 1e4


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (lambda x: x + torch.ones(4), "same device"),
        (lambda x: torch.stack([x[0], torch.tensor(1.0)]), "same device"),
        (lambda x: torch.tensor(1.0).add_(x[0]), "same device"),
        (lambda x: x.numpy(), "can't convert cuda"),
        (lambda x: torch.ones(4)[x.argsort()], "indices should be"),
        (lambda x: x.normal_(generator=torch.Generator()), "for generator"),
        (lambda x: torch.randn(4, generator=torch.Generator(), device=x.device), "for generator"),
    ],
)
def test_what_a_gpu_refuses_is_refused(gpu, spoilt, message):
    x = torch.rand(4, device="cuda")
    assert (x + torch.tensor(1.0)).device == GPU, "a scalar may lie on the CPU"
    with pytest.raises((RuntimeError, TypeError), match=message):
        spoilt(x)


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0.5],
        lambda x: x[[0, 1]],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(4)),
        lambda x: torch.zeros(()).copy_(x[0]),
        lambda x: x[0].copy_(torch.zeros(())),
        lambda x: x + torch.tensor(2.0, device=x.device),
        lambda x: x + torch.tensor(2.0),
        lambda x: bool((x > 0).all()),
        lambda x: F.one_hot(x.argsort()),
        lambda x: torch.repeat_interleave(x, x.argsort()),
    ],
)
def test_what_a_capture_refuses_is_refused(gpu, spoilt):
    x = torch.rand(4, device="cuda")
    spoilt(x.clone())  # allowed outside
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        Step(lambda: spoilt(x), lambda: [x], GPU)()


def test_a_number_that_a_capture_would_freeze_is_refused(gpu):
    x, count = torch.zeros(4, device="cuda"), itertools.count()
    Step(lambda: x.fill_(1.0), lambda: [x], GPU)()
    assert x.tolist() == [1.0] * 4
    with pytest.raises(RuntimeError, match="would repeat the numbers of one run"):
        Step(lambda: x.fill_(next(count)), lambda: [x], GPU)()


@pytest.mark.medium
@pytest.mark.parametrize("name", ["table5", "table6", "table8", "figure5"])
def test_a_rehearsal_runs_where_it_is_told(gpu, tmp_path, name):
    """Cells of speed, losses, accuracy and pictures."""
    run = prepare_run(name, quick=True, work_dir=tmp_path, device="cuda", dtype="float32", quiet=True)
    run.cells = run.cells[:2]
    run()
    assert gpu.steps > 0
    assert gpu.elements > 1e6
