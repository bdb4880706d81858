"""ICM-LoRA against its baselines on CIFAR-FS train classes: accuracy, ranks, layers, storage, new tasks, recycling.

    python benchmarks/icm_lora.py --work-dir WORK

Tunes an adapter on each of 7 five-way tasks (2 of them stay unseen by the generators), keeps the checkpoints of the
last epochs, fits every generator on those of 5 tasks and tests on other images of the same classes. What is in the
work folder is not done again, so the command may be stopped, and `--only` does a part of it. Needs cifar_fs.npz,
vit_tiny_patch16_224.safetensors and resnet20_cifar10.safetensors in the folder that LORARECYCLE_DATA names
(../shared/data otherwise). Writes benchmarks/results/icm_lora.md and .json.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from icm_lora_adapters import (
    EPOCHS,
    LEARNT,
    SAVE_LAST,
    Task,
    head_accuracy,
    make_tasks,
    mean_accuracy,
    seconds_spent,
    tune_task,
)
from icm_lora_recycle import recycle_all
from icm_lora_report import write_report
from icm_lora_scaling import measure_scaling
from memory import peak_memory, reset_peak_memory
from sets_224 import DATA, vit_tiny

from lorarecycle import Adapter, load_dataset
from lorarecycle.generate import CondPDiff, GenerateConfig, LoRAGenerator, ModelSoup, NearestTask, task_vector
from lorarecycle.generate.generator import Generator
from lorarecycle.runtime.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
SEEN, SAMPLES = 5, 2
FITS = [(2, 12), (4, 12), (1, 12), (2, 10), (2, 14), (8, 12)]
"""(rank, convolutional layers) of the generators: Tab. 1, 4 and 5."""


class Bench:
    """The parts of the experiment, each kept in the work folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.work_dir
        self.backbone = vit_tiny(image_size=112, dtype=torch.bfloat16)
        self.tasks = make_tasks(load_dataset(DATA / "cifar_fs.npz", "train").resize(112), 7, args.seed)
        self.facts: dict[str, Any] = {}
        if (self.folder / "facts.json").exists():
            self.facts = read_json(self.folder / "facts.json")

    def once(self, key: str, work: Callable[[], Any]) -> Any:
        """A JSON result, from the work folder where it is there."""
        if key not in self.facts:
            found = work()
            path = self.folder / "facts.json"
            self.facts = {**(read_json(path) if path.exists() else {}), key: found}
            write_json(path, self.facts)
            if not key.startswith("vector"):
                logging.info("%s: %s", key, json.dumps(found))
        return self.facts[key]

    def checkpoints(self, task: Task, r: int) -> list[Adapter]:
        return tune_task(self.backbone, task, r, self.folder / "adapters" / f"r{r}" / task.name, seed=self.args.seed)

    def vector(self, task: Task, *, other_images: bool = False) -> torch.Tensor:
        """Of the images tuned on, or of the test images."""
        name = f"{task.name}{'-test' if other_images else ''}"
        images = (task.test if other_images else task.images).images
        return torch.tensor(self.once(f"vector {name}", lambda: task_vector(self.backbone, images).tolist()))

    def pool(self, r: int, last: int = LEARNT) -> tuple[list[Adapter], list[torch.Tensor]]:
        adapters, vectors = [], []
        for task in self.tasks[:SEEN]:
            found = self.checkpoints(task, r)[-last:]
            adapters += found
            vectors += [self.vector(task)] * len(found)
        return adapters, vectors

    def generator(self, method: type[Generator], r: int, name: str, last: int = LEARNT, **config: Any) -> Generator:
        """A fitted generator, in as many steps from few checkpoints as from many; its costs are noted."""
        path = self.folder / "generators" / f"{name}.safetensors"
        if not path.exists():
            adapters, vectors = self.pool(r, last)
            if issubclass(method, LoRAGenerator):
                epochs = self.args.epochs * SAVE_LAST // last
                config = {"batch_size": 2, "epochs": epochs, "seed": self.args.seed, **config}
            extra: dict[str, Any] = {}
            if config.get("recipe") == "greedy":
                extra["score"] = self.validation_score
            reset_peak_memory()
            start = time.perf_counter()
            made = method.fit(
                adapters, vectors, config=config, device="cpu", dtype=self.args.dtype, quiet=True, **extra
            )
            seconds = time.perf_counter() - start
            made.save(path)
            losses = {key: value[-50:].mean().item() for key, value in getattr(made, "losses", {}).items()}
            steps = sum(len(v) for key, v in getattr(made, "losses", {}).items() if key != "kl")
            facts = {"seconds": seconds, "peak_gb": peak_memory(), "steps": steps, "parameters": made.layout.size}
            facts["losses_of_last_50_steps"] = losses
            self.once(f"fit {name}", lambda: facts)
        return method.load(path)

    def validation_score(self, adapter: Adapter, vector: torch.Tensor) -> float:
        """Accuracy on the images tuned on, the only ones that a soup may choose by."""
        task = next(t for t in self.tasks if torch.equal(self.vector(t), vector))
        return head_accuracy(self.backbone, adapter, task.images)

    def accuracy(self, key: str, task: Task, make: Callable[[], list[Adapter]]) -> float:
        """Mean test accuracy of some adapters under their own heads."""

        def work() -> float:
            found = [head_accuracy(self.backbone, adapter, task.test) for adapter in make()]
            return sum(found) / len(found)

        return float(self.once(f"{key} / {task.name}", work))

    # --- the parts --------------------------------------------------------------------------------------------

    def tune(self) -> None:
        for r in (2, 4, 1, 8):
            for task in self.tasks[: 7 if r == 2 else SEEN]:
                self.checkpoints(task, r)

    def main_table(self) -> None:
        """Tab. 1: accuracy on the tasks learnt from, by method, at rank 2."""
        for task in self.tasks[:SEEN]:
            vector, other = self.vector(task), self.vector(task, other_images=True)
            runs = self.checkpoints(task, 2)
            self.accuracy("original", task, lambda runs=runs: runs[-1:])
            self.accuracy("original, mean of checkpoints", task, lambda runs=runs: runs[-LEARNT:][1::2])
            self.once(f"plain / {task.name}", lambda t=task: mean_accuracy(self.backbone, None, t.images, t.test))
            made = self.generator(LoRAGenerator, 2, "icm-r2-n12")
            self.accuracy("generated", task, lambda g=made, v=vector: g.sample(v, SAMPLES))
            self.accuracy("generated, vector of other images", task, lambda g=made, v=other: g.sample(v, 1))
            for name, method, config in (
                ("nearest", NearestTask, {}),
                ("soup of all", ModelSoup, {}),
                ("soup of the task", ModelSoup, {"scope": "task"}),
                ("greedy soup of all", ModelSoup, {"recipe": "greedy"}),
            ):
                last = 2 if config.get("recipe") else LEARNT  # a greedy soup scores every adapter for every task
                made = self.generator(method, 2, name.replace(" ", "-"), last=last, **config)
                self.accuracy(name, task, lambda g=made, v=vector: g.sample(v, 1))

    def pools(self) -> None:
        """The same at rank 2, from more and from fewer checkpoints of each task."""
        for last in (SAVE_LAST, 5):
            made = self.generator(LoRAGenerator, 2, f"icm-r2-n12-last{last}", last=last)
            for task in self.tasks[:SEEN]:
                vector = self.vector(task)
                self.accuracy(f"generated, last {last}", task, lambda g=made, v=vector: g.sample(v, SAMPLES))

    def choice(self) -> None:
        """What the defaults were chosen by: rank 2 on the images that are neither tuned on nor tested on."""
        for last in (SAVE_LAST, LEARNT, 5):
            soup = self.generator(ModelSoup, 2, f"soup-of-the-task-last{last}", last=last, scope="task")
            self.accuracy_of_rest(f"soup of the last {last}", lambda t, g=soup: g.sample(self.vector(t)))
        plain = self.generator(LoRAGenerator, 2, f"icm-r2-n12-last{SAVE_LAST}-plain", last=SAVE_LAST, settle=0.0)
        settled = self.generator(LoRAGenerator, 2, f"icm-r2-n12-last{SAVE_LAST}", last=SAVE_LAST)
        fewer = self.generator(LoRAGenerator, 2, "icm-r2-n12")
        for key, made in (("plain", plain), ("settled", settled), ("settled, fewer", fewer)):
            self.accuracy_of_rest(f"generated, {key}", lambda t, g=made: g.sample(self.vector(t)))
            last = LEARNT if made is fewer else SAVE_LAST
            self.once(f"distance, {key}", lambda g=made, last=last: self.fit_error(g, last))
        self.accuracy_of_rest("last checkpoint", lambda t: self.checkpoints(t, 2)[-1:])
        self.accuracy_of_rest("mean of checkpoints", lambda t: self.checkpoints(t, 2)[3::4])

    def accuracy_of_rest(self, key: str, make: Callable[[Task], list[Adapter]]) -> None:
        for task in self.tasks[:SEEN]:
            self.accuracy(f"rest: {key}", task._replace(test=task.rest), lambda t=task: make(t))

    def fit_error(self, made: LoRAGenerator, last: int) -> float:
        """Distance of a sample from the mean of the checkpoints learnt from, relative to its length, over tasks."""
        found = []
        for task in self.tasks[:SEEN]:
            mean = torch.stack([made.layout.flatten(a) for a in self.checkpoints(task, 2)[-last:]]).mean(dim=0)
            gap = made.layout.flatten(made.sample(self.vector(task))[0]) - mean
            found.append((gap.norm() / mean.norm()).item())
        return sum(found) / len(found)

    def diffusion(self) -> None:
        """COND P-DIFF, Tab. 1."""
        for task in self.tasks[:SEEN]:
            epochs = self.args.epochs * 100 * SAVE_LAST // LEARNT  # a batch holds the latents of all
            made = self.generator(CondPDiff, 2, "pdiff-r2", diffusion_epochs=epochs)
            vector = self.vector(task)
            self.accuracy("COND P-DIFF", task, lambda g=made, v=vector: g.sample(v, SAMPLES))

    def ablations(self, fits: list[tuple[int, int]]) -> None:
        """Tab. 4 and 5: ranks, and convolutional layers."""
        for r, layers in fits:
            made = self.generator(LoRAGenerator, r, f"icm-r{r}-n{layers}", conv_layers=layers)
            for task in self.tasks[:SEEN]:
                vector = self.vector(task)
                self.accuracy(f"original r={r}", task, lambda t=task, r=r: self.checkpoints(t, r)[-LEARNT:][1::2])
                self.accuracy(f"last original r={r}", task, lambda t=task, r=r: self.checkpoints(t, r)[-1:])
                self.accuracy(f"generated r={r} n={layers}", task, lambda g=made, v=vector: g.sample(v, 1))
            if layers == 12:
                soup = self.generator(ModelSoup, r, f"soup-r{r}")
                for task in self.tasks[:SEEN]:
                    vector = self.vector(task)
                    self.accuracy(f"soup r={r}", task, lambda g=soup, v=vector: g.sample(v, 1))

    def held_out(self) -> None:
        """Task vectors of tasks that no generator has seen: own head, and class means of the tuning images."""
        made = self.generator(LoRAGenerator, 2, "icm-r2-n12")
        nearest = self.generator(NearestTask, 2, "nearest")
        soup = self.generator(ModelSoup, 2, "soup-of-all")
        for task in self.tasks[SEEN:]:
            vector = self.vector(task)
            self.once(f"plain / {task.name}", lambda t=task: mean_accuracy(self.backbone, None, t.images, t.test))
            for name, make in (
                ("original", lambda t=task: self.checkpoints(t, 2)[-1]),
                ("generated", lambda v=vector: made.sample(v)[0]),
                ("nearest", lambda v=vector: nearest.sample(v)[0]),
                ("soup of all", lambda v=vector: soup.sample(v)[0]),
            ):
                self.accuracy(name, task, lambda make=make: [make()])
                self.once(
                    f"{name}, class means / {task.name}",
                    lambda t=task, make=make: mean_accuracy(self.backbone, make(), t.images, t.test),
                )

    def spread(self) -> None:
        """How far samples lie from the last checkpoint and from each other, relative to its length."""
        made = self.generator(LoRAGenerator, 2, "icm-r2-n12")

        def work() -> dict[str, list[float]]:
            found: dict[str, list[float]] = {"to checkpoint": [], "between samples": [], "between checkpoints": []}
            for task in self.tasks[:SEEN]:
                runs = [made.layout.flatten(a) for a in self.checkpoints(task, 2)]
                one, two = (made.layout.flatten(a) for a in made.sample(self.vector(task), 2))
                size = runs[-1].norm()
                for key, gap in (
                    ("to checkpoint", one - runs[-1]),
                    ("between samples", one - two),
                    ("between checkpoints", runs[-1] - runs[0]),
                ):
                    found[key].append((gap.norm() / size).item())
            return found

        self.once("relative distances", work)

    def recycle(self) -> None:
        made = self.generator(LoRAGenerator, 2, "icm-r2-n12")
        real = [self.checkpoints(task, 2)[-1] for task in self.tasks[:3]]
        vectors = [self.vector(task) for task in self.tasks[:3]]
        recycle_all(self.once, self.backbone, DATA, real, [made.sample(v)[0] for v in vectors], self.folder)

    def sampling(self) -> None:
        """Milliseconds of a sample after loading, one thread: median of 9."""
        vector = self.vector(self.tasks[0])
        for path in sorted((self.folder / "generators").glob("icm-r*-n12.safetensors")):
            made = LoRAGenerator.load(path)

            def work(made: LoRAGenerator = made) -> float:
                made.sample(vector)
                times = []
                for seed in range(9):
                    start = time.perf_counter()
                    made.sample(vector, seed=seed)
                    times.append(1000 * (time.perf_counter() - start))
                return statistics.median(times)

            self.once(f"sampling {path.stem}", work)

    def scaling(self) -> None:
        def work() -> list[dict[str, float]]:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # whose memory holds nothing else
                return fresh.submit(measure_scaling).result()

        self.once("scaling", work)

    def report(self) -> None:
        self.facts["settings"] = {
            "command": "python benchmarks/icm_lora.py --work-dir WORK",
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
            "tuning_epochs": EPOCHS,
            "fit_epochs": self.args.epochs,
            "dtype": self.args.dtype,
            "config": {**GenerateConfig().__dict__, "batch_size": 2, "epochs": self.args.epochs},
            "tuning_seconds": seconds_spent(self.folder / "adapters"),
            "adapter_bytes": {r: folder_bytes(self.folder / "adapters" / f"r{r}") for r in (1, 2, 4, 8)},
            "generator_bytes": {f.stem: f.stat().st_size for f in (self.folder / "generators").glob("*.safetensors")},
            "image_bytes": sum(t.images.images[:, :, :32, :32].numel() for t in self.tasks[:SEEN]),
        }
        write_report(self.facts, self.tasks, SEEN, self.args.output)


