"""ICM-LoRA: adapters from task vectors, and the methods it is compared with, in one interface."""

from __future__ import annotations

from os import PathLike

from .cond_pdiff import CondPDiff
from .config import DiffusionConfig, GenerateConfig, NearestConfig, SoupConfig
from .generator import Generator, read_file
from .icm_lora import LoRAGenerator
from .nearest import NearestTask
from .parameters import PeftAdapter, load_adapter
from .soup import ModelSoup
from .task_vectors import clip_encoder, load_vector, save_vector, task_vector, text_vector

__all__ = [
    "CondPDiff",
    "DiffusionConfig",
    "GenerateConfig",
    "Generator",
    "LoRAGenerator",
    "ModelSoup",
    "NearestConfig",
    "NearestTask",
    "PeftAdapter",
    "SoupConfig",
    "clip_encoder",
    "load_adapter",
    "load_generator",
    "load_vector",
    "save_vector",
    "task_vector",
    "text_vector",
]

METHODS: tuple[type[Generator], ...] = (LoRAGenerator, ModelSoup, CondPDiff, NearestTask)


def load_generator(path: str | PathLike[str]) -> Generator:
    """A saved generator of whatever method; see `Generator.load`."""
    found = read_file(path)[1].get("method")
    for method in METHODS:
        if method.method == found:
            return method.load(path)
    raise ValueError(f"{path} must hold a generator of {[m.method for m in METHODS]}, got method {found!r}.")
