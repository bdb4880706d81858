"""The kinds of files that the fuzzer mutates: how good ones are made and read, and what counts of them."""

from __future__ import annotations

from good import BASE, Target, adapter, anything, digest, never, numbers
from good_adapters import (
    adapter_facts,
    finite_adapter,
    make_bare,
    make_clip_lora,
    make_lora_vit,
    make_peft,
    peft_legal,
    sealed_legal,
)
from good_data import (
    data_legal,
    export_legal,
    images_legal,
    make_export,
    make_images,
    make_npz,
    make_parquet,
    make_prototypes,
    make_tasks,
    prototypes_legal,
    read_both_prototypes,
    read_export,
    read_images,
    tasks_legal,
)
from good_models import base_facts, base_legal, experiment_facts, make_base, make_experiment, make_timm_base
from good_runs import (
    absent_checkpoint,
    checkpoint_facts,
    make_checkpoint,
    make_generator,
    make_run,
    make_surrogate,
    new_run,
    read_checkpoint,
    read_generators,
    read_run,
    read_surrogate,
    read_vector,
    surrogate_facts,
)

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.data.load import load_dataset
from lorarecycle.fewshot.tasks import Tasks
from lorarecycle.generate import PeftAdapter, save_vector
from lorarecycle.reproduce.experiment import load_experiment
from lorarecycle.vit.backbone import Backbone

TARGETS: dict[str, Target] = {
    "adapter": Target(lambda f: adapter().save(f), Adapter.load, adapter_facts, sealed_legal),
    "adapter of PEFT": Target(make_peft, Adapter.load, adapter_facts, peft_legal),
    "adapter of LoRA-ViT": Target(
        make_lora_vit, lambda f: Adapter.from_lora_vit(f / "lora.safetensors", BASE()), adapter_facts, finite_adapter
    ),
    "adapter of CLIP-LoRA": Target(
        make_clip_lora, lambda f: Adapter.from_clip_lora(f / "lora_weights.pt", BASE()), adapter_facts, finite_adapter
    ),
    "bare PEFT": Target(
        make_bare, PeftAdapter.load, lambda a: digest(*a.tensors.values(), sorted(a.tensors), a.config["r"]), never
    ),
    "surrogate": Target(make_surrogate, read_surrogate, surrogate_facts, never),
    "checkpoint": Target(make_checkpoint, read_checkpoint, checkpoint_facts, absent_checkpoint),
    "generator": Target(make_generator, read_generators, lambda s: [a.digest() for a in s], never),
    "task vector": Target(lambda f: save_vector(f / "v.safetensors", numbers(4)), read_vector, digest, never),
    "run": Target(make_run, read_run, repr, new_run),
    "prototypes": Target(
        make_prototypes, read_both_prototypes, lambda p: digest(*(x for pair in p for x in pair)), prototypes_legal
    ),
    "task list": Target(
        make_tasks, lambda f: Tasks.load(f / "t.npz"), lambda t: digest(t.classes, t.support, t.query), tasks_legal
    ),
    "npz": Target(
        make_npz,
        lambda f: load_dataset(f / "d.npz", "train"),
        lambda d: digest(d.images, d.labels, d.class_names),
        data_legal,
    ),
    "parquet": Target(
        make_parquet,
        lambda f: load_dataset(f, "train", quiet=True),
        lambda d: digest(d.images, d.labels, d.class_names),
        data_legal,
    ),
    "image": Target(make_images, read_images, lambda s: digest(*s), images_legal),
    "export": Target(make_export, read_export, lambda f: digest(f[0]), export_legal, "*"),
    "base of transformers": Target(make_base, Backbone.load, base_facts, base_legal),
    "base of timm": Target(make_timm_base, Backbone.load, base_facts, base_legal),
    "experiment": Target(make_experiment, lambda f: load_experiment(f / "mine.json"), experiment_facts, anything),
}
