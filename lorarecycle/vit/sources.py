"""Where a Vision Transformer comes from: timm, the Hub, a local checkpoint, the package itself, or a module."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.processor import read_channels
from ..runtime.files import load_tensors, naming, read_json, read_object
from ..runtime.hub import find_folder
from .support import require_plain_vit

CLASSIFIER_KEYS = ("head.", "head_dist.", "aux_head.", "classifier.", "fc.")


def find_vit(
    base: str | PathLike[str] | nn.Module, weights: str | PathLike[str] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The module, and `name`, `mean`, `std`, `resize`, `crop_pct`, `family` as far as its source tells them; arguments
    as in `Backbone.load`."""
    if isinstance(base, nn.Module):
        return _given_vit(base, weights)
    path = Path(base).expanduser()
    if weights is not None and (base == "demo" or path.is_dir() or path.suffix == ".safetensors"):
        raise ValueError(
            f"`weights` must come with a `base` that names an architecture, got {str(base)!r}, which has its "
            "own weights; pass a timm name or a Hub id as `base`, or leave `weights` out."
        )
    if base == "demo":
        return _demo_vit()
    if path.is_dir():
        return _folder_vit(path, str(base))
    if path.suffix == ".safetensors":
        _, meta = load_tensors(path)
        if "architecture" not in meta:
            raise ValueError(
                f"`base` file {path} must name its timm `architecture` in its metadata, got none; pass the "
                "architecture as `base` and the file as `weights`."
            )
        return _timm_vit(meta["architecture"], path)
    if "/" in str(base):
        folder = find_folder(base, ("*.json", "*.safetensors"), what="a Vision Transformer", argument="base")
        return _folder_vit(folder, str(base), weights)
    return _timm_vit(str(base), weights)


def _given_vit(base: nn.Module, weights: str | PathLike[str] | None) -> tuple[nn.Module, dict[str, Any]]:
    """A module of timm as it is, one of transformers as timm's; with other weights where they are given."""
    facts: dict[str, Any] = {"name": type(base).__name__}
    if type(base).__module__.startswith("peft.") or hasattr(base, "peft_config"):
        raise TypeError(
            "`base` must be a model without adapters, got one with PEFT's; give what `model.unload()` returns."
        )
    config = getattr(base, "config", None)
    if type(base).__module__.startswith("transformers.") and hasattr(config, "to_dict"):
        from .checkpoint_facts import DEFAULTS, find_facts
        from .checkpoints import build_vit, find_family

        tensors = base.state_dict()
        found = find_facts(config.to_dict(), Path("the config of the model"))  # type: ignore[union-attr]
        family = find_family(tensors)
        own = {**DEFAULTS[family], **found}
        base = build_vit(tensors, found)
        facts |= {key: own[key] for key in ("mean", "std", "resize", "crop_pct") if own.get(key)} | {"family": family}
    else:
        facts["name"] = (getattr(base, "pretrained_cfg", None) or {}).get("architecture") or facts["name"]
    require_plain_vit(base)
    if weights is not None:
        _fill(base, load_tensors(Path(weights).expanduser())[0], str(weights))
    return base, facts


