"""What folding LoRA factors into a bfloat16 weight does to the update, and to meta-training; on any CPU.

    python benchmarks/lora_fold_error.py

First: the error of the LoRA part alone (output minus bare product, both from the same 16-bit weight and input) against
float64, for updates of 1e-4 to 1e-1 of the weight's length, at qkv of ViT-B/16. "Kept" is how much of the true LoRA
part the output holds: its projection on it. Second: 200 meta-steps of the demo's ViT in bfloat16 from random factors
with the paper's rank and rate, plain and folded, on the demo's digits 0 to 5, and the accuracy on the digits 6 to 9.
The folded form is written here in plain PyTorch, with the roundings of the GPU's; products add up in float32, as there.
Writes benchmarks/results/lora_fold_error.md and .json.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from lorarecycle.kernels import reference
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorarecycle import Backbone, RecycleConfig, load_dataset
from lorarecycle.demo.demo import UNSEEN, on_photographs
from lorarecycle.fewshot.evaluate import Evaluation, task_accuracies
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.inversion.surrogate import Surrogate
from lorarecycle.meta.train import meta_train
from lorarecycle.runtime.files import write_json, write_text
from lorarecycle.vit import lora as vit_lora
from lorarecycle.vit.features import extract_features

ROOT = Path(__file__).resolve().parent.parent
RATIOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SHOTS = (1, 5)


def fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """`W + B A`, summed in float32, rounded once to the dtype of `weight`."""
    S, R, K = lora_A.shape
    delta = torch.bmm(lora_B.float().view(S, -1, R), lora_A.float())
    return (weight.float() + delta.view(-1, K)).to(weight.dtype)


def fold_dithered(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """`fold` to bfloat16 with stochastic rounding: right on average, noisier."""
    S, R, K = lora_A.shape
    exact = weight.float() + torch.bmm(lora_B.float().view(S, -1, R), lora_A.float()).view(-1, K)
    noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    return ((exact.view(torch.int32) + noise) & -65536).view(torch.float32).bfloat16()


class Folded(torch.autograd.Function):
    """The folded `lora_qkv` in plain PyTorch: h and dh in the dtype of x, sums in float32, as on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        folded = fold(weight, lora_A, lora_B)
        ctx.save_for_backward(x, folded, lora_A, lora_B)
        return F.linear(x, folded, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, folded, lora_A, lora_B = ctx.saved_tensors
        S, R, K = lora_A.shape
        dy_rows, x_rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, K)
        by_segment = dy_rows.view(len(dy_rows), S, -1).transpose(0, 1)  # [S, M, N / S]
        h = F.linear(x_rows, lora_A.to(x.dtype).flatten(0, 1)).view(-1, S, R).transpose(0, 1)  # [S, M, R]
        dh = torch.bmm(by_segment, lora_B.to(x.dtype).view(S, -1, R))
        d_lora_B = torch.bmm(by_segment.transpose(1, 2).float(), h.float()).reshape(lora_B.shape)
        d_lora_A = torch.matmul(dh.transpose(1, 2).float(), x_rows.float())
        return (dy_rows @ folded).view_as(x), None, None, d_lora_A, d_lora_B


class WideProducts(TorchFunctionMode):
    """Products of bfloat16 tensors in float32, each result rounded, as tensor cores do; fast on any CPU."""

    PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.addmm, torch.bmm)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        return func(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs).bfloat16()


def errors() -> list[dict[str, float]]:
    """Relative error and kept share of the LoRA part for each ratio, by form."""
    generator = torch.Generator().manual_seed(0)
    M, K, N, S, R = 512, 768, 2304, 3, 4
    weight = (torch.randn(N, K, generator=generator) * K**-0.5).bfloat16()
    x = torch.randn(M, K, generator=generator).bfloat16()
    lora_A, lora_B = torch.randn(S, R, K, generator=generator), torch.randn(N, R, generator=generator)
    length = torch.bmm(lora_B.view(S, -1, R), lora_A).norm()
    bare = F.linear(x.double(), weight.double())
    rows = []
    for ratio in RATIOS:
        scaled_B = lora_B * (ratio * weight.float().norm() / length)
        delta = torch.bmm(scaled_B.view(S, -1, R), lora_A).view(N, K)
        wanted = F.linear(x.double(), delta.double())
        outputs = {
            "eager": reference.lora_qkv(x, weight, None, lora_A.bfloat16(), scaled_B.bfloat16()),
            "folded": F.linear(x, fold(weight, lora_A, scaled_B)),
            "folded, stochastic rounding": F.linear(x, fold_dithered(weight, lora_A, scaled_B)),
            "no LoRA at all": F.linear(x, weight),
        }
        row = {"ratio": ratio}
        for name, y in outputs.items():
            part = y.double() - bare
            row[f"error, {name}"] = float((part - wanted).norm() / wanted.norm())
            row[f"kept, {name}"] = float((part * wanted).sum() / wanted.square().sum())
        rows.append(row)
    return rows


