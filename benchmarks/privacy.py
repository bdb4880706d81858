r"""Privacy: how close inverted images come to the photographs that an adapter was tuned on.

    python benchmarks/privacy.py --work-dir WORK                    # CIFAR-FS, 8 adapters: hours on a CPU
    python benchmarks/privacy.py --work-dir WORK --set vgg_flower --recipe paper --tuning-images 20

For each image: the nearest of its class's photographs that the adapter was tuned on, and the nearest of as many others
of the class, which it never saw (where few are left, of as many of the tuning's). An image that tells nothing of single
photographs is nearer to one of the tuning half of the time. Other held-out photographs in the place of the images are
the baseline. Distances: root of the mean squared difference of pixels (0 to 255) at 32 x 32, and one minus the cosine
of features, of the plain ViT and of EfficientNet-Lite0. Adapters and images are made as `accuracy_224.py` makes them,
with the same options, and stay in the work folder. Writes JSON, a table, and a sheet of the images that came closest,
each above its nearest photograph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_224 import IN_DOMAIN, RECIPES, ROOT, Bench, describe_machine, make_parser, told
from PIL import Image
from sets_224 import evenly, loaded
from torch import Tensor

from lorarecycle import Surrogate
from lorarecycle.data.images import normalize
from lorarecycle.runtime.files import write_json, write_text
from lorarecycle.vit.features import extract_features

INVERTED = {title: recipe for title, recipe in RECIPES.items() if recipe.inversion.steps}
HALF = (0.5, 0.5, 0.5)


def pixels(images: Tensor) -> Tensor:
    """float32 [N, 3072]: images at 32 x 32."""
    return F.interpolate(images.float(), size=32, mode="area").flatten(1)


def features_of(network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """Of a convolutional network, before its classifier; of length 1."""

    @torch.no_grad()
    def compute(images: Tensor) -> Tensor:
        device = next(network.parameters()).device
        found = [
            network.forward_head(network.forward_features(normalize(part.to(device), HALF, HALF)), pre_logits=True)  # type: ignore[operator]
            for part in images.split(64)
        ]
        return F.normalize(torch.cat(found).float().cpu(), dim=1)

    return compute


def pixel_distance(one: Tensor, other: Tensor) -> Tensor:
    """float32 [N, M], 0 to 255."""
    return torch.cdist(one, other) / math.sqrt(one.shape[1])


def cosine_distance(one: Tensor, other: Tensor) -> Tensor:
    """float32 [N, M] of features of length 1, 0 to 2."""
    return 1 - one @ other.T


def compare(found: Tensor, seen: Tensor, unseen: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """float32 [N, 2]: distances to the nearest photograph that the adapter was tuned on, and to the nearest other."""
    return torch.stack([distance(found, seen).amin(1), distance(found, unseen).amin(1)], dim=1)


def summary(classes: list[Tensor]) -> dict[str, float]:
    """Means of the two distances, and the share that is nearer to the tuning's photographs with its 95 % interval over
    classes: images of one class are compared with the same photographs, so they are not independent."""
    seen, unseen = torch.cat(classes).mean(0).tolist()
    shares = torch.tensor([(c[:, 0] < c[:, 1]).float().mean().item() for c in classes])
    interval = 1.96 * shares.std().item() / math.sqrt(len(shares))
    share, images = shares.mean().item(), sum(map(len, classes))
    return {"seen": seen, "unseen": unseen, "share": 100 * share, "interval": 100 * interval, "images": images}


def evenly_of(images: Tensor, count: int) -> Tensor:
    """At most `count` of them, evenly spaced."""
    return images[evenly(torch.arange(len(images)), count)]


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{report['machine']}. `{report['command']}`",
        "",
        "| images | distance | to the nearest of the tuning | to the nearest other | nearer to the tuning's, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what, rows in report["rows"].items():
        for name, row in rows.items():
            share = f"{row['share']:.1f} ± {row['interval']:.1f} of {row['images']}"
            lines.append(f"| {what} | {name} | {row['seen']:.3f} | {row['unseen']:.3f} | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--set", choices=IN_DOMAIN, default="cifar_fs")
    parser.add_argument("--recipe", choices=list(INVERTED), default="fourier")
    parser.add_argument("--seed", type=int, default=0, help="of inversion")
    parser.add_argument("--surrogates", type=Path, help="images in place of the recipe's: a folder of `reproduce`")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "privacy.json")
    args = parser.parse_args()
    bench = Bench(args)
    make = bench.sets[args.set].train
    assert make is not None
    whole = make()
    fewest = int(torch.bincount(torch.as_tensor(whole.labels)).min())
    if fewest < args.tuning_images + 2:
        parser.error(f"`--tuning-images` must leave two of each class ({fewest}) held out, got {args.tuning_images}")
    adapters, tasks = bench.adapters(args.set)
    if args.surrogates is None:
        folder = args.work_dir / f"{args.set}-{args.adapters}"
        surrogates = bench.inverted(adapters, args.recipe, args.seed, folder)
    else:
        by_adapter = {s.adapter_digest: s for s in map(Surrogate.load, sorted(args.surrogates.glob("*.safetensors")))}
        missing = [adapter.name for adapter in adapters if adapter.weights_digest() not in by_adapter]
        if missing:
            parser.error(f"`--surrogates` must hold images of each adapter, got none of {', '.join(missing)}")
        surrogates = [by_adapter[adapter.weights_digest()] for adapter in adapters]

    def read(data: Any, rows: Tensor) -> Tensor:
        return loaded(data.subset(rows), bench.backbone.fit).images

    def vit(images: Tensor) -> Tensor:
        return F.normalize(extract_features(bench.backbone, images).float().cpu(), dim=1)

    measures: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
        "pixels at 32 x 32": (pixels, pixel_distance),
        "features of the plain ViT": (vit, cosine_distance),
        "features of EfficientNet-Lite0": (features_of(bench.network), cosine_distance),
    }
    found: dict[str, dict[str, list[Tensor]]] = {"inverted images": {}, "held-out photographs": {}}
    closest: list[tuple[float, Tensor, Tensor]] = []
    for surrogate, task in zip(surrogates, tasks, strict=True):
        own = whole.select_classes(task.class_names)
        for c in range(len(task.class_names)):
            rows = (own.labels == c).nonzero()[:, 0]
            some = evenly(rows, args.tuning_images)
            others = rows[~torch.isin(rows, some)]
            count = min(len(some), len(others) // 2)  # the same of each, so that chance gives one half
            unseen_rows = evenly(others, count)
            held_rows = evenly(others[~torch.isin(others, unseen_rows)], count)
            seen, unseen, held_out = (read(own, part) for part in (evenly(some, count), unseen_rows, held_rows))
            assert torch.equal(seen, evenly_of(task.images[task.labels == c], count))
            made = surrogate.images[surrogate.labels == c].cpu()
            for name, (encode, distance) in measures.items():
                a, b = encode(seen), encode(unseen)
                for what, images in (("inverted images", made), ("held-out photographs", held_out)):
                    if len(images):
                        found[what].setdefault(name, []).append(compare(encode(images), a, b, distance))
                if encode is vit:
                    near = distance(encode(made), a)
                    closest += [(near[i].min().item(), made[i], seen[near[i].argmin()]) for i in range(len(made))]
    shares = {what: {name: summary(d) for name, d in of.items()} for what, of in found.items()}
    report = {
        "machine": describe_machine(bench),
        "command": told("privacy.py"),
        "rows": shares,
    }
    write_json(args.output, report)
    write_text(args.output.with_suffix(".md"), table(report))
    closest.sort(key=lambda entry: entry[0])
    sheet = torch.cat([torch.cat(entry[1:], dim=1) for entry in closest[:10]], dim=2)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(args.output.with_suffix(".jpg"), quality=85)
    print(table(report))


if __name__ == "__main__":
    main()
