"""Where a Vision Transformer comes from: timm, the Hub, a local checkpoint, the package itself, or a module."""

from __future__ import annotations

from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..runtime.files import load_tensors, read_json
from ..runtime.hub import find_folder

CLASSIFIER_KEYS = ("head.", "head_dist.", "classifier.", "fc.")


def find_vit(
    base: str | PathLike[str] | nn.Module, weights: str | PathLike[str] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The module, and `name`, `mean`, `std` as far as its source tells them; arguments as in `Backbone.load`."""
    if isinstance(base, nn.Module):
        name = (getattr(base, "pretrained_cfg", None) or {}).get("architecture") or type(base).__name__
        if weights is not None:
            _fill(base, _read_weights(Path(weights)), str(weights))
        return base, {"name": name}
    path = Path(base)
    if weights is not None and (base == "demo" or path.is_dir() or path.suffix == ".safetensors"):
        raise ValueError(
            f"`weights` must come with a `base` that names an architecture, got {str(base)!r}, which has its "
            "own weights; pass a timm name or a Hub id as `base`, or leave `weights` out."
        )
    if base == "demo":
        return _demo_vit()
    if path.is_dir():
        return _transformers_vit(path, str(base))
    if path.suffix == ".safetensors":
        _, meta = load_tensors(path)
        if "architecture" not in meta:
            raise ValueError(
                f"`base` file {path} must name its timm `architecture` in its metadata, got none; pass the "
                "architecture as `base` and the file as `weights`."
            )
        vit, facts = _timm_vit(meta["architecture"], path)
        return vit, {**facts, **_normalisation(meta)}
    if "/" in str(base):
        return _hub_vit(str(base), weights)
    return _timm_vit(str(base), weights)


def _timm_vit(name: str, weights: str | PathLike[str] | None) -> tuple[nn.Module, dict[str, Any]]:
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"`base` must be a timm model name, a Hub id, a folder, a safetensors file or 'demo', got {name!r}; "
            "`timm.list_models('vit*')` lists the names."
        )
    if weights is None:
        try:
            return timm.create_model(name, pretrained=True, num_classes=0), {"name": name}
        except Exception as error:
            raise ValueError(
                f"`base` {name!r} needs its pre-trained weights, which could not be fetched ({error}); pass a local "
                "safetensors file as `weights`."
            ) from error
    tensors, meta = load_tensors(weights)
    vit = timm.create_model(name, pretrained=False, num_classes=0)
    _fill(vit, tensors, str(weights))
    return vit, {"name": name, **_normalisation(meta)}


def _demo_vit() -> tuple[nn.Module, dict[str, Any]]:
    """The small ViT that comes with the package; demo_vit.json beside it says how it was made."""
    from timm.models.vision_transformer import VisionTransformer

    with resources.as_file(resources.files("lorarecycle.vit.assets")) as folder:
        record = read_json(folder / "demo_vit.json")
        vit = VisionTransformer(**record["architecture"])
        _fill(vit, load_tensors(folder / "demo_vit.safetensors")[0], "the demo model")
    return vit, {"name": "demo", "mean": tuple(record["mean"]), "std": tuple(record["std"])}


def _hub_vit(name: str, weights: str | PathLike[str] | None) -> tuple[nn.Module, dict[str, Any]]:
    folder = find_folder(name, ("*.json", "*.safetensors"), what="a Vision Transformer", argument="base")
    facts = read_json(folder / "config.json")
    if "architecture" in facts:  # a timm repository
        vit, found = _timm_vit(facts["architecture"], weights or folder / "model.safetensors")
        return vit, {**found, "name": name}
    vit, found = _transformers_vit(folder, name)
    if weights is not None:
        _fill(vit, _read_weights(Path(weights)), str(weights))
    return vit, found


def _transformers_vit(folder: Path, name: str) -> tuple[nn.Module, dict[str, Any]]:
    from .checkpoints import load_vit

    vit, facts = load_vit(folder)
    return vit, {"name": name, **{key: tuple(facts[key]) for key in ("mean", "std") if facts.get(key)}}


def _read_weights(path: Path) -> dict[str, Tensor]:
    return load_tensors(path)[0]


def _fill(vit: Any, tensors: dict[str, Tensor], source: str) -> None:
    """Load weights under timm's or transformers' keys; position embeddings are resampled, classifiers left out."""
    from timm.layers import resample_abs_pos_embed

    from .checkpoints import convert_state_dict

    own = set(vit.state_dict())
    state = {
        k: v.float() for k, v in convert_state_dict(tensors).items() if k in own or not k.startswith(CLASSIFIER_KEYS)
    }
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


def _normalisation(meta: dict[str, str]) -> dict[str, Any]:
    """`mean` and `std` in a file's metadata, three numbers parted by commas."""
    return {k: tuple(float(v) for v in meta[k].split(",")) for k in ("mean", "std") if k in meta}