def _timm_vit(
    name: str, weights: str | PathLike[str] | None, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    import timm
    import torch

    from . import lvvit  # noqa: F401  # registers its model with timm

    if not timm.is_model(name):
        raise ValueError(
            f"`base` must be a timm model name, a Hub id, a folder, a safetensors file or 'demo', got {name!r}; "
            "`timm.list_models('vit*')` lists the names."
        )
    options = {"num_classes": 0, **(arguments or {})}
    with torch.device("meta"):  # no weights are fetched for what is no ViT
        require_plain_vit(timm.create_model(name, pretrained=False, **options))
    if weights is None:
        try:
            return timm.create_model(name, pretrained=True, **options, **_released(name)), {"name": name}
        except Exception as error:
            raise ValueError(
                f"`base` {name!r} needs its pre-trained weights, which could not be fetched ({error}); pass a local "
                "safetensors file as `weights`."
            ) from error
    path = Path(weights).expanduser()
    tensors, meta = load_tensors(path)
    vit = timm.create_model(name, pretrained=False, **options)
    _fill(vit, tensors, str(weights))
    return vit, {"name": name, **_preparation(meta, path)}


def _released(name: str) -> dict[str, Any]:
    """What tells timm to read the released weights from a file that was fetched here: safetensors only, one try.

    timm itself asks for a pickle where it finds no safetensors, and tries for a minute without a network.
    """
    from timm.models import get_pretrained_cfg

    hub_id = getattr(get_pretrained_cfg(name, allow_unregistered=True), "hf_hub_id", None)
    if not hub_id:
        return {}
    folder = find_folder(hub_id, ("model.safetensors",), what="a Vision Transformer", argument="base")
    file = folder / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{hub_id} has no model.safetensors")
    return {"pretrained_cfg_overlay": {"file": str(file), "custom_load": False}}


def _demo_vit() -> tuple[nn.Module, dict[str, Any]]:
    """The small ViT that comes with the package; demo_vit.json beside it says how it was made."""
    from timm.models.vision_transformer import VisionTransformer

    with resources.as_file(resources.files("lorarecycle.vit.assets")) as folder:
        record = read_json(folder / "demo_vit.json")
        vit = VisionTransformer(**record["architecture"])
        _fill(vit, load_tensors(folder / "demo_vit.safetensors")[0], "the demo model")
    return vit, {"name": "demo", "mean": tuple(record["mean"]), "std": tuple(record["std"])}


def _folder_vit(
    folder: Path, name: str, weights: str | PathLike[str] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """A checkpoint of transformers or of timm, whose config.json tells which."""
    from .checkpoints import find_family, load_vit

    path = folder / "config.json"
    content = read_object(path) if path.is_file() else {}
    if "architecture" in content:
        return _timm_folder(folder, name, content, weights)
    vit, facts = load_vit(folder)
    found = {key: facts[key] for key in ("mean", "std", "resize", "crop_pct", "family") if facts.get(key)}  # type: ignore[literal-required]
    if weights is not None:
        tensors = load_tensors(Path(weights).expanduser())[0]
        find_family(tensors)
        _fill(vit, tensors, str(weights))
    return vit, {"name": name, **found}


def _timm_folder(
    folder: Path, name: str, content: Mapping[str, Any], weights: str | PathLike[str] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """What timm's `save_for_hf` writes, and snapshots of its repositories hold."""
    path = folder / "config.json"
    arguments, config = content.get("model_args") or {}, content.get("pretrained_cfg") or {}
    for key, value in (("model_args", arguments), ("pretrained_cfg", config)):
        if not isinstance(value, dict):
            raise ValueError(f"`{key}` in {path} must be a JSON object, got {type(value).__name__}; fetch it again.")
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    if content.get("global_pool") and "global_pool" not in arguments:
        arguments["global_pool"] = content["global_pool"]
    if not (weights or (folder / "model.safetensors").is_file()):
        pickles = sorted(found.name for found in folder.glob("pytorch_model*.bin"))
        raise FileNotFoundError(
            f"{folder} must hold model.safetensors, got {f'only the pickle file {pickles[0]}' if pickles else 'none'}; "
            "fetch it again, or write it with `timm.models.save_for_hf(model, folder, safe_serialization=True)`."
        )
    try:
        vit, facts = _timm_vit(str(content["architecture"]), weights or folder / "model.safetensors", arguments)
    except (ImportError, MemoryError, FileNotFoundError):
        raise
    except (ValueError, OSError) as error:
        if str(folder) in str(error) or (weights and str(weights) in str(error)):
            raise
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # whatever a model's class makes of `model_args`
        raise ValueError(
            f"`architecture` and `model_args` in {path} must make a timm model, got {type(error).__name__}: "
            f"{str(error)[:200]}; fetch it again."
        ) from error
    own = {key: read_channels(config[key], key, path) for key in ("mean", "std") if config.get(key) is not None}
    if isinstance(config.get("crop_pct"), (int, float)):
        own["crop_pct"] = config["crop_pct"]
    if config.get("crop_mode") in ("squash", "center"):
        own["resize"] = "squash" if config["crop_mode"] == "squash" else "crop"  # type: ignore[assignment]
    return vit, {**own, **facts, "name": name}


def _fill(vit: Any, tensors: dict[str, Tensor], source: str) -> None:
    """Load weights under timm's or transformers' keys; position embeddings are resampled, classifiers left out."""
    from timm.layers import resample_abs_pos_embed

    from .checkpoints import convert_state_dict, require_floats

    own = set(vit.state_dict())
    with naming(source):
        tensors = convert_state_dict(tensors)
        tensors = {k: v for k, v in tensors.items() if k in own or not k.startswith(CLASSIFIER_KEYS)}
        require_floats({k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")})
    state = {k: v.float() for k, v in tensors.items()}
    positions = state.get("pos_embed")
    if positions is not None and vit.pos_embed is not None and positions.shape[1] != vit.pos_embed.shape[1]:
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        state["pos_embed"] = resample_abs_pos_embed(
            positions, new_size=list(vit.patch_embed.grid_size), num_prefix_tokens=prefix
        )
    try:
        vit.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"weights from {source} must fit the architecture: {str(error)[:600]}; choose the one they are for."
        ) from error


def _preparation(meta: Mapping[str, str], path: Path) -> dict[str, Any]:
    """`mean` and `std` in a file's metadata, numbers parted by commas; `resize` and `crop_pct`."""
    found: dict[str, Any] = {}
    for key in ("mean", "std", "crop_pct"):
        if key not in meta:
            continue
        try:
            numbers = [float(number) for number in meta[key].strip("[]").split(",")]
        except ValueError as error:
            raise ValueError(f"`{key}` in the metadata of {path} must be numbers, got {meta[key][:60]!r}.") from error
        found[key] = numbers[0] if key == "crop_pct" else read_channels(numbers, key, path)
    if "resize" in meta:
        found["resize"] = meta["resize"].strip('"')
    return found
