"""A small job from an installed wheel, outside the checkout: package data, command line and pipeline are there."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lorarecycle.export.real_images import handwritten_digits
from lorarecycle.kernels import cpp

import lorarecycle
from lorarecycle import Adapter, Backbone, FewShotClassifier, LabelledImages, recycle, tune

checkout = Path(__file__).resolve().parent.parent
home = Path(lorarecycle.__file__).resolve().parent
assert home.parent != checkout, f"imported from the checkout: {home}"
assert (home / "py.typed").exists()
assert not (shutil.which("g++") and shutil.which("ninja")) or cpp.available(), (
    "the C++ kernels must build from the wheel's own sources"
)

backbone = Backbone.load("demo")
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (24, 3, 32, 32), generator=generator, dtype=torch.uint8)
data = LabelledImages(images, torch.arange(24) % 2, ("even", "odd"))
adapters = [tune(backbone, data, config={"epochs": 1}, seed=i, name=f"task-{i}", quiet=True) for i in range(2)]
with tempfile.TemporaryDirectory() as folder:
    meta_lora = recycle(
        adapters,
        base=backbone,
        work_dir=Path(folder) / "work",
        inversion={"steps": 2, "images_per_class": 4, "prior": None},
        meta={"steps": 2, "n_way": 2, "n_query": 3},
        quiet=True,
    )
    assert Adapter.load(meta_lora.save(Path(folder) / "meta-lora")).sites == meta_lora.sites
classifier = FewShotClassifier(backbone, meta_lora).fit(images[:2], ["even", "odd"])
assert classifier.predict_proba(images).shape == (24, 2)
assert len(list((home / "demo").glob("adapters/*/*.safetensors"))) == 6, "the demo needs them"
assert handwritten_digits()[0].shape == (200, 8, 8, 3)
subprocess.run([sys.executable, "-m", "lorarecycle.export", "--help"], check=True, stdout=subprocess.DEVNULL)
subprocess.run([sys.executable, "-m", "lorarecycle", "--help"], check=True, stdout=subprocess.DEVNULL)
sys.stdout.write(f"wheel works: {home}, {meta_lora}\n")
