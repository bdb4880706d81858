"""Data as people have it: parquet of Hugging Face, folders, npz, torchvision; lazily, in groups, class splits."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from lorarecycle.data.dataset import LabelledImages
from lorarecycle.data.lazy import Dataset, LazyImages
from lorarecycle.data.load import load_dataset
from lorarecycle.data.sets import from_torchvision, open_dataset
from lorarecycle.data.splits import class_split, refuse_overlap, split_names
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.tuning import tune


def png(value: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, labels, names=None, first=0, groups=None, rows=2):
    """As `datasets` writes them: struct images, ClassLabel names in the metadata, several row groups."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": png(first + i), "path": None} for i in range(len(labels))]
    columns = {"image": images, "label": labels, **({"group": groups} if groups else {})}
    table = pa.table(columns)
    if names:
        facts = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=rows)


def test_parquet_files_of_hugging_face(tmp_path):
    names = ["ant", "bee", "cat"]
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1, 0], names)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 0, -1], names, first=100)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [2, 1], names, first=200)
    train = open_dataset(tmp_path, "train")
    assert train.class_names == ("ant", "bee"), "classes without images are left out"
    assert train.labels.tolist() == [0, 1, 0, 1, 0], "images without a label are left out"
    assert train.load(4).images[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101]
    assert train.select_classes(["bee"]).load(4).images[:, 0, 0, 0].tolist() == [1, 100]
    assert open_dataset(tmp_path, "test").class_names == ("bee", "cat")
    with pytest.raises(ValueError, match=r"`split` must be one of \['test', 'train'\], the parts of"):
        open_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`split` must be one of \['test', 'train'\].*got 'val'"):
        open_dataset(tmp_path, "val")


def test_load_dataset_and_tune_take_what_open_dataset_reads(tmp_path, monkeypatch, tiny_backbone):
    names = ["ant", "bee"]
    write_parquet(tmp_path / "set" / "train.parquet", [0, 1] * 4, names)
    write_parquet(tmp_path / "set" / "test.parquet", [1, 0], names, first=100)
    loaded = load_dataset(tmp_path / "set", "test")
    assert loaded.images.shape == (2, 3, 8, 8), "images that share a size keep it"
    assert loaded.images[:, 0, 0, 0].tolist() == [100, 101]
    assert load_dataset(tmp_path / "set" / "test.parquet", size=4).images.shape == (2, 3, 4, 4)
    asked = []
    monkeypatch.setattr(
        "lorarecycle.data.sets.open_hub_dataset",
        lambda *a, **k: asked.append(a) or open_dataset(tmp_path / "set", "test"),
    )
    assert load_dataset("owner/name", "test").class_names == ("ant", "bee")
    assert asked == [("owner/name", "test")]
    settings = {"epochs": 1, "batch_size": 4}
    opened = tune(tiny_backbone, open_dataset(tmp_path / "set", "train"), config=settings, quiet=True)
    memory = tune(tiny_backbone, load_dataset(tmp_path / "set", "train"), config=settings, quiet=True)
    assert opened.digest() == memory.digest()
    assert opened.head.class_names == ("ant", "bee")
    with pytest.raises(FileNotFoundError, match="`source` must be a folder, a npz or parquet file"):
        load_dataset(tmp_path / "nothing.npz")


def test_parquet_labels_without_names_and_groups(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["owl", "elk", "owl"], groups=["p1", "p2", "p1"])
    data = open_dataset(tmp_path / "a.parquet")
    assert (data.class_names, data.labels.tolist()) == (("elk", "owl"), [1, 0, 1])
    assert data.groups.tolist() == [0, 1, 0]
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"picture": [1], "label": [0]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="must have a column image or img, got picture, label"):
        open_dataset(tmp_path / "b.parquet")


def test_datasets_objects(tmp_path):
    datasets = pytest.importorskip("datasets")
    from lorarecycle.data.parquet import from_hugging_face

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    made = datasets.Dataset.from_dict(
        {"img": [{"bytes": png(5), "path": None}, {"bytes": png(9), "path": None}], "label": [1, 0]}, features
    )
    data = from_hugging_face(made)
    assert (data.class_names, data.labels.tolist()) == (("x", "y"), [1, 0])
    assert data.load(4).images[:, 0, 0, 0].tolist() == [5, 9]


def test_folders_npz_and_torchvision(tmp_path):
    for name, value in (("a", 10), ("b", 20)):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.png").write_bytes(png(value))
    folder = open_dataset(tmp_path / "set")
    assert folder.class_names == ("a", "b")
    assert folder.load(4).images[:, 0, 0, 0].tolist() == [10, 20]
    np.savez(tmp_path / "x.npz", test_images=np.full((2, 8, 8, 3), 7, np.uint8), test_labels=np.array([0, 1]))
    assert open_dataset(tmp_path / "x.npz", "test").load(8).images.float().mean() == 7
    from torchvision.datasets import FakeData, ImageFolder

    seen = from_torchvision(ImageFolder(str(tmp_path / "set")))
    assert seen.class_names == ("a", "b")
    assert seen.load(4).images[:, 0, 0, 0].tolist() == [10, 20]
    fake = from_torchvision(FakeData(size=6, image_size=(3, 8, 8), num_classes=2))
    assert len(fake) == 6


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "`source` must be a folder, a npz or parquet file"),
        ("ISIC", FileNotFoundError, r"not fetched here; it is at https://challenge\.isic-archive\.com"),
        ("torchvision/Nothing", ValueError, r"must name a class of torchvision.datasets \(.*CIFAR10"),
        ("torchvision/CIFAR10", FileNotFoundError, "must be under `root`"),
        ("nobody/no-such-set", FileNotFoundError, "https://huggingface.co/datasets/nobody/no-such-set"),
    ],
)
def test_a_missing_set_says_where_it_is(source, error, message, tmp_path):
    if source.startswith("nobody"):
        pytest.importorskip("datasets")
    with pytest.raises(error, match=message):
        open_dataset(source, root=tmp_path)