def folder_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weights of all checkpoints, and of the last ones only, of the tasks learnt from."""
    files = [sorted(folder.glob(f"task-{i}/checkpoints/*/adapter_model.safetensors")) for i in range(SEEN)]
    return {
        "checkpoints": sum(f.stat().st_size for task in files for f in task),
        "last": sum(task[-1].stat().st_size for task in files if task),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="keep adapters, generators and results here")
    parser.add_argument("--epochs", type=int, default=50, help="of every fit, over 100 checkpoints; more over fewer")
    parser.add_argument("--dtype", default="bfloat16", help="of every fit")
    parser.add_argument("--seed", type=int, default=0)
    parts = (
        "tune",
        "main",
        "pools",
        "choice",
        "diffusion",
        *(f"r{r}-n{n}" for r, n in FITS),
        "held-out",
        "sampling",
        "recycle",
        "scaling",
        "report",
    )
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "icm_lora")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bench = Bench(args)
    for part in args.only:
        if part == "main":
            bench.main_table()
            bench.spread()
        elif part == "held-out":
            bench.held_out()
        elif part.startswith("r") and "-n" in part:
            bench.ablations([(r, n) for r, n in FITS if part == f"r{r}-n{n}"])
        else:
            getattr(bench, part)()


if __name__ == "__main__":
    main()
