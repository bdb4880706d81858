"""Surrogates, checkpoints, generators and the record of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from good import CLASSES, adapter, digest, numbers
from torch import Tensor, nn

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.generate import LoRAGenerator, ModelSoup, load_generator, load_vector
from lorarecycle.inversion.stored import StoredSurrogate
from lorarecycle.inversion.surrogate import Surrogate
from lorarecycle.runtime.checkpoint import Checkpoint
from lorarecycle.work_dir import WorkDir


def make_surrogate(folder: Path) -> None:
    """Every optional tensor."""
    images = (numbers(6, 3, 32, 32) * 40 + 128).clamp(0, 255).to(torch.uint8)
    Surrogate(
        images,
        torch.arange(6) % 3,
        numbers(6, 3),
        CLASSES,
        8,
        kept=torch.arange(8).repeat(6, 1),
        scores=numbers(6, 16),
        adapter="a",
        adapter_digest="0" * 64,
        config={"steps": 3},
        curves=numbers(6, 2, 5),
        rows=torch.arange(6),
    ).save(folder / "s.safetensors")


def read_surrogate(folder: Path) -> Any:
    """Both readers, which must agree."""
    answers: list[Any] = []
    for read in (Surrogate.load, StoredSurrogate):
        try:
            answers.append(read(folder / "s.safetensors"))
        except (ValueError, OSError) as error:
            answers.append(error)
    failed = [isinstance(answer, Exception) for answer in answers]
    assert failed[0] == failed[1], f"one reader takes what the other refuses: {answers}"
    if failed[0]:
        raise answers[1]
    return answers


def surrogate_facts(found: list[Any]) -> Any:
    """The same from both."""
    whole, stored = found
    images = stored.images(torch.arange(len(stored)))
    assert torch.equal(images, whole.images)
    assert (stored.patch_size, stored.class_names) == (whole.patch_size, whole.class_names)
    parts = (whole.labels, whole.teacher_logits, whole.kept, whole.scores, whole.curves, whole.rows)
    return digest(images, *parts, whole.class_names, whole.patch_size, whole.adapter_digest, dict(whole.config))


class Training:
    """What a checkpoint is of."""

    def __init__(self, folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.optimizer = torch.optim.Adam(self.body.parameters(), lr=0.05)
        self.histories = {"loss": torch.zeros(5)}
        self.checkpoint = Checkpoint(
            folder / "c.safetensors", {"seed": 0, "settings": {"lr": 0.1}}, modules={"body": self.body},
            optimizer=self.optimizer, histories=self.histories, steps=5,
        )  # fmt: skip


def make_checkpoint(folder: Path) -> None:
    """After three of five steps."""
    training = Training(folder)
    for step in range(3):
        training.body(numbers(5, 3, seed=step)).square().mean().backward()
        training.optimizer.step()
        training.histories["loss"][step] = step + 1
    training.checkpoint.write(3)


def read_checkpoint(folder: Path) -> Any:
    """The training that goes on."""
    training = Training(folder)
    training.done = training.checkpoint.resume()  # type: ignore[attr-defined]
    return training


def checkpoint_facts(found: Any) -> Any:
    """Everything that goes on."""
    state = [tensor for one in found.optimizer.state_dict()["state"].values() for tensor in one.values()]
    return digest(found.done, *found.body.state_dict().values(), *state, found.histories["loss"])


def absent_checkpoint(folder: Path, found: Any) -> None:
    """Without a file a training starts at 0."""
    assert not (folder / "c.safetensors").exists(), "a changed checkpoint was taken"
    assert found.done == 0


def make_generator(folder: Path) -> None:
    """Two methods."""
    pool = [adapter(head=True, seed=20 * s, pool="token") for s in range(3)]
    vectors = [numbers(4, seed=s) for s in (0, 0, 1)]
    config = {"epochs": 1, "batch_size": 2, "conv_layers": 4, "latent": 3}
    LoRAGenerator.fit(pool, vectors, config=config, quiet=True).save(folder / "icm.safetensors")
    ModelSoup.fit(pool, vectors, quiet=True).save(folder / "soup.safetensors")


def read_generators(folder: Path) -> list[Adapter]:
    """A sample of each."""
    return [load_generator(folder / f"{n}.safetensors").sample(torch.ones(4))[0] for n in ("icm", "soup")]  # type: ignore[misc]


def read_vector(folder: Path) -> Tensor:
    """A task vector."""
    return load_vector(folder / "v.safetensors")


def make_run(folder: Path) -> None:
    """A run's folder."""
    WorkDir(folder).open({"config": {"steps": 1}, "base": {"name": "b", "sha256": "1"}, "adapters": [{"sha256": "2"}]})


def read_run(folder: Path) -> bool:
    """Whether it is the same run."""
    run = {"config": {"steps": 1}, "base": {"name": "b", "sha256": "1"}, "adapters": [{"sha256": "2"}]}
    return WorkDir(folder).open(run)


def new_run(folder: Path, known: bool) -> None:
    """Only a folder without a record is a new one's."""
    assert not known, "another run's folder was taken"
