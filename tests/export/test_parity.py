"""Exported files equal PyTorch: every batch size, 100 random tasks, real weights, ViT, CLIP and DINOv2."""

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from lorarecycle.export import check, export_encoder, export_episode

from lorarecycle import Backbone, FewShotClassifier, load_dataset
from lorarecycle.data.images import normalize, to_uint8
from lorarecycle.fewshot.tasks import sample_tasks

pytestmark = pytest.mark.medium


def load(path):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, **feeds):
    return load(path).run(None, {k: np.asarray(v) for k, v in feeds.items()})


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_encoder_equals_the_worn_adapter_at_any_batch_size(exported, model, n):
    images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
    merged = model.backbone.merge(model.meta_lora)
    expected = merged(images).numpy()
    (ours,) = run(exported / "encoder.onnx", pixel_values=images)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.abs(model.backbone(images).numpy() - ours).max() > 0.1, "the adapter does nothing"


def test_episode_equals_the_classifier_on_100_random_tasks(exported, model, pictures):
    classifier = FewShotClassifier(model.backbone, model.meta_lora)
    session = load(exported / "episode.onnx")
    pixels = normalize(pictures.images, model.backbone.mean, model.backbone.std).numpy()
    agreed = 0
    for i in range(100):
        sizes = {"n_way": 1 + i % 6, "n_shot": 1 + i % 3, "n_query": 1 + i % 4}
        task = sample_tasks(pictures.labels, **sizes, n_tasks=1, seed=i)
        support, query = task.support[0].numpy(), task.query[0].numpy()
        labels = torch.arange(task.n_way).repeat_interleave(task.n_shot)
        order = torch.randperm(len(support), generator=torch.Generator().manual_seed(i)).numpy()
        support, labels = support[order], labels[order]
        feeds = {"support_images": pixels[support], "query_images": pixels[query], "support_labels": labels.numpy()}
        logits = session.run(None, feeds)[0]
        expected = classifier.fit(pictures.images[support], labels).logits(pictures.images[query])
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        agreed += (logits.argmax(1) == expected.argmax(1)).all()
    assert agreed == 100


NAMES = ["vit_base_patch16_224", "vit_base_patch16_clip_quickgelu_224", "vit_base_patch14_dinov2"]


def random_backbone(name, **options):
    """An architecture under random weights, none of which is idle."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, **options)
    for key, parameter in vit.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.ones_(parameter)
    return Backbone(vit, name=name)


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name, tmp_path, monkeypatch):
    """ViT, CLIP and DINOv2: width 768 and all their parts, two blocks and small images."""
    monkeypatch.setattr(check, "BATCH_SIZES", (1, 2, 14))
    backbone = random_backbone(name, depth=2, img_size=56 if "14" in name else 64)
    assert export_encoder(backbone, tmp_path / "encoder.onnx").max_error < 1e-4


@pytest.mark.slow
def test_an_architecture_in_full_size(tmp_path, capsys, monkeypatch):
    """One, of 22 million parameters: `test_architectures` has the parts of all."""
    monkeypatch.setattr(check, "BATCH_SIZES", (1, 2))
    name = "vit_small_patch16_224"
    parity = export_encoder(random_backbone(name, img_size=224), tmp_path / "encoder.onnx")
    with capsys.disabled():
        print(f"\n{name}: {parity}")  # noqa: T201
    assert parity.max_error < 1e-4
    assert parity.reference == "float32"


@pytest.mark.slow
def test_vit_tiny_with_real_weights(real_data, tmp_path, pictures):
    """Random and real images in batches of 1, 2, 7 and 64."""
    weights = real_data / "vit_tiny_patch16_224.safetensors"
    backbone = Backbone.load("vit_tiny_patch16_224", weights=weights)
    parity = export_encoder(backbone, tmp_path / "encoder.onnx", images=pictures.images)
    assert parity.max_error < 1e-4
    assert parity.reference == "float32"
    pixels = normalize(to_uint8(pictures.images[:3], 224), backbone.mean, backbone.std)
    np.testing.assert_allclose(run(tmp_path / "encoder.onnx", pixel_values=pixels)[0], backbone(pixels), atol=1e-4)


@pytest.mark.slow
def test_episode_of_vit_tiny_equals_the_classifier_on_100_random_tasks(real_data, tmp_path):
    """Real weights, photos of CIFAR-FS's validation classes, 64 x 64."""
    weights = real_data / "vit_tiny_patch16_224.safetensors"
    backbone = Backbone.load("vit_tiny_patch16_224", weights=weights, image_size=64)
    export_episode(backbone, tmp_path / "episode.onnx")
    data = load_dataset(real_data / "cifar_fs.npz", "val")
    classifier = FewShotClassifier(backbone)
    session = load(tmp_path / "episode.onnx")
    tasks = sample_tasks(data.labels, n_way=5, n_shot=1, n_query=1, n_tasks=100, seed=0)
    labels = torch.arange(5)
    for support, query in zip(tasks.support, tasks.query, strict=True):
        fitted = to_uint8(data.images[torch.cat([support, query])], backbone.fit)
        pixels = normalize(fitted, backbone.mean, backbone.std).numpy()
        feeds = {"support_images": pixels[:5], "support_labels": labels.numpy(), "query_images": pixels[5:]}
        expected = classifier.fit(data.images[support], labels).logits(data.images[query])
        (logits,) = session.run(None, feeds)
        np.testing.assert_allclose(logits, expected, rtol=5e-5)  # of distances from 30 to 80
        assert (logits.argmax(1) == expected.argmax(1)).all()
