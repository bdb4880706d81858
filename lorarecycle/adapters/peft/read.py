"""Reading PEFT adapter directories, those of transformers and of timm models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from ...runtime.files import naming
from ...runtime.settled import read_settled
from ..algebra import split_factors, stack_factors
from ..value import AnyValue, Head, LoRAFactors
from .config import CONFIG_FILE, AdapterConfig
from .head import HEAD_FILES, find_head, model_width
from .keys import WEIGHTS_FILE, FoundKeys, sort_keys
from .metadata import METADATA_FILE, Metadata
from .names import PARTS, find_layer

logger: logging.Logger = logging.getLogger(__name__)

FILES = (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, *HEAD_FILES, "config.json", "preprocessor_config.json")
"""What is fetched of a Hub id."""


def read_peft(
    folder: Path,
    kind: type[AnyValue],
    *,
    name: str,
    head: Head | str | PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> AnyValue:
    """Read a PEFT adapter; see `Adapter.from_pretrained`.

    What is left out stands in the result's `notes`, and in one line of the log.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        kind: class of the result.
        name: of the adapter, where its own files do not name it.
        head, class_names: in place of those in the files.

    Raises:
        TornFolderError: files that were not saved together.
    """
    return read_settled(folder, FILES, lambda: _read(folder, kind, name, head, class_names))


def _read(
    folder: Path,
    kind: type[AnyValue],
    name: str,
    head: Head | str | PathLike[str] | None,
    class_names: Sequence[str] | None,
) -> AnyValue:
    config = AdapterConfig(folder / CONFIG_FILE)
    metadata = Metadata.read(folder)
    keys = sort_keys(folder, config, skip=() if head is None else HEAD_FILES)
    factors = _site_factors(keys, config, metadata)
    name = metadata.name or name
    preparation = metadata.preparation(folder)
    found = find_head(folder, keys, config, metadata, model_width(factors), head=head)
    if class_names is not None:
        if found is None:
            raise ValueError(f"`class_names` must come with a head, and {name!r} has none; give `head=` too.")
        found = replace(found, class_names=tuple(class_names))
    if keys.notes:
        logger.warning("%s: %s.", keys.path, "; ".join(keys.notes))
    with naming(keys.path):
        return kind(
            factors,
            head=found,
            base_model=metadata.base_model or config.base_model,
            mean=preparation.mean,
            std=preparation.std,
            name=name,
            base_class=metadata.base_class or config.base_class,
            resize=preparation.resize,
            notes=keys.notes,
        )


def _site_factors(keys: FoundKeys, config: AdapterConfig, metadata: Metadata) -> dict[str, LoRAFactors]:
    """Site -> factors, a qkv layer split and the halves of a SwiGLU layer put together."""
    layers: dict[tuple[int, str], LoRAFactors] = {}
    for module, (lora_A, lora_B) in keys.pairs.items():
        layer = find_layer(module)
        assert layer is not None, "sort_keys lets no other module through"
        r, name = lora_A.shape[0], keys.names[module]
        if config.sizes.rank(name) != r:
            logger.warning(
                "%s gives %s rank %d, its tensors have rank %d; the tensors count.",
                config.path, module, config.sizes.rank(name), r,
            )  # fmt: skip
        if (layer.block, layer.name) in layers:
            raise ValueError(
                f"each site in {keys.path} must come once, got {layer.name} of block {layer.block} twice "
                f"(again as {module!r}); it holds several models' adapters: save them apart."
            )
        layers[layer.block, layer.name] = LoRAFactors(lora_A, lora_B, config.sizes.scaling(name, r))
    factors = {}
    for (block, name), pair in layers.items():
        if name == "attn.qkv":
            columns = metadata.columns(f"blocks.{block}.{name}", PARTS[name])
            try:
                parts = split_factors(pair, 3, columns)
            except ValueError as error:
                raise ValueError(f"{keys.path}, qkv of block {block}: {error}") from error
            for site, part in zip(PARTS[name], parts, strict=True):
                if part is not None:  # a copy: not a view that keeps the whole layer's factors
                    own = LoRAFactors(part.lora_A.clone(), part.lora_B.clone(), part.scaling)
                    factors[f"blocks.{block}.{site}"] = own
        elif name in PARTS["mlp.fc1"]:
            halves = [layers.get((block, half)) for half in PARTS["mlp.fc1"]]
            factors[f"blocks.{block}.mlp.fc1"] = stack_factors(halves)[0]
        else:
            factors[f"blocks.{block}.{name}"] = pair
    return factors
