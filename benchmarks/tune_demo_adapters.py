"""Tune the adapters that come with the demo: digits over photographs, six tasks of five of the digits 0 to 5.

    python benchmarks/tune_demo_adapters.py --output X   # half an hour of one core; goes on where X was stopped
    python benchmarks/tune_demo_adapters.py              # those of the package that are not there

The digits 6 to 9 and the grounds that the demo shows (another seed of `on_photographs`) are in none of them.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch

from lorarecycle import Backbone, LabelledImages, TuneConfig, load_dataset, tune
from lorarecycle.demo.demo import ADAPTERS, on_photographs

TUNE = TuneConfig(epochs=5, lr=2e-3, flip=False)
IMAGES_PER_CLASS = 100
GROUNDS = range(10, 13)
"""Seeds: each digit is seen over as many pieces of the photographs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ADAPTERS)
    output = parser.parse_args().output
    backbone, digits = Backbone.load("demo"), load_dataset("digits", size=32)
    shown = [on_photographs(digits, seed) for seed in GROUNDS]
    for place, classes in enumerate(itertools.combinations("012345", 5)):
        name = "digits-on-photographs-" + "".join(classes)
        if (output / name).exists():
            continue
        start = time.process_time()
        images = [
            images.select_classes(classes).sample(IMAGES_PER_CLASS, torch.Generator().manual_seed(place))
            for images in shown
        ]
        data = LabelledImages(
            torch.cat([part.images for part in images]), torch.cat([part.labels for part in images]), classes
        )
        tune(backbone, data, config=TUNE, name=name, seed=place).save(output / name)
        print(f"{name}: {time.process_time() - start:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
