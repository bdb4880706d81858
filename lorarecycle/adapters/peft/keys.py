"""The keys of adapter_model.safetensors: factor pairs, a head, what is left out, and nothing that is not understood."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...runtime.files import load_tensors, refuse_pickles
from .config import AdapterConfig
from .names import find_layer, split_block, strip_wrappers
from .seal import check_seal

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
HEAD_NAMES = ("classifier", "head", "score")

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_HEAD = re.compile(
    rf"(?:.*\.)?(?P<name>{'|'.join(HEAD_NAMES)})(?:\.modules_to_save\.[^.]+|\.base_layer)?\.(?P<key>weight|bias)"
)
_TEXT = re.compile(
    r"(?:.*\.)?(?:text_model|text_projection|text_encoder|logit_scale|bert|roberta|distilbert|electra|deberta)(?:\..*)?"
)


class FactorKey(NamedTuple):
    """What the key of a LoRA factor says."""

    module: str
    """module name, without PEFT's own prefix and other wrappers"""
    side: str
    """"A" or "B\""""
    adapter: str | None
    """the adapter's name inside PEFT's model, where the key holds one"""


class FoundKeys(NamedTuple):
    """What an adapter's file holds."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    """module name (without wrappers) -> lora_A [r, in], lora_B [out, r]"""
    heads: dict[str, dict[str, Tensor]]
    """"classifier", "head" or "score" -> weight and bias"""
    path: Path
    names: dict[str, str]
    """module name without wrappers -> the name that the file has, PEFT's own prefix removed"""
    notes: tuple[str, ...] = ()
    """what is left out, a line each"""


def find_factor(key: str) -> FactorKey | None:
    """The factor that a key of a PEFT file means; None for any other tensor (a head, a bias, an embedding's factor)."""
    match = _FACTOR.fullmatch(strip_wrappers(key))
    return None if match is None else FactorKey(match["module"], match["side"], match["adapter"])


