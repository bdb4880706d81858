"""PEFT models in memory, read through the files that PEFT itself writes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ...runtime.files import load_tensors, save_tensors
from ..value import AnyValue, Head
from .keys import HEAD_NAMES, PREFIX, WEIGHTS_FILE
from .read import read_peft


def is_peft_model(value: object) -> bool:
    """Whether something is a PEFT model, or one of transformers that wears PEFT adapters; PEFT is not imported."""
    value = _unwrapped(value)
    return not isinstance(value, type) and bool(getattr(value, "peft_config", None)) and hasattr(value, "state_dict")


def adapter_names(model: Any) -> list[str]:
    """Names of the adapters of a PEFT model, in its order."""
    return list(_unwrapped(model).peft_config)


def read_model(
    model: Any,
    kind: type[AnyValue],
    *,
    adapter_name: str | None = None,
    name: str | None = None,
    head: Head | str | PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> AnyValue:
    """Read an adapter of a PEFT model; see `Adapter.from_peft`."""
    if not is_peft_model(model):
        raise TypeError(
            f"`model` must be a PEFT model, got {type(model).__name__}; make one with `peft.get_peft_model`, or load "
            "files with `Adapter.load`."
        )
    model = _unwrapped(model)
    names = adapter_names(model)
    chosen = adapter_name if adapter_name is not None else _active(model, names)
    if chosen not in names:
        raise ValueError(f"`adapter_name` must be one of {names}, the adapters of the model, got {chosen!r}.")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        _write(model, chosen, folder)
        _add_base_heads(model, folder)
        label = name or (chosen if chosen != "default" else "adapter")
        return read_peft(folder, kind, name=label, head=head, class_names=class_names)


def _write(model: Any, chosen: str, folder: Path) -> None:
    if type(model).__module__.startswith("peft."):
        model.save_pretrained(
            str(folder), safe_serialization=True, selected_adapters=[chosen], save_embedding_layers=False
        )
        written = folder / chosen if chosen != "default" else folder
    else:  # of transformers, which writes the active adapter only
        import peft

        tensors = peft.get_peft_model_state_dict(model, adapter_name=chosen, save_embedding_layers=False)
        folder.mkdir()
        model.peft_config[chosen].save_pretrained(str(folder))
        save_tensors(folder / WEIGHTS_FILE, {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()})
        return
    if written != folder:
        for file in written.iterdir():
            file.replace(folder / file.name)


def _add_base_heads(model: Any, folder: Path) -> None:
    """Put the weights of heads under LoRA beside their factors, with which they are merged."""
    path = folder / WEIGHTS_FILE
    tensors = load_tensors(path)[0]
    modules = dict(model.named_modules())
    added = {}
    for key in tensors:
        module = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
        if module.rpartition(".")[2] not in HEAD_NAMES or module + ".lora_A.weight" != key.removeprefix(PREFIX):
            continue
        base = getattr(modules.get(f"{PREFIX}{module}", modules.get(module)), "base_layer", None)
        for part in ("weight", "bias"):
            value = getattr(base, part, None)
            if value is not None:
                added[f"{PREFIX}{module}.base_layer.{part}"] = value
    if added:
        save_tensors(path, {**tensors, **added})


def _active(model: Any, names: list[str]) -> str:
    active = getattr(model, "active_adapter", None)
    active = active() if callable(active) else active
    active = active[0] if isinstance(active, list) and active else active
    return active if isinstance(active, str) else names[0]


def _unwrapped(model: Any) -> Any:
    """Without DDP and torch.compile."""
    for _ in range(4):
        inner = next(
            (
                own[key]
                for own in [getattr(model, "_modules", None) or {}]
                for key in ("_orig_mod", "module")
                if key in own
            ),
            None,
        )
        if inner is None or getattr(model, "__dict__", {}).get("peft_config"):
            return model
        model = inner
    return model
