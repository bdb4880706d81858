"""What the processes of a test run: a meta-training that is stopped between two checkpoints and goes on, and
one that is not.

    torchrun --standalone --nproc-per-node 2 tests/distributed/resume.py FOLDER

Each process writes the digests of both meta-LoRAs and whether their losses have the same bits.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from scale_job import tiny_backbone

from lorarecycle import MetaConfig, Surrogate, meta_train
from lorarecycle.meta import train
from lorarecycle.meta.step import EpisodeStep
from lorarecycle.runtime.distributed import join, leave

folder = Path(sys.argv[1])
torch.set_num_threads(1)
group = join(torch.device("cpu"))
g = torch.Generator().manual_seed(0)
surrogates = []
for i in range(2):
    images = torch.randint(256, (12, 3, 32, 32), generator=g, dtype=torch.uint8)
    names = tuple(f"{i}.{c}" for c in range(3))
    surrogates.append(Surrogate(images, torch.arange(12) % 3, torch.randn(12, 3, generator=g), names, 8))
settings = MetaConfig(steps=7, n_way=3, n_query=2, guide_weight=0.0, init="random", episodes_per_step=3, cycle=7)
train.CHECKPOINT_EVERY = 2


def run(checkpoint):
    return meta_train(
        tiny_backbone(), surrogates, config=settings, checkpoint=checkpoint, quiet=True, group=group, seed=3
    )


whole = run(None)
take = EpisodeStep.__call__
taken = []


def take_five(self):
    if len(taken) == 5:
        raise KeyboardInterrupt
    taken.append(self)
    take(self)


EpisodeStep.__call__ = take_five
try:
    run(folder / "checkpoint.safetensors")
except KeyboardInterrupt:
    EpisodeStep.__call__ = take
group.wait()
gone_on = run(folder / "checkpoint.safetensors")
found = {
    "steps before": len(taken),
    "moved": float(whole.losses.std()) > 0,
    "digests": [whole.meta_lora.digest(), gone_on.meta_lora.digest()],
    "losses": torch.equal(whole.losses, gone_on.losses),
}
(folder / f"of-{group.rank}.json").write_text(json.dumps(found))
leave()
