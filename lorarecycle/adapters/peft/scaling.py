"""The rank and the scaling that a PEFT configuration gives each module: the one place that knows PEFT's rules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


class Sizes:
    """Ranks and scalings by module name, checked.

    Args:
        config: content of adapter_config.json.
        where: what holds it, for messages.

    Raises:
        ValueError: `r`, `lora_alpha`, `rank_pattern` or `alpha_pattern` of the wrong kind.
    """

    def __init__(self, config: Mapping[str, Any], where: object) -> None:
        self._r, self._alpha = (_number(config, key, where) for key in ("r", "lora_alpha"))
        self._ranks, self._alphas = (_pattern(config, key, where) for key in ("rank_pattern", "alpha_pattern"))
        self._rank_stabilised = bool(config.get("use_rslora"))

    def scaling(self, module: str, r: int) -> float:
        """`alpha / r` or, with use_rslora, `alpha / sqrt(r)`, for the module of that name whose tensors have rank r."""
        alpha = _match(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(r) if self._rank_stabilised else r)

    def rank(self, module: str) -> int:
        """The rank that the configuration gives a module (the tensors' own rank counts)."""
        return int(_match(self._ranks, module, self._r))


def _match(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's `get_pattern_key`: the value of the first key that, as an expression, matches the end of the name."""
    for key, value in pattern.items():
        if key == module or re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _number(config: Mapping[str, Any], key: str, where: object) -> float:
    value = config.get(key)
    if value is None:  # PEFT's default; 0 is a value
        return 8
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{key}` in {where} must be a number, got {value!r}.")
    return value


def _pattern(config: Mapping[str, Any], key: str, where: object) -> dict[str, float]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"`{key}` in {where} must map module names to numbers, got {pattern!r}.")
    for name, value in pattern.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"`{key}` in {where} must map module names to numbers, got {value!r}.")
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"`{key}` in {where} must have regular keys, got {name!r} ({error}).") from error
    return pattern
