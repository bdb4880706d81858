"""adapter_config.json: which PEFT adapters are plain LoRA, and with what scaling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.files import read_object
from ..value import LoRAFactors
from .names import is_plain_vit
from .scaling import Sizes

CONFIG_FILE = "adapter_config.json"

_NOT_PLAIN = {
    "use_dora": "DoRA rescales whole rows of the weight, which no low-rank pair does; merge it into its base "
    "(`merge_and_unload`) or tune again with use_dora=False",
    "use_qalora": "QALoRA pools the inputs in groups; tune again with use_qalora=False",
    "use_bdlora": "BD-LoRA keeps block-diagonal factors; tune again with use_bdlora=None",
    "lora_bias": "a bias of lora_B changes more than the weight; tune again with lora_bias=False",
    "layer_replication": "the adapter belongs to a model with repeated blocks; tune on the plain model",
    "alora_invocation_tokens": "aLoRA switches on at chosen text tokens; tune again without it",
    "trainable_token_indices": "it also retrains token embeddings; tune again without it",
    "target_parameters": "it adapts bare parameters; tune again with target_modules",
    "arrow_config": "Arrow routes between several adapters; give those adapters one by one",
    "kasa_config": "KaSA also changes the base weights; tune again with plain LoRA",
    "monteclora_config": "MonteCLoRA samples its factors; tune again with plain LoRA",
}
"""Keys that make an adapter something else than plain LoRA, and what to do."""

# fmt: off
_HARMLESS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora", "velora_config",
))
# fmt: on
"""Keys that are read here, or that leave the update `scaling * B @ A` of the saved factors as it is.
`fan_in_fan_out` only says how the base stores its weight; PEFT itself resets it for linear layers."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Ways to start the factors that leave the base weights alone, beside True and False."""


def read_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json, of any kind of PEFT adapter.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"an adapter directory must hold {CONFIG_FILE}, got none in {path.parent}; give the "
            "directory that PEFT's `save_pretrained` wrote."
        )
    return read_object(path)


class AdapterConfig:
    """A checked adapter_config.json.

    Args:
        path: the file.

    Attributes:
        path, content: the file and what it holds.
        sizes: rank and scaling of each module.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not plain LoRA, or of another architecture than a plain ViT; the message names the
            reason and what to do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = read_config(path)
        self._require_plain_lora()
        self.sizes: Sizes = Sizes(self.content, path)

    @property
    def base_model(self) -> str:
        """Name of the base model; "" when unknown."""
        return str(self.content.get("base_model_name_or_path") or "")

    @property
    def model_class(self) -> str:
        """Class of the model it was tuned on; "" when unknown."""
        return str(self._mapping.get("base_model_class") or "")

    @property
    def base_class(self) -> str:
        """The same with its Python module, "transformers.models.vit.modeling_vit.ViTModel"; "" when unknown."""
        return ".".join(filter(None, (str(self._mapping.get("parent_library") or ""), self.model_class)))

    @property
    def _mapping(self) -> dict[str, Any]:
        mapping = self.content.get("auto_mapping") or {}
        if not isinstance(mapping, dict):
            raise ValueError(f"`auto_mapping` in {self.path} must be a JSON object, got {mapping!r}; save it again.")
        return mapping

    def _require_plain_lora(self) -> None:
        kind = self.content.get("peft_type")
        if kind != "LORA":
            raise ValueError(
                f"`peft_type` in {self.path} must be 'LORA', got {kind!r}; convert the adapter to LoRA "
                "(peft's `convert_to_lora` where it supports the type) or tune again with LoRA."
            )
        for key, advice in _NOT_PLAIN.items():
            if _is_set(self.content.get(key)):
                raise ValueError(f"`{key}` in {self.path} must be off, got {self.content[key]!r}: {advice}.")
        bias = self.content.get("bias") or "none"
        if bias != "none":
            raise ValueError(
                f"`bias` in {self.path} must be 'none', got {bias!r}: trained biases change more than the "
                "sites; tune again with bias='none'."
            )
        start = self.content.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in _PLAIN_INITS:
            raise ValueError(
                f"`init_lora_weights` in {self.path} must leave the base weights alone, got {start!r}; "
                "convert it to plain LoRA (`save_pretrained` with "
                "`path_initial_model_for_weight_conversion`)."
            )
        for key, value in self.content.items():
            if key not in _HARMLESS and _is_set(value):
                raise ValueError(
                    f"`{key}` in {self.path} must be off or known, got {str(value)[:80]}: no PEFT known here has it, "
                    "so it may change what the factors mean; remove the key if you know that it does not, else save "
                    "the adapter as plain LoRA."
                )
        if not is_plain_vit(self.base_class):
            raise ValueError(
                f"`auto_mapping` in {self.path} must name a plain ViT (ViT, DeiT, DINOv2, CLIP; timm's "
                f"VisionTransformer), got {self.base_class}, whose blocks are others; choose an adapter of one of "
                "those."
            )


def make_config(
    factors: Mapping[str, LoRAFactors],
    *,
    base_model: str,
    model_class: str,
    library: str,
    modules_to_save: list[str] | None,
) -> dict[str, Any]:
    """The content of adapter_config.json for these modules.

    The commonest rank and alpha become `r` and `lora_alpha`, the others go into `rank_pattern` and
    `alpha_pattern` under full module names, which every PEFT version matches.

    Args:
        factors: module name -> factors.
        base_model: "" when unknown.
        model_class, library: of the matching model.
        modules_to_save: module names of what is saved whole.
    """
    ranks = {module: pair.r for module, pair in factors.items()}
    alphas = {module: _alpha(pair) for module, pair in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "auto_mapping": {"base_model_class": model_class, "parent_library": library},
        "base_model_name_or_path": base_model or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "r": r,
        "revision": None,
        "target_modules": list(factors),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != lora_alpha},
    }


def _alpha(pair: LoRAFactors) -> float | int:
    """The alpha whose quotient by r is the scaling, to the last bit where a double can."""
    alpha = pair.scaling * pair.r
    nearby = (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((value for value in nearby if value / pair.r == pair.scaling), alpha)


def _is_set(value: object) -> bool:
    return not (value is None or value is False or value in ("", "none", [], {}))
