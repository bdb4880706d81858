"""Pre-train the small ViT that ships with the package, and measure its few-shot accuracy.

    python benchmarks/pretrain_demo_vit.py                  # train, evaluate, write the package's asset
    python benchmarks/pretrain_demo_vit.py --evaluate       # only evaluate the shipped file
    python benchmarks/pretrain_demo_vit.py --data cifar100  # by torchvision, 600 images a class

The student starts at random and learns the labels together with an ImageNet ViT-Tiny's class-token feature of the
clean, enlarged image; half of its patches are dropped while it learns, except in the last epochs. No weight of the
teacher is in the result.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sets_224 import DATA
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.transforms import v2

from lorarecycle.data.dataset import LabelledImages
from lorarecycle.data.load import load_dataset
from lorarecycle.fewshot.evaluate import Evaluation, task_accuracies
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.runtime.files import load_tensors, read_json, save_tensors, write_json
from lorarecycle.runtime.progress import track

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "vit_tiny_patch16_224"
MEAN = STD = 0.5


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="measure `--output` as it is, train nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "lorarecycle/vit/assets/demo_vit.safetensors")
    parser.add_argument("--data", choices=("cifar_fs", "cifar100"), default="cifar_fs")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--full-epochs", type=int, default=2, help="last epochs, in which no patch is dropped")
    parser.add_argument("--patch-drop", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--drop-path", type=float, default=0.05)
    parser.add_argument("--width", type=int, default=144)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--mlp-ratio", type=float, default=4.0)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--distill", type=float, default=4.0, help="weight of the feature loss; 0: labels only")
    parser.add_argument("--teacher-size", type=int, default=144, help="side of the images that the teacher sees")
    parser.add_argument("--features", type=Path, help="keep the teacher's features here, and read them if present")
    parser.add_argument("--checkpoint-every", type=int, default=0, help="also write `--output` every so many epochs")
    parser.add_argument("--limit", type=int, help="use so many images only, for a quick try")
    parser.add_argument("--machine", default=f"{os.cpu_count()} cores, {platform.machine()}", help="for the record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_split(data: str, split: str) -> LabelledImages:
    """Images of the train, val or test classes of CIFAR-FS, from the prepared file or through torchvision."""
    if data == "cifar_fs":
        return load_dataset(DATA / "cifar_fs.npz", split)
    return load_dataset("cifar-fs", split, download=True)


def normalize(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN) / STD


@torch.inference_mode()
def encode(model: nn.Module, images: Tensor, size: int = 32, description: str = "features") -> Tensor:
    """Class-token features [n, D] of uint8 images."""
    model.eval()
    features = []
    for batch in track(images.split(64), description, quiet=len(images) < 5000):
        batch = normalize(batch)
        if size != batch.shape[-1]:
            batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        features.append(model(batch))
    return torch.cat(features).clone()


def evaluate(model: nn.Module, data: str) -> dict[str, str]:
    """Few-shot accuracies on the unseen CIFAR-FS classes and on the digits, printed and returned."""
    sets = {f"CIFAR-FS {split} classes": load_split(data, split) for split in ("val", "test")}
    sets["scikit-learn digits"] = load_dataset("digits", size=32)
    result = {}
    for name, images in sets.items():
        features = encode(model, images.images)
        for n_shot in (1, 5):
            tasks = sample_tasks(images.labels, n_way=5, n_shot=n_shot, n_query=15, n_tasks=600, seed=0)
            evaluation = Evaluation(task_accuracies(features, tasks), tasks)
            result[f"{name}, 5-way {n_shot}-shot"] = f"{evaluation.accuracy:.1f} +- {evaluation.interval:.1f}"
            print(f"{name}: {evaluation}", flush=True)
    return result


def load_teacher(size: int) -> VisionTransformer:
    """The ImageNet ViT-Tiny without its head, for images of `size`; from `DATA`, else through timm."""
    local = DATA / f"{TEACHER}.safetensors"
    overlay = {"pretrained_cfg_overlay": {"file": str(local)}} if local.is_file() else {}
    return timm.create_model(TEACHER, pretrained=True, num_classes=0, img_size=size, **overlay).float().eval()


def teacher_targets(images: Tensor, size: int, cache: Path | None) -> tuple[Tensor, float]:
    """The teacher's features [n, D] of the clean images, each dimension standardised; seconds they took."""
    if cache is not None and cache.is_file():
        stored = load_tensors(cache)[0]
        if len(stored["features"]) != len(images):
            raise ValueError(
                f"`--features` must hold {len(images)} features, got {len(stored['features'])}; name another file."
            )
        return stored["features"], stored["seconds"].item()
    began = time.time()
    features = encode(load_teacher(size), images, size, description="teacher")
    features = (features - features.mean(0)) / features.std(0)
    seconds = time.time() - began
    if cache is not None:
        save_tensors(cache, {"features": features, "seconds": torch.tensor(seconds)})
    return features, seconds


