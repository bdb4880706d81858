"""Writing PEFT adapter directories, under timm's names or those of transformers."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch

from ...runtime.files import require_place, save_tensors, write_json, write_text
from ...runtime.folders import atomic_folder
from ...runtime.version import __version__
from ..algebra import Columns, stack_factors
from ..value import AdapterValue, LoRAFactors
from .card import OWN_TAG, write_card
from .config import CONFIG_FILE, make_config
from .head import HEAD_FILES, model_width, place_head
from .keys import PREFIX, WEIGHTS_FILE
from .metadata import METADATA_FILE, Metadata
from .names import PARTS, Names, find_names, require_layout
from .seal import SEAL, make_seal

logger: logging.Logger = logging.getLogger(__name__)

CARD = "README.md"
OWN_HEAD_FILES = HEAD_FILES[:1]
"""Where a head goes that the layout's classifier cannot hold."""


def write_peft(
    adapter: AdapterValue,
    directory: str | PathLike[str],
    *,
    layout: str = "timm",
    config: Mapping[str, object] | None = None,
    sources: Sequence[AdapterValue] = (),
) -> Path:
    """Write a PEFT directory; see `Adapter.save`.

    Without a head the names are those of the headless model, with one (or in a layout such as "vit-classifier") those
    of the image classifier. PEFT finds nothing to adapt where names are of another class, and only warns. A head
    that the classifier cannot hold (it reads another feature) goes into head.safetensors beside the adapter.

    Raises:
        ValueError: unknown layout, or factors that the layout has no place for.
        OSError: writing failed; earlier files in `directory` are whole.
    """
    require_layout(layout)
    placed = place_head(adapter.head, layout, model_width(adapter.factors))
    names = find_names(layout, classifier=bool(placed.inside))
    modules, columns = _modules(adapter, names)
    tensors = {}
    for module, pair in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.lora_A.clone()  # parts may share memory
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.lora_B.clone()
    tensors |= {f"{PREFIX}{names.head}.{key}": value.clone() for key, value in placed.inside.items()}
    peft_config = make_config(
        modules,
        base_model=adapter.base_model,
        model_class=names.model_class,
        library=names.library,
        modules_to_save=[names.head] if placed.inside else None,
    )
    metadata = Metadata.of(adapter, layout=layout, columns=columns, head_file=placed.beside_file, sources=sources)
    card = write_card(
        adapter,
        layout=layout,
        model_class=names.model_class,
        versions=_versions(),
        config=config,
        sources=sources,
    )

    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`directory` must be a directory or new, got the file {directory}.")
    require_place(directory, "directory", folder=True)

    readme = directory / CARD
    foreign = readme.is_file() and f"\n- {OWN_TAG}\n" not in readme.read_text(encoding="utf-8", errors="replace")
    if foreign:
        logger.warning("%s is left as it is: it is no model card of lorarecycle", readme)

    def stale() -> list[str]:
        """The head's file of the adapter that is there when this one is put in its place."""
        earlier = _head_file(directory)
        return [earlier] if earlier else []

    with atomic_folder(directory, first=WEIGHTS_FILE, last=(METADATA_FILE, CONFIG_FILE), stale=stale) as folder:
        if placed.beside_file:
            save_tensors(folder / placed.beside_file, placed.beside, placed.beside_metadata)
        write_json(folder / CONFIG_FILE, peft_config)
        write_json(folder / METADATA_FILE, metadata.content)
        seal = make_seal(folder, [file.name for file in folder.iterdir()], tensors)
        save_tensors(folder / WEIGHTS_FILE, tensors, {SEAL: seal}, digests=False)
        if not foreign:
            write_text(folder / CARD, card)
    return directory


def _modules(adapter: AdapterValue, names: Names) -> tuple[dict[str, LoRAFactors], dict[str, dict[str, Columns]]]:
    """Module name -> factors, and for each qkv module the columns of its parts."""
    modules: dict[str, LoRAFactors] = {}
    columns: dict[str, dict[str, Columns]] = {}
    qkv: dict[str, list[LoRAFactors | None]] = defaultdict(lambda: [None, None, None])
    for site, pair in adapter.factors.items():
        _, block, layer = site.split(".", 2)
        if layer in PARTS["attn.qkv"] and "attn.qkv" in names.modules:
            qkv[block][PARTS["attn.qkv"].index(layer)] = pair
            modules.setdefault(names.modules["attn.qkv"].format(block), pair)  # holds the place in model order
        else:
            _require_plain_mlp(adapter, block, layer, names)
            modules[names.modules[layer].format(block)] = pair
    for block, parts in qkv.items():
        module = names.modules["attn.qkv"].format(block)
        modules[module], own = stack_factors(parts)
        columns[f"blocks.{block}.attn.qkv"] = dict(zip(PARTS["attn.qkv"], own, strict=True))
    return modules, columns


def _require_plain_mlp(adapter: AdapterValue, block: str, layer: str, names: Names) -> None:
    """Refuse a packed SwiGLU fc1 (twice as wide as fc2 reads) under transformers' separate names."""
    if layer != "mlp.fc1" or "attn.qkv" in names.modules:
        return
    fc2 = adapter.factors.get(f"blocks.{block}.mlp.fc2")
    rows = adapter.factors[f"blocks.{block}.mlp.fc1"].lora_B.shape[0]
    if fc2 is not None and fc2.lora_A.shape[1] != rows:
        raise ValueError(
            f"`layout` must be 'timm' for an adapter of a SwiGLU MLP, got fc1 with {rows} rows before fc2 "
            f"with {fc2.lora_A.shape[1]} columns in block {block}; save with layout='timm'."
        )


def _versions() -> dict[str, str]:
    import safetensors

    return {
        "lorarecycle": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "PEFT LoRA format": "adapter_config.json + adapter_model.safetensors",
    }


def _head_file(directory: Path) -> str | None:
    """The head's own file of the adapter that is in a directory, if an earlier save put one there."""
    try:
        return Metadata.read(directory).head_file
    except ValueError:  # a damaged one is about to be replaced
        return None
