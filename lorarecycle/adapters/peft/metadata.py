"""lorarecycle.json beside a PEFT adapter: what PEFT's own configuration has no place for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.processor import Preparation, read_channels, read_processor
from ...runtime.files import read_json
from ...runtime.version import __version__
from ..algebra import Columns
from ..value import AdapterValue

METADATA_FILE = "lorarecycle.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Metadata:
    """Name, input normalisation, class names and the block structure of qkv layers.

    Attributes:
        content: as in the file; {} when there is none.
        path: the file, for messages.
    """

    content: Mapping[str, Any] = field(default_factory=dict)
    path: Path = Path(METADATA_FILE)

    @classmethod
    def read(cls, folder: Path) -> Metadata:
        """Read it from an adapter's folder; an empty one if there is no such file.

        Raises:
            ValueError: damaged, or of a newer format.
        """
        path = folder / METADATA_FILE
        if not path.is_file():
            return cls({}, path)
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
            raise ValueError(f"{path} must be a JSON object with `format_version`, got another; save again.")
        if content["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"`format_version` in {path} must be at most {FORMAT_VERSION}, got "
                f"{content['format_version']}; upgrade lorarecycle."
            )
        for key in ("head", "fused"):
            if not isinstance(content.get(key) or {}, dict):
                raise ValueError(f"`{key}` in {path} must be a JSON object, got {content[key]!r}; save again.")
        return cls(content, path)

    @classmethod
    def of(
        cls,
        adapter: AdapterValue,
        *,
        layout: str,
        columns: Mapping[str, Mapping[str, Columns]],
        head_file: str | None,
        sources: Sequence[AdapterValue],
    ) -> Metadata:
        """The content for an adapter about to be saved."""
        head = adapter.head
        content = {
            "format_version": FORMAT_VERSION,
            "lorarecycle_version": __version__,
            "name": adapter.name,
            "base_model": adapter.base_model,
            "mean": adapter.mean and list(adapter.mean),
            "std": adapter.std and list(adapter.std),
            "resize": adapter.resize,
            "base_class": adapter.base_class,
            "layout": layout,
            "head": head and {"class_names": list(head.class_names), "pool": head.pool, "file": head_file},
            "fused": {module: dict(parts) for module, parts in columns.items()},
            "sources": [{"name": one.name, "digest": one.digest()} for one in sources],
        }
        return cls(content)

    @property
    def name(self) -> str:
        """Name of the adapter; "" when unknown."""
        return str(self.content.get("name") or "")

    @property
    def base_model(self) -> str:
        """Name of the base model; "" when unknown."""
        return str(self.content.get("base_model") or "")

    @property
    def base_class(self) -> str:
        """Class of the model that it was tuned on, with its module; "" when unknown."""
        return str(self.content.get("base_class") or "")

    @property
    def head(self) -> dict[str, Any]:
        """`class_names`, `pool` and `file` of the head; {} without one."""
        return self.content.get("head") or {}

    @property
    def head_file(self) -> str | None:
        """Name of the head's own file, if it has one."""
        name = self.head.get("file")
        return name if isinstance(name, str) and Path(name).name == name else None

    def preparation(self, folder: Path) -> Preparation:
        """How images were prepared: from here, else from a preprocessor_config.json beside it.

        Raises:
            ValueError: numbers that cannot be; the message names the file.
        """
        mean, std, resize = (self.content.get(key) for key in ("mean", "std", "resize"))
        if not mean or not std:
            return read_processor(folder)
        if resize not in (None, "crop", "squash"):
            raise ValueError(f"`resize` in {self.path} must be 'crop' or 'squash', got {resize!r}; save again.")
        return Preparation(read_channels(mean, "mean", self.path), read_channels(std, "std", self.path), resize)

    def columns(self, module: str, parts: Sequence[str]) -> list[Columns] | None:
        """The columns that each part of a qkv module owns; None when that was not written down."""
        found = (self.content.get("fused") or {}).get(module)
        if not isinstance(found, dict):
            return None
        columns: list[Columns] = []
        for part in parts:
            own = found.get(part)
            if own is not None and not (isinstance(own, list) and [type(end) for end in own] == [int, int]):
                return None
            columns.append(None if own is None else (own[0], own[1]))
        return columns