def train(student: VisionTransformer, images: Tensor, labels: Tensor, arguments: argparse.Namespace) -> float:
    """Train `student` in place; returns the seconds it took, those of the teacher included."""
    targets, teacher_seconds = torch.zeros(len(images), student.embed_dim), 0.0
    if arguments.distill:
        targets, teacher_seconds = teacher_targets(images, arguments.teacher_size, arguments.features)
    started = time.time()
    torch.manual_seed(arguments.seed)  # the same draws whether the features were computed or read
    classify = nn.Linear(student.embed_dim, int(labels.max()) + 1)
    imitate = nn.Linear(student.embed_dim, targets.shape[1])
    augment = v2.Compose(
        [
            v2.RandomCrop(32, padding=4, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4)], p=0.5),
            v2.RandomGrayscale(0.1),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([MEAN] * 3, [STD] * 3),
            v2.RandomErasing(0.25, value="random"),
        ]
    )
    parameters = [p for module in (student, classify, imitate) for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": arguments.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=arguments.lr,
    )
    steps = len(images) // arguments.batch
    schedule = CosineLRScheduler(
        optimizer, t_initial=arguments.epochs * steps, lr_min=1e-6, warmup_t=steps, warmup_lr_init=1e-6,
        warmup_prefix=True, t_in_epochs=False,
    )  # fmt: skip
    patch_drop = PatchDropout(arguments.patch_drop, num_prefix_tokens=student.num_prefix_tokens)
    student.patch_drop = patch_drop
    done = 0
    for epoch in range(arguments.epochs):
        student.train()
        patch_drop.prob = arguments.patch_drop if epoch < arguments.epochs - arguments.full_epochs else 0.0
        sums, began = torch.zeros(2), time.time()
        order = torch.randperm(len(images))[: steps * arguments.batch]
        for chosen in track(order.split(arguments.batch), f"epoch {epoch + 1}", quiet=not sys.stderr.isatty()):
            # one draw of the augmentation for eight images: whole tensors are quicker than single images
            inputs = torch.cat([augment(part) for part in images[chosen].split(8)])
            features = student(inputs)
            label_loss = F.cross_entropy(classify(features), labels[chosen], label_smoothing=0.1)
            feature_loss = 1 - F.cosine_similarity(imitate(features), targets[chosen]).mean()
            loss = label_loss + arguments.distill * feature_loss if arguments.distill else label_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            done += 1
            schedule.step_update(done)
            sums += torch.tensor([label_loss.item(), feature_loss.item()])
        label_mean, feature_mean = (sums / steps).tolist()
        print(
            f"epoch {epoch + 1}/{arguments.epochs}: label loss {label_mean:.3f}, "
            f"feature loss {feature_mean:.3f}, {time.time() - began:.0f} s",
            flush=True,
        )
        if arguments.checkpoint_every and (epoch + 1) % arguments.checkpoint_every == 0:
            write(student, arguments, {}, teacher_seconds + time.time() - started)
    return teacher_seconds + time.time() - started


def architecture(arguments: argparse.Namespace) -> dict[str, object]:
    """Arguments of timm's VisionTransformer."""
    return {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": arguments.width,
        "depth": arguments.depth,
        "num_heads": arguments.heads,
        "mlp_ratio": arguments.mlp_ratio,
        "num_classes": 0,
    }


def write(student: nn.Module, arguments: argparse.Namespace, accuracy: dict[str, str], seconds: float) -> None:
    """Write the weights (fp16) and, beside them, the record that suffices to rebuild the model."""
    record = {
        "architecture": architecture(arguments),
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "data": f"CIFAR-FS, 64 train classes x {150 if arguments.data == 'cifar_fs' else 600} images",
        "start": "random",
        "teacher": f"{TEACHER} at {arguments.teacher_size} pixels" if arguments.distill else None,
        "command": shlex.join(["python", "benchmarks/pretrain_demo_vit.py", *sys.argv[1:]]),
        "training_minutes": round(seconds / 60, 1),
        "accuracy": accuracy,
        "accuracy_note": "nearest class mean, 600 tasks, 15 queries a class; percent +- 95 % interval",
        "machine": arguments.machine,
        "versions": {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }
    save_tensors(arguments.output, {k: v.half() for k, v in student.state_dict().items()}, {"record": record})
    write_json(arguments.output.with_suffix(".json"), record)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.evaluate:
        record = read_json(arguments.output.with_suffix(".json"))
        student = VisionTransformer(**record["architecture"])
        student.load_state_dict({name: t.float() for name, t in load_tensors(arguments.output)[0].items()})
        evaluate(student, arguments.data)
        return
    torch.manual_seed(arguments.seed)  # this script owns the process; v2 and timm draw from the global generator
    source = load_split(arguments.data, "train")
    images, labels = source.images, source.labels
    if arguments.limit:
        chosen = torch.randperm(len(images))[: arguments.limit]
        images, labels = images[chosen], labels[chosen]
    student = VisionTransformer(**architecture(arguments), drop_path_rate=arguments.drop_path)
    size = 2 * sum(p.numel() for p in student.parameters()) / 1e6
    print(f"{size:.2f} MB in fp16, {len(images)} images of {int(labels.max()) + 1} classes", flush=True)
    seconds = train(student, images, labels, arguments)
    student.load_state_dict({name: t.half().float() for name, t in student.state_dict().items()})  # as shipped
    write(student, arguments, evaluate(student, arguments.data), seconds)
    print(f"{arguments.output} written after {seconds / 60:.1f} minutes of training")


if __name__ == "__main__":
    main()