def test_lazy_images_are_fetched_when_wanted():
    fetched = []
    images = LazyImages(lambda i: fetched.append(i) or png(i), torch.arange(10))
    data = Dataset(images, torch.arange(10) % 2, ("a", "b"))
    part = data.subset(torch.tensor([7, 3]))
    assert (len(part), part.counts, fetched) == (2, (0, 2), [])
    assert part.load(4).images[:, 0, 0, 0].tolist() == [7, 3]
    assert fetched == [7, 3]
    with pytest.raises(ValueError, match="`labels` must be one per image"):
        Dataset(images, torch.zeros(3), ("a",))
    with pytest.raises(ValueError, match="`classes` must be names or indices of the 2 classes, got 'c'"):
        data.select_classes(["c"])


def test_support_and_query_never_share_a_group():
    labels = torch.arange(3).repeat_interleave(12)
    groups = torch.arange(36) // 3
    tasks = sample_tasks(labels, n_way=2, n_shot=2, n_query=5, n_tasks=100, seed=0, groups=groups)
    for support, query in zip(tasks.support, tasks.query, strict=True):
        assert not set(groups[support].tolist()) & set(groups[query].tolist())
        assert torch.equal(labels[support].view(2, 2), labels[query].view(2, 5)[:, :2])
    with pytest.raises(
        ValueError, match=r"`n_query` must be at most the images that are of other groups.*got 10; class"
    ):
        sample_tasks(labels, n_way=2, n_shot=1, n_query=10, n_tasks=1, seed=0, groups=groups)
    with pytest.raises(ValueError, match="`groups` must have one value per image"):
        sample_tasks(labels, n_way=2, n_shot=1, n_query=1, n_tasks=1, seed=0, groups=[1])


@pytest.mark.parametrize("name", split_names())
def test_class_splits_are_whole(name):
    parts = class_split(name)
    assert len(parts["test"]) >= 5
    sizes = {"mini_imagenet": 100, "cub": 200, "vgg_flower": 102, "cifar_fs": 100}
    sizes |= {"crop_diseases": 38, "crop_diseases_by_plant": 38}
    assert sizes.get(name, 0) in (0, sum(map(len, parts.values())))


def test_splits_that_overlap_are_refused():
    with pytest.raises(ValueError, match="birds must have each class in one part only, got 'owl' in train and test"):
        refuse_overlap({"train": ["owl"], "val": ["emu"], "test": ["owl"]}, "birds")
    with pytest.raises(ValueError, match="`name` must be one of aircraft, .*, got 'imagenet'"):
        class_split("imagenet")


@pytest.mark.medium
def test_20_gb_of_images_in_2_gb_of_memory():
    code = (
        "import re, numpy as np, torch\n"
        "from lorarecycle import Backbone, evaluate\n"
        "from lorarecycle.data.lazy import Dataset, LazyImages\n"
        "side, n = 1830, 2000\n"
        "assert side * side * 3 * n > 20e9\n"
        "count = []\n"
        "def fetch(i):\n"
        "    count.append(i)\n"
        "    return np.full((side, side, 3), 20 + 40 * (i % 5), np.uint8)\n"
        "data = Dataset(LazyImages(fetch, torch.arange(n)), torch.arange(n) % 5, tuple('abcde'))\n"
        "sizes = {'n_tasks': 3, 'n_query': 15}\n"
        "result = evaluate(Backbone.load('demo'), data, config=sizes, workers=2, quiet=True)\n"
        "status = open('/proc/self/status').read()\n"  # ru_maxrss begins with the parent's memory
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1e6\n"
        "assert len(count) > 220 and len(set(count)) == len(count), len(count)\n"
        "assert result.accuracy == 100, result\n"
        "assert peak < 2, peak\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_real_parquet_files(real_data):
    pytest.importorskip("pyarrow")
    for name, folder in (("cub", "cub"), ("vgg_flower", "vgg_flower")):
        assert open_dataset(real_data / "datasets" / folder, "test").class_names == class_split(name)["test"]


def test_groups_come_along_into_memory(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["owl", "elk", "owl"], groups=["p1", "p2", "p1"])
    data = load_dataset(tmp_path)
    assert data.groups.tolist() == [0, 1, 0]
    assert data.select_classes(["owl"]).resize(8).groups.tolist() == [0, 0]
    with pytest.raises(ValueError, match="`groups` must be one per image"):
        LabelledImages(data.images, data.labels, data.class_names, data.groups[:2])


def test_torchvision_sets_of_two_parts(monkeypatch):
    class Two(torchvision.datasets.VisionDataset):
        def __init__(self, root, train=True, download=False):
            self.targets, self.train = [0, 1], train

        def __getitem__(self, index):
            return Image.new("RGB", (4, 4), (255 * self.train,) * 3), self.targets[index]

        def __len__(self):
            return 2

    monkeypatch.setattr(torchvision.datasets, "Two", Two, raising=False)
    assert [np.asarray(open_dataset("torchvision/Two", part).images[0]).max() for part in ("train", "test")] == [255, 0]
    for part in ("val", "Train", "tset"):
        with pytest.raises(ValueError, match=f"`split` of torchvision/Two must be 'train' or 'test', got '{part}'"):
            open_dataset("torchvision/Two", part)


def test_a_source_without_a_name_is_not_the_current_folder():
    for read in (open_dataset, load_dataset):
        with pytest.raises(ValueError, match="`source` must name a data set, got an empty name"):
            read("")
