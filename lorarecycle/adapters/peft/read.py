"""PEFT adapter directories: reading those of transformers and timm models, and writing them."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from ...runtime.files import save_tensors, write_json, write_text
from ...runtime.hub import find_folder
from ..adapter import Adapter, Head, LoRAFactors
from ..algebra import Columns, split_factors, stack_factors
from .card import write_card
from .config import CONFIG_FILE, AdapterConfig, make_config
from .head import HEAD_FILES, find_head, place_head
from .keys import PREFIX, WEIGHTS_FILE, FoundKeys, sort_keys
from .metadata import SIDE_FILE, SideFile
from .names import FUSED, LAYOUTS, Names, find_layer, timm_names, transformers_names

logger = logging.getLogger(__name__)

FILES = (CONFIG_FILE, WEIGHTS_FILE, SIDE_FILE, *HEAD_FILES, "config.json", "preprocessor_config.json")
"""What is fetched of a Hub id."""


def load_peft(
    source: str | PathLike[str],
    *,
    head: Head | str | PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Adapter:
    """Read a PEFT adapter; see `Adapter.load`."""
    folder = find_folder(source, FILES, what="a PEFT adapter")
    config = AdapterConfig(folder / CONFIG_FILE)
    side = SideFile.read(folder)
    keys = sort_keys(folder, config)
    factors = _site_factors(keys, config, side)
    name = side.name or (folder.resolve().name if Path(source).expanduser().is_dir() else str(source))
    mean, std = side.normalisation(folder)
    found = find_head(folder, keys, config, side, _width(factors), head=head)
    if class_names is not None:
        if found is None:
            raise ValueError(f"`class_names` must come with a head, and {name!r} has none; give `head=` too.")
        found = replace(found, class_names=tuple(class_names))
    return Adapter(
        factors,
        head=found,
        base_model=side.base_model or config.base_model,
        mean=mean,
        std=std,
        name=name,
    )


def save_peft(
    adapter: Adapter,
    directory: str | PathLike[str],
    *,
    layout: str = "timm",
    config: Mapping[str, object] | None = None,
    sources: Sequence[Adapter] = (),
) -> Path:
    """Write a PEFT directory; see `Adapter.save`.

    Without a head the names are those of the headless model, with one those of the image classifier. A head
    that the classifier cannot hold (it reads another feature) goes into head.safetensors beside the adapter.

    Raises:
        ValueError: unknown layout, or factors that the layout has no place for.
        OSError: writing failed; earlier files in `directory` are whole.
    """
    if layout != "timm" and layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {('timm', *LAYOUTS)}, got {layout!r}.")
    placed = place_head(adapter.head, layout, _width(adapter.factors))
    names = timm_names() if layout == "timm" else transformers_names(layout, classifier=bool(placed.inside))
    modules, fused = _modules(adapter, names)
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
    side = SideFile.of(adapter, layout=layout, fused=fused, head_file=placed.beside_file, sources=sources)
    card = write_card(
        adapter,
        layout=layout,
        model_class=names.model_class,
        versions=_versions(),
        config=config,
        sources=sources,
    )

    def write(folder: Path) -> None:
        save_tensors(folder / WEIGHTS_FILE, tensors)
        if placed.beside_file:
            save_tensors(folder / placed.beside_file, placed.beside, placed.beside_metadata)
        write_json(folder / CONFIG_FILE, peft_config)
        write_json(folder / SIDE_FILE, side.content)
        write_text(folder / "README.md", card)

    return _write_folder(Path(directory), write)


def _site_factors(keys: FoundKeys, config: AdapterConfig, side: SideFile) -> dict[str, LoRAFactors]:
    """Site -> factors, fused layers split and the halves of a SwiGLU layer put together."""
    layers: dict[tuple[int, str], LoRAFactors] = {}
    for module, (lora_A, lora_B) in keys.pairs.items():
        layer = find_layer(module)
        assert layer is not None, "sort_keys lets no other module through"
        r = lora_A.shape[0]
        if config.configured_rank(module) != r:
            logger.warning(
                "%s gives %s rank %d, its tensors have rank %d; the tensors count.",
                config.path, module, config.configured_rank(module), r,
            )  # fmt: skip
        if (layer.block, layer.name) in layers:
            raise ValueError(
                f"each site in {keys.path} must come once, got {layer.name} of block {layer.block} twice "
                f"(again as {module!r}); it holds several models' adapters: save them apart."
            )
        layers[layer.block, layer.name] = LoRAFactors(lora_A, lora_B, config.scaling(module, r))
    factors = {}
    for (block, name), pair in layers.items():
        if name == "attn.qkv":
            columns = side.columns(f"blocks.{block}.{name}", FUSED[name])
            try:
                parts = split_factors(pair, 3, columns)
            except ValueError as error:
                raise ValueError(f"{keys.path}, qkv of block {block}: {error}") from error
            for site, part in zip(FUSED[name], parts, strict=True):
                if part is not None:
                    factors[f"blocks.{block}.{site}"] = part
        elif name in FUSED["mlp.fc1"]:
            halves = [layers.get((block, half)) for half in FUSED["mlp.fc1"]]
            factors[f"blocks.{block}.mlp.fc1"] = stack_factors(halves)[0]
        else:
            factors[f"blocks.{block}.{name}"] = pair
    return factors


def _modules(adapter: Adapter, names: Names) -> tuple[dict[str, LoRAFactors], dict[str, dict[str, Columns]]]:
    """Module name -> factors, and for each fused module the columns of its parts."""
    modules: dict[str, LoRAFactors] = {}
    fused: dict[str, dict[str, Columns]] = {}
    qkv: dict[str, list[LoRAFactors | None]] = defaultdict(lambda: [None, None, None])
    for site, pair in adapter.factors.items():
        _, block, layer = site.split(".", 2)
        if layer in FUSED["attn.qkv"] and "attn.qkv" in names.modules:
            qkv[block][FUSED["attn.qkv"].index(layer)] = pair
            modules.setdefault(names.modules["attn.qkv"].format(block), pair)  # holds the place in model order
        else:
            _require_plain_mlp(adapter, block, layer, names)
            modules[names.modules[layer].format(block)] = pair
    for block, parts in qkv.items():
        module = names.modules["attn.qkv"].format(block)
        modules[module], columns = stack_factors(parts)
        fused[f"blocks.{block}.attn.qkv"] = dict(zip(FUSED["attn.qkv"], columns, strict=True))
    return modules, fused


def _require_plain_mlp(adapter: Adapter, block: str, layer: str, names: Names) -> None:
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


def _width(factors: Mapping[str, LoRAFactors]) -> int:
    """Width of the model: what q, k, v, proj and fc1 read and what fc2 writes."""
    site, pair = next(iter(factors.items()))
    return pair.lora_B.shape[0] if site.endswith("mlp.fc2") else pair.lora_A.shape[1]


def _versions() -> dict[str, str]:
    import safetensors

    from ...runtime.version import __version__

    return {
        "lorarecycle": __version__,
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
        "PEFT LoRA format": "adapter_config.json + adapter_model.safetensors",
    }


def _write_folder(directory: Path, write: Callable[[Path], None]) -> Path:
    """Run `write(folder)` on a new folder beside `directory`, then put its files in place.

    A directory that is not there yet appears in one step; in one that is, file after file is replaced.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`directory` must be a directory or new, got the file {directory}.")
    stale = _head_file(directory)
    parent, mark = directory.absolute().parent, f".{directory.name}.saving-"
    temporary = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(f"{glob.escape(mark)}*"):  # of a process that was killed here
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=mark))
        write(temporary)
        os.chmod(temporary, 0o755)
        if directory.is_dir():
            for path in sorted(temporary.iterdir()):
                os.replace(path, directory / path.name)
                stale = None if path.name == stale else stale
            if stale:  # the head of the adapter that was here before
                (directory / stale).unlink(missing_ok=True)
        else:
            os.rename(temporary, directory)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        reason = cause.strerror or cause
        raise OSError(error.errno, f"cannot write {directory}: {reason}; earlier files there are unchanged") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _head_file(directory: Path) -> str | None:
    """The head's own file of the adapter that is in a directory, if an earlier save put one there."""
    try:
        return SideFile.read(directory).head_file
    except ValueError:  # a damaged one is about to be replaced
        return None
