"""Adapters of every format, and what may be read of a changed one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from good import BASE, D, adapter, normalisation, numbers
from safetensors import safe_open
from safetensors.torch import save_file

from lorarecycle.adapters.adapter import Adapter
from lorarecycle.generate import PeftAdapter
from lorarecycle.runtime.files import load_tensors


def adapter_facts(found: Adapter) -> Any:
    """Names may be changed by hand, numbers may not."""
    return found.weights_digest(), found.mean, found.std, found.resize


def sealed_legal(folder: Path, found: Adapter) -> None:
    """PEFT's two files may be copied without lorarecycle.json, which holds normalisation and pool."""
    assert not (folder / "lorarecycle.json").is_file(), "changed files of a sealed folder were read"
    for site in adapter().sites:
        assert torch.allclose(found.delta(site), adapter().delta(site), atol=1e-5), f"another update at {site}"


def make_peft(folder: Path) -> None:
    """As PEFT writes it: no seal, a config with patterns, the base's labels and processor beside."""
    adapter(pool="token").save(folder, layout="vit-classifier")
    weights = folder / "adapter_model.safetensors"
    tensors = load_tensors(weights)[0]
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "lorarecycle.json").unlink()
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": 2, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {r"layers?\.1.*": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "rescale_factor": 1 / 255}))


def peft_legal(folder: Path, found: Adapter) -> None:
    """Factors are the file's tensors, scalings what PEFT's own rule gives for the configuration."""
    from peft.utils.other import get_pattern_key

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        there = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8-sig"))
    alphas = content.get("alpha_pattern") or {}
    alpha = 8 if content.get("lora_alpha") is None else content["lora_alpha"]
    for site, pair in found.factors.items():
        keys = [
            key for key, value in there.items() if value.shape == pair.lora_A.shape and torch.equal(value, pair.lora_A)
        ]
        assert keys, f"lora_A of {site} is not in the file"
        assert any(torch.equal(value, pair.lora_B) for value in there.values()), f"lora_B of {site} is not in the file"
        modules = [key.removeprefix("base_model.model.").split(".lora_A")[0] for key in keys]
        r = len(pair.lora_A)
        expected = {alphas.get(get_pattern_key(list(alphas), module), alpha) for module in modules}
        expected = {a / (math.sqrt(r) if content.get("use_rslora") else r) for a in expected}
        assert pair.scaling in expected, f"scaling of {site} is {pair.scaling}, PEFT's rule gives {expected}"
    normalisation(found.mean, found.std)
    if found.head is not None:
        assert found.head.bias is not None
        assert torch.isfinite(found.head.weight).all()
        assert found.head.weight.shape == (len(found.head.class_names), D)
        assert found.head.bias.shape == (len(found.head.class_names),)


def make_lora_vit(folder: Path) -> None:
    """LoRA-ViT's names."""
    tensors = {
        f"w_{side}_{k:03d}": numbers(*((2, D) if side == "a" else (D, 2)), seed=k) for k in range(4) for side in "ab"
    }
    save_file({**tensors, f"fc_{D}in_3out": numbers(3, D)}, folder / "lora.safetensors")


def make_clip_lora(folder: Path) -> None:
    """CLIP-LoRA's file, a pickle of tensors."""
    layer = {"q_proj": {"w_lora_A": numbers(2, D), "w_lora_B": numbers(D, 2)}}
    facts = {"r": 2, "alpha": 1, "encoder": "vision", "position": "all", "params": ["q"]}
    torch.save({"weights": {"layer_0": layer, "layer_1": layer}, "metadata": facts}, folder / "lora_weights.pt")


def finite_adapter(_: Path, found: Adapter) -> None:
    """Numbers of a file that carries no digest may be any; they are finite and fit the base."""
    for site, pair in found.factors.items():
        assert (pair.lora_B.shape[0], pair.lora_A.shape[1]) == BASE().site_shape(site)
        assert torch.isfinite(pair.lora_A).all()
        assert torch.isfinite(pair.lora_B).all()
        assert math.isfinite(pair.scaling)


def make_bare(folder: Path) -> None:
    """A language model's adapter."""
    tensors = {f"base_model.model.layers.{i}.x.lora_{s}.weight": numbers(2, 4, seed=i) for i in range(2) for s in "A"}
    PeftAdapter(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["x"]}).save(folder)
