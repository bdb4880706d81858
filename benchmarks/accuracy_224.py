r"""Few-shot accuracy at 224 pixels: what images inverted from adapters teach, beside painted and real ones.

    python benchmarks/accuracy_224.py --work-dir WORK                            # CIFAR-FS, 8 adapters: hours on a CPU
    python benchmarks/accuracy_224.py --work-dir WORK --sets vgg_flower cub crop_diseases --adapters 20
    python benchmarks/accuracy_224.py --work-dir WORK --sets cross --adapters 20   # adapters of all four together
    python benchmarks/accuracy_224.py --work-dir WORK --split val --recipes fourier fourier-32px --seeds 0 1 2 \
        --adapters 3 --images-per-class 16 --inversion-steps 300 --meta-steps 60   # leads, ranked on a CPU

On a GPU, for each SET; none needs what another leaves, and by the speed of a step on an H100 each should take less
than 8 minutes:

    ... --sets SET --adapters 20 --seeds 0 1 2 --recipes plain average "warm start" default --output SET-default.json
    ... --sets SET --adapters 20 --recipes plain fourier-mixed "real images, the paper's loss" --output SET-fourier.json
    ... --sets SET --recipes plain paper --output SET-paper.json
    ... --sets SET --recipes plain "real images, to convergence (bound)" --output SET-bound.json

ViT-Tiny; adapters of rank 4 tuned at 224 pixels on 5-way tasks of train classes, 600 tasks of test classes (the same
for every row), 15 queries (5-shot: 10). The bound is what real images of the adapters reach: the best of several
numbers of steps and both starts, chosen on validation classes; its seconds are those of that one. All that is finished
stays in the work folder: run it again and it goes on. Each row can be asked for by itself (`--recipes`), which on a GPU
takes minutes. Needs the sets of `sets_224.py`, vit_tiny_patch16_224.safetensors and
weights/tf_efficientnet_lite0.safetensors in the folder that LORARECYCLE_DATA names (../shared/data otherwise). Writes
JSON, tables and a sheet of images for each recipe; what is there already of other arguments stays, and sets and rows of
the same arguments join it.
"""

from __future__ import annotations

import argparse
import logging
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from sets_224 import DATA, claim, data_sets, loaded, vit_tiny

from lorarecycle import (
    Adapter,
    BatchNormPrior,
    LabelledImages,
    MetaConfig,
    RecycleConfig,
    Surrogate,
    TuneConfig,
    recycle,
    warm_start,
)
from lorarecycle.config import DISTANCES, EvaluateConfig, InversionConfig
from lorarecycle.fewshot.methods.average import average
from lorarecycle.report.pictures import draw_surrogates
from lorarecycle.reproduce.stages import Row, draw_class_lists, inverted, label_by_teacher, measured, trained, tuned
from lorarecycle.runtime.device import resolve
from lorarecycle.runtime.files import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
IN_DOMAIN = ("cifar_fs", "vgg_flower", "cub", "crop_diseases")
CROSS = ("eurosat", "isic", "chestx")
PAPER = RecycleConfig.paper()
EPISODES = replace(PAPER.meta, n_query=5)
SMOOTH = InversionConfig(
    steps=300, init="noise", parametrization="fourier", lr=0.25, warm_up=0.1, schedule="cosine", prior_weight=0.002
)
RECIPES = {
    "default": RecycleConfig(),
    "painted, the guide sees more": replace(RecycleConfig(), meta=MetaConfig(resolutions=(32, 64, 224))),
    "paper": replace(PAPER, meta=EPISODES),  # EfficientNet-Lite0 in place of ResNet-50
    "fourier": RecycleConfig(SMOOTH, EPISODES),
    "fourier-32px": RecycleConfig(SMOOTH, replace(EPISODES, resolutions=(32,))),
    "fourier-mixed": RecycleConfig(SMOOTH, replace(EPISODES, resolutions=(24, 32, 48, 64, 128, 224))),
    "fourier inverted at 32 px": RecycleConfig(replace(SMOOTH, latent_size=32), EPISODES),
    "fourier-labels-32px": RecycleConfig(SMOOTH, replace(EPISODES, interpolation=1.0, resolutions=(32,))),
    "fourier-relative": RecycleConfig(replace(SMOOTH, prior_relative=True, prior_weight=0.1), EPISODES),
    "pixels": RecycleConfig(replace(SMOOTH, parametrization="pixels", lr=0.05), EPISODES),
}
REAL = {
    "real images, the paper's loss": EPISODES,
    "real images, labels only": replace(EPISODES, interpolation=1.0),
}
OTHERS = {
    "real birds, labels only": replace(EPISODES, interpolation=1.0),
    "real birds seen at 32 px, labels only": replace(EPISODES, interpolation=1.0, resolutions=(32,)),
}
"""What no adapter has to do with: photographs of CUB's train classes. It shows what is the resolution's alone."""
IMAGES = ("epochs", "tuning_images", "images_per_class", "inversion_steps", "prior_size")
"""Options that images of adapters hang on."""
BOUND = "real images, to convergence (bound)"


