"""The rank and the scaling that a PEFT configuration gives each module: the one place that knows PEFT's rules."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

with warnings.catch_warnings():  # the parser's public name went, its module is still there
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from re import _parser as sre_parse  # type: ignore[attr-defined]
    except ImportError:  # Python 3.10
        import sre_parse

_LARGEST = 1_000_000
_MAX_PATTERN, _MAX_REPEATS = 1000, 4


class Sizes:
    """Ranks and scalings by module name, checked.

    Args:
        config: content of adapter_config.json.
        where: what holds it, for messages.

    Raises:
        ValueError: `r`, `lora_alpha`, `rank_pattern` or `alpha_pattern` of the wrong kind, or a regular expression in
            them that could take for ever.
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
    if not _is_number(value):
        raise ValueError(f"`{key}` in {where} must be a number, got {str(value)[:40]!r}.")
    return value


def _pattern(config: Mapping[str, Any], key: str, where: object) -> dict[str, float]:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"`{key}` in {where} must map module names to numbers, got {str(pattern)[:40]}.")
    for name, value in pattern.items():
        if not _is_number(value):
            raise ValueError(f"`{key}` in {where} must map module names to numbers, got {str(value)[:40]!r}.")
        try:
            costly = len(name) > _MAX_PATTERN or _is_costly(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"`{key}` in {where} must have regular keys, got {name[:80]!r} ({error}).") from error
        if costly:
            raise ValueError(
                f"`{key}` in {where} must have keys that are matched quickly (no repeat within a repeat, at most "
                f"{_MAX_REPEATS} repeats, {_MAX_PATTERN} characters), got {name[:80]!r}; write full module names."
            )
    return pattern


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_costly(expression: str) -> bool:
    """Whether matching may take time exponential, or polynomial of a high degree, in the length of a name."""
    re.compile(expression)
    if re.fullmatch(r"[\w.]*", expression):
        return False
    repeats = list(_repeats(sre_parse.parse(expression)))
    return len(repeats) > _MAX_REPEATS or any(_is_ambiguous(body) for body in repeats)


def _repeats(parsed: Any) -> Iterator[Any]:
    """The bodies of all unbounded repeats in a parsed expression."""
    for operation, argument in parsed:
        if "REPEAT" in str(operation) and int(argument[1]) > 1:
            yield argument[2]
        for inner in _inner(argument):
            yield from _repeats(inner)


def _is_ambiguous(body: Any) -> bool:
    """Whether a repeated body holds alternatives or repeats, so that one text matches in many ways."""
    return any(
        str(operation) == "BRANCH" or "REPEAT" in str(operation) or any(map(_is_ambiguous, _inner(argument)))
        for operation, argument in body
    )


def _inner(argument: Any) -> Iterator[Any]:
    if isinstance(argument, sre_parse.SubPattern):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for one in argument:
            yield from _inner(one)
