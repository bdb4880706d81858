"""Few-shot accuracy of exported encoders beside PyTorch's: ViT-Tiny on the test classes of CIFAR-FS.

    python benchmarks/export_accuracy.py

600 5-way tasks, 15 queries a class, the same for every form; the plain ViT, no adapter. Needs cifar_fs.npz and
vit_tiny_patch16_224.safetensors in the folder that LORARECYCLE_DATA names (../shared/data otherwise). Prints a row
for each form and writes JSON, in which forms of earlier runs stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lorarecycle.export import ExportConfig
from lorarecycle.export.graphs import EncoderGraph, prepare_backbone
from lorarecycle.export.onnx_files import write_encoder
from lorarecycle.export.runtime import Graph
from sets_224 import DATA, vit_tiny

from lorarecycle import Backbone, load_dataset
from lorarecycle.data.images import normalize, to_uint8
from lorarecycle.fewshot.evaluate import Evaluation, task_accuracies
from lorarecycle.fewshot.tasks import sample_tasks
from lorarecycle.runtime.files import write_json

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=["torch", "fp32", "fp16", "int8"])
    parser.add_argument("--n-shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--split", choices=("val", "test"), default="test", help="choose settings on val only")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "export_accuracy_cifar_fs.json"
    )
    args = parser.parse_args()
    backbone = vit_tiny(image_size=args.image_size)
    images = load_dataset(DATA / "cifar_fs.npz", args.split)
    command = "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    machine = f"{name_cpu()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
    machine += f"torch {torch.__version__}, onnxruntime {version('onnxruntime')}"
    report: dict[str, Any] = {"split": args.split, "image_size": args.image_size, "accuracy": {}}
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        if all(earlier[key] == report[key] for key in ("split", "image_size")):
            report = earlier
    for form in args.forms:
        start = time.process_time()
        features = encode_all(backbone, images.images, form)
        row = {"cpu_seconds": round(time.process_time() - start, 1), "command": command, "machine": machine}
        for n_shot in args.n_shots:
            tasks = sample_tasks(images.labels, n_way=5, n_shot=n_shot, n_query=15, n_tasks=600, seed=0)
            result = Evaluation(task_accuracies(features, tasks), tasks)
            row[f"{n_shot}-shot"] = {"mean": result.accuracy, "interval": result.interval}
        print(form, row, flush=True)
        report["accuracy"][form] = row
        write_json(args.output, report)


def name_cpu() -> str:
    """The processor as Linux names it, with VNNI's presence, which decides how int8 products are computed."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    vnni = "with VNNI" if {"avx512_vnni", "avx_vnni"} & set(facts.get("flags", "").split()) else "without VNNI"
    named = facts.get("model name", platform.machine())
    return f"{named}, family {facts.get('cpu family', '?')} model {facts.get('model', '?')}, {vnni}"


@torch.no_grad()
def encode_all(backbone: Backbone, images: torch.Tensor, form: str) -> torch.Tensor:
    """Features of all images, float32 [n, D]."""
    encode: Any = backbone
    with tempfile.TemporaryDirectory() as folder:
        if form != "torch":
            path = Path(folder) / "encoder.onnx"
            write_encoder(EncoderGraph(prepare_backbone(backbone, None, None)), path, ExportConfig(dtype=form))
            graph = Graph(path, threads=torch.get_num_threads())
            encode = lambda x: torch.from_numpy(graph.run({"pixel_values": x.numpy()})["embeddings"].numpy())  # noqa: E731
        parts = images.split(8)
        size = backbone.image_size
        return torch.cat([encode(normalize(to_uint8(p, size), backbone.mean, backbone.std)) for p in parts])


if __name__ == "__main__":
    main()