def read_weights(folder: Path, *, skip: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a PEFT folder, whose seal is checked where it has one.

    Args:
        folder: the folder.
        skip: names of files beside that are not read, and need not belong to the weights.

    Raises:
        FileNotFoundError: no weights.
        ValueError: pickle files only, or a damaged file; as `TornFolderError`, files that were not saved together.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        refuse_pickles(folder, "adapter_model*.bin", "peft and call `save_pretrained(..., safe_serialization=True)`")
        raise FileNotFoundError(
            f"an adapter directory must hold {WEIGHTS_FILE}, got none in {folder}; fetch the adapter again, "
            "or save it with `safe_serialization=True`."
        )
    tensors, metadata = load_tensors(path)
    check_seal(path, tensors, metadata, skip=skip)
    return tensors


def sort_keys(folder: Path, config: AdapterConfig, *, skip: Collection[str] = ()) -> FoundKeys:
    """Read and sort the weights of an adapter.

    Left out, and counted in `notes`: factors of a text tower, and those on layers outside the blocks (pooler,
    projection, patch embedding). A head under LoRA is merged where its own weight is in the file, else left out.

    Args:
        folder, skip: as in `read_weights`.
        config: of the folder.

    Raises:
        FileNotFoundError: no weights.
        ValueError: pickle files only, damaged files, or keys that are no LoRA factors of a ViT's blocks; the
            message names the key and what to do.
    """
    path = folder / WEIGHTS_FILE
    tensors = read_weights(folder, skip=skip)
    if "Text" in config.model_class:
        raise ValueError(f"{path} must adapt a vision model, got one of {config.model_class}; use its vision half.")
    sides: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    adapters, text, unknown = set(), [], []
    for key, tensor in tensors.items():
        name = strip_wrappers(key)
        factor, head = find_factor(key), _HEAD.fullmatch(name)
        if _TEXT.fullmatch(name):
            text.append(name)
        elif factor:
            adapters.add(factor.adapter)
            pair = sides.setdefault(factor.module, {})
            if factor.side in pair and len(adapters) == 1:
                raise ValueError(
                    f"each factor in {path} must come once, got lora_{factor.side} of {factor.module!r} twice; it "
                    "holds several models' adapters: save them apart."
                )
            pair[factor.side] = tensor
            original = _FACTOR.fullmatch(key.removeprefix(PREFIX))
            names[factor.module] = factor.module if original is None else original["module"]
        elif head:
            heads.setdefault(head["name"], {})[head["key"]] = tensor
        elif ".original_module." not in name:
            unknown.append(name)
    _require_known(path, unknown)
    if len(adapters) > 1:
        raise _several(path, adapters)
    notes = [f"{len(text)} tensors of the text tower are left out; only the vision model counts"] if text else []
    pairs = {module: _pair(path, module, side) for module, side in sides.items()}
    outside = {module: pairs.pop(module) for module in list(pairs) if find_layer(module) is None}
    if not pairs:
        found = (
            f"only LoRA on {', '.join(sorted(outside)[:3])}" if outside else f"none among its {len(tensors)} tensors"
        )
        raise ValueError(
            f"{path} must hold LoRA factors (lora_A, lora_B) of a ViT's blocks, got {found}; give the directory of "
            "a LoRA adapter of q, k, v, attention output, fc1 or fc2."
        )
    notes += _place_outside(outside, heads, config)
    return FoundKeys(pairs, heads, path, names, tuple(notes))


def _place_outside(
    outside: Mapping[str, tuple[Tensor, Tensor]], heads: dict[str, dict[str, Tensor]], config: AdapterConfig
) -> list[str]:
    """Merge LoRA on heads whose weight is known, in place; notes on what is left out."""
    notes, others = [], []
    for module, (lora_A, lora_B) in outside.items():
        name = module.rpartition(".")[2]
        weight = heads.get(name, {}).get("weight")
        if name not in HEAD_NAMES:
            others.append(module)
        elif weight is not None and tuple(weight.shape) == (lora_B.shape[0], lora_A.shape[1]):
            scaling = config.sizes.scaling(module, lora_A.shape[0])
            heads[name]["weight"] = weight.float() + scaling * (lora_B.float() @ lora_A.float())
        else:
            heads.pop(name, None)
            notes.append(
                f"the head is left out: {module!r} is under LoRA and its own weight is not in the file; give the "
                "merged head as `head=`, or load the PEFT model and use `Adapter.from_peft`"
            )
    if others:
        shown = ", ".join(sorted(others)[:5]) + (", ..." if len(others) > 5 else "")
        notes.append(f"LoRA outside the blocks is left out, {len(others)} of {len(outside)}: {shown}")
    return notes


def _several(path: Path, adapters: set[str | None]) -> ValueError:
    return ValueError(f"{path} must hold one adapter, got {sorted(map(str, adapters))}; save them apart.")


def _require_known(path: Path, unknown: list[str]) -> None:
    if not unknown:
        return
    name = unknown[0]
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    if "lora_magnitude_vector" in name:
        what = "a magnitude vector of DoRA"
        advice = "merge it into its base (`merge_and_unload`) or tune again with use_dora=False"
    elif ".lora_embedding_" in name:
        what = "LoRA on an embedding"
        advice = "tune again with target_modules that name linear layers of the blocks"
    elif ".lora_B" in name and name.endswith("bias"):
        what = "a bias of lora_B"
        advice = "tune again with lora_bias=False"
    elif "cls_classifier" in name or "distillation_classifier" in name or "head_dist" in name:
        what = "two heads of a distilled model"
        advice = "tune DeiTForImageClassification, which has one head"
    else:
        what = "a tensor that is neither a LoRA factor nor a linear head"
        advice = "beside the factors only a head (classifier, head, score) may be saved; tune without it"
    raise ValueError(f"{path} must hold LoRA factors of the blocks and a head, got {what}: {name!r}{more}; {advice}.")


def _pair(path: Path, module: str, sides: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if find_layer(module) is None and split_block(module) is not None:
        raise ValueError(
            f"{path} must adapt q, k, v, attention output, fc1 or fc2 of a ViT's blocks, got LoRA on "
            f"{module!r}, which a plain ViT's blocks do not have; choose an adapter of a plain ViT, or tune again with "
            "target_modules that name those layers only."
        )
    if set(sides) != {"A", "B"}:
        (side,) = sides
        missing = "B" if side == "A" else "A"
        raise ValueError(
            f"{path} must hold lora_A and lora_B of each module, got {module!r} without lora_{missing}; save "
            "or fetch the adapter again."
        )
    lora_A, lora_B = sides["A"], sides["B"]
    if find_layer(module) is None and lora_A.ndim == lora_B.ndim == 4:  # a convolution, such as the patch embedding
        return lora_A, lora_B
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1] or not lora_A.shape[0]:
        raise ValueError(
            f"{path} must hold lora_A [r, in] and lora_B [out, r] of one rank, got {list(lora_A.shape)} and "
            f"{list(lora_B.shape)} at {module!r}; save or fetch the adapter again."
        )
    return lora_A, lora_B