def accuracies(steps: int, seeds: int, lr: float) -> list[dict[str, Any]]:
    """Accuracy in % with its interval on unseen digits after meta-training, by form, dtype and seed."""
    digits = on_photographs(load_dataset("digits", size=32), 0)
    plain = Backbone.load("demo")
    surrogates = []
    for i, task in enumerate(("012", "345")):
        images = digits.select_classes(tuple(task)).sample(100, torch.Generator().manual_seed(i))
        surrogates.append(Surrogate(images.images, images.labels, None, images.class_names, 4, adapter=task))
    unseen = digits.select_classes(UNSEEN)
    size = {"n_way": len(UNSEEN), "n_query": 15, "n_tasks": 600, "seed": 0}
    tasks = [sample_tasks(unseen.labels, n_shot=n_shot, **size) for n_shot in SHOTS]

    def scores(model: Backbone) -> list[dict[str, float]]:
        features = extract_features(model, unseen.images)
        return [Evaluation(task_accuracies(features, t), t).summary() for t in tasks]

    config = replace(RecycleConfig.paper().meta, steps=steps, n_way=3, n_query=3, flip=False, interpolation=1.0, lr=lr)
    rows: list[dict[str, Any]] = [{"steps": 0, "form": "no meta-LoRA", "seed": None, "accuracy": scores(plain)}]
    for seed in range(seeds):
        for form, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("folded", torch.bfloat16)):
            backbone = plain.clone().to(dtype)
            op = Folded.apply if form == "folded" else vit_lora.lora_qkv
            with mock.patch.object(vit_lora, "lora_qkv", op), WideProducts():
                done = meta_train(backbone, surrogates, config=config, seed=seed, quiet=True)
            name = f"{form}, {str(dtype).removeprefix('torch.')}"
            loss = float(done.losses[-20:].mean())
            moved = _moved(plain, done.meta_lora.factors)
            rows.append(
                {
                    "steps": steps,
                    "form": name,
                    "seed": seed,
                    "accuracy": scores(plain.merge(done.meta_lora)),
                    "loss": loss,
                }
            )
            rows[-1]["moved"] = moved
            print(rows[-1], flush=True)
    return rows


def _moved(backbone: Backbone, factors: Any) -> float:
    """Length of the update over that of the weights that it is added to."""
    update = sum(float((f.lora_B @ f.lora_A * f.scaling).square().sum()) for f in factors.values())
    weight = sum(float(block.attn.qkv.weight.square().sum()) * 2 / 3 for block in backbone.vit.blocks)  # q and v
    return (update / weight) ** 0.5


def report(
    found: list[dict[str, float]], trained: list[dict[str, Any]], machine: str, arguments: str, seeds: int
) -> str:
    """Both tables in Markdown."""
    forms = ("eager", "folded", "folded, stochastic rounding", "no LoRA at all")
    lines = [
        "# Folding LoRA factors into a bfloat16 weight",
        "",
        f"`python benchmarks/lora_fold_error.py {arguments}` on {machine}.",
        "",
        "## The LoRA part of one layer",
        "",
        "2304 x 768 (qkv of ViT-B/16), rank 4, 512 rows, against float64. Error: length of the LoRA part's error over",
        "its own length. Kept: its projection on the true one.",
        "",
        "| update / weight | " + " | ".join(f"error, {f}" for f in forms) + " | kept, eager | kept, folded |",
        "|" + " --- |" * (len(forms) + 3),
    ]
    for row in found:
        cells = [f"{row[f'error, {f}']:.3f}" for f in forms] + [f"{row[f'kept, {f}']:.3f}" for f in forms[:2]]
        lines.append(f"| {row['ratio']:g} | {' | '.join(cells)} |")
    lines += [
        "",
        "Folded and eager lose the same: an update that is too small to move a weight of 8 bits is too small to move",
        "an output of 8 bits, to which the eager form adds it. Stochastic rounding keeps small updates on average,",
        "with a larger error in every row.",
        "",
        "## Meta-training from random factors",
        "",
        "The demo's ViT (width 144, 6 blocks), rank 4 on q and v, episodes of digits 0 to 5 on photographs. Accuracy",
        "in % on the digits 6 to 9, 600 tasks, of the meta-LoRA merged in float32. Moved: length of the update over",
        "that of the weights.",
        "",
        "| steps | training | seed | 1-shot | 5-shot | loss of the last 20 steps | moved |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in trained:
        cells = [f"{a['accuracy']:.2f} ± {a['interval']:.2f}" for a in row["accuracy"]]
        rest = [f"{row['loss']:.3f}", f"{row['moved']:.3f}"] if "loss" in row else ["", ""]
        seed = "" if row["seed"] is None else str(row["seed"])
        lines.append(f"| {row['steps']} | {row['form']} | {seed} | {' | '.join([*cells, *rest])} |")
    lines += ["", "Largest distance of two runs of one seed, in points (1-shot):", ""]
    accuracy = {(row["steps"], row["seed"], row["form"]): row["accuracy"][0]["accuracy"] for row in trained}
    for steps in sorted({row["steps"] for row in trained} - {0}):
        apart = {
            f"{one} and {other}": max(
                abs(accuracy[steps, seed, one] - accuracy[steps, seed, other]) for seed in range(seeds)
            )
            for one, other in (("eager, float32", "eager, bfloat16"), ("eager, bfloat16", "folded, bfloat16"))
        }
        lines.append(f"- {steps} steps: " + "; ".join(f"{pair} {points:.2f}" for pair, points in apart.items()))
    lines += ["", "Where the first pair is as far apart as the second, rounding of any kind is what moves the runs."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[200], help="meta-steps")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate; the paper's when left out")
    parser.add_argument("--seeds", type=int, default=3, help="of the meta-training")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "lora_fold_error.json")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    found = errors()
    for row in found:
        print(row, flush=True)
    trained = [row for i, steps in enumerate(args.steps) for row in accuracies(steps, args.seeds, args.lr)[min(i, 1) :]]
    write_json(args.output, {"machine": machine, "errors": found, "trained": trained})
    written = report(found, trained, machine, f"--seeds {args.seeds} --lr {args.lr:g}", args.seeds)
    write_text(args.output.with_suffix(".md"), written)
    print(written)


if __name__ == "__main__":
    main()
