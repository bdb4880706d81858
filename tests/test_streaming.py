"""Many adapters in little memory: images that stay in files, and a peak that does not grow with the adapters."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lorarecycle import InversionConfig, MetaConfig, RecycleConfig, Surrogate, make_plan, recycle
from lorarecycle.inversion.stored import StoredImages, StoredSurrogate
from lorarecycle.meta.bank import fill_bank
from lorarecycle.meta.stream import AHEAD, ImageStream
from lorarecycle.runtime.files import load_tensors, save_tensors
from lorarecycle.runtime.memory import free_memory, image_budget

SETTINGS = RecycleConfig(
    InversionConfig(images_per_class=4, batch_size=4, steps=3, init="noise", prior=None),
    MetaConfig(steps=5, n_way=2, n_query=2, guide_weight=0.25),
)


@pytest.fixture
def adapters(tiny_backbone, make_adapter):
    return [make_adapter(tiny_backbone, seed=i) for i in range(4)]


@pytest.fixture
def files(tmp_path, make_data):
    made = []
    for i in range(3):
        data = make_data(n_classes=2, per_class=3 + i, seed=i)
        logits = torch.randn(len(data), 2, generator=torch.Generator().manual_seed(i))
        surrogate = Surrogate(data.images, data.labels, logits, data.class_names, 8, scores=torch.rand(len(data), 16))
        made.append((surrogate, StoredSurrogate(surrogate.save(tmp_path / f"{i}.safetensors"))))
    return made


def test_images_in_files_are_the_images(files):
    held, stored = zip(*files, strict=True)
    images = StoredImages(stored)
    whole = torch.cat([s.images for s in held])
    assert images.shape == tuple(whole.shape) == (24, 3, 32, 32)
    rows = torch.tensor([23, 0, 5, 6, 13, 14, 5])
    assert torch.equal(images.read(rows), whole[rows])
    assert torch.equal(stored[1].tables.teacher_logits, held[1].teacher_logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surrogate_format": 99}, "must be a surrogate of a format in .*, got 99"),
        ({"patch_size": None}, "`patch_size` of .*other.safetensors must be int, got 'None'; make it again"),
        ({"class_names": "cat"}, "`class_names` of .*other.safetensors must be list, got 'cat'; make it again"),
        ({"images": None}, r"must hold `images`, uint8 \[n, 3, H, W\], got none"),
        ({"images": torch.zeros(2, 3, 8, 8)}, r"must hold `images`, uint8 \[n, 3, H, W\], got F32 \[2, 3, 8, 8\]"),
        ({"images": torch.zeros(2, 8, 8, dtype=torch.uint8)}, r"got U8 \[2, 8, 8\]"),
    ],
)
def test_other_files_are_refused(files, tmp_path, changes, message):
    tensors, strings = load_tensors(files[0][1].path)
    facts = {key: json.loads(value) for key, value in strings.items() if key != "format"}
    for kind, found in (("tensors", tensors), ("facts", facts)):
        for key, value in changes.items():
            if (key == "images") == (kind == "tensors"):
                found.pop(key)
                if value is not None:
                    found[key] = value
    other = save_tensors(tmp_path / "other.safetensors", tensors, facts)
    with pytest.raises(ValueError, match=message):
        StoredSurrogate(other)


@pytest.mark.parametrize("budget", [None, 10**6, 0])
def test_a_bank_of_files(files, tiny_backbone, budget):
    held, stored = zip(*files, strict=True)
    one, other = fill_bank(tiny_backbone, held, 0.5), fill_bank(tiny_backbone, stored, 0.5, budget=budget)
    assert (other.images is None) == (budget == 0) == (other.stored is not None)
    if other.images is not None:
        assert torch.equal(one.images, other.images)
    for name in ("teacher_logits", "kept"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_parts_of_one_tensor_are_not_copied(files, tiny_backbone):
    whole = torch.cat([s.images for s, _ in files])
    parts = [Surrogate(p, None, None, (), 8) for p in whole.split([6, 8, 10])]
    assert fill_bank(tiny_backbone, parts).images.data_ptr() == whole.data_ptr()
    swapped = fill_bank(tiny_backbone, [parts[1], parts[0], parts[2]]).images
    assert torch.equal(swapped, torch.cat([p.images for p in (parts[1], parts[0], parts[2])]))
    twice = fill_bank(tiny_backbone, [parts[0], parts[0]]).images
    assert torch.equal(twice, torch.cat([parts[0].images] * 2))


def test_a_stream_gives_each_step_its_images(files):
    images = StoredImages([stored for _, stored in files])
    whole = torch.cat([s.images for s, _ in files])
    rows = torch.randint(24, (7, 5), generator=torch.Generator().manual_seed(0))
    stream = ImageStream(images, rows, 2, torch.device("cpu"))
    place = stream.window.data_ptr()
    for step in range(2, 7):
        stream.advance()
        assert torch.equal(stream.window, whole[rows[step]])
    assert stream.window.data_ptr() == place
    stream.close()


def test_nothing_is_read_beside_the_first_step(files, monkeypatch):
    """Which may be captured as a CUDA graph: memory must not be pinned meanwhile."""
    images, order = StoredImages([stored for _, stored in files]), []
    read = images.read

    def slow(rows):
        time.sleep(0.05)
        order.append("read")
        return read(rows)

    monkeypatch.setattr(images, "read", slow)
    stream = ImageStream(images, torch.zeros(5, 2, dtype=torch.int64), 0, torch.device("cpu"))
    stream.advance()
    order.append("step")
    stream.close()
    assert order == ["read"] * AHEAD + ["step"]


@pytest.mark.medium
@pytest.mark.parametrize("changes", [{}, {"sparsity": 0.5}, {"guide_weight": 1.0}, {"guide_weight": 0.0}])
def test_the_result_is_the_same_from_memory_and_from_disk(tiny_backbone, adapters, tmp_path, changes):
    config = {"config": SETTINGS, "meta": {**vars(SETTINGS.meta), **changes}, "base": tiny_backbone, "quiet": True}
    held = recycle(adapters, **config)
    for work_dir, budget in ((None, 0), (tmp_path / "a", 0), (tmp_path / "b", None)):
        assert recycle(adapters, work_dir=work_dir, memory_budget=budget, **config).digest() == held.digest()


def test_pictures_from_disk(tiny_backbone, adapters):
    config = {"base": tiny_backbone, "inversion": {"pictures": 12}, "meta": {"steps": 3}, "quiet": True}
    assert recycle(adapters, memory_budget=0, **config).digest() == recycle(adapters, **config).digest()


@pytest.mark.medium
def test_a_training_goes_on_from_disk(tiny_backbone, adapters, tmp_path, monkeypatch):
    config = {"config": SETTINGS, "base": tiny_backbone, "quiet": True, "memory_budget": 0}
    whole = recycle(adapters, **config)
    monkeypatch.setattr("lorarecycle.meta.train.CHECKPOINT_EVERY", 2)
    from lorarecycle.meta.step import EpisodeStep

    original, taken = EpisodeStep.__call__, []

    def stop(self):
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        original(self)

    monkeypatch.setattr(EpisodeStep, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        recycle(adapters, work_dir=tmp_path / "w", **config)
    monkeypatch.setattr(EpisodeStep, "__call__", original)
    assert (tmp_path / "w" / "meta_checkpoint.safetensors").exists()
    assert recycle(adapters, work_dir=tmp_path / "w", **config).digest() == whole.digest()


def test_the_plan_says_where_images_are(tiny_backbone, adapters):
    held = make_plan(adapters, base=tiny_backbone, config=SETTINGS, memory_budget=10**6).describe()
    assert "held in memory (budget: 1.0 MB of memory)" in held
    measured = make_plan(adapters, base=tiny_backbone, config=SETTINGS).describe()
    assert "of memory, 50% of what is free)" in measured
    disk = make_plan(adapters, base=tiny_backbone, config=SETTINGS, memory_budget=1000).describe()
    assert "read from disk step by step, as they are above the budget (1.0 kB of memory)" in disk
    with pytest.raises(ValueError, match="`memory_budget` must be at least 0 bytes, got -1"):
        make_plan(adapters, base=tiny_backbone, config=SETTINGS, memory_budget=-1)


def test_what_is_free():
    cpu = torch.device("cpu")
    free = free_memory(cpu)
    assert 10**7 < free < 10**14
    assert image_budget(cpu, 7) == 7
    assert image_budget(cpu, None) == pytest.approx(free / 2, rel=0.2)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_adapters(tmp_path):
    """10 and 200 tiny adapters: each run in a process of its own, whose peak the system counts."""
    script = Path(__file__).parents[1] / "benchmarks" / "scale_job.py"
    peaks = {}
    for n in (10, 200):
        folder = str(tmp_path / str(n))
        done = subprocess.run(
            [sys.executable, str(script), *f"--adapters {n} --steps 20 --inversion-steps 1 --folder".split(), folder],
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
        peaks[n] = json.loads(done.stdout.splitlines()[-1])["peak_mb"]
    assert max(peaks.values()) - peaks[10] < 25, peaks  # of MB, of which the interpreter and torch take 740