class Bench:
    """One group of settings, in one work folder.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device, self.dtype = resolve(args.device, args.dtype)
        self.backbone = vit_tiny(device=self.device)
        self.sets = data_sets(DATA)

    @cached_property
    def network(self) -> torch.nn.Module:
        """EfficientNet-Lite0 of ImageNet, float32."""
        state = load_file(DATA / "weights" / "tf_efficientnet_lite0.safetensors")
        network = timm.create_model("tf_efficientnet_lite0")
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False)
        return network.eval().to(self.device)

    @cached_property
    def prior(self) -> Callable[[bool], BatchNormPrior]:
        """The batch-norm prior, absolute or relative."""
        half = (0.5, 0.5, 0.5)
        size = self.args.prior_size

        def make(relative: bool) -> BatchNormPrior:
            prior = BatchNormPrior(self.network, mean=half, std=half, size=size, dtype=self.dtype, relative=relative)
            return prior.to(self.device)

        return cache(make)

    def adapters(self, name: str) -> tuple[list[Adapter], list[LabelledImages]]:
        """Adapters of a set, or for "cross" of all in-domain sets in turn, and what each was tuned on."""
        found, tasks = [], []
        names = IN_DOMAIN if name == "cross" else (name,)
        counts = [len(range(i, self.args.adapters, len(names))) for i in range(len(names))]
        for own, count in zip(names, counts, strict=True):
            make = self.sets[own].train
            assert make is not None
            data = make()
            for i, classes in enumerate(draw_class_lists(data.class_names, count, 5)):
                images = loaded(data.select_classes(classes), self.backbone.fit, self.args.tuning_images)
                folder = (
                    self.args.work_dir / "adapters" / own / f"{self.args.tuning_images}x{self.args.epochs}" / f"{i}"
                )
                config = TuneConfig(epochs=self.args.epochs, seed=i)
                adapter = tuned(self.backbone.clone().to(self.dtype), images, folder, config=config)
                found.append(replace(adapter, name=f"{own}-{i}"))
                tasks.append(images)
        return found, tasks

    def unseen(self, name: str, split: str) -> dict[str, LabelledImages]:
        """What a row is evaluated on."""
        images = {}
        for own in CROSS if name == "cross" else (name,):
            make = getattr(self.sets[own], split)
            if make is not None:
                images[own] = loaded(make(), self.backbone.fit, self.args.test_images)
        return images

    def rows(self, name: str) -> dict[str, list[Row]]:
        """Every row of a set."""
        args, folder = self.args, self.args.work_dir / f"{name}-{self.args.adapters}"
        claim(folder, self._settings(*IMAGES, "meta_steps", "test_images", "n_tasks"))
        adapters, tasks = self.adapters(name)
        images = {split: self.unseen(name, split) for split in {args.split, "val" if name in IN_DOMAIN else args.split}}

        @cache
        def real() -> list[Surrogate]:
            parts = [task.subset(self._some(task)) for task in tasks]
            found = zip(adapters, parts, strict=True)
            return [label_by_teacher(self.backbone, a, part, dtype=self.dtype) for a, part in found]

        def from_real(config: MetaConfig, seed: int) -> Adapter:
            shared = {"adapters": adapters, "seed": seed, "dtype": self.dtype}
            return trained(self.backbone, real(), config=config, **shared)

        @cache
        def birds() -> list[Surrogate]:
            data = self.sets["cub"].train()
            found = []
            for i, classes in enumerate(draw_class_lists(data.class_names, args.adapters, 5)):
                images = loaded(data.select_classes(classes), self.backbone.fit, args.images_per_class)
                marks = {"adapter": f"birds-{i}", "adapter_digest": f"birds-{i}"}
                patch = self.backbone.patch_size
                found.append(Surrogate(images.images, images.labels, None, images.class_names, patch, **marks))
            return found

        def from_birds(config: MetaConfig, seed: int) -> Adapter:
            return trained(self.backbone, birds(), config=self._shortened(config), seed=seed, dtype=self.dtype)

        @cache
        def invert(title: str, seed: int) -> list[Surrogate]:
            return self.inverted(adapters, title, seed, folder)

        def row(title: str, make: Callable[[], Adapter | None], split: str = args.split) -> Row:
            shared = {"n_query": 15, "n_tasks": args.n_tasks, "dtype": self.dtype, "distance": args.distance}
            path = folder / split / args.distance / title
            first = measured(self.backbone, make, images[split], path.with_suffix(".1.json"), n_shots=(1,), **shared)
            shared["n_query"] = 10
            again = measured(self.backbone, make, images[split], path.with_suffix(".5.json"), n_shots=(5,), **shared)
            return {**first, **{key: value for key, value in again.items() if key != "seconds"}}

        fixed: dict[str, Callable[[], Adapter | None]] = {
            "plain": lambda: None,
            "average": lambda: average(adapters),
            "warm start": lambda: warm_start(adapters, base=self.backbone),
        }
        wanted = args.recipes or [*fixed, *RECIPES, *OTHERS, *REAL, *([BOUND] if name in IN_DOMAIN else [])]
        found = {title: [row(title, make)] for title, make in fixed.items() if title in wanted}
        for title in wanted:
            for seed in args.seeds if title not in fixed else ():
                place, images_of, trials = folder / "meta" / f"{title}-{seed}", None, {}
                if title in RECIPES:
                    images_of = partial(invert, title, seed) if RECIPES[title].inversion.steps else None
                    make = partial(self._recycled, adapters, title, seed, images_of)
                elif title in OTHERS:
                    images_of, make = birds, partial(from_birds, OTHERS[title], seed)
                elif title in REAL:
                    images_of, make = real, partial(from_real, self._shortened(REAL[title]), seed)
                else:
                    images_of = real
                    place, make, trials = self._bound(from_real, real, row, seed, folder)
                made = row(place.name, partial(_once, make, place, images_of))
                seconds = read_json(place.with_suffix(".seconds.json"))["seconds"]  # a row made anew finds its adapter
                if title in RECIPES:
                    files = self._surrogates(title, seed, folder).glob("*.seconds.json")
                    seconds += sum(read_json(file)["seconds"] for file in files)
                found.setdefault(title, []).append(
                    {**made, "seconds": {"mean": seconds}, **({"trials": trials} if trials else {})}
                )
        return found

    def _recycled(
        self, adapters: Sequence[Adapter], title: str, seed: int, images_of: Callable[[], list[Surrogate]] | None
    ) -> Adapter:
        config = RECIPES[title]
        if images_of is None:
            config = replace(config, seed=seed)
            return recycle(adapters, base=self.backbone, config=config, device=self.device, dtype=self.dtype)
        shared = {"adapters": adapters, "seed": seed, "dtype": self.dtype}
        return trained(self.backbone, images_of(), config=self._shortened(config.meta), **shared)

    def inverted(self, adapters: Sequence[Adapter], title: str, seed: int, folder: Path) -> list[Surrogate]:
        """Images of each adapter by a recipe, a sheet of some, and beside each file the seconds that it took."""
        shorter = {} if self.args.inversion_steps is None else {"steps": self.args.inversion_steps}
        count = self.args.images_per_class
        inversion = replace(RECIPES[title].inversion, images_per_class=count, batch_size=5 * count, **shorter)
        prior = self.prior(inversion.prior_relative)
        surrogates, place = [], self._surrogates(title, seed, folder)
        claim(place, self._settings(*IMAGES))
        for i, adapter in enumerate(adapters):
            path = place / f"{i}.safetensors"
            settings = {"config": inversion, "prior": prior, "dtype": self.dtype, "seed": seed * 1000 + i}
            start, took = time.perf_counter(), path.with_suffix(".seconds.json")
            if not took.exists():
                path.unlink(missing_ok=True)  # stopped in between: made again, to be timed
            surrogates.append(inverted(self.backbone, adapter, path, **settings))
            if not took.exists():
                write_json(took, {"seconds": time.perf_counter() - start})
        draw_surrogates([s.masked(0.75) for s in surrogates[:4]], folder / f"{place.name}.png")
        return surrogates

    @staticmethod
    def _surrogates(title: str, seed: int, folder: Path) -> Path:
        """Where the images of a recipe are kept; recipes of one inversion share them."""
        key = next(t for t, r in RECIPES.items() if r.inversion == RECIPES[title].inversion)
        return folder / "surrogates" / f"{key}-{seed}"

    def _settings(self, *names: str) -> dict[str, Any]:
        """The machine and some options, for `claim`."""
        return {"machine": describe_machine(self), **{name: getattr(self.args, name) for name in names}}

    def _bound(
        self, from_real: Any, real: Any, row: Any, seed: int, folder: Path
    ) -> tuple[Path, Callable[[], Adapter], dict[str, float]]:
        """Of several numbers of steps from either start the best on validation classes: its folder, how it is made, and
        what each has there in 1-shot.

        Each trial is a row and an adapter of its own: more steps asked for later join those that are there.
        """
        trials, scores = {}, {}
        for init, lr in (("adapters", 5e-4), ("random", 1e-3)):
            for steps in self.args.bound_steps:
                config = replace(EPISODES, steps=steps, cycle=max(4, steps), init=init, interpolation=1.0, lr=lr)
                place = folder / "meta" / f"{BOUND}-{init}-{steps}-{seed}"
                make = partial(from_real, config, seed)
                found = row(place.name, partial(_once, make, place, real), "val")
                name = f"{steps} steps from {'the warm start' if init == 'adapters' else 'a random start'}"
                scores[name] = statistics.mean(v["mean"] for k, v in found.items() if k.endswith("1-shot"))
                trials[name] = place, make
        return *trials[max(scores, key=scores.__getitem__)], scores

    def _shortened(self, meta: MetaConfig) -> MetaConfig:
        steps = self.args.meta_steps
        return meta if steps is None else replace(meta, steps=steps, cycle=max(4, steps))

    def _some(self, task: LabelledImages) -> torch.Tensor:
        rows = [(task.labels == c).nonzero()[: self.args.images_per_class, 0] for c in range(len(task.class_names))]
        return torch.cat(rows)


def _once(make: Callable[[], Adapter], folder: Path, images_of: Callable[[], object] | None = None) -> Adapter:
    """Make an adapter, or load it where it was made; its clock runs once the images, which rows share, are there."""
    if not folder.exists():
        if images_of is not None:
            images_of()
        start = time.perf_counter()
        made = make()
        write_json(folder.with_suffix(".seconds.json"), {"seconds": time.perf_counter() - start})
        made.save(folder)  # last: where it is there, so are its seconds
    return Adapter.load(folder)


def table(group: dict[str, Any]) -> str:
    """Markdown of what was run with equal arguments: mean over seeds, interval over tasks, seconds to make a row."""
    where = f"{group['arguments']['split']} classes, {group['arguments']['distance']}"
    lines = [f"{group['machine']}; {where}.", "", "```", *group["commands"], "```", ""]
    for name, rows in group["sets"].items():
        columns = [key for key in next(iter(rows.values()))[0] if key not in ("seconds", "trials")]
        lines += [
            f"**{name}, {group['arguments']['adapters']} adapters**",
            "",
            f"| meta-LoRA | {' | '.join(columns)} | seeds | made in, s |",
            "| --- |" + " --- |" * (len(columns) + 2),
        ]
        for title, runs in rows.items():
            cells = []
            for column in columns:
                means = [run[column]["mean"] for run in runs]
                spread = f" ({min(means):.1f} to {max(means):.1f})" if len(means) > 1 else ""
                cells.append(f"{statistics.mean(means):.2f} ± {runs[0][column]['interval']:.2f}{spread}")
            seconds = statistics.mean(run["seconds"]["mean"] for run in runs)
            lines.append(f"| {title} | {' | '.join(cells)} | {len(runs)} | {seconds:.{0 if seconds > 9 else 1}f} |")
        lines.append("")
        for trials in (run["trials"] for run in rows.get(BOUND, []) if "trials" in run):
            told = "; ".join(f"{name} {score:.2f}" for name, score in trials.items())
            lines += [f"Of the bound, chosen on validation classes, 1-shot: {told}.", ""]
    return "\n".join(lines)


def kept(path: Path, run: dict[str, Any], command: str, sets: dict[str, dict[str, list[Row]]]) -> dict[str, Any]:
    """Put rows into the file, with those of the same machine and arguments; the file as it is now, not as it was hours
    ago. Writes JSON, and tables beside it, those of most adapters first."""
    groups: list[dict[str, Any]] = read_json(path)["groups"] if path.exists() else []
    group = next((g for g in groups if all(g[key] == value for key, value in run.items())), None)
    if group is None:
        group = {**run, "commands": [], "sets": {}}
        groups.append(group)
    group["commands"] = [*(c for c in group["commands"] if c != command), command]
    for name, rows in sets.items():
        group["sets"][name] = {**group["sets"].get(name, {}), **rows}
    groups.sort(key=lambda one: -one["arguments"]["adapters"])
    write_json(path, {"groups": groups})
    write_text(path.with_suffix(".md"), "\n".join(table(one) for one in groups))
    return group


def describe_machine(bench: Bench) -> str:
    """For the record."""
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {bench.device}, "
        f"{bench.dtype}, torch {torch.__version__}"
    )


def told(script: str) -> str:
    """The command that was given, for the record; it names no folder of this machine, nor where the record lies."""
    given = re.sub(r" ?--output[ =]\S+", "", shlex.join(sys.argv[1:]))
    places = {"work-dir": "WORK", "surrogates": "IMAGES"}
    given = re.sub(r"--(work-dir|surrogates)[ =]\S+", lambda m: f"--{m[1]} {places[m[1]]}", given)
    return f"python benchmarks/{script} {given}"


def make_parser(about: str) -> argparse.ArgumentParser:
    """The options of all that is measured in one work folder."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="of one group of settings: keeps all that is done")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=TuneConfig().epochs, help="few leave nothing in common")
    parser.add_argument("--tuning-images", type=int, default=60, help="of a class, at most")
    parser.add_argument("--images-per-class", type=int, default=16, help="inverted, or real in their place")
    parser.add_argument("--inversion-steps", type=int, help="the recipe's when left out")
    parser.add_argument("--prior-size", type=int, help="side at which the prior sees images; their own when left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--sets", nargs="+", choices=(*IN_DOMAIN, "cross"), default=["cifar_fs"])
    known = ("plain", "average", "warm start", *RECIPES, *OTHERS, *REAL, BOUND)
    parser.add_argument("--recipes", nargs="*", choices=known, help="rows; all when left out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of inversion and meta-training")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="choose settings on val only")
    parser.add_argument("--meta-steps", type=int, help="of episodes; the recipe's when left out")
    parser.add_argument("--bound-steps", nargs="+", type=int, default=[100, 200, 400, 800])
    parser.add_argument("--test-images", type=int, help="of a class, at most; all when left out")
    parser.add_argument("--n-tasks", type=int, default=600)
    parser.add_argument("--distance", choices=DISTANCES, default=EvaluateConfig().distance)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy_224.json")
    args = parser.parse_args()
    if "cross" in args.sets and BOUND in (args.recipes or ()):
        parser.error("the bound is chosen on validation classes, which `--sets cross` has none of")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bench = Bench(args)
    left_out = ("work_dir", "output", "sets", "recipes")
    arguments = {k: v for k, v in vars(args).items() if k not in left_out}
    run = {"machine": describe_machine(bench), "arguments": arguments}
    command = told("accuracy_224.py")
    for name in args.sets:
        group = kept(args.output, run, command, {name: bench.rows(name)})
    print(table(group))


if __name__ == "__main__":
    main()
